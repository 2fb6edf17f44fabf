"""Weights to start from, by our names and by the box: of a checkpoint of ours, or of a Hugging Face folder."""

from collections.abc import Collection, Mapping
from fnmatch import fnmatchcase
from itertools import takewhile
from typing import Any, Protocol

from torch import Tensor

from paraxis.base.keys import KeyTable, Piece, Stacked, Theirs
from paraxis.base.layout import Box, whole_box
from paraxis.checkpoint.hf import MODEL, left_over, renamed
from paraxis.checkpoint.hf_source import HuggingFaceWeights
from paraxis.checkpoint.load import Checkpoint

BUFFER = "buffer/"


class WeightsSource(Protocol):
    """Tensors that a model can start from, by the names that checkpoints of ours give them (model/NAME, buffer/NAME)."""

    def shape(self, name: str) -> tuple[int, ...] | None:
        """The shape of a tensor; None where there is none of this name."""
        ...

    def others(self, names: Collection[str], skip: Collection[str]) -> list[str]:
        """What the source calls its weights that are none of `names`; `skip` has patterns of those that nobody asks for."""
        ...

    def read(self, name: str, box: Box, out: Tensor) -> None:
        """Fills `out` with a part of a tensor, cast once to its dtype. Reads little more than the part."""
        ...


class OurWeights:
    """The `WeightsSource` of a checkpoint of ours."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self.checkpoint = checkpoint

    def shape(self, name: str) -> tuple[int, ...] | None:
        stored = self.checkpoint.tensors.get(name)
        return None if stored is None else stored.shape

    def others(self, names: Collection[str], skip: Collection[str]) -> list[str]:
        return sorted(name for name in self.checkpoint.tensors if name.startswith((MODEL, BUFFER)) and name not in names)

    def read(self, name: str, box: Box, out: Tensor) -> None:
        self.checkpoint.read(name, box, out)


class TheirWeights:
    """The `WeightsSource` of a Hugging Face folder, for a model with these `keys` and parameters `names` (without model/)."""

    def __init__(self, weights: HuggingFaceWeights, keys: KeyTable, names: Collection[str]) -> None:
        self._weights = weights
        self._theirs: Mapping[str, Theirs] = {MODEL + name: theirs for name, theirs in renamed(weights, keys, names).items()}

    def shape(self, name: str) -> tuple[int, ...] | None:
        theirs, have = self._theirs.get(name), self._weights.tensors
        if isinstance(theirs, Stacked):
            first, count = theirs.names(1)[0], len(self._experts(theirs))
            return (count, *_turned(have[first][0], theirs.transpose)) if count else None
        if isinstance(theirs, Piece):
            if theirs.pattern not in have:
                return None
            *rest, last = have[theirs.pattern][0]
            return _turned((*rest, last // theirs.of), theirs.transpose)
        return have[theirs][0] if theirs is not None and theirs in have else None

    def others(self, names: Collection[str], skip: Collection[str]) -> list[str]:
        needed: set[str] = set()
        for name in names:
            theirs = self._theirs.get(name)
            if isinstance(theirs, Stacked):
                needed.update(self._experts(theirs))
            elif theirs is not None:
                needed.add(theirs if isinstance(theirs, str) else theirs.pattern)
        ours = {name.removeprefix(MODEL): theirs for name, theirs in self._theirs.items()}
        return left_over(self._weights, ours, needed, [name for name in self._weights.tensors if any(fnmatchcase(name, p) for p in skip)])

    def read(self, name: str, box: Box, out: Tensor) -> None:
        theirs, shape = self._theirs[name], self.shape(name)
        assert shape is not None
        part = box.slices_within(whole_box(shape))
        # Files are mapped, so of what is read here only the pages of the part come into memory.
        if isinstance(theirs, Stacked):
            for one, expert in zip(out, self._experts(theirs)[part[0]], strict=True):
                one.copy_(_turned(self._weights.read(expert), theirs.transpose)[part[1:]])
        elif isinstance(theirs, Piece):
            piece = self._weights.read(theirs.pattern).chunk(theirs.of, dim=-1)[theirs.number]
            out.copy_(_turned(piece, theirs.transpose)[part])
        else:
            out.copy_(self._weights.read(theirs)[part])

    def _experts(self, theirs: Stacked) -> list[str]:
        """The tensors that make up one of ours, as many as there are."""
        have = self._weights.tensors
        return list(takewhile(have.__contains__, theirs.names(len(have))))


def _turned(x: Any, turn: bool) -> Any:
    """A matrix, or a shape, transposed where it is to be."""
    if not turn:
        return x
    return x.mT if isinstance(x, Tensor) else x[::-1]
