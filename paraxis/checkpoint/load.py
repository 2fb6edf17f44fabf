"""Reading a checkpoint: any box of any tensor, whatever layout wrote it; no byte is used before its SHA-256 was compared."""

import hashlib
import logging
import struct
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor

from paraxis.base.env import cores
from paraxis.base.errors import CheckpointError
from paraxis.base.layout import Box, whole_box
from paraxis.checkpoint.manifest import CHUNK_BYTES, MANIFEST, Manifest, StoredFile, StoredPiece, StoredTensor
from paraxis.checkpoint.place import Location, step_in_name
from paraxis.checkpoint.store import Files, complete_folders, open_files
from paraxis.checkpoint.tensor_file import DTYPES, HEADER_LIMIT_BYTES, Located, parse_header

MANIFEST_LIMIT_BYTES = 2**30
SPAN_BYTES = 64 * 2**20  # how much of a file is held at a time while a box is read

_READERS = 4
_KEPT_CHUNKS = 4  # neighbours in a file are read one after another, often from the same chunk

_log = logging.getLogger(__name__)


def newest(folder: str | Location, warn: Callable[[str], None] = _log.warning) -> Location | None:
    """The checkpoint in `folder` that was committed last, or None. `warn` is told of each damaged one that was passed over."""
    return next((checkpoint.path for checkpoint in committed(folder, warn)), None)


def committed(folder: str | Location, warn: Callable[[str], None] = _log.warning) -> list["Checkpoint"]:
    """The checkpoints in `folder` whose manifest is whole and whose files are all there, newest first.

    A store that does not answer raises StorageError: a checkpoint there is not damaged, and an older one must not take its place.
    What is inside the files is compared when it is read: a caller that then meets a CheckpointError goes on to the next one.
    """
    found = []
    for path in complete_folders(folder):
        try:
            found.append(open_listed(path))
        except CheckpointError as error:
            warn(f"{path.name} is passed over: {error}")
    return sorted(found, key=lambda checkpoint: checkpoint.manifest.generation, reverse=True)


def open_listed(path: Location) -> "Checkpoint":
    """`open_checkpoint` of one that stands among others under the name of its step: a manifest of another step is refused too."""
    checkpoint = open_checkpoint(path)
    if (step := checkpoint.manifest.step) != step_in_name(path.name):
        raise CheckpointError(
            f"{path / MANIFEST} is that of step {step}: files of two checkpoints are mixed, or the folder was renamed; "
            "put them back, or move it elsewhere"
        )
    return checkpoint


def open_checkpoint(path: str | Location) -> "Checkpoint":
    """The checkpoint at `path`. Raises CheckpointError where it is missing, foreign, or visibly damaged."""
    files = open_files(path)
    manifest = read_manifest(files)
    for name, stored in manifest.files.items():
        check_size(files, name, stored)
    return Checkpoint(files, manifest)


def read_manifest(files: Files) -> Manifest:
    """The manifest of a checkpoint. Raises CheckpointError where it is missing, foreign or damaged."""
    file = files.path / MANIFEST
    if not files.has(MANIFEST):
        raise CheckpointError(
            f"{files.path} has no {MANIFEST}, so it is not a complete paraxis checkpoint; "
            f"give a folder such as RUN_DIR/checkpoints/step-100. "
            f"Weights from elsewhere come in with `paraxis convert import`; nothing that is pickled in them runs"
        )
    size = files.size(MANIFEST)
    if size > MANIFEST_LIMIT_BYTES:
        raise CheckpointError(f"{file} has {size} bytes, more than any manifest should ({MANIFEST_LIMIT_BYTES})")
    try:
        return Manifest.from_bytes(files.read_range(MANIFEST, 0, size))
    except ValueError as error:
        raise CheckpointError(f"{file}: {error}") from error


def check_size(files: Files, name: str, stored: StoredFile) -> None:
    """Raises CheckpointError where the file `name` of a checkpoint is missing, no file, or of another length."""
    if (size := files.size(name)) != stored.size_bytes:
        raise CheckpointError(f"{files.path / name} has {size} bytes, but {stored.size_bytes} were written; it was damaged or exchanged")


class Checkpoint:
    """A checkpoint whose files are all there. Open one with `open_checkpoint`; it serves one thread.

    Reading raises CheckpointError, with the file's name and the tensor's, where bytes are not those that were written.
    """

    def __init__(self, files: Files, manifest: Manifest) -> None:
        self.path = files.path
        self.manifest = manifest
        self._files = files
        self._headers: dict[str, dict[str, Located]] = {}
        self._chunks: dict[tuple[str, int], bytes] = {}
        self._scratch = bytearray()
        self._pool = ThreadPoolExecutor(min(_READERS, cores()))  # without a thread until it is used

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
            return parse_header(bytes(self._span(file, 8, 8 + length, "")), size)
        except (ValueError, struct.error) as error:
            raise CheckpointError(f"{self.path / file} is not a safetensors file: {error}") from error

    def _span(self, file: str, begin: int, end: int, tensor: str) -> memoryview:
        """Bytes `begin` to `end` of `file`, verified, until the next call; `tensor` is whom an error says they are for."""
        if len(self._scratch) < end - begin:
            self._scratch = bytearray(end - begin)  # kept, since new memory costs as much as hashing does
        span = memoryview(self._scratch)[: end - begin]
        indices = range(begin // CHUNK_BYTES, -(-end // CHUNK_BYTES))
        missing = [index for index in indices if (file, index) not in self._chunks]
        # Hashing lets other threads run, and what is far away is waited for by all of them at once.
        fetch = partial(self._fetch, file, tensor)
        fetched = dict(zip(missing, self._pool.map(fetch, missing) if len(missing) > 1 else map(fetch, missing), strict=True))
        for index in indices:
            start = index * CHUNK_BYTES
            chunk = fetched[index] if index in fetched else self._chunks[file, index]
            part = memoryview(chunk)[max(begin - start, 0) : end - start]
            span[max(start - begin, 0) :][: len(part)] = part
        for index, chunk in fetched.items():
            self._chunks[file, index] = chunk
        while len(self._chunks) > _KEPT_CHUNKS:
            del self._chunks[next(iter(self._chunks))]
        return span

    def _fetch(self, file: str, tensor: str, index: int) -> bytes:
        stored = self.manifest.files[file]
        start = index * CHUNK_BYTES
        data = self._files.read_range(file, start, min(CHUNK_BYTES, stored.size_bytes - start))
        if hashlib.sha256(data).hexdigest() != stored.chunks[index]:
            raise CheckpointError(
                f"{self.path / file} is damaged: bytes {start} to {start + len(data)} do not match their SHA-256"
                + (f" (read for tensor {tensor})" if tensor else "")
                + "; restore the file from a copy, or go back to an older step"
            )
        return data
