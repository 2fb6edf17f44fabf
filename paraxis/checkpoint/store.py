"""What saving, loading and pruning need of the place that holds a run's checkpoints: a local folder or an object store.

Names are relative: a checkpoint is called `step-12` or so, and a file in it `step-12/manifest.json`.
"""

from collections.abc import Callable
from math import inf
from typing import Protocol

from paraxis.checkpoint.local_store import LocalFiles, LocalStore
from paraxis.checkpoint.manifest import StoredFile
from paraxis.checkpoint.object_store import ObjectFiles, ObjectStore
from paraxis.checkpoint.place import Draft, Location, Url, location
from paraxis.checkpoint.tensor_file import Sink


class Files(Protocol):
    """What is in one checkpoint, by name relative to it.

    All raise CheckpointError for what is missing or not a file of its own, StorageError where the store does not answer.
    """

    @property
    def path(self) -> Location: ...

    def has(self, name: str) -> bool:
        """Whether there is such a file."""
        ...

    def size(self, name: str) -> int:
        """The length in bytes."""
        ...

    def read_range(self, name: str, start: int, length: int) -> bytes:
        """`length` bytes from `start` on."""
        ...

    def listing(self) -> dict[str, int]:
        """Everything that can be listed, with its length in bytes; a link counts as itself."""
        ...

    def saved_s(self) -> float | None:
        """When the manifest was written, or else when the last change was, in seconds since 1970; None where nobody knows."""
        ...


class Store(Protocol):
    """A place that holds checkpoints. Made by `open_store` from its `place` alone, so any process can open the same one.

    What changes it raises OSError (StorageError among them) and is called by one process, save `write`.
    """

    @property
    def place(self) -> Location: ...

    def files(self, name: str) -> Files:
        """What is in the checkpoint `name`."""
        ...

    def complete(self) -> list[str]:
        """The checkpoints that have been committed, in no order; none where there is no such place."""
        ...

    def unfinished(self) -> list[str]:
        """Those that are being written, or were when their save died."""
        ...

    def is_empty(self) -> bool:
        """Whether nothing at all is there."""
        ...

    def sweep(self, upto: float = inf) -> list[int]:
        """Clears away what other saves up to this generation have left; one that is still at it cannot commit any more.

        Returns the generations of all that are known to have begun.
        """
        ...

    def begin(self, step: int, generation: int) -> Draft:
        """Begins the save of `step`, as of this generation or a later one that nobody has taken."""
        ...

    def write(self, name: str, put: Callable[[Sink], StoredFile]) -> StoredFile:
        """Makes the file `name`, of which `put` writes the bytes; durable on return. `put` may be called again after a passing fault."""
        ...

    def commit(self, draft: Draft, manifest: bytes) -> None:
        """Adds the manifest and makes all of the draft visible at once. Raises where a newer save has begun."""
        ...

    def discard(self, draft: Draft) -> None:
        """Deletes a draft as far as that is possible; raises nothing."""
        ...

    def announce(self, name: str) -> None:
        """Points `latest` at the checkpoint `name`, in one step."""
        ...

    def latest(self) -> str:
        """The name that `latest` holds; empty where there is none that can be read."""
        ...

    def remove(self, name: str) -> None:
        """Deletes the checkpoint `name`; it stops being one before the first of its files goes."""
        ...


def open_store(place: str | Location) -> Store:
    """The store at `place`, which need not exist yet. Raises ConfigError for a URL that no installed package opens."""
    where = location(place)
    return ObjectStore(where) if isinstance(where, Url) else LocalStore(where)


def open_files(path: str | Location) -> Files:
    """What is in the checkpoint at `path`. Raises as `open_store`."""
    where = location(path)
    return ObjectFiles(where) if isinstance(where, Url) else LocalFiles(where)


def complete_folders(place: str | Location) -> list[Location]:
    """The checkpoints at `place` that have been committed, in no order; none where there is no such place."""
    store = open_store(place)
    return [store.place / name for name in store.complete()]
