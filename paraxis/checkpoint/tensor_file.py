"""Safetensors files, written as a stream: the header, then one tensor after another, hashed on their way to the disk.

The format (https://huggingface.co/docs/safetensors): eight bytes with the header's length, little-endian; the header, JSON from key
to dtype, shape and the tensor's byte range after the header; then the tensors, row-major, little-endian and without holes.
"""

import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Protocol

import torch
from torch import Tensor

from paraxis.checkpoint.hashing import ChunkHasher
from paraxis.checkpoint.manifest import StoredFile

SHARD_BYTES = 4 * 2**30
HEADER_LIMIT_BYTES = 100_000_000  # the safetensors library refuses longer ones

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class Entry:
    """A tensor to be written under `key`. `load` is called when its turn comes, so that only one has to be in memory."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    load: Callable[[], Tensor]

    @property
    def size_bytes(self) -> int:
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Located:
    """Where a tensor stands in its file: `begin` and `end` count bytes from the start of the file."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int
    end: int


def shards(entries: Iterable[Entry], limit_bytes: int) -> Iterator[list[Entry]]:
    """`entries` in order, in groups of at most `limit_bytes`; a larger one stands alone."""
    group: list[Entry] = []
    held = 0
    for entry in entries:
        if group and held + entry.size_bytes > limit_bytes:
            yield group
            group, held = [], 0
        group.append(entry)
        held += entry.size_bytes
    if group:
        yield group


def write_tensors(to: "Path | Sink", entries: Iterable[Entry]) -> StoredFile:
    """Writes a new safetensors file, durable on return. Raises OSError, and ValueError for a dtype the format does not have."""
    # Widest dtype first: every tensor then starts at a multiple of its own width, which readers that map the file rely on.
    ordered = sorted(entries, key=lambda entry: -entry.dtype.itemsize)
    with HashingWriter(to) as file:
        file.write(_header(ordered))
        for entry in ordered:
            tensor = entry.load()
            assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), entry.key
            file.write(_bytes_of(tensor))
    return file.stored


def write_file(to: "Path | Sink", data: bytes) -> StoredFile:
    """Writes a new file, durable on return. Raises OSError."""
    with HashingWriter(to) as file:
        file.write(memoryview(data))
    return file.stored


def parse_header(data: bytes | bytearray, file_bytes: int) -> dict[str, Located]:
    """Where each tensor stands, from a file's header without its first eight bytes. Raises ValueError where it says what cannot be."""
    start = 8 + len(data)
    found: dict[str, Located] = {}
    try:
        for key, value in json.loads(data).items():
            if key == "__metadata__":
                continue
            begin, end = value["data_offsets"]
            located = Located(DTYPES[value["dtype"]], tuple(value["shape"]), start + begin, start + end)
            if not start <= located.begin <= located.end <= file_bytes:
                raise ValueError(f"{key} stands at bytes {begin} to {end}, outside the file")
            if located.end - located.begin != prod(located.shape) * located.dtype.itemsize:
                raise ValueError(f"{key} has {end - begin} bytes, which is not its shape times its dtype")
            found[key] = located
    except (KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(f"its header cannot be read ({type(error).__name__}: {error})") from error
    return found


def _header(entries: list[Entry]) -> memoryview:
    # "format" is what transformers insists on before it loads a file.
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    begin = 0
    for entry in entries:
        if entry.dtype not in DTYPE_NAMES:
            raise ValueError(f"{entry.key} is {entry.dtype}, which safetensors cannot store; it can: {', '.join(DTYPES)}")
        end = begin + entry.size_bytes
        header[entry.key] = {"dtype": DTYPE_NAMES[entry.dtype], "shape": entry.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > HEADER_LIMIT_BYTES:
        raise ValueError(f"{len(entries)} tensors make a header of {len(text)} bytes; the format allows {HEADER_LIMIT_BYTES}")
    return memoryview(struct.pack("<Q", len(text)) + text)


def _bytes_of(tensor: Tensor) -> memoryview:
    flat = tensor.detach().to("cpu").contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


class Sink(Protocol):
    """A new file somewhere, which is written from start to end. All of its methods raise OSError, except `discard`."""

    def write(self, data: memoryview) -> None: ...

    def close(self) -> None:
        """Makes what was written durable, and all of it visible at once where the file was not visible before."""
        ...

    def discard(self) -> None:
        """Ends a file that was not finished, where `close` is not called."""
        ...


class DiskFile:
    """The `Sink` that is the file `path`. What is discarded stays as far as it came."""

    def __init__(self, path: Path) -> None:
        self._file = open(path, "xb", buffering=2**20)  # noqa: SIM115 (closed by close and discard)

    def write(self, data: memoryview) -> None:
        self._file.write(data)

    def close(self) -> None:
        with self._file:
            self._file.flush()
            os.fsync(self._file.fileno())

    def discard(self) -> None:
        with suppress(OSError):
            self._file.close()


class HashingWriter:
    """Writes a new file from start to end, and hashes its chunks in threads meanwhile.

    On leaving the `with` block the file is durable and `stored` describes it; an exception leaves what was written so far.
    """

    stored: StoredFile

    def __init__(self, to: Path | Sink) -> None:
        self._sink: Sink = DiskFile(to) if isinstance(to, Path) else to
        self._hasher = ChunkHasher()
        self._bytes = 0

    def write(self, data: memoryview) -> None:
        """Appends `data`, which must not change before the `with` block is left."""
        self._hasher.add(data)
        self._sink.write(data)
        self._bytes += len(data)

    def __enter__(self) -> "HashingWriter":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        try:
            if error is None:
                self._sink.close()
                self.stored = StoredFile(self._bytes, self._hasher.chunks())
            else:
                self._sink.discard()
        finally:
            self._hasher.close()
