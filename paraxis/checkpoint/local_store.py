"""A folder that holds checkpoints: how they are named while they come and go, and operations that outlive a power cut.

    step-12/               complete: it was given this name only after everything in it was on the disk
    step-12.save-7/        the same, copied here from an object store
    step-12.tmp-7/         being written by save number 7 (its generation), or left by one that died
    step-12.replaced-7/    complete; save 7 is about to put its own step-12 in this place
    step-3.pruned/         no longer wanted, being deleted
    latest                 the name of the newest complete one, for people and scripts; loading does not rely on it

The folder may be shared by several hosts, if what one has written and closed is then seen by all.
"""

import os
import re
import shutil
import stat
from collections.abc import Callable
from math import inf
from pathlib import Path, PurePosixPath

from paraxis.base.errors import CheckpointError
from paraxis.checkpoint.manifest import MANIFEST, StoredFile
from paraxis.checkpoint.place import LATEST, Draft
from paraxis.checkpoint.tensor_file import DiskFile, Sink, write_file

_COMPLETE = re.compile(r"step-\d+(\.replaced-\d+|\.save-\d+)?")
_PASSING = re.compile(r"(?P<base>step-\d+)\.(?P<what>tmp|replaced)-(?P<generation>\d+)")
_PRUNED = ".pruned"
_LONGEST_NAME = 255  # characters, of a file system


class LocalStore:
    """The `Store` that is the folder `place`."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def files(self, name: str) -> "LocalFiles":
        return LocalFiles(self.place / name)

    def complete(self) -> list[str]:
        return [name for name in self._folders() if _COMPLETE.fullmatch(name)]

    def unfinished(self) -> list[str]:
        return [name for name in self._folders() if (match := _PASSING.fullmatch(name)) and match["what"] == "tmp"]

    def is_empty(self) -> bool:
        return not self.place.exists() or (self.place.is_dir() and not any(self.place.iterdir()))

    def sweep(self, upto: float = inf) -> list[int]:
        found = []
        for name in self._folders():
            if name.endswith(_PRUNED):
                shutil.rmtree(self.place / name)
        for name in self._folders():
            if match := _PASSING.fullmatch(name):
                found.append(int(match["generation"]))
                if found[-1] > upto:
                    continue
                if match["what"] == "replaced" and not (self.place / match["base"]).exists():
                    os.rename(self.place / name, self.place / match["base"])  # its replacement never came
                else:
                    self.remove(name)
        return found

    def begin(self, step: int, generation: int) -> Draft:
        self.place.mkdir(parents=True, exist_ok=True)
        draft = Draft(f"step-{step}.tmp-{generation}", f"step-{step}", generation)
        (self.place / draft.name).mkdir()
        return draft

    def write(self, name: str, put: Callable[[Sink], StoredFile]) -> StoredFile:
        # Not the draft itself: where a newer save has swept it away, this one has to fail.
        for parent in reversed(PurePosixPath(name).parents[:-2]):
            (self.place / parent).mkdir(exist_ok=True)
        return put(DiskFile(self.place / name))

    def commit(self, draft: Draft, manifest: bytes) -> None:
        folder, final = self.place / draft.name, self.place / draft.final
        write_file(folder / MANIFEST, manifest)
        sync_tree(folder)
        if final.exists():
            os.rename(final, final.with_name(f"{final.name}.replaced-{draft.generation}"))
        os.rename(folder, final)
        sync_folder(self.place)

    def discard(self, draft: Draft) -> None:
        shutil.rmtree(self.place / draft.name, ignore_errors=True)

    def announce(self, name: str) -> None:
        draft = self.place / f".{LATEST}.tmp"
        with open(draft, "w") as file:
            file.write(name + "\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(draft, self.place / LATEST)
        sync_folder(self.place)

    def latest(self) -> str:
        try:
            with open(self.place / LATEST, errors="replace") as file:
                return file.read(_LONGEST_NAME).strip()
        except OSError:
            return ""

    def remove(self, name: str) -> None:
        doomed = self.place / (name + _PRUNED)
        os.rename(self.place / name, doomed)
        shutil.rmtree(doomed)

    def _folders(self) -> list[str]:
        try:
            return [path.name for path in self.place.iterdir() if path.is_dir()] if self.place.is_dir() else []
        except OSError as error:
            raise CheckpointError(f"{self.place} cannot be listed: {error.strerror}; see that it is readable") from error


class LocalFiles:
    """The `Files` of the checkpoint in the folder `path`."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def has(self, name: str) -> bool:
        return (self.path / name).is_file()

    def size(self, name: str) -> int:
        path = self.path / name
        if os.path.realpath(path) != os.path.join(os.path.realpath(self.path), name):
            raise CheckpointError(f"{path} is a link; a checkpoint holds its own files. Copy the file there to keep it")
        try:
            found = path.stat()
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if not stat.S_ISREG(found.st_mode):
            raise CheckpointError(f"{path} is not a plain file")
        return found.st_size

    def read_range(self, name: str, start: int, length: int) -> bytes:
        path = self.path / name
        try:
            with open(path, "rb", buffering=0) as file:
                file.seek(start)
                data = b"".join(iter(lambda: file.read(length - file.tell() + start), b""))
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
        if len(data) != length:
            raise CheckpointError(f"{path} ends at byte {start + len(data)}, but {start + length} were expected; it was truncated")
        return data

    def listing(self) -> dict[str, int]:
        found: dict[str, int] = {}
        try:
            for where, folders, files in os.walk(self.path):
                links = [name for name in folders if os.path.islink(os.path.join(where, name))]
                for path in (os.path.join(where, name) for name in files + links):
                    found[os.path.relpath(path, self.path)] = os.lstat(path).st_size
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}; if a run is at work there, try again") from error
        return found

    def saved_s(self) -> float | None:
        manifest = self.path / MANIFEST  # written last
        try:
            return (manifest if manifest.is_file() else self.path).stat().st_mtime
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error.strerror}; if a run is at work there, try again") from error


def looks_like_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder with the name of a complete checkpoint; what is in it may be damaged."""
    return path.is_dir() and _COMPLETE.fullmatch(path.absolute().name) is not None


def sync_folder(folder: Path) -> None:
    """Makes the names inside `folder` durable (its files' contents are made so when they are closed). Raises OSError."""
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """`sync_folder` of `folder` and of every folder inside it. Raises OSError."""
    for path, _, _ in os.walk(folder):
        sync_folder(Path(path))
