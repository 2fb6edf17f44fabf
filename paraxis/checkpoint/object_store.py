"""An object store that holds checkpoints. Nothing can be renamed there, and a listing may be late.

    step-12.save-7/...            save number 7 (its generation), under a prefix of its own
    step-12.save-7/manifest.json  put last and in one piece: with it the save is a checkpoint, without it nothing
    generation-7                  who has taken number 7, and for which save; made before anything else of it, by one writer alone
    latest                        the name of the newest complete one; newer ones are found by their numbers

What was written last is found by key: `latest`, the numbers after it, and the manifests. So it does not matter that a listing
lacks it, and what no listing and no key shows is not deleted. A writer whose number is not the last any more cannot commit. What is
left of a dead save gets a manifest that is none before it is deleted: where the store makes an object for one alone, its writer
cannot commit after all.
"""

import logging
import re
from collections.abc import Callable
from itertools import count
from math import inf
from uuid import uuid4

from paraxis.base.errors import CheckpointError, StorageError
from paraxis.checkpoint.manifest import MANIFEST, StoredFile
from paraxis.checkpoint.objects import Objects
from paraxis.checkpoint.place import LATEST, Draft, Url
from paraxis.checkpoint.tensor_file import Sink

VOID = b"void"  # the manifest of a save that must not be completed

_NAME = re.compile(r"step-\d+(\.save-(?P<generation>\d+))?")  # without a number: copied here from a local folder
_NUMBER = re.compile(r"generation-(\d+)")
_SHORT = 512  # bytes, more than any name

_log = logging.getLogger(__name__)


class ObjectStore:
    """The `Store` that is the URL `place`."""

    def __init__(self, place: Url) -> None:
        self.place = place
        self._objects = Objects(place)

    def files(self, name: str) -> "ObjectFiles":
        return ObjectFiles(self.place / name)

    def complete(self) -> list[str]:
        return [name for name in self._seen()[0] if self._manifest_bytes(name) not in (None, len(VOID))]

    def unfinished(self) -> list[str]:
        return [name for name in self._seen()[0] if self._manifest_bytes(name) is None]

    def is_empty(self) -> bool:
        return not self._objects.children() and not self.latest()

    def sweep(self, upto: float = inf) -> list[int]:
        names, numbers = self._seen()
        newest = _generation(self.latest())
        for name in names:
            size = self._manifest_bytes(name)
            if size not in (None, len(VOID)) or not 0 < _generation(name) <= upto:
                continue
            try:
                self._objects.create(f"{name}/{MANIFEST}", VOID)
            except FileExistsError:
                continue  # it was committed just now
            self._objects.remove([f"{name}/{key}" for key in self._objects.find(name) if key != MANIFEST])
            if _generation(name) < newest:  # its writer is refused without it
                self._objects.remove([f"{name}/{MANIFEST}"])
        return sorted(numbers)

    def begin(self, step: int, generation: int) -> Draft:
        for number in count(max([generation - 1, *self._seen()[1]]) + 1):
            draft = Draft(f"step-{step}.save-{number}", f"step-{step}.save-{number}", number, uuid4().hex)
            try:
                self._objects.create(f"generation-{number}", _claim(draft))
                return draft
            except FileExistsError:
                continue
        raise AssertionError

    def write(self, name: str, put: Callable[[Sink], StoredFile]) -> StoredFile:
        return self._objects.stream(name, put)

    def commit(self, draft: Draft, manifest: bytes) -> None:
        overtaken = (
            f"{self.place}: a newer save than number {draft.generation} has begun, so this one cannot be completed; "
            "see that only one run saves there"
        )
        if not self._is_last(draft):
            raise StorageError(overtaken)
        try:
            self._objects.create(f"{draft.name}/{MANIFEST}", manifest)
        except FileExistsError as error:
            raise StorageError(overtaken) from error

    def discard(self, draft: Draft) -> None:
        try:
            if self._holder(draft.generation) == _claim(draft):
                self.remove(draft.name)
        except OSError as error:
            _log.warning("what is left of %s could not be deleted, the next save will: %s", self.place / draft.name, error)

    def announce(self, name: str) -> None:
        newest = _generation(name)
        if newest < _generation(self.latest()):
            return
        self._objects.put(LATEST, f"{name}\n".encode())
        listed = [int(match[1]) for child in self._objects.children() if (match := _NUMBER.fullmatch(child))]
        self._objects.remove([f"generation-{number}" for number in listed if number < newest])

    def latest(self) -> str:
        try:
            name = self._objects.read(LATEST, 0, _SHORT).decode(errors="replace").strip()
        except FileNotFoundError:
            return ""
        return name if _NAME.fullmatch(name) else ""

    def remove(self, name: str) -> None:
        self._objects.remove([f"{name}/{MANIFEST}"])
        self._objects.remove([f"{name}/{key}" for key in self._objects.find(name)])

    def _seen(self) -> tuple[list[str], set[int]]:
        """The saves that are listed, or found by key from the newest on, and the numbers that were taken."""
        listed = self._objects.children()
        names = {name for name in listed if _NAME.fullmatch(name)}
        numbers = {int(match[1]) for child in listed if (match := _NUMBER.fullmatch(child))}
        if latest := self.latest():
            names.add(latest)
        numbers |= {_generation(name) for name in names} - {0}
        for number in count(_generation(latest) or min(numbers, default=1)):
            if holder := self._holder(number):
                name = holder.decode(errors="replace").partition(" ")[0]
                names |= {name} if _NAME.fullmatch(name) and _generation(name) == number else set()
                numbers.add(number)
            elif number > max(numbers, default=0):
                return sorted(names), numbers
        raise AssertionError

    def _manifest_bytes(self, name: str) -> int | None:
        return self._objects.size(f"{name}/{MANIFEST}")

    def _holder(self, number: int) -> bytes:
        """What the save that took `number` has written there; empty where nobody has."""
        try:
            return self._objects.read(f"generation-{number}", 0, _SHORT)
        except FileNotFoundError:
            return b""

    def _is_last(self, draft: Draft) -> bool:
        ours = self._holder(draft.generation) == _claim(draft)
        return ours and not self._holder(draft.generation + 1) and _generation(self.latest()) < draft.generation


class ObjectFiles:
    """The `Files` of the checkpoint below the URL `path`. They do not change once they are there, so one listing serves all sizes."""

    def __init__(self, path: Url) -> None:
        self.path = path
        self._objects = Objects(path)
        self._sizes: dict[str, int] | None = None

    def has(self, name: str) -> bool:
        return self._objects.size(name) not in (None, len(VOID))

    def size(self, name: str) -> int:
        size = self.listing().get(name)
        if size is None and (size := self._objects.size(name)) is None:
            raise CheckpointError(f"{self.path / name} cannot be read: there is no such object")
        return size

    def read_range(self, name: str, start: int, length: int) -> bytes:
        try:
            data = self._objects.read(name, start, length)
        except FileNotFoundError as error:
            raise CheckpointError(f"{self.path / name} cannot be read: there is no such object") from error
        if len(data) != length:
            raise CheckpointError(
                f"{self.path / name} ends at byte {start + len(data)}, but {start + length} were expected; it was truncated"
            )
        return data

    def listing(self) -> dict[str, int]:
        if self._sizes is None:
            self._sizes = self._objects.find("")
        return self._sizes

    def saved_s(self) -> float | None:
        return self._objects.modified_s(MANIFEST)


def _claim(draft: Draft) -> bytes:
    return f"{draft.final} {draft.owner}\n".encode()


def _generation(name: str) -> int:
    """The number in the name of a save; 0 where it has none."""
    match = _NAME.fullmatch(name)
    return int(match["generation"] or 0) if match else 0
