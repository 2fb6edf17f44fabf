"""Folders that are made once, whole or not at all, however many processes ask for them together."""

import fcntl
import logging
import os
import platform
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from paraxis.base.errors import StorageError

log = logging.getLogger(__name__)


def made_once(cache: Path, name: str, make: Callable[[Path], None], *, lock: str = "") -> Path:
    """The folder `cache/name`, made by calling `make` on a temporary folder if it is not there yet.

    Whoever makes it holds a lock of the same name, or the `lock` given, which several folders may share.

    One process makes it while others, also on other hosts that share the file system's locks, wait. It appears only when
    complete and on disk. Raises StorageError where it cannot be written; what `make` raises passes through, leaving nothing.
    """
    folder = cache / name
    if folder.is_dir():
        return folder
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with _locked(cache / f"{lock or name}.lock", log.debug if lock else log.info):
            if not folder.is_dir():
                _make(folder, make)
    except OSError as error:
        raise StorageError(
            f"cannot write the data cache {cache}: {error}; free space, or choose another folder with PARAXIS_CACHE"
        ) from error
    return folder


def _make(folder: Path, make: Callable[[Path], None]) -> None:
    # The host is in the name for file systems whose locks hold on one host only: two hosts may then both do the work, but
    # neither writes into the other's. Whatever a killed process left is removed: only the lock's holder comes here.
    partial = folder.with_name(f"{folder.name}.partial-{platform.node()}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        make(partial)
        for file in partial.iterdir():
            _sync(file)
        _sync(partial)
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():  # else another host was first, with the same content
                raise
        _sync(folder.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def _locked(path: Path, say: Callable[..., None]) -> Iterator[None]:
    """Holds the file lock at `path`. The file stays: removing it would let two processes lock two files of one name."""
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("waiting for another process that is making %s", path.with_suffix(""))
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def drop(folder: Path) -> None:
    """Removes a folder at once for whoever looks for it, and then what is in it."""
    trash = folder.with_name(f"{folder.name}.dropped-{platform.node()}-{os.getpid()}")
    try:
        folder.rename(trash)
    except FileNotFoundError:  # somebody else has
        return
    shutil.rmtree(trash, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
