"""What a traced step takes on a cluster: every operator priced, those that a compiler merges as one, and put in order for `simulate.py`.

Prices: a product and attention by the accelerator's tables; any other kernel by the bytes that it reads and writes; an exchange by the
cluster's links. In compiled blocks, `fusion.py` says which operators are one kernel.
Blocks are alike: one in the middle stands for those that were not traced.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise, product

import numpy as np

from paraxis.base.axes import AXES, Degrees
from paraxis.base.schedule import Action
from paraxis.plan.fusion import COMPILED, last_uses, merged
from paraxis.plan.hardware import Cluster
from paraxis.plan.operators import Operator
from paraxis.plan.rates import Accelerator
from paraxis.plan.simulate import Compute, Item, Start, Wait
from paraxis.plan.trace import Phase, Trace
from paraxis.plan.watch import EVERYTHING

# The block that stands for those that were not traced, counted from the first like it. Its backward asks, as theirs do, for what the
# second block before it needs, which only this one has.
TYPICAL = 2


@dataclass(frozen=True)
class Place:
    """Where a traced rank, and those that do the same, run: `placement` has the device of each of the run's ranks.

    They wait for each other, so that the slowest device and the slowest of their groups set the pace.
    """

    cluster: Cluster
    rank: int
    placement: Sequence[int]
    degrees: Degrees

    @property
    def device(self) -> int:
        return self.placement[self.rank]

    @cached_property
    def _alike(self) -> bool:
        """Whether all ranks have like devices and links."""
        return len(self.cluster.pools) == 1 and not self.cluster.matrix and self.placement == range(len(self.placement))

    @cached_property
    def _stage(self) -> range:
        """The ranks that do the same: those of one place in the pipeline, which is the outermost axis."""
        size = len(self.placement) // self.degrees.pp
        return range(self.rank // size * size, (self.rank // size + 1) * size)

    @cached_property
    def accelerator(self) -> Accelerator:
        found = {self.cluster.accelerator_of(self.placement[rank]).name: rank for rank in ([self.rank] if self._alike else self._stage)}
        return min((self.cluster.accelerator_of(self.placement[rank]) for rank in found.values()), key=_speed)

    def exchange(self, operator: Operator) -> tuple[float, str]:
        """Seconds of an exchange, and the link that it is on."""
        assert operator.exchange is not None
        if len(operator.group) < 2:
            copied = 0.0 if operator.exchange == "all_reduce" else 2.0 * operator.bytes
            return self.accelerator.moving_s(copied), "memory"
        found = []
        for group in self._groups(operator.group):
            devices = [self.placement[rank] for rank in group]
            found.append((self.cluster.exchange_s(operator.exchange, operator.bytes, devices), self.link(devices)))
        return max(found)

    def _groups(self, group: tuple[int, ...]) -> Iterable[Sequence[int]]:
        """The groups that do the same at the same time: `group` alone where all are alike."""
        if self._alike or len(group) == len(self.placement):
            return [group]
        shape = [getattr(self.degrees, axis) for axis in AXES]
        at = np.stack(np.unravel_index(np.array(group), shape))
        fixed = [place for place in range(1, len(AXES)) if len(set(at[place].tolist())) == 1]
        others = product(*(range(shape[place]) for place in fixed))
        moved = []
        for other in others:
            at[fixed] = np.array(other, dtype=at.dtype)[:, None]
            moved.append(np.ravel_multi_index(tuple(at), shape).tolist())
        return moved

    def message_s(self, other: "Place", bytes: int) -> float:
        """A message from each of these ranks to its like at another place of the pipeline: the slowest."""
        pairs = [(self.rank, other.rank)] if self._alike else zip(self._stage, other._stage, strict=True)
        return max(self.cluster.exchange_s("p2p", bytes, (self.placement[a], self.placement[b])) for a, b in pairs)

    def link(self, devices: Sequence[int]) -> str:
        """Which of a device's ports a group of devices uses: the one inside its host, or the one across hosts."""
        return "inside" if len({self.cluster.host_of(device) for device in devices}) == 1 else "across"


def _speed(accelerator: Accelerator) -> float:
    return max(accelerator.peak_flops.values()) * accelerator.product_share


def kernel_s(operator: Operator, on: Accelerator) -> float:
    """Seconds of a kernel by itself."""
    if operator.sort == "product":
        m, n, k, batch = operator.sizes
        return on.product_s(operator.dtype, m, n, k, batch)
    if operator.sort == "attention":
        batch, heads, width, queries, keys = operator.sizes
        return on.attention_s(operator.dtype, batch, heads, width, queries, keys, causal=operator.causal, backward=operator.backward)
    return on.moving_s(sum(bytes for _, bytes in (*operator.reads, *operator.writes)))


@dataclass
class Steps:
    """A traced step as items for the simulation. `extra[stage]` blocks of a stage were not traced; `leading` first ones differ. `more`
    has steps with one block more in a stage, for what is not part of a block: the optimizer."""

    trace: Trace
    place: Place
    compiled: bool
    extra: Sequence[int] = (0,)
    leading: int = 0
    more: Mapping[int, Trace] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._starts = [phase.operator for phase in self.trace.phases]
        self._pieces: dict[tuple[int, int], list[Item]] = {}
        self._last_use = last_uses(self.trace.operators)

    def head(self) -> list[Item]:
        """What comes before the passes."""
        return self._items(0, self._at("passes"))

    def tail(self) -> list[Item]:
        """What follows the passes: the gradient's norm, the optimizer."""
        own = self._items(self._at("tail"), len(self.trace.operators))
        missing = 0.0
        for stage, trace in self.more.items():
            with_one = Steps(trace, self.place, self.compiled).tail()
            missing += self.extra[stage] * (total_s(with_one) - total_s(own))
        return joined([*own, Compute(max(0.0, missing))])

    def batches(self) -> list[list[Item]]:
        """Each micro-batch's forward and backward, without a pipeline."""
        starts = [mark.operator for mark in self.trace.marks if mark.kind == "batch"]
        ends = [*starts[1:], self._at("tail")]
        return [self._items(start, end) for start, end in zip(starts, ends, strict=True)]

    def actions(self) -> dict[Action, list[Item]]:
        """Each action of this rank of a pipeline."""
        marks = [mark for mark in self.trace.marks if mark.kind in ("action", "tail")]
        return {mark.action: self._items(mark.operator, after.operator) for mark, after in pairwise(marks) if mark.action is not None}

    def _at(self, kind: str) -> int:
        return next(mark.operator for mark in self.trace.marks if mark.kind == kind)

    def _items(self, start: int, end: int) -> list[Item]:
        """The items of a stretch of operators, blocks that were not traced in their place."""
        found: list[Item] = []
        for phase, first, last in self._phases(start, end):
            piece = self._piece(phase, first, last)
            times = 1
            if phase.kind in ("forward", "backward") and phase.block == self.leading + TYPICAL:
                times += self.extra[phase.stage]
            found += piece * times
        return joined(found)

    def _phases(self, start: int, end: int) -> Iterator[tuple[Phase, int, int]]:
        number = max(0, bisect_right(self._starts, start) - 1)
        phases = self.trace.phases
        while number < len(phases) and phases[number].operator < end:
            after = phases[number + 1].operator if number + 1 < len(phases) else len(self.trace.operators)
            first, last = max(start, phases[number].operator), min(end, after)
            if first < last:
                yield phases[number], first, last
            number += 1

    def _piece(self, phase: Phase, first: int, last: int) -> list[Item]:
        if (first, last) not in self._pieces:
            operators: Sequence[Operator] = self.trace.operators[first:last]
            if self.compiled and phase.kind in COMPILED:
                operators, _ = merged(operators, last, self._last_use)
            self._pieces[first, last] = list(self._priced(operators))
        return self._pieces[first, last]

    def _priced(self, operators: Sequence[Operator]) -> Iterator[Item]:
        """Kernels of a stream of its own are part of the exchange on it."""
        on, begun = self.place.accelerator, None
        for operator in operators:
            if begun is not None and (operator.lane != begun.lane or operator.sort in ("begin", "wait")):
                yield begun
                begun = None
            if operator.sort == "begin":
                assert operator.lane in ("all_gather", "reduce_scatter")
                begun = Start(operator.lane, 0.0, "memory", early=operator.early)
            elif operator.sort == "wait":
                lane = operator.lane if operator.lane in ("all_gather", "reduce_scatter") else "exchange"
                yield Wait(lane, number=operator.result if lane == "exchange" else -1, everything=operator.result == EVERYTHING)
            elif operator.sort == "exchange":
                seconds, link = self.place.exchange(operator)
                if begun is not None:
                    begun = Start(begun.lane, begun.seconds + seconds, link if link != "memory" else begun.link, begun.early)
                else:
                    yield Start("exchange", seconds, link, number=operator.result)
                    if operator.result < 0:  # nothing waits for it by name: the host's next operator does
                        yield Wait("exchange")
            elif begun is not None:
                begun = Start(begun.lane, begun.seconds + kernel_s(operator, on), begun.link, begun.early)
            else:
                yield Compute(kernel_s(operator, on))
        if begun is not None:
            yield begun


def total_s(items: Sequence[Item]) -> float:
    """Seconds of everything, one after another."""
    return sum(item.seconds for item in items if not isinstance(item, Wait))


def joined(items: Sequence[Item]) -> list[Item]:
    """The same items, computing that follows on computing as one."""
    found: list[Item] = []
    for item in items:
        if isinstance(item, Compute) and found and isinstance(before := found[-1], Compute):
            found[-1] = Compute(before.seconds + item.seconds)
        else:
            found.append(item)
    return found
