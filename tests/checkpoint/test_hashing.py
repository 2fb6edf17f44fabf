"""Chunks hashed in threads have the hashes of the same chunks hashed one after another, however the stream arrives."""

import hashlib
import random

import pytest

from paraxis.checkpoint import hashing
from paraxis.checkpoint.hashing import ChunkHasher

CHUNK = 1000


@pytest.mark.parametrize("size", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1, 40 * CHUNK, 41 * CHUNK + 7])
@pytest.mark.parametrize("longest", [1, 10 * CHUNK, 50 * CHUNK])
def test_hashes_do_not_depend_on_how_the_stream_is_cut(size: int, longest: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hashing, "CHUNK_BYTES", CHUNK)
    dice = random.Random(size)
    data = dice.randbytes(size)
    hasher, at = ChunkHasher(), 0
    while at < size:
        length = dice.randint(1, longest)
        hasher.add(memoryview(data)[at : at + length])
        at += length
    assert hasher.chunks() == tuple(hashlib.sha256(data[begin : begin + CHUNK]).hexdigest() for begin in range(0, size, CHUNK))
