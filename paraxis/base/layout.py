"""Where tensors may be split (layout tables), which part of each a rank holds (boxes), and the grammar of a run's layout.

A model says *where* in a table from name patterns to rules; `parallel/apply.py` says *in which order*:

    LAYOUT = {
        "layers.*.mlp": Gather(),                        # its input is gathered to the whole sequence
        "layers.*.mlp.up_proj.weight": Split("tp", 0),   # output features
        "layers.*.mlp.down_proj.weight": Split("tp", 1), # input features: the output is summed and scattered again
    }

Between the modules so named, activations are split along the sequence; what the table does not name
acts on each position alone and is replicated.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from math import prod

from paraxis.base.axes import AXES, Degrees
from paraxis.base.errors import ConfigError


@dataclass(frozen=True)
class Split:
    """This parameter is cut along `dim` into equal parts, one for each rank of `axis`."""

    axis: str
    dim: int


@dataclass(frozen=True)
class Gather:
    """This module's input is gathered to the whole sequence; a split layer inside scatters it again."""


@dataclass(frozen=True)
class Whole:
    """This module needs the whole sequence and has no split layer: every rank runs all of it and keeps its part."""


LayoutTable = Mapping[str, Split | Gather | Whole]


@cache
def _matcher(pattern: str) -> re.Pattern[str]:
    return re.compile(translate(pattern))


def matching(table: Mapping[str, object], name: str) -> object | None:
    """The rule of the first pattern in `table` (shell wildcards, `*` crosses dots) that matches `name`, or None."""
    return next((rule for pattern, rule in table.items() if _matcher(pattern).match(name)), None)


@dataclass(frozen=True)
class Box:
    """A rectangular part of a tensor: where it starts and how large it is, in every dimension."""

    offsets: tuple[int, ...]
    sizes: tuple[int, ...]

    @property
    def numel(self) -> int:
        return prod(self.sizes)

    def overlap(self, other: "Box") -> "Box | None":
        """The part that both hold, or None."""
        starts = tuple(max(a, b) for a, b in zip(self.offsets, other.offsets, strict=True))
        ends = tuple(min(a + m, b + n) for a, m, b, n in zip(self.offsets, self.sizes, other.offsets, other.sizes, strict=True))
        sizes = tuple(end - start for start, end in zip(starts, ends, strict=True))
        return Box(starts, sizes) if all(size > 0 for size in sizes) else None

    def slices_within(self, outer: "Box") -> tuple[slice, ...]:
        """How to index a tensor that holds `outer` to get this box."""
        return tuple(slice(a - b, a - b + n) for a, b, n in zip(self.offsets, outer.offsets, self.sizes, strict=True))

    def cut(self, dim: int, parts: int, index: int) -> "Box":
        """Part `index` of `parts` along `dim`, in `torch.chunk`'s sizes: the last parts may be short or empty."""
        size = self.sizes[dim]
        step = -(-size // parts)
        start = min(step * index, size)
        end = min(start + step, size)
        offsets, sizes = list(self.offsets), list(self.sizes)
        offsets[dim] += start
        sizes[dim] = end - start
        return Box(tuple(offsets), tuple(sizes))


def whole_box(shape: tuple[int, ...]) -> Box:
    """The box that is all of a tensor of this shape."""
    return Box((0,) * len(shape), tuple(shape))


@dataclass(frozen=True)
class Placed:
    """Where one parameter lives: its global shape, the part this rank computes with, and the part it stores.

    `computed` is what forward sees (cut along `tp` where the table says so); `stored` is what FSDP keeps of it
    between uses (cut again along dimension 0). Both are boxes of the global tensor. `replica` of `replicas`
    numbers the ranks that store the same part.
    """

    name: str
    shape: tuple[int, ...]
    computed: Box
    stored: Box
    split: Split | None
    replica: int
    replicas: int


def place(name: str, shape: tuple[int, ...], table: LayoutTable, degrees: Degrees, at: Mapping[str, int]) -> Placed:
    """Where the parameter `name` of global `shape` lives on the rank whose coordinates are `at` (axis -> index).

    Raises ConfigError when a split does not divide the dimension evenly.
    """
    rule = matching(table, name)
    split = rule if isinstance(rule, Split) else None
    box = whole_box(shape)
    if split is not None and (parts := getattr(degrees, split.axis)) > 1:
        if split.dim >= len(shape) or shape[split.dim] % parts:
            size = shape[split.dim] if split.dim < len(shape) else "no"
            raise ConfigError(
                f"parallel.{split.axis}={parts} does not divide {name}: dimension {split.dim} has {size} entries; "
                f"choose a degree that divides it, or change the model's shape"
            )
        box = box.cut(split.dim, parts, at[split.axis])
    stored = box.cut(0, degrees.fsdp, at["fsdp"]) if shape else box
    tp_copies = degrees.tp if split is None else 1
    replica = at["dp"] * tp_copies + (at["tp"] if tp_copies > 1 else 0)
    return Placed(name, tuple(shape), box, stored, split, replica, degrees.dp * tp_copies)


_PART = re.compile(r"([a-z]+)(-?\d+)")


def parse_layout(text: str) -> dict[str, int]:
    """`"fsdp2 x tp2"` (spaces optional) as {"fsdp": 2, "tp": 2}. Raises ConfigError naming the part it cannot read."""
    found: dict[str, int] = {}
    for part in re.split(r"\s*x\s*", text.strip()):
        match = _PART.fullmatch(part)
        if not match or match[1] not in AXES:
            raise ConfigError(
                f"layout {text!r}: cannot read {part!r}; write axes with degrees joined by x, such as fsdp2xtp2 (axes: {', '.join(AXES)})"
            )
        if match[1] in found:
            raise ConfigError(f"layout {text!r}: {match[1]} stands twice; name each axis once")
        found[match[1]] = int(match[2])
    Degrees(**found)
    return found
