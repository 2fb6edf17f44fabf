"""The record of what a checkpoint holds: every tensor and which file has which box of it, every file and the hash of its bytes.

`manifest.json` is written last, so a folder that has a whole one is complete. Its own SHA-256 stands first in it, taken over the
file with that field set to zeros; a changed byte anywhere in it is noticed, and every other file is guarded by the hashes it lists.
"""

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from paraxis.base.layout import Box

MANIFEST = "manifest.json"
CHUNK_BYTES = 16 * 2**20  # the unit of hashing: what must be read to trust any byte of it

_FORMAT = "paraxis checkpoint"
_VERSION = 1
_MOST_ENTRIES = 2**60  # what strides in bytes can still reach
_NO_DIGEST = "0" * 64
_HEAD = b'{"digest": "'
_HEX = re.compile(r"[0-9a-f]{64}")
_NAME_PART = re.compile(r"[A-Za-z0-9_+=@-][A-Za-z0-9_.+=@-]*")  # no leading dot: excludes "..", "." and hidden files


@dataclass(frozen=True)
class StoredFile:
    """One file's length and the SHA-256 of each of its chunks, in hex. A file of one chunk has that chunk's hash as its own."""

    size_bytes: int
    chunks: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        return {"bytes": self.size_bytes, "chunks": list(self.chunks)}

    @staticmethod
    def from_json(value: Any) -> "StoredFile":
        file = StoredFile(_natural(value["bytes"]), tuple(value["chunks"]))
        if len(file.chunks) != -(-file.size_bytes // CHUNK_BYTES) or not all(_HEX.fullmatch(chunk) for chunk in file.chunks):
            raise ValueError(f"{file.size_bytes} bytes with {len(file.chunks)} chunk hashes")
        return file


@dataclass(frozen=True)
class StoredPiece:
    """The box of a tensor that stands under `key` in the safetensors file called `file`."""

    file: str
    key: str
    box: Box

    def to_json(self) -> dict[str, Any]:
        return {"file": self.file, "key": self.key, "offsets": list(self.box.offsets), "sizes": list(self.box.sizes)}

    @staticmethod
    def from_json(value: Any) -> "StoredPiece":
        return StoredPiece(str(value["file"]), str(value["key"]), Box(_naturals(value["offsets"]), _naturals(value["sizes"])))


@dataclass(frozen=True)
class StoredTensor:
    """A tensor's global shape, its dtype as safetensors names it, and the pieces that tile it."""

    shape: tuple[int, ...]
    dtype: str
    pieces: tuple[StoredPiece, ...]

    def __post_init__(self) -> None:
        if prod(max(size, 1) for size in self.shape) >= _MOST_ENTRIES:
            raise ValueError(f"{self.shape} is no shape of a tensor")
        boxes = {piece.box for piece in self.pieces}
        for box in boxes:
            if not len(box.offsets) == len(box.sizes) == len(self.shape):
                raise ValueError(f"a piece has {len(box.sizes)} dimensions, the tensor {len(self.shape)}")
            if any(start + size > end for start, size, end in zip(box.offsets, box.sizes, self.shape, strict=True)):
                raise ValueError(f"a piece at {box.offsets} of {box.sizes} reaches beyond {self.shape}")
        if len(boxes) != len(self.pieces) or sum(box.numel for box in boxes) != prod(self.shape):
            raise ValueError(f"its {len(self.pieces)} pieces do not tile {self.shape}")

    def to_json(self) -> dict[str, Any]:
        return {"shape": list(self.shape), "dtype": self.dtype, "pieces": [piece.to_json() for piece in self.pieces]}

    @staticmethod
    def from_json(value: Any) -> "StoredTensor":
        pieces = tuple(StoredPiece.from_json(piece) for piece in value["pieces"])
        return StoredTensor(_naturals(value["shape"]), str(value["dtype"]), pieces)


@dataclass(frozen=True)
class Manifest:
    """What one checkpoint holds.

    `generation` counts the saves of a checkpoints folder: where a run was taken back to an older step, the newest state is not
    the one of the highest step. `layout` is the layout that wrote it, for people; reading does not depend on it.
    """

    step: int
    generation: int
    layout: str
    tensors: Mapping[str, StoredTensor]
    files: Mapping[str, StoredFile]
    meta: Mapping[str, Any]

    def to_bytes(self) -> bytes:
        text = json.dumps(
            {
                "digest": _NO_DIGEST,
                "format": _FORMAT,
                "version": _VERSION,
                "step": self.step,
                "generation": self.generation,
                "layout": self.layout,
                "meta": self.meta,
                "files": {name: file.to_json() for name, file in self.files.items()},
                "tensors": {name: tensor.to_json() for name, tensor in self.tensors.items()},
            }
        ).encode()
        digest = hashlib.sha256(text).hexdigest().encode()
        return _HEAD + digest + text[len(_HEAD) + len(digest) :]

    @staticmethod
    def from_bytes(data: bytes) -> "Manifest":
        """The manifest written as `data`. Raises ValueError where it is foreign, damaged, or says what cannot be."""
        end = len(_HEAD) + len(_NO_DIGEST)
        if not data.startswith(_HEAD):
            raise ValueError("it is not a paraxis manifest, or its beginning is damaged")
        if hashlib.sha256(_HEAD + _NO_DIGEST.encode() + data[end:]).hexdigest().encode() != data[len(_HEAD) : end]:
            raise ValueError("its contents do not match its own SHA-256; it was damaged or edited")
        try:
            return _parse(json.loads(data))
        except (KeyError, TypeError, AttributeError, RecursionError) as error:
            raise ValueError(f"it lacks a field or has one of another kind ({type(error).__name__}: {error})") from error


def _parse(body: dict[str, Any]) -> Manifest:
    if (body["format"], body["version"]) != (_FORMAT, _VERSION):
        raise ValueError(f"it is {body['format']!r} version {body['version']!r}; this release reads {_FORMAT!r} version {_VERSION}")
    files = {checked_name(name): StoredFile.from_json(file) for name, file in body["files"].items()}
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in body["tensors"].items():
        try:
            tensors[name] = StoredTensor.from_json(tensor)
        except ValueError as error:
            raise ValueError(f"tensor {name}: {error}") from error
        if unlisted := {piece.file for piece in tensors[name].pieces} - files.keys():
            raise ValueError(f"tensor {name} is in {min(unlisted)}, which is not listed")
    return Manifest(_natural(body["step"]), _natural(body["generation"]), str(body["layout"]), tensors, files, dict(body["meta"]))


def files_beside(manifest: Manifest) -> list[str]:
    """The names of the files that hold no tensors, such as the configuration and the tokenizer's."""
    shards = {piece.file for tensor in manifest.tensors.values() for piece in tensor.pieces}
    return [name for name in manifest.files if name not in shards]


def checked_name(name: str) -> str:
    """`name` where it is a relative path that stays inside its folder. Raises ValueError for any other."""
    if name == MANIFEST or not all(_NAME_PART.fullmatch(part) for part in name.split("/")):
        raise ValueError(f"{name!r} cannot be a file of a checkpoint; names are plain, relative, and without '..'")
    return name


def _natural(value: Any) -> int:
    if type(value) is not int or not 0 <= value < 2**63:  # bool is an int, NaN and Infinity are floats: none is a size
        raise ValueError(f"{value!r} is not a size or an offset")
    return value


def _naturals(values: Any) -> tuple[int, ...]:
    return tuple(_natural(value) for value in values)
