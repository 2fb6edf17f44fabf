"""Objects below one URL, through fsspec: whole or absent, by key, with faults that may pass tried again and final ones said at once."""

import errno
import logging
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from typing import Any, TypeVar

from fsspec.core import url_to_fs
from fsspec.registry import known_implementations

from paraxis.base.config import redact
from paraxis.base.errors import ConfigError, ParaxisError, StorageError
from paraxis.checkpoint.manifest import StoredFile
from paraxis.checkpoint.place import Url
from paraxis.checkpoint.tensor_file import Sink

ATTEMPTS = 5
FIRST_WAIT_S = 0.5  # doubled after each attempt; the libraries below have tried several times themselves by then
PART_BYTES = 16 * 2**20  # of an upload in parts: stores allow some 10,000 of them, and nothing smaller than 5 MiB

_FINAL = (PermissionError, FileNotFoundError, IsADirectoryError, NotADirectoryError, ValueError, NotImplementedError, ImportError)
_FINAL_NUMBERS = (errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.ENAMETOOLONG)
_MISTAKES = (TypeError, AttributeError, AssertionError, LookupError, RecursionError, MemoryError)  # in code, not in a store

_dice = random.Random()
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Refused(StorageError, OSError):
    """What a store will not do however often it is asked."""


class Unreachable(StorageError, OSError):
    """A store that did not answer, broke off, or was too busy."""


class Objects:
    """The objects below `url`, by their keys relative to it.

    Every method but `stream` is tried up to ATTEMPTS times where a fault may pass. They raise Unreachable after that, and Refused.
    """

    def __init__(self, url: Url) -> None:
        self.url = url
        try:
            self._fs, root = url_to_fs(str(url))
        except ImportError as error:
            raise ConfigError(_lacking(url, error)) from error
        except ValueError as error:
            raise ConfigError(f"{url} cannot be opened: {error}; give a path, or a URL such as s3://bucket/runs/demo") from error
        except Exception as error:  # such as credentials that cannot be found
            raise Refused(f"{url} cannot be opened: {_said(error)}") from error
        self._root = root.rstrip("/")

    def read(self, key: str, start: int, length: int) -> bytes:
        """`length` bytes of an object from `start` on, or less where it ends before. Raises FileNotFoundError."""

        def once() -> bytes:
            data = self._fs.cat_file(self._key(key), start=start, end=start + length) if length else b""
            if len(data) < length and ((size := self._size(key)) is None or len(data) < min(size - start, length)):
                raise ConnectionError(f"{len(data)} of {length} bytes came")
            return data

        return self._patiently(f"reading {self.url / key}", once)

    def size(self, key: str) -> int | None:
        """An object's length in bytes, by its key rather than from a listing; None where there is none."""
        return self._patiently(f"looking for {self.url / key}", lambda: self._size(key))

    def modified_s(self, key: str) -> float | None:
        """When an object was put, in seconds since 1970; None where the store does not say."""

        def once() -> float | None:
            with suppress(NotImplementedError, FileNotFoundError, TypeError, KeyError):
                when = self._fs.modified(self._key(key))
                return when.timestamp() if isinstance(when, datetime) else None
            return None

        return self._patiently(f"looking for {self.url / key}", once)

    def children(self) -> list[str]:
        """The first parts of all listed keys, each once."""

        def once() -> list[str]:
            self._fs.invalidate_cache()
            try:
                return sorted({entry["name"].rstrip("/").rpartition("/")[2] for entry in self._fs.ls(self._root, detail=True)})
            except FileNotFoundError:
                return []

        return self._patiently(f"listing {self.url}", once)

    def find(self, prefix: str) -> dict[str, int]:
        """The listed objects below `prefix`, by key relative to it, with their lengths in bytes."""

        def once() -> dict[str, int]:
            self._fs.invalidate_cache()
            below = self._key(prefix)
            try:
                found: dict[str, Any] = self._fs.find(below, detail=True)  # type: ignore[assignment]
            except FileNotFoundError:
                return {}
            return {key[len(below) :].lstrip("/"): int(entry["size"] or 0) for key, entry in found.items() if entry["type"] == "file"}

        return self._patiently(f"listing {self.url / prefix}", once)

    def put(self, key: str, data: bytes) -> None:
        """Makes or replaces an object, in one piece."""
        self._patiently(f"writing {self.url / key}", lambda: self._fs.pipe_file(self._key(key), data), no_place=True)

    def create(self, key: str, data: bytes) -> None:
        """Makes an object that must not exist. Raises FileExistsError where another has made it, if the store can tell."""

        def once() -> None:
            # An attempt that seemed to fail may have come through, so what is there may be ours.
            if self._size(key) is None:
                try:
                    self._fs.pipe_file(self._key(key), data, mode="create")
                    return
                except FileExistsError:
                    pass
            if self._fs.cat_file(self._key(key)) != data:
                raise FileExistsError(f"{self.url / key} is there already")

        self._patiently(f"writing {self.url / key}", once, no_place=True)

    def stream(self, key: str, put: Callable[[Sink], StoredFile]) -> StoredFile:
        """Makes an object of what `put` writes. Where a fault may pass, `put` is called anew, with nothing left of the time before."""
        what = f"writing {self.url / key}"
        return self._patiently(what, lambda: put(_Upload(self._fs, self._key(key), what)), no_place=True, translate=False)

    def remove(self, keys: Sequence[str]) -> None:
        """Deletes objects; those that are not there are none to delete."""

        def once() -> None:
            self._fs.invalidate_cache()
            try:
                self._fs.rm([self._key(key) for key in keys])
            except FileNotFoundError:
                for key in keys:
                    with suppress(FileNotFoundError):
                        self._fs.rm_file(self._key(key))

        if keys:
            self._patiently(f"deleting {self.url / keys[0]}", once)

    def _key(self, key: str) -> str:
        return f"{self._root}/{key}" if key else self._root

    def _size(self, key: str) -> int | None:
        self._fs.invalidate_cache()
        try:
            found = self._fs.info(self._key(key))
        except FileNotFoundError:
            return None
        return int(found["size"] or 0) if found["type"] == "file" else None

    def _patiently(self, what: str, action: Callable[[], T], *, no_place: bool = False, translate: bool = True) -> T:
        """What `action` returns, tried again where a fault may pass. With `no_place`, FileNotFoundError is final: there is no bucket."""
        for attempt in range(1, ATTEMPTS + 1):
            try:
                with _told_apart(what) if translate else nullcontext():
                    return action()
            except FileNotFoundError as error:
                if no_place:
                    raise Refused(f"{what}: there is no such bucket or container") from error
                raise
            except Unreachable as error:
                if attempt == ATTEMPTS:
                    raise Unreachable(f"{error} (tried {ATTEMPTS} times)") from error
                wait_s = FIRST_WAIT_S * 2 ** (attempt - 1) * _dice.uniform(0.5, 1.5)  # many ranks should not all come back at once
                _log.warning("%s; trying again in %.1f s (%d of %d)", error, wait_s, attempt + 1, ATTEMPTS)
                time.sleep(wait_s)
        raise AssertionError(what)


class _Upload:
    """The `Sink` that is one object: it appears when `close` returns, and not at all after `discard`."""

    def __init__(self, fs: Any, key: str, what: str) -> None:
        self._what = what
        with _told_apart(what):
            self._file = fs.open(key, "wb", block_size=PART_BYTES)

    def write(self, data: memoryview) -> None:
        with _told_apart(self._what):
            for start in range(0, len(data), PART_BYTES):  # what a file is given at once it sends as one part
                self._file.write(data[start : start + PART_BYTES])

    def close(self) -> None:
        try:
            with _told_apart(self._what):
                self._file.close()
        except BaseException:
            self.discard()
            raise

    def discard(self) -> None:
        with suppress(Exception):
            self._file.discard()  # the parts that a store has so far
        with suppress(Exception):
            self._file.closed = True  # else its end would upload what there is


@contextmanager
def _told_apart(what: str) -> Iterator[None]:
    """Turns what file systems raise into Refused and Unreachable; FileNotFoundError and FileExistsError go through."""
    try:
        yield
    except (FileNotFoundError, FileExistsError, ParaxisError, *_MISTAKES):
        raise
    except Exception as error:  # their libraries have types of their own for what a network does
        # By name: botocore and google.auth have one each, and neither need be installed.
        final = isinstance(error, _FINAL) or getattr(error, "errno", None) in _FINAL_NUMBERS or "Credential" in type(error).__name__
        raise (Refused if final else Unreachable)(f"{what}: {_said(error)}") from error


def _said(error: Exception) -> str:
    """`error` in words; libraries quote the URLs they asked, signatures included."""
    return f"{type(error).__name__}: {redact('', str(error))}" if str(error) else type(error).__name__


def _lacking(url: Url, error: ImportError) -> str:
    scheme = url.text.partition("://")[0]
    package = known_implementations.get(scheme, {}).get("class", "fsspec.").partition(".")[0]
    remedy = f"pip install {package}" if package != "fsspec" else str(error)
    return f"{url} needs a package that is not installed: {remedy}"
