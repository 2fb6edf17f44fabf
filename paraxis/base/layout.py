"""Where tensors may be split (layout tables), which part of each a rank holds (boxes), and the grammar of a run's layout.

A model says *where* in a table from name patterns to rules; `parallel/apply.py` says *in which order*:

    LAYOUT = {
        "layers.*.mlp": Gather(),                        # its input is gathered to the whole sequence
        "layers.*.mlp.up_proj.weight": Split("tp", 0),   # output features
        "layers.*.mlp.down_proj.weight": Split("tp", 1), # input features: the output is summed and scattered again
    }

Between the modules so named, activations are split along the sequence; what the table does not name
acts on each position alone and is replicated.

A run's layout is written `pp2.zbv x cp4.ulysses2 x fsdp2 x tp2 x ep2`: axes with degrees, after a dot the pipeline's schedule
(`.interleaved3`: three stages a rank) or how attention crosses `cp` (`.ring`, `.allgather`, `.ulysses`; `.ulysses2`: pairs in a ring).
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import translate
from functools import cache
from math import prod
from typing import cast

from paraxis.base.axes import DEGREES, Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.schedules import SCHEDULES


@dataclass(frozen=True)
class Split:
    """This parameter is cut along `dim` into equal parts, one for each rank of `axis`."""

    axis: str
    dim: int


@dataclass(frozen=True)
class Gather:
    """This module's input is gathered to the whole sequence; a split layer inside scatters it again.

    `readers` names those of its layers that read the input, where they all are split along their outputs and nothing else reads it:
    with asynchronous tensor parallelism they multiply what has arrived while the rest is on its way.
    """

    readers: tuple[str, ...] = ()


@dataclass(frozen=True)
class Partial:
    """This module's input is gathered to the whole sequence; its output, of which every rank makes a summand, is summed and scattered.

    Split layers inside, such as experts cut along their hidden features, leave their summand as it is.
    """


@dataclass(frozen=True)
class Whole:
    """This module needs the whole sequence and has no split layer: every rank runs all of it and keeps its part."""


@dataclass(frozen=True)
class Lookup:
    """This module is given numbers that every rank has, such as positions, and looks each up in whole parameters: ranks keep their part."""


LayoutTable = Mapping[str, Split | tuple[Split, ...] | Gather | Partial | Whole | Lookup]


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

    `computed` is what forward sees (cut along `tp` and `ep` where the table says so); `stored` is what FSDP keeps of it
    between uses (cut again along `shard_dim`). Both are boxes of the global tensor. `replica` of `replicas` numbers the ranks
    of a pipeline stage that store the same part. A `frozen` parameter is not trained, and every rank keeps what it computes with.
    """

    name: str
    shape: tuple[int, ...]
    computed: Box
    stored: Box
    splits: tuple[Split, ...] = ()
    shard_dim: int = 0
    replica: int = 0
    replicas: int = 1
    frozen: bool = False

    def split_along(self, axis: str) -> Split | None:
        """How the table cuts this parameter along `axis`, if it does."""
        return next((split for split in self.splits if split.axis == axis), None)


def place(
    name: str, shape: tuple[int, ...], table: LayoutTable, degrees: Degrees, at: Mapping[str, int], *, frozen: bool = False
) -> Placed:
    """Where the parameter `name` of global `shape` lives on the rank whose coordinates are `at` (axis -> index).

    Raises ConfigError when a split does not divide the dimension evenly.
    """
    splits = _splits(table, name, degrees)
    shard = at["fsdp"] * degrees.cp + at["cp"]
    index = {**at, "ep": shard % degrees.ep}
    box = whole_box(shape)
    for split in splits:
        parts = getattr(degrees, split.axis)
        if split.dim >= len(shape) or shape[split.dim] % parts:
            size = shape[split.dim] if split.dim < len(shape) else "no"
            raise ConfigError(
                f"parallel.{split.axis}={parts} does not divide {name}: dimension {split.dim} has {size} entries; "
                f"choose a degree that divides it, or change the model's shape"
            )
        box = box.cut(split.dim, parts, index[split.axis])
    experts = degrees.ep if any(split.axis == "ep" for split in splits) else 1
    copies = 1 if any(split.axis == "tp" for split in splits) else degrees.tp
    copy = at["tp"] if copies > 1 else 0
    if frozen or not shape:
        replica, replicas = ((at["dp"] * degrees.shards) + shard) * copies + copy, degrees.dp * degrees.shards * copies
        return Placed(name, tuple(shape), box, box, splits, 0, replica, replicas, frozen)
    ways = degrees.shards // experts
    # Few experts on many ranks: their rows are shared out where the experts themselves would leave ranks with nothing.
    dim = 1 if experts > 1 and box.sizes[0] % ways and not box.sizes[1] % ways else 0
    stored = box.cut(dim, ways, shard // experts)
    return Placed(name, tuple(shape), box, stored, splits, dim, at["dp"] * copies + copy, degrees.dp * copies)


def _splits(table: LayoutTable, name: str, degrees: Degrees) -> tuple[Split, ...]:
    """How `table` cuts a parameter along axes that have more than one rank."""
    rule = matching(table, name)
    rules = cast("tuple[object, ...]", rule) if isinstance(rule, tuple) else (rule,)
    return tuple(rule for rule in rules if isinstance(rule, Split) and getattr(degrees, rule.axis) > 1)


_PART = re.compile(r"([a-z]+)(-?\d+)(?:\.([a-z0-9]+))?")
CP_KINDS = ("ring", "ulysses", "usp", "allgather")


def parse_layout(text: str) -> dict[str, int | str]:
    """`"pp2.zbv x fsdp2"` (spaces optional) as the fields of `ParallelConfig` that it says: {"pp": 2, "schedule": "zbv", "fsdp": 2}.

    Raises ConfigError naming the part it cannot read.
    """
    found: dict[str, int | str] = {}
    for part in re.split(r"\s*x\s*", text.strip()):
        match = _PART.fullmatch(part)
        if not match or match[1] not in DEGREES or (match[3] and match[1] not in ("pp", "cp")):
            raise ConfigError(
                f"layout {text!r}: cannot read {part!r}; write axes with degrees joined by x, such as fsdp2xtp2 or pp2.zbvxcp2.ulysses "
                f"(axes: {', '.join(DEGREES)})"
            )
        axis, degree, kind = match[1], int(match[2]), match[3]
        if axis in found:
            raise ConfigError(f"layout {text!r}: {axis} stands twice; name each axis once")
        found[axis] = degree
        if kind and axis == "pp":
            name, number = (kind, "") if kind in SCHEDULES else _numbered(kind)
            found |= {"schedule": name} | ({"stages_a_rank": int(number)} if number else {})
        elif kind:
            found |= _context(text, *_numbered(kind))
    Degrees(**{axis: degree for axis, degree in found.items() if axis in DEGREES and isinstance(degree, int)})
    return found


# What settings of an axis say when it is not used.
IDLE: dict[str, dict[str, int | str | tuple[int, ...]]] = {
    "pp": {"schedule": "auto", "stages_a_rank": 0, "cuts": ()},
    "cp": {"cp_kind": "auto", "cp_ulysses": 0},
    "tp": {"async_tp": False, "sequence_parallel": True},
}


def layout_settings(text: str) -> dict[str, int | str | tuple[int, ...]]:
    """Every field of `ParallelConfig` that a layout decides: one degree for each axis, and no settings for an axis that is not used."""
    found = parse_layout(text)
    idle = {field: value for axis, fields in IDLE.items() if found.get(axis, 1) == 1 for field, value in fields.items()}
    return {**dict.fromkeys(DEGREES, 1), **idle, **found}


def laid_out(settings: Mapping[str, object], layout: str) -> dict[str, object]:
    """The `settings` of a run with every degree of `layout`. Raises ConfigError for one that `settings` says too."""
    degrees = {f"parallel.{field}": value for field, value in layout_settings(layout).items()}
    if both := sorted(degrees.keys() & settings.keys()):
        raise ConfigError(f"--layout={layout} says every degree, and so does --{both[0]}; leave out one of the two")
    return {**settings, **degrees}


def _numbered(kind: str) -> tuple[str, str]:
    """`ulysses2` as ("ulysses", "2")."""
    name = kind.rstrip("0123456789")
    return name, kind.removeprefix(name)


def _context(text: str, kind: str, number: str) -> dict[str, int | str]:
    """What `.ulysses2` after `cp4` says: all-to-all among pairs, a ring across them."""
    if kind not in CP_KINDS or (number and kind not in ("ulysses", "usp")):
        raise ConfigError(f"layout {text!r}: cp knows {', '.join(CP_KINDS)}, and a number after ulysses alone; not {kind + number!r}")
    return {"cp_kind": "usp", "cp_ulysses": int(number)} if number else {"cp_kind": kind}
