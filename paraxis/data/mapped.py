"""Arrays in files, mapped: what is read of one is compared with the SHA-256 of its part first, once in each process.

Beside `tokens-00000.bin` stands `tokens-00000.sha256`: 32 bytes for each PART_BYTES of it. Reading a row costs the hashing of a part or
two the first time, about a tenth of a millisecond, and no more than reading all of the file in the end.
"""

import hashlib
from pathlib import Path

import numpy as np

from paraxis.base.errors import DataError

PART_BYTES = 1 << 16  # what has to be read to trust any of it
_DIGEST_BYTES = 32


def hash_parts(path: Path) -> None:
    """Writes the hashes of the file `path` beside it. Raises OSError."""
    with path.open("rb") as file, _beside(path).open("wb") as hashes:
        while part := file.read(PART_BYTES):
            hashes.write(hashlib.sha256(part).digest())


def files_of(path: Path) -> tuple[Path, Path]:
    """The two files of an array: itself, and its hashes."""
    return path, _beside(path)


class Mapped:
    """`count` entries of `dtype` in the file `path`. Raises DataError where it, or its hashes, are missing or of another length."""

    def __init__(self, path: Path, dtype: np.dtype, count: int) -> None:
        self._path, self._entries = path, PART_BYTES // dtype.itemsize
        self._data = _map(path, dtype, count)
        self._hashes = _map(_beside(path), np.dtype(np.uint8), -(-count // self._entries) * _DIGEST_BYTES).reshape(-1, _DIGEST_BYTES)
        self._trusted = np.zeros(len(self._hashes), bool)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Entries `start` to `stop`. Raises DataError, with the file's name, where they are not those that were written."""
        parts = slice(start // self._entries, -(-stop // self._entries))
        if not self._trusted[parts].all():
            self._compare(parts)
        return self._data[start:stop]

    def __len__(self) -> int:
        return len(self._data)

    def __getitem__(self, entries: slice) -> np.ndarray:
        """Entries that follow one another, as `read` gives them."""
        start, stop, step = entries.indices(len(self))
        assert step == 1
        return self.read(start, max(start, stop))

    def _compare(self, parts: slice) -> None:
        for part in range(parts.start, min(parts.stop, len(self._trusted))):
            data = self._data[part * self._entries : (part + 1) * self._entries]
            if hashlib.sha256(data.tobytes()).digest() != self._hashes[part].tobytes():
                raise DataError(
                    f"the data are damaged: bytes {part * PART_BYTES} to {part * PART_BYTES + data.nbytes} of {self._path} do not match "
                    f"their SHA-256; delete the folder {self._path.parent} and make it again"
                )
            self._trusted[part] = True


def _beside(path: Path) -> Path:
    return path.with_suffix(".sha256")


def _map(path: Path, dtype: np.dtype, count: int) -> np.ndarray:
    if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
        raise DataError(
            f"the data are damaged: {path} is missing or not {count * dtype.itemsize} bytes; "
            f"delete the folder {path.parent} and make it again"
        )
    return np.memmap(path, dtype, mode="r") if count else np.empty(0, dtype)
