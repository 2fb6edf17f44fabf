"""SHA-256 of each chunk of a stream of bytes, in threads, while the same bytes are on their way to the disk."""

import hashlib
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from paraxis.base.env import cores
from paraxis.checkpoint.manifest import CHUNK_BYTES

THREADS = 4  # one hashes a gigabyte a second or two: with these, few disks have to wait


class ChunkHasher:
    """Takes a stream part by part; `chunks` then has the hash of each CHUNK_BYTES of it. hashlib lets other threads run meanwhile."""

    def __init__(self) -> None:
        self._threads = min(THREADS, cores())
        self._pool = ThreadPoolExecutor(self._threads)
        self._hashes: list[Future[str]] = []
        self._open: list[memoryview] = []  # of the chunk that is not full yet
        self._room = CHUNK_BYTES

    def add(self, data: memoryview) -> None:
        """Takes the next bytes of the stream. They are read later: they must not change before `chunks` has returned."""
        while data:
            part, data = data[: self._room], data[self._room :]
            self._open.append(part)
            self._room -= len(part)
            if not self._room:
                self._submit()

    def chunks(self) -> tuple[str, ...]:
        """The hashes of all chunks in hex, the last one perhaps of a shorter chunk; nothing can be added any more."""
        last = (_sha256(self._open),) if self._open else ()
        hashes = tuple(future.result() for future in self._hashes)
        self.close()
        return hashes + last

    def close(self) -> None:
        """Ends the threads."""
        self._pool.shutdown(cancel_futures=True)

    def _submit(self) -> None:
        # What waits to be hashed stays in memory, which is not to fill up where the disk is the faster of the two.
        if len(self._hashes) >= 2 * self._threads:
            self._hashes[-2 * self._threads].result()
        self._hashes.append(self._pool.submit(_sha256, self._open))
        self._open, self._room = [], CHUNK_BYTES


def _sha256(parts: Sequence[memoryview]) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()
