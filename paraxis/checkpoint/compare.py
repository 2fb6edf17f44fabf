"""How two checkpoints differ: tensor by tensor, a bounded part of each in memory at a time, whatever layouts wrote them."""

from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import inf, prod
from typing import Any

import torch
from torch import Tensor

from paraxis.base.layout import Box, whole_box
from paraxis.checkpoint.load import Checkpoint
from paraxis.checkpoint.manifest import StoredFile, StoredTensor, files_beside
from paraxis.checkpoint.tensor_file import DTYPES

PART = 2**20  # elements that are compared at a time: few enough that their fp64 stays in memory that is used again
ABSENT = "(absent)"


@dataclass(frozen=True)
class TensorDifference:
    """A tensor that is not the same on both sides. Shape and dtype are None on a side that has none.

    `relative` is max|a - b| / max|b| where the shapes agree: inf where a NaN or an infinity is on one side alone, or b is all zeros.
    """

    name: str
    a: tuple[tuple[int, ...], str] | None
    b: tuple[tuple[int, ...], str] | None
    relative: float | None = None


@dataclass(frozen=True)
class MetaDifference:
    """An entry of the meta, by its path with dots, that is not the same; a side that lacks it has ABSENT."""

    name: str
    a: Any
    b: Any


@dataclass(frozen=True)
class Differences:
    """How checkpoint a differs from b. `compared` tensors are on both sides; `files` are others than those that hold tensors."""

    compared: int
    tensors: tuple[TensorDifference, ...]
    meta: tuple[MetaDifference, ...]
    files: tuple[str, ...]

    @property
    def same(self) -> bool:
        return not (self.tensors or self.meta or self.files)


def compare(a: Checkpoint, b: Checkpoint, progress: Callable[[int, int], None]) -> Differences:
    """Every difference between `a` and `b`. Raises CheckpointError where either is damaged.

    `progress` is told how many bytes of `a`'s tensors were compared, and of how many.
    """
    common = [name for name in a.tensors if name in b.tensors]
    total = sum(_bytes(a.tensors[name]) for name in common)
    done = 0
    found = [TensorDifference(name, _kind(a, name), _kind(b, name)) for name in sorted(a.tensors.keys() ^ b.tensors.keys())]
    with ThreadPoolExecutor(2) as pool:  # one for each side: hashing and reading let the other run
        for name in common:
            difference = _tensor(a, b, name, pool)
            found += [difference] if difference is not None else []
            done += _bytes(a.tensors[name])
            progress(done, total)
    return Differences(len(common), tuple(found), tuple(_meta(a.meta, b.meta)), tuple(_files(a, b)))


def _kind(checkpoint: Checkpoint, name: str) -> tuple[tuple[int, ...], str] | None:
    stored = checkpoint.tensors.get(name)
    return None if stored is None else (stored.shape, stored.dtype)


def _bytes(stored: StoredTensor) -> int:
    return prod(stored.shape) * DTYPES[stored.dtype].itemsize if stored.dtype in DTYPES else 0  # of those no byte can be read


def _tensor(a: Checkpoint, b: Checkpoint, name: str, pool: ThreadPoolExecutor) -> TensorDifference | None:
    """What differs of a tensor that both have, or None where every bit is the same."""
    kinds = _kind(a, name), _kind(b, name)
    if a.tensors[name].shape != b.tensors[name].shape:
        return TensorDifference(name, *kinds)

    def both() -> Iterator[Iterator[Tensor]]:
        return (pool.map(partial(_read, name, box), (a, b)) for box in _parts(whole_box(a.tensors[name].shape)))

    # Bits first: they take a fraction of the time, and most comparisons are of what is the same, or differs from the start.
    if kinds[0] == kinds[1] and all(_same_bits(left, right) for left, right in both()):
        return None
    apart, largest = 0.0, 0.0
    for left, right in both():
        apart, largest = max(apart, _apart(left, right)), max(largest, _largest(right))
    return TensorDifference(name, *kinds, apart and (apart / largest if largest else inf))


def _parts(box: Box) -> Iterator[Box]:
    """`box` in parts that are small enough, in the order in which its elements are stored."""
    dim = next((dim for dim, size in enumerate(box.sizes) if size > 1), None)
    if box.numel <= PART or dim is None:
        yield box
        return
    for index in range(2):
        yield from _parts(box.cut(dim, 2, index))


def _read(name: str, box: Box, checkpoint: Checkpoint) -> Tensor:
    return checkpoint.read(name, box)


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.reshape(-1).view(torch.uint8), b.reshape(-1).view(torch.uint8))


def _apart(a: Tensor, b: Tensor) -> float:
    """max|a - b|; what is the same on both sides, NaN and infinities too, is 0 apart, and NaN and any other number are inf apart."""
    a, b = a.double(), b.double()
    alike = (a == b) | (a.isnan() & b.isnan())
    apart = (a - b).abs().nan_to_num(nan=inf, posinf=inf).masked_fill(alike, 0.0)
    return apart.max().item() if apart.numel() else 0.0


def _largest(b: Tensor) -> float:
    """max|b| over its finite entries."""
    sizes = b.double().abs().nan_to_num(nan=0.0, posinf=0.0)
    return sizes.max().item() if sizes.numel() else 0.0


def _meta(a: Any, b: Any, where: str = "") -> Iterator[MetaDifference]:
    """What differs between two JSON values; mappings are gone into."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for key in dict.fromkeys([*a, *b]):
            yield from _meta(a.get(key, ABSENT), b.get(key, ABSENT), f"{where}.{key}" if where else key)
    elif a != b:
        yield MetaDifference(where, a, b)


def _files(a: Checkpoint, b: Checkpoint) -> list[str]:
    """The names of files beside the tensors that only one has, or that have other contents."""
    ours, theirs = _beside(a), _beside(b)
    return sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))


def _beside(checkpoint: Checkpoint) -> dict[str, StoredFile]:
    return {name: checkpoint.manifest.files[name] for name in files_beside(checkpoint.manifest)}
