"""The folder that holds a run's checkpoints: how they are named while they come and go, and operations that outlive a power cut.

    step-12/               complete: it was given this name only after everything in it was on the disk
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
from pathlib import Path

from paraxis.base.errors import CheckpointError

LATEST = "latest"

_COMPLETE = re.compile(r"step-\d+(\.replaced-\d+)?")
_PASSING = re.compile(r"(?P<base>step-\d+)\.(?P<what>tmp|replaced)-(?P<generation>\d+)")
_STEP = re.compile(r"step-(\d+)")
_PRUNED = ".pruned"
_LONGEST_NAME = 255  # characters, of a file system


def complete_folders(folder: Path) -> list[Path]:
    """The checkpoints of `folder` that have been committed, in no order; none where there is no folder."""
    return [path for path in _folders(folder) if _COMPLETE.fullmatch(path.name)]


def draft_folders(folder: Path) -> list[Path]:
    """The checkpoints that are being written in `folder`, or were when their save died."""
    return [path for path in _folders(folder) if (match := _PASSING.fullmatch(path.name)) and match["what"] == "tmp"]


def step_in_name(name: str) -> int:
    """The step of the checkpoint whose folder is called `name`."""
    match = _STEP.match(name)
    assert match is not None, name
    return int(match[1])


def looks_like_checkpoint(path: Path) -> bool:
    """Whether `path` is a folder with the name of a complete checkpoint; what is in it may be damaged."""
    return path.is_dir() and _COMPLETE.fullmatch(path.absolute().name) is not None


def passing_generations(folder: Path) -> list[int]:
    """The generations of saves that are at work in `folder`, or died there."""
    return [int(match["generation"]) for path in _folders(folder) if (match := _PASSING.fullmatch(path.name))]


def sweep(folder: Path) -> None:
    """Clears away what other saves have left. One that is still at it loses its draft, so it cannot commit. Raises OSError."""
    for path in _folders(folder):
        if path.name.endswith(_PRUNED):
            shutil.rmtree(path)
    for path in _folders(folder):
        if match := _PASSING.fullmatch(path.name):
            if match["what"] == "replaced" and not (folder / match["base"]).exists():
                os.rename(path, folder / match["base"])  # its replacement never came
            else:
                remove(path)


def remove(path: Path) -> None:
    """Deletes the folder of a checkpoint; it stops being one before the first of its files goes. Raises OSError."""
    doomed = path.with_name(path.name + _PRUNED)
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def write_latest(folder: Path, name: str) -> None:
    """Points `latest` at the checkpoint called `name`, in one step. Raises OSError."""
    draft = folder / f".{LATEST}.tmp"
    with open(draft, "w") as file:
        file.write(name + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(draft, folder / LATEST)
    sync_folder(folder)


def read_latest(folder: Path) -> str:
    """The name that `latest` in `folder` holds; empty where there is none that can be read."""
    try:
        with open(folder / LATEST, errors="replace") as file:
            return file.read(_LONGEST_NAME).strip()
    except OSError:
        return ""


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


def size_of(path: Path, within: Path) -> int:
    """The length in bytes of the plain file `path`. Raises CheckpointError for a link on the way from `within`, or anything else."""
    if os.path.realpath(path) != os.path.join(os.path.realpath(within), path.relative_to(within)):
        raise CheckpointError(f"{path} is a link; a checkpoint holds its own files. Copy the file there to keep it")
    try:
        found = path.stat()
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"{path} is not a plain file")
    return found.st_size


def read_range(path: Path, start: int, length: int) -> bytes:
    """`length` bytes of `path` from `start` on. Raises CheckpointError where they cannot be read."""
    try:
        with open(path, "rb", buffering=0) as file:
            file.seek(start)
            data = b"".join(iter(lambda: file.read(length - file.tell() + start), b""))
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}") from error
    if len(data) != length:
        raise CheckpointError(f"{path} ends at byte {start + len(data)}, but {start + length} were expected; it was truncated")
    return data


def _folders(folder: Path) -> list[Path]:
    try:
        return [path for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    except OSError as error:
        raise CheckpointError(f"{folder} cannot be listed: {error.strerror}; see that it is readable") from error
