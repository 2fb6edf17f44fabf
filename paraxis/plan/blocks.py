"""What a model's blocks take for a token, read off one forward of each kind without data: products, traffic, what backward keeps.

The counts are those of a whole block; how axes cut them stands in `closed.py`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod
from typing import Any

import torch
from torch import nn

from paraxis.base.dtypes import precision
from paraxis.base.layout import Gather, Partial, Split, matching
from paraxis.base.seams import Batch
from paraxis.parallel.knapsack import BlockTable, Operator
from paraxis.parallel.tabulate import Rates, Setting, tabulate
from paraxis.train.config import RunConfig

COUNTED = Rates(1, 1, 1, 1)  # seconds are then operations, or bytes


@dataclass(frozen=True)
class Matrix:
    """A parameter of a block and the axes it is cut along: `tp` is the dimension that tensor parallelism cuts (-1: none); `experts` how
    many of them it stacks along dimension 0, where `ep` shares it out."""

    shape: tuple[int, ...]
    tp: int = -1
    experts: int = 0

    @property
    def entries(self) -> int:
        return prod(self.shape)

    def cut(self, tp: int, ep: int) -> tuple[int, ...]:
        """Its shape on one rank while it is whole there."""
        shape = list(self.shape)
        if self.tp >= 0:
            shape[self.tp] //= tp
        if self.experts:
            shape[0] //= ep
        return tuple(shape)


@dataclass(frozen=True)
class Multiplied:
    """A product of a block's forward: operations for a token, the output's bytes, and the matrix, where it is a parameter."""

    flops: float
    bytes: float
    matrix: Matrix | None


@dataclass(frozen=True)
class BlockKind:
    """Blocks that are alike. Per token: attention's operations in forward, bytes that cheap kernels move, and what backward keeps: of
    the block's input, of everything it reads (`whole`), of the outputs that selective recomputation keeps (`costly`).

    `gathers` counts modules whose input tensor parallelism gathers and whose output it sums; `routed` says that tokens go to experts.
    """

    parameters: tuple[Matrix, ...]
    products: tuple[Multiplied, ...]
    attention_flops: float
    moved: float
    input: float
    whole: float
    costly: float
    gathers: int
    routed: int

    def entries(self, tp: int, ep: int) -> tuple[int, int]:
        """Entries on one rank while they are whole there: outside experts, and of experts."""
        sizes = [(prod(one.cut(tp, ep)), one.experts > 0) for one in self.parameters]
        return sum(n for n, expert in sizes if not expert), sum(n for n, expert in sizes if expert)


@dataclass(frozen=True)
class Ends:
    """What is not in blocks: entries of the parameters before the first block and after the last, those that both ends have (a tied
    embedding), and of the head's matrix: its rows and columns."""

    first: tuple[Matrix, ...]
    last: tuple[Matrix, ...]
    head: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Shape:
    """A model as costs see it: `kinds[order[i]]` is block i, compiled or not (`fused`)."""

    fused: bool
    kinds: tuple[BlockKind, ...]
    order: tuple[int, ...]
    ends: Ends
    known: dict[Any, Any] = field(default_factory=dict, compare=False, repr=False)


def read_shape(config: RunConfig, model: nn.Module, *, fused: bool) -> Shape:
    """The shape of `model` (on the meta device). Raises ConfigError where it cannot run without data."""
    length, width = config.data.seq_len, getattr(config.model, "width", 0)
    batch = Batch(*(torch.empty(1, length, dtype=torch.int64, device="meta") for _ in range(3)))
    setting = Setting(
        device=torch.device("cpu"),
        dtype=precision(config.precision).compute,
        stream=(1, length, width),
        rates=COUNTED,
        fused=fused,
        opaque=False,
        spread=False,
    )
    tables = tabulate(model, batch, setting, first=True)
    layout, blocks = getattr(model, "layout", {}), list(model.blocks())  # type: ignore[operator]
    names = {id(module): name for name, module in model.named_modules()}
    found: dict[Any, int] = {}
    kinds: list[BlockKind] = []
    order: list[int] = []
    for block, table in zip(blocks, tables, strict=True):
        kind = table, tuple((name, tuple(p.shape)) for name, p in block.named_parameters())
        if kind not in found:
            found[kind] = len(kinds)
            kinds.append(_kind(block, names[id(block)], table, layout, length))
        order.append(found[kind])
    return Shape(fused, tuple(kinds), tuple(order), _ends(model, blocks, layout, config))


def _kind(block: nn.Module, name: str, table: BlockTable, layout: Mapping[str, Any], tokens: int) -> BlockKind:
    parameters = {own: _matrix(f"{name}.{own}", p, layout) for own, p in block.named_parameters()}
    rules = [matching(layout, f"{name}.{own}") for own, _ in block.named_modules() if own]
    products = [one for one in table.operators if one.call[0] != "attention"]
    used: dict[str, int] = {}
    return BlockKind(
        parameters=tuple(parameters.values()),
        products=tuple(Multiplied(one.seconds / tokens, one.bytes / tokens, _of(one, parameters, used)) for one in products),
        attention_flops=sum(one.seconds for one in table.operators if one.call[0] == "attention") / tokens,
        moved=table.cheap_s / tokens,
        input=table.input_bytes / tokens,
        whole=table.whole_bytes / tokens,
        costly=(table.input_bytes + sum(one.bytes for one in table.operators)) / tokens,
        gathers=sum(isinstance(rule, Gather | Partial) for rule in rules),
        routed=max((one.experts for one in parameters.values()), default=0),
    )


def _of(one: Operator, parameters: Mapping[str, Matrix], used: dict[str, int]) -> Matrix | None:
    """The parameter that a module multiplies with: its next one, of those that are matrices."""
    own = [matrix for name, matrix in parameters.items() if name.rpartition(".")[0] == one.place and len(matrix.shape) > 1]
    number = used[one.place] = used.get(one.place, -1) + 1
    return own[number] if number < len(own) else None


def _matrix(name: str, parameter: nn.Parameter, layout: Mapping[str, Any]) -> Matrix:
    rule = matching(layout, name)
    splits = {one.axis: one.dim for one in (rule if isinstance(rule, tuple) else (rule,)) if isinstance(one, Split)}
    return Matrix(tuple(parameter.shape), splits.get("tp", -1), parameter.shape[0] if "ep" in splits else 0)


def _ends(model: nn.Module, blocks: list[nn.Module], layout: Mapping[str, Any], config: RunConfig) -> Ends:
    """Before the first block come the parameters that are declared before it. A tied embedding counts at both ends."""
    inside = {id(p) for block in blocks for p in block.parameters()}
    first: list[Matrix] = []
    last: list[Matrix] = []
    where = first
    for name, parameter in model.named_parameters():
        if id(parameter) in inside:
            where = last
        else:
            where.append(_matrix(name, parameter, layout))
    rows, width = getattr(config.model, "vocab_size", 0), getattr(config.model, "width", 0)
    head = next((one for one in last if one.shape == (rows, width)), None)
    if head is None and getattr(config.model, "tied", False):
        last += [one for one in first if one.shape == (rows, width)]
    return Ends(tuple(first), tuple(last), (rows, width))
