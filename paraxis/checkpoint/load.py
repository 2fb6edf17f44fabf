"""Reading a checkpoint: any box of any tensor, whatever layout wrote it; no byte is used before its SHA-256 was compared."""

import hashlib
import logging
import struct
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paraxis.base.errors import CheckpointError
from paraxis.base.layout import Box, whole_box
from paraxis.checkpoint.manifest import CHUNK_BYTES, MANIFEST, Manifest, StoredFile, StoredPiece, StoredTensor
from paraxis.checkpoint.store import complete_folders, read_range, size_of
from paraxis.checkpoint.tensor_file import DTYPES, HEADER_LIMIT_BYTES, Located, parse_header

MANIFEST_LIMIT_BYTES = 2**30
SPAN_BYTES = 64 * 2**20  # how much of a file is held at a time while a box is read

_KEPT_CHUNKS = 4  # neighbours in a file are read one after another, often from the same chunk

_log = logging.getLogger(__name__)


def newest(folder: Path, warn: Callable[[str], None] = _log.warning) -> Path | None:
    """The checkpoint in `folder` that was committed last, or None. `warn` is told of each damaged one that was passed over."""
    return next((checkpoint.path for checkpoint in committed(folder, warn)), None)


def committed(folder: Path, warn: Callable[[str], None] = _log.warning) -> list["Checkpoint"]:
    """The checkpoints in `folder` whose manifest is whole and whose files are all there, newest first.

    What is inside the files is compared when it is read: a caller that then meets a CheckpointError goes on to the next one.
    """
    found = []
    for path in complete_folders(folder):
        try:
            found.append(open_checkpoint(path))
        except CheckpointError as error:
            warn(f"{path.name} is passed over: {error}")
    return sorted(found, key=lambda checkpoint: checkpoint.manifest.generation, reverse=True)


def open_checkpoint(path: Path) -> "Checkpoint":
    """The checkpoint in the folder `path`. Raises CheckpointError where it is missing, foreign, or visibly damaged."""
    manifest = read_manifest(path)
    for name, stored in manifest.files.items():
        check_size(path, name, stored)
    return Checkpoint(path, manifest)


def read_manifest(path: Path) -> Manifest:
    """The manifest of the checkpoint in the folder `path`. Raises CheckpointError where it is missing, foreign or damaged."""
    file = path / MANIFEST
    if not file.is_file():
        raise CheckpointError(
            f"{path} has no {MANIFEST}, so it is not a complete paraxis checkpoint; give a folder such as RUN_DIR/checkpoints/step-100. "
            f"Weights from elsewhere come in with `paraxis convert import`; pickled ones are never opened"
        )
    size = size_of(file, path)
    if size > MANIFEST_LIMIT_BYTES:
        raise CheckpointError(f"{file} has {size} bytes, more than any manifest should ({MANIFEST_LIMIT_BYTES})")
    try:
        return Manifest.from_bytes(read_range(file, 0, size))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_size(path: Path, name: str, stored: StoredFile) -> None:
    """Raises CheckpointError where the file `name` of the checkpoint at `path` is missing, no file, or of another length."""
    if (size := size_of(path / name, path)) != stored.size_bytes:
        raise CheckpointError(f"{path / name} has {size} bytes, but {stored.size_bytes} were written; it was damaged or exchanged")


class Checkpoint:
    """A checkpoint whose files are all there. Open one with `open_checkpoint`.

    Reading raises CheckpointError, with the file's name and the tensor's, where bytes are not those that were written.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._headers: dict[str, dict[str, Located]] = {}
        self._chunks: dict[tuple[str, int], bytes] = {}

    @property
    def meta(self) -> Mapping[str, Any]:
        """What was saved beside the tensors."""
        return self.manifest.meta

    @property
    def tensors(self) -> Mapping[str, StoredTensor]:
        """Shape, dtype (as safetensors names it) and pieces of every tensor."""
        return self.manifest.tensors

    def file(self, name: str) -> bytes:
        """The contents of the file that was saved as `name`."""
        if name not in self.manifest.files:
            raise CheckpointError(f"{self.path} holds no file {name}; it has {', '.join(sorted(self.manifest.files))}")
        return bytes(self._span(name, 0, self.manifest.files[name].size_bytes, ""))

    def read(self, name: str, box: Box | None = None, out: Tensor | None = None) -> Tensor:
        """The part `box` (default: all) of the tensor `name`, in its stored dtype on CPU; or `out`, filled with it.

        `out` has the box's shape, and any device, strides and dtype: values are cast once, to nearest. Reads the chunks that
        hold the box, SPAN_BYTES at a time.
        """
        if name not in self.tensors:
            raise CheckpointError(f"{self.path} holds no tensor {name}; it was saved from another model or without this state")
        stored = self.tensors[name]
        box = whole_box(stored.shape) if box is None else box
        assert all(start + size <= end for start, size, end in zip(box.offsets, box.sizes, stored.shape, strict=True)), (name, box)
        if out is None:
            out = torch.empty(box.sizes, dtype=self._dtype(name))
        assert tuple(out.shape) == box.sizes, (name, tuple(out.shape), box)
        with torch.no_grad():
            for piece in stored.pieces:
                if overlap := piece.box.overlap(box):
                    self._copy(name, piece, overlap, out[overlap.slices_within(box)])
        return out

    def _copy(self, name: str, piece: StoredPiece, box: Box, out: Tensor) -> None:
        """Fills `out` with the part `box` of one piece: the bytes from its first element to its last, viewed with the piece's strides."""
        located = self._locate(name, piece)
        strides = tuple(prod(piece.box.sizes[dim + 1 :]) for dim in range(len(piece.box.sizes)))
        width = located.dtype.itemsize
        first = sum(part.start * stride for part, stride in zip(box.slices_within(piece.box), strides, strict=True))
        count = 1 + sum((size - 1) * stride for size, stride in zip(box.sizes, strides, strict=True))
        if count * width > SPAN_BYTES and (dim := next((d for d, size in enumerate(box.sizes) if size > 1), None)) is not None:
            for half in (box.cut(dim, 2, 0), box.cut(dim, 2, 1)):
                self._copy(name, piece, half, out[half.slices_within(box)])
            return
        begin = located.begin + first * width
        span = self._span(piece.file, begin, begin + count * width, name)
        out.copy_(torch.frombuffer(span, dtype=located.dtype).as_strided(box.sizes, strides))

    def _dtype(self, name: str) -> torch.dtype:
        if self.tensors[name].dtype not in DTYPES:
            raise CheckpointError(f"{self.path}: {name} is {self.tensors[name].dtype!r}; this release reads {', '.join(DTYPES)}")
        return DTYPES[self.tensors[name].dtype]

    def _locate(self, name: str, piece: StoredPiece) -> Located:
        if piece.file not in self._headers:
            self._headers[piece.file] = self._header(piece.file)
        located = self._headers[piece.file].get(piece.key)
        if located is None or (located.dtype, located.shape) != (self._dtype(name), piece.box.sizes):
            raise CheckpointError(f"{self.path / piece.file} does not hold {piece.key} as the manifest says (tensor {name})")
        return located

    def _header(self, file: str) -> dict[str, Located]:
        size = self.manifest.files[file].size_bytes
        try:
            length = struct.unpack("<Q", self._span(file, 0, min(8, size), ""))[0]
            if length > min(HEADER_LIMIT_BYTES, size - 8):
                raise ValueError(f"its header claims {length} bytes")
            return parse_header(self._span(file, 8, 8 + length, ""), size)
        except (ValueError, struct.error) as error:
            raise CheckpointError(f"{self.path / file} is not a safetensors file: {error}") from error

    def _span(self, file: str, begin: int, end: int, tensor: str) -> bytearray:
        """Bytes `begin` to `end` of `file`, verified; `tensor` is whom an error says they are for."""
        parts = []
        for index in range(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES)):
            start = index * CHUNK_BYTES
            parts.append(memoryview(self._chunk(file, index, tensor))[max(begin - start, 0) : end - start])
        return bytearray().join(parts)

    def _chunk(self, file: str, index: int, tensor: str) -> bytes:
        if (file, index) in self._chunks:
            return self._chunks[file, index]
        stored = self.manifest.files[file]
        start = index * CHUNK_BYTES
        data = read_range(self.path / file, start, min(CHUNK_BYTES, stored.size_bytes - start))
        if hashlib.sha256(data).hexdigest() != stored.chunks[index]:
            raise CheckpointError(
                f"{self.path / file} is damaged: bytes {start} to {start + len(data)} do not match their SHA-256"
                + (f" (read for tensor {tensor})" if tensor else "")
                + "; restore the file from a copy, or go back to an older step"
            )
        while len(self._chunks) >= _KEPT_CHUNKS:
            del self._chunks[next(iter(self._chunks))]
        self._chunks[file, index] = data
        return data
