"""What a traced step takes on a cluster: every operator priced, those that a compiler merges as one, and put in order for `simulate.py`.

Prices: a product and attention by the accelerator's tables; any other kernel by the bytes that it reads and writes; an exchange by the
cluster's links. In compiled blocks, `fusion.py` says which operators are one kernel.
Blocks are alike: one in the middle stands for those that were not traced.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product

import numpy as np

from paraxis.base.axes import AXES, Degrees
from paraxis.plan.fusion import COMPILED, inlined, last_uses, merged
from paraxis.plan.hardware import Cluster
from paraxis.plan.operators import Operator
from paraxis.plan.pieces import IN_BLOCKS, TYPICAL, Part, Piece, cut, extended, weights_of
from paraxis.plan.rates import Accelerator
from paraxis.plan.record import Trace
from paraxis.plan.simulate import Compute, Item, Read, Start, Wait
from paraxis.plan.watch import EVERYTHING


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
    def alike(self) -> bool:
        """Whether all ranks have like devices and links."""
        return len(self.cluster.pools) == 1 and not self.cluster.matrix and self.placement == range(len(self.placement))

    @cached_property
    def _stage(self) -> range:
        """The ranks that do the same: those of one place in the pipeline, which is the outermost axis."""
        size = len(self.placement) // self.degrees.pp
        return range(self.rank // size * size, (self.rank // size + 1) * size)

    @cached_property
    def _accelerators(self) -> list[Accelerator]:
        ranks = [self.rank] if self.alike else self._stage
        return list({one.name: one for one in (self.cluster.accelerator_of(self.placement[rank]) for rank in ranks)}.values())

    @cached_property
    def accelerator(self) -> Accelerator:
        """The slowest."""
        return min(self._accelerators, key=_speed)

    @property
    def usable_bytes(self) -> int:
        """What the allocator can have of the smallest device."""
        return min(one.usable_bytes for one in self._accelerators)

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
        if self.alike or len(group) == len(self.placement):
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
        pairs = [(self.rank, other.rank)] if self.alike else zip(self._stage, other._stage, strict=True)
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


@dataclass(eq=False)
class Steps:
    """A traced step as items for the simulation. `extra[stage]` blocks of a stage were not traced; `leading` first ones differ.

    `selective`: blocks are recomputed selectively and not compiled, even where the rest is, so that every operator comes by Python.
    """

    trace: Trace
    place: Place
    compiled: bool
    extra: Sequence[int] = (0,)
    leading: int = 0
    selective: bool = False

    def __post_init__(self) -> None:
        self._priced_pieces: dict[range, list[Item]] = {}

    @cached_property
    def _parts(self) -> dict[Part, list[Piece]]:
        return cut(self.trace, self.leading + TYPICAL, [1 + more for more in self.extra])

    @cached_property
    def _last_use(self) -> dict[int, int]:
        return last_uses(self.trace.operators)

    def of(self, place: Place, extra: Sequence[int]) -> "Steps":
        """Another rank's, which does the same; where it is on a like device, between like links, at the same prices."""
        other = Steps(self.trace, place, self.compiled, extra, self.leading, self.selective)
        if place.alike and self.place.alike:
            other._priced_pieces = self._priced_pieces
        return other

    def head(self) -> list[Item]:
        """What comes before the passes."""
        return self.part("head")

    def tail(self) -> list[Item]:
        """What follows the passes: the gradient's norm, the optimizer. It grows with what all blocks have."""
        weights = weights_of(self.trace, self.leading + TYPICAL, [1 + more for more in self.extra])
        start = next(mark.operator for mark in self.trace.marks if mark.kind == "tail")
        on = self.place.accelerator
        return joined(list(self._priced([scaled(operator, weights) for operator in self.trace.operators[start:]], on.host_eager_s)))

    def batches(self) -> list[list[Item]]:
        """Each traced micro-batch's forward and backward, without a pipeline."""
        return [self.part(number) for number in sorted(part for part in self._parts if isinstance(part, int))]

    def part(self, part: Part) -> list[Item]:
        """The items of a part of the step, blocks that were not traced in their place."""
        pieces = extended(self._parts.get(part, ()), self.leading + TYPICAL, self.extra)
        return joined([item for piece, _ in pieces for item in self.priced(piece)])

    def priced(self, piece: Piece) -> list[Item]:
        """The items of one piece."""
        if piece.operators not in self._priced_pieces:
            operators: Sequence[Operator] = self.trace.operators[piece.operators.start : piece.operators.stop]
            host_s = self.place.accelerator.host_eager_s
            if self.selective and piece.kind in IN_BLOCKS:
                host_s = self.place.accelerator.host_selective_s
            elif self.compiled and piece.kind in COMPILED:
                operators, _ = merged(operators, piece.operators.stop, self._last_use)
                operators = inlined(operators, piece.operators.stop, self._last_use)
                host_s = self.place.accelerator.host_compiled_s if piece.kind in IN_BLOCKS else host_s
            self._priced_pieces[piece.operators] = list(self._priced(operators, host_s))
        return self._priced_pieces[piece.operators]

    def _priced(self, operators: Sequence[Operator], host_s: float) -> Iterator[Item]:
        """The host takes `host_s` to ask for a kernel. Kernels of a stream of its own are part of the exchange on it."""
        on, begun = self.place.accelerator, None
        for operator in operators:
            if begun is not None and (operator.lane != begun.lane or operator.sort in ("begin", "wait", "read")):
                yield begun
                begun = None
            if operator.sort == "begin":
                assert operator.lane in ("all_gather", "reduce_scatter")
                begun = Start(operator.lane, 0.0, "memory", early=operator.early, host_s=on.host_sharding_s)
            elif operator.sort == "read":
                yield Read()
            elif operator.sort == "wait":
                lane = operator.lane if operator.lane in ("all_gather", "reduce_scatter") else "exchange"
                yield Wait(lane, number=operator.result if lane == "exchange" else -1, everything=operator.result == EVERYTHING)
            elif operator.sort == "exchange":
                seconds, link = self.place.exchange(operator)
                if begun is not None:
                    begun = replace(begun, seconds=begun.seconds + seconds, link=link if link != "memory" else begun.link)
                else:
                    yield Start("exchange", seconds, link, number=operator.result, host_s=on.host_exchange_s)
                    if operator.result < 0:  # nothing waits for it by name: the host's next operator does
                        yield Wait("exchange")
            elif begun is not None:
                begun = replace(begun, seconds=begun.seconds + kernel_s(operator, on), host_s=begun.host_s + host_s)
            else:
                yield Compute(kernel_s(operator, on), host_s, host_s)
        if begun is not None:
            yield begun


def scaled(operator: Operator, weights: Mapping[int, float]) -> Operator:
    """An operator on allocations that are so many times as large."""
    if not weights:
        return operator
    reads = tuple((number, round(bytes * weights.get(number, 1.0))) for number, bytes in operator.reads)
    writes = tuple((number, round(bytes * weights.get(number, 1.0))) for number, bytes in operator.writes)
    times = weights.get(operator.reads[0][0], 1.0) if operator.exchange and operator.reads else 1.0
    return replace(operator, reads=reads, writes=writes, bytes=round(operator.bytes * times))


def total_s(items: Sequence[Item]) -> float:
    """Seconds of everything, one after another."""
    return sum(item.seconds for item in items if isinstance(item, Compute | Start))


def joined(items: Sequence[Item]) -> list[Item]:
    """The same items, computing that follows on computing as one."""
    found: list[Item] = []
    for item in items:
        if isinstance(item, Compute) and found and isinstance(before := found[-1], Compute):
            found[-1] = before + item
        else:
            found.append(item)
    return found
