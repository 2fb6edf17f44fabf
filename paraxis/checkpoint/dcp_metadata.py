"""The `.metadata` of a torch distributed checkpoint (DCP), which is a pickle, read without running anything in it.

A pickle names functions and classes, and has them called. Here a name means something only if it stands in the list below, and then
it is a stand-in that keeps what it is called with: no class of torch is made, nothing is imported, and any other name ends the reading.
This is the one file that may import pickle (tests/house/test_rules.py).
"""

import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from paraxis.base.errors import CheckpointError
from paraxis.base.layout import Box
from paraxis.checkpoint.tensor_file import DTYPE_NAMES

METADATA = ".metadata"
LIMIT_BYTES = 2**30

_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.distcp")


@dataclass(frozen=True)
class Chunk:
    """The box of a tensor that stands, as `torch.save` wrote it, at bytes `begin` to `begin + length` of `file`."""

    box: Box
    file: str
    begin: int
    length: int


@dataclass(frozen=True)
class DcpTensor:
    """A tensor of the checkpoint, and the chunks that tile it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    chunks: tuple[Chunk, ...]


class _StandIn:
    """In place of an instance of a class of torch's: what it was made with, and the state it was given."""

    def __new__(cls, *args: Any) -> "_StandIn":
        made = super().__new__(cls)
        made.args, made.state = args, {}
        return made

    args: tuple[Any, ...]
    state: Any

    def __init__(self, *args: Any) -> None: ...

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Tensor(_StandIn): ...


class _Metadata(_StandIn): ...


_DCP = "torch.distributed.checkpoint.metadata"
ALLOWED: Mapping[tuple[str, str], Any] = {
    (_DCP, "Metadata"): _Metadata,
    (_DCP, "TensorStorageMetadata"): _Tensor,
    (_DCP, "BytesStorageMetadata"): _StandIn,
    (_DCP, "TensorProperties"): _StandIn,
    (_DCP, "ChunkStorageMetadata"): _StandIn,
    (_DCP, "MetadataIndex"): _StandIn,
    (_DCP, "StorageMeta"): _StandIn,
    (_DCP, "_MEM_FORMAT_ENCODING"): _StandIn,
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"): _StandIn,
    ("torch.serialization", "_get_layout"): _StandIn,
    ("torch", "Size"): tuple,
    ("collections", "OrderedDict"): dict,
    ("pathlib", "Path"): _StandIn,
    ("pathlib", "PosixPath"): _StandIn,
    ("pathlib", "WindowsPath"): _StandIn,
    ("pathlib._local", "PosixPath"): _StandIn,
    ("pathlib._local", "WindowsPath"): _StandIn,
    **{("torch", str(dtype).removeprefix("torch.")): dtype for dtype in DTYPE_NAMES},
}


class _Reader(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ALLOWED:
            raise CheckpointError(f"it names {module}.{name}, which no metadata of a checkpoint needs; nothing of it was run")
        return ALLOWED[module, name]


def read_metadata(folder: Path) -> dict[str, DcpTensor]:
    """The tensors of the checkpoint in `folder` by name. What else it holds, pickles of their own, is never opened.

    Raises CheckpointError where the metadata cannot be read, says what cannot be, or names anything but what metadata is made of.
    """
    path = folder / METADATA
    try:
        if (size := path.stat().st_size) > LIMIT_BYTES:
            raise CheckpointError(f"it has {size} bytes, more than any metadata should ({LIMIT_BYTES})")
        with open(path, "rb") as file:
            metadata = _Reader(file).load()
        if not isinstance(metadata, _Metadata):
            raise CheckpointError("it is not the metadata of a checkpoint")
        return _tensors(metadata.state)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is refused: {error}") from None
    except Exception as error:  # a foreign pickle can go wrong in any way
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}: {error}); is it a checkpoint of torch's DCP?") from error


def _tensors(state: Mapping[str, Any]) -> dict[str, DcpTensor]:
    where: dict[tuple[str, tuple[int, ...]], Mapping[str, Any]] = {}
    for index, info in state["storage_data"].items():
        if index.state.get("offset") is not None:
            where[str(index.state["fqn"]), _naturals(index.state["offset"])] = info.state
    held = state["state_dict_metadata"].items()
    return {name: _tensor(name, one.state, where) for name, one in held if isinstance(one, _Tensor)}


def _tensor(name: str, state: Mapping[str, Any], where: Mapping[tuple[str, tuple[int, ...]], Mapping[str, Any]]) -> DcpTensor:
    shape, properties = _naturals(state["size"]), state["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    if dtype not in DTYPE_NAMES:
        raise CheckpointError(f"{name} is {dtype}, which cannot be read")
    chunks = []
    for chunk in state["chunks"]:
        box = Box(_naturals(chunk.state["offsets"]), _naturals(chunk.state["sizes"]))
        if len(box.sizes) != len(shape) or any(a + n > end for a, n, end in zip(box.offsets, box.sizes, shape, strict=True)):
            raise CheckpointError(f"a part of {name} reaches beyond its shape {shape}")
        stored = where[name, box.offsets]
        if stored.get("transform_descriptors"):
            raise CheckpointError(f"{name} is compressed ({stored['transform_descriptors']}); save it without")
        if not _FILE.fullmatch(stored["relative_path"]):
            raise CheckpointError(f"{name} is said to be in {stored['relative_path']!r}; only .distcp files of the same folder are read")
        chunks.append(Chunk(box, stored["relative_path"], *_naturals((stored["offset"], stored["length"]))))
    if len({chunk.box for chunk in chunks}) != len(chunks) or sum(chunk.box.numel for chunk in chunks) != torch.Size(shape).numel():
        raise CheckpointError(f"the parts of {name} do not make up its shape {shape}")
    return DcpTensor(shape, dtype, tuple(chunks))


def _naturals(values: Any) -> tuple[int, ...]:
    numbers = tuple(values)
    if not all(type(number) is int and 0 <= number < 2**63 for number in numbers):
        raise CheckpointError(f"{numbers} are not sizes or offsets")
    return numbers
