"""Weights from torch's own files: a `.pt` file, or the folder of a distributed checkpoint (DCP). They are pickles; nothing in them is run.

Tensors are read by `torch.load(weights_only=True)`, which knows tensors, numbers, text and containers alone, and here not even what
other code has told it to trust. What else such a checkpoint holds is left where it is.
"""

import io
import re
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.base.errors import CheckpointError
from paraxis.checkpoint.dcp_metadata import METADATA, read_metadata
from paraxis.checkpoint.hf_source import ForeignWeights, Stored
from paraxis.checkpoint.tensor_file import DTYPE_NAMES

SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
# What training code puts around a model's names: in front of all, or anywhere within.
WRAPPERS = ("model", "module", "state_dict", "model_state_dict", "app")
WITHIN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")

_DEEPEST = 32  # dictionaries within dictionaries


def is_torch_checkpoint(source: Path) -> bool:
    """Whether `source` looks like a file or a folder that torch wrote."""
    return (source.is_file() and source.suffix in SUFFIXES) or (source / METADATA).is_file()


def open_torch(source: Path) -> "PtFile | DcpFolder":
    """The tensors at `source`, by the names that its writer gave them. Raises CheckpointError for what only running it could read."""
    return PtFile(source) if source.is_file() else DcpFolder(source)


class PtFile:
    """The tensors of a `.pt` file, mapped where its format allows: dictionaries within dictionaries are joined by dots."""

    def __init__(self, source: Path) -> None:
        self.source = source
        with _reading(str(source)):
            held = torch.load(source, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(source))
        self._tensors: dict[str, Tensor] = {}
        for name, value in _leaves(held, "", _DEEPEST):
            if isinstance(value, Tensor):
                self._tensors[name] = _plain(value, f"{source}: {name}")
        self.tensors: Mapping[str, Stored] = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in self._tensors.items()}

    def read(self, name: str) -> Tensor:
        return self._tensors[name]


class DcpFolder:
    """The tensors of a DCP folder; one is in memory while it is read."""

    def __init__(self, source: Path) -> None:
        self.source = source
        self._held = read_metadata(source)
        self.tensors: Mapping[str, Stored] = {name: (held.shape, held.dtype) for name, held in self._held.items()}

    def read(self, name: str) -> Tensor:
        held = self._held[name]
        whole = torch.empty(held.shape, dtype=held.dtype)
        for chunk in held.chunks:
            path = self.source / chunk.file
            where = f"{path} (tensor {name})"
            with _reading(where):
                with open(path, "rb") as file:
                    file.seek(chunk.begin)
                    data = file.read(chunk.length)
                part = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
            if not isinstance(part, Tensor) or (tuple(part.shape), part.dtype) != (chunk.box.sizes, held.dtype):
                raise CheckpointError(f"{where} does not hold what {METADATA} says: {chunk.box.sizes} in {held.dtype}")
            slices = tuple(slice(start, start + size) for start, size in zip(chunk.box.offsets, chunk.box.sizes, strict=True))
            whole[slices] = _plain(part, where)
        return whole


class Unwrapped:
    """Some of the tensors of `inner` by other names: theirs without what was put around them. `prefix` is what they all began with."""

    def __init__(self, inner: ForeignWeights, names: Mapping[str, str], prefix: str) -> None:
        self._inner, self._names, self.prefix = inner, names, prefix
        self.source = inner.source
        self.tensors: Mapping[str, Stored] = {name: inner.tensors[theirs] for name, theirs in names.items()}

    def read(self, name: str) -> Tensor:
        return self._inner.read(self._names[name])


def unwrap(weights: ForeignWeights, expected: Mapping[str, Collection[str]]) -> tuple[Unwrapped, str]:
    """The tensors of a model in `weights`, and in which of the `expected` ways (way -> names) they are called.

    What wrappers put in front of names, or into them, is taken off where that finds more of a model. Raises CheckpointError where
    nothing of it is found, and where two tensors would have one name.
    """
    bare = {name: ".".join(part for part in name.split(".") if part not in WITHIN) for name in weights.tensors}
    found = [
        (len({name.removeprefix(prefix) for name in bare.values() if name.startswith(prefix)} & set(names)), -len(prefix), prefix, way)
        for prefix in {prefix for name in bare.values() for prefix in _prefixes(name)}
        for way, names in expected.items()
    ]
    hits, _, prefix, way = max(found, default=(0, 0, "", ""))
    if not hits:
        held = ", ".join(list(bare)[:5]) or "no tensors"
        raise CheckpointError(f"{weights.source} holds nothing of the recipe's model; it has {held}. Is it the recipe of this model?")
    names: dict[str, str] = {}
    for name, short in bare.items():
        if short.startswith(prefix) and (other := names.setdefault(short.removeprefix(prefix), name)) != name:
            raise CheckpointError(f"{weights.source} has {other} and {name}, which would both be {short.removeprefix(prefix)}")
    return Unwrapped(weights, names, prefix), way


def _prefixes(name: str) -> Iterator[str]:
    """What may be taken off the front of `name`: nothing, or one wrapper after another."""
    prefix = ""
    yield prefix
    for part in name.split(".")[:-1]:
        if part not in WRAPPERS:
            return
        prefix += f"{part}."
        yield prefix


def _leaves(value: Any, name: str, depth: int) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and depth:
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else str(key), depth - 1)
    else:
        yield name, value


def _plain(tensor: Tensor, where: str) -> Tensor:
    """`tensor` where it is nothing but numbers in memory. Raises CheckpointError for kinds that are more, or less."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.layout != torch.strided or tensor.dtype not in DTYPE_NAMES:
        raise CheckpointError(
            f"{where} is a {type(tensor).__name__} of {tensor.dtype} ({tensor.layout}), which is not taken; save it plain"
        )
    return tensor.detach()


def _without_advice(error: Exception) -> str:
    """The first line of what torch says, but not where that is how to run the file after all."""
    line = next(iter(str(error).splitlines()), "")
    return type(error).__name__ if "weights_only" in line else f"{type(error).__name__}: {line}"


@contextmanager
def _reading(where: str) -> Iterator[None]:
    """Turns whatever torch says about a file into a CheckpointError; while inside, torch trusts no classes but its own choice."""
    trusted = torch.serialization.get_safe_globals()
    torch.serialization.clear_safe_globals()
    try:
        yield
    except Exception as error:  # a foreign pickle can go wrong in any way
        named = re.search(r"GLOBAL ([\w.]+)", str(error))
        why = f"it names {named[1]}, which is no part of a plain tensor" if named else f"torch cannot read it ({_without_advice(error)})"
        raise CheckpointError(
            f"{where} is refused: {why}; nothing of it was run. Where you trust its source, save its state dict alone again "
            "(torch.save(model.state_dict(), path)), or as safetensors"
        ) from error
    finally:
        torch.serialization.add_safe_globals(trusted)
