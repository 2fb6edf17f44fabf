"""Times of a candidate by formulas, from what its blocks take for a token: what a search prunes with, and simulates.

Products, attention and traffic are priced by the accelerator's tables as traced operators are; exchanges by the cluster's links, each on
the ranks that it has on devices in their order. On unlike devices the slowest counts everywhere. Every figure here is an estimate: what
is proposed in the end is traced (`predict.py`).
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod, sqrt

from paraxis.optim.build import state_bytes
from paraxis.plan.blocks import BlockKind, Multiplied
from paraxis.plan.candidates import Candidate
from paraxis.plan.hardware import ExchangeKind
from paraxis.plan.holdings import Holdings, cut_bytes
from paraxis.train.choose import ALL_TO_ALL_RANKS


@dataclass(frozen=True)
class BlockTime:
    """Seconds of a block for one micro-batch, computing and in exchanges that computing waits for: forward, the gradient of its input
    (with what is computed again), that of its weights; and FSDP's gathering and reducing of its parameters."""

    forward_s: float
    forward_exchange_s: float
    input_s: float
    input_exchange_s: float
    weights_s: float
    gather_s: float
    reduce_s: float

    @property
    def forward(self) -> float:
        return self.forward_s + self.forward_exchange_s

    @property
    def input(self) -> float:
        return self.input_s + self.input_exchange_s


@dataclass(frozen=True)
class StageTime:
    """A stage's blocks, with how many of each in a row, and seconds of what follows the last block: the head and the loss."""

    blocks: Sequence[tuple[BlockTime, int]]
    head: BlockTime | None

    @cached_property
    def forward_s(self) -> float:
        return sum(one.forward * n for one, n in self.parts)

    @cached_property
    def input_s(self) -> float:
        return sum(one.input * n for one, n in self.parts)

    @cached_property
    def weights_s(self) -> float:
        return sum(one.weights_s * n for one, n in self.parts)

    @cached_property
    def parts(self) -> list[tuple[BlockTime, int]]:
        return [*self.blocks, *([(self.head, 1)] if self.head else [])]


class Costs(Holdings):
    """What candidates for a run on `ranks` devices of `cluster` take, besides memory."""

    def stages(self, candidate: Candidate) -> list[StageTime]:
        """Every stage's times; one stage without a pipeline."""
        d = candidate.degrees
        key = ("stages", d, candidate.micro_batch, candidate.chunks, candidate.cp_kind, candidate.cp_ulysses, candidate.remat,
               self._compiles(candidate))  # fmt: skip
        if key not in self._known:
            cuts = self.cuts(candidate)
            self._known[key] = [self._stage(candidate, own, n + 1 == len(cuts)) for n, own in enumerate(cuts)]
        return self._known[key]

    def _stage(self, candidate: Candidate, own: range, last: bool) -> StageTime:
        shape = self.shape(candidate)
        counted: list[tuple[BlockTime, int]] = []
        for number in own:
            time = self.block(candidate, shape.order[number])
            if counted and counted[-1][0] is time:
                counted[-1] = time, counted[-1][1] + 1
            else:
                counted.append((time, 1))
        return StageTime(counted, self._head(candidate) if last else None)

    def block(self, candidate: Candidate, kind: int) -> BlockTime:
        """The times of a block of that kind."""
        c, d = candidate, candidate.degrees
        key = "block", kind, d.dp, d.fsdp, d.cp, d.tp, d.ep, c.micro_batch, c.cp_kind, c.cp_ulysses, c.remat, self._compiles(c)
        if key not in self._known:
            gather, reduce = self._sharding_s(c, *self.shape(c).kinds[kind].entries(d.tp, d.ep))
            self._known[key] = replace(self._computed(c, kind), gather_s=gather, reduce_s=reduce)
        return self._known[key]

    def _computed(self, candidate: Candidate, kind: int) -> BlockTime:
        """Without the sharing out of parameters."""
        c, d = candidate, candidate.degrees
        key = "computed", kind, d.cp, d.tp, d.ep, c.micro_batch, c.cp_kind, c.cp_ulysses, c.remat, self._compiles(c)
        if key not in self._known:
            self._known[key] = self._block(candidate, self.shape(candidate).kinds[kind])
        return self._known[key]

    def _block(self, candidate: Candidate, kind: BlockKind) -> BlockTime:
        tokens = self.tokens(candidate)
        products = [self._product(one, tokens, candidate) for one in kind.products]
        attended = self._attention_s(kind, tokens, candidate, backward=False)
        moved = self.device.moving_s(self.moved(kind, candidate) * tokens) if kind.moved else 0.0
        forward = sum(one[0] for one in products) + attended + moved
        sent, sent_back = self._exchanges(candidate, kind, attended)
        every = self.every(candidate)
        again = {"full": (forward / every, sent / every), "selective": (moved / every, sent / 2 / every)}.get(candidate.remat, (0.0, 0.0))
        back = sum(one[1] for one in products) + self._attention_s(kind, tokens, candidate, backward=True) + 2 * moved
        return BlockTime(forward, sent, back + again[0], sent_back + again[1], sum(one[2] for one in products), 0.0, 0.0)

    def moved(self, kind: BlockKind, candidate: Candidate) -> float:
        """Bytes of a token that a rank's cheap kernels move. Without sequence parallelism each rank has the norm before every module that
        is cut, and the sum after it, of the whole stream: two numbers read and two written, merged to one kernel."""
        return cut_bytes(kind.moved, 0.0 if self.config.parallel.sequence_parallel else 4 * kind.gathers * kind.input, candidate.degrees.tp)

    def _product(self, one: Multiplied, tokens: int, candidate: Candidate) -> tuple[float, float, float]:
        """Forward, gradient of the input, gradient of the weight."""
        d, on = candidate.degrees, self.device
        dtype = self.peak_dtype if one.matrix and self.peak_dtype in on.peak_flops else self.compute_dtype
        if one.matrix is None:
            side = max(1, round(sqrt(one.flops / 2)))
            alone = on.product_s(self.compute_dtype, tokens, side, side)
            return alone, alone, alone
        *stacked, n, k = one.matrix.cut(d.tp, d.ep)
        batch = prod(stacked)
        rows = max(1, round(tokens * one.flops / 2 / prod(one.matrix.shape[-2:]) / batch)) if stacked else tokens
        return (
            on.product_s(dtype, rows, n, k, batch),
            on.product_s(dtype, rows, k, n, batch),
            on.product_s(dtype, n, k, rows, batch),
        )

    def _attention_s(self, kind: BlockKind, tokens: int, candidate: Candidate, *, backward: bool) -> float:
        if not kind.attention_flops:
            return 0.0
        model, on, length = self.config.model, self.device, self.config.data.seq_len
        heads, width = getattr(model, "heads", 0), getattr(model, "head_width", 0)
        if heads and width:
            heads, cp = max(1, heads // candidate.degrees.tp), candidate.degrees.cp
            return on.attention_s(self.compute_dtype, candidate.micro_batch, heads, width, length // cp, length, backward=backward)
        ideal = kind.attention_flops * tokens / candidate.degrees.tp / on.peak(self.compute_dtype)
        return ideal * (2.5 if backward else 1) / on.attention_share

    def exchange_s(self, kind: ExchangeKind, bytes: float, ranks: int, stride: int) -> float:
        """An exchange among so many ranks, every `stride`-th one."""
        if ranks < 2:
            return 0.0
        key = kind, int(bytes), ranks, stride
        if key not in self._known:
            self._known[key] = self.cluster.exchange_s(kind, bytes, range(0, ranks * stride, stride))
        return self._known[key]

    def link(self, ranks: int, stride: int) -> str:
        """Whether such a group stays within a host."""
        return "inside" if self.cluster.host_of((ranks - 1) * stride) == self.cluster.host_of(0) else "across"

    def _exchanges(self, candidate: Candidate, kind: BlockKind, attended: float) -> tuple[float, float]:
        """Seconds of a block's exchanges in forward and in backward that nothing hides: of tp, cp and ep."""
        d, tokens = candidate.degrees, self.tokens(candidate)
        stream = kind.input * tokens
        whole = self.config.parallel.sequence_parallel
        kinds: Sequence[ExchangeKind] = ("all_gather", "reduce_scatter") if whole else ("all_reduce",)
        tensor = kind.gathers * sum(self.exchange_s(one, stream, d.tp, 1) for one in kinds)
        routed = 0.0
        if kind.routed and d.ep > 1:
            expert = next(one for one in kind.products if one.matrix and one.matrix.experts)
            assert expert.matrix is not None
            chosen = expert.flops / 2 / prod(expert.matrix.shape[-2:])
            routed = 2 * self.exchange_s("all_to_all", stream * chosen, d.ep, d.tp)
        forward, backward = self._context_s(candidate, attended)
        return tensor + routed + forward, tensor + routed + backward

    def _context_s(self, candidate: Candidate, attended: float) -> tuple[float, float]:
        d, model = candidate.degrees, self.config.model
        if d.cp == 1:
            return 0.0, 0.0
        width = getattr(model, "width", 0)
        heads, one = getattr(model, "heads", 1), getattr(model, "head_width", 0) or width // max(1, getattr(model, "heads", 1))
        size = self.tokens(candidate) * one * self.dtypes.compute.itemsize / d.tp
        queries, keys = size * heads, 2 * size * getattr(model, "kv_heads", heads)
        if candidate.cp_kind == "allgather":
            gathered = self.exchange_s("all_gather", keys * d.cp, d.cp, d.tp)
            return gathered, gathered + self.exchange_s("reduce_scatter", keys * d.cp, d.cp, d.tp)
        inner = candidate.cp_ulysses or (d.cp if candidate.cp_kind == "ulysses" else 1)
        swapped = self.exchange_s("all_to_all", 2 * queries + keys, inner, d.tp)
        ring = d.cp // inner
        message = self.exchange_s("p2p", keys, 2, inner * d.tp) if ring > 1 else 0.0
        # A piece of keys travels while the one before it is attended to; in backward, with its gradient.
        forward = (ring - 1) * max(0.0, message - attended / ring)
        backward = (ring - 1) * max(0.0, 2 * message - 2.5 * attended / ring)
        return swapped + forward, swapped + backward

    def _sharding_s(self, candidate: Candidate, dense: int, routed: int) -> tuple[float, float]:
        """Gathering and reducing parameters that have so many entries on a rank, outside experts and in them."""
        d, gather, reduce = candidate.degrees, 0.0, 0.0
        for entries, ways, stride in ((dense, d.shards, d.tp), (routed, d.shards // d.ep, d.tp * d.ep)):
            if entries:
                gather += self.exchange_s("all_gather", entries * self.dtypes.compute.itemsize, ways, stride)
                sums = self.exchange_s("reduce_scatter", entries * self.dtypes.reduce.itemsize, ways, stride)
                if self.config.parallel.travel != "reduced" and d.shards <= ALL_TO_ALL_RANKS:
                    sums = min(sums, self.exchange_s("all_to_all", entries * self.dtypes.compute.itemsize, ways, stride))
                reduce += sums
                reduce += self.exchange_s("all_reduce", entries * self.dtypes.reduce.itemsize / ways, d.dp, d.shards * d.tp)
        return gather, reduce

    def _head(self, candidate: Candidate) -> BlockTime:
        """The last norm is left out: the head and the loss are by far most."""
        d, on, tokens = candidate.degrees, self.device, self.tokens(candidate)
        rows, width = self.shape(candidate).ends.head
        if not rows or not width:
            return BlockTime(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        n = rows // d.tp
        logits = on.moving_s(tokens * n * (self.dtypes.compute.itemsize + 4.0))
        gather, reduce = self._sharding_s(candidate, sum(prod(one.cut(d.tp, 1)) for one in self.shape(candidate).ends.last), 0)
        return BlockTime(
            on.product_s(self.compute_dtype, tokens, n, width) + logits,
            0.0,
            on.product_s(self.compute_dtype, tokens, width, n) + logits,
            0.0,
            on.product_s(self.compute_dtype, n, width, tokens),
            gather,
            reduce,
        )

    def message_s(self, candidate: Candidate) -> float:
        """What one pipeline stage hands to the next."""
        d = candidate.degrees
        cut = d.tp if self.config.parallel.sequence_parallel else 1
        bytes = self.tokens(candidate) // cut * getattr(self.config.model, "width", 0) * self.dtypes.compute.itemsize
        return self.exchange_s("p2p", bytes, 2, self.ranks // d.pp)

    def optimizer_s(self, candidate: Candidate) -> float:
        """Reads gradients twice, for their norm too, and parameters and states once; writes these."""
        bytes = 4 * self.dtypes.master.itemsize + 2 * state_bytes(self.config.optim, self.dtypes.master)
        return self.device.moving_s(bytes * max(self.stored(candidate, r) for r in self.ends_of(candidate)))

    def least_s(self, candidate: Candidate) -> float:
        """Less than which `bound_s` never is, at once: the work of all stages, shared out evenly."""
        c, d = candidate, candidate.degrees
        key = "least", d.tp, d.cp, d.ep, c.micro_batch, c.cp_kind, c.cp_ulysses, c.remat, self._compiles(c)
        if key not in self._known:
            shape = self.shape(c)
            times = [self._computed(c, kind) for kind in range(len(shape.kinds))]
            head = self._head(c)
            work = sum(times[kind].forward + times[kind].input + times[kind].weights_s for kind in shape.order)
            self._known[key] = work + head.forward + head.input + head.weights_s
        return c.micro_batches * self._known[key] / d.pp

    def bound_s(self, candidate: Candidate) -> float:
        """Less than which no simulation of the candidate takes: a rank waits for the first input of its first stage, does its own work,
        and where backwards are whole, waits until the last gradient that it hands on has reached the first stage."""
        c, d = candidate, candidate.degrees
        key = ("bound", d.pp, d.tp, d.cp, d.ep, d.shards * d.dp, c.micro_batch, c.micro_batches, c.schedule, c.chunks, c.cp_kind,
               c.cp_ulysses, c.remat)  # fmt: skip
        if key not in self._known:
            self._known[key] = self._bound_s(candidate)
        return self._known[key]

    def _bound_s(self, candidate: Candidate) -> float:
        times, holder, number = self.stages(candidate), self.holder(candidate), candidate.micro_batches
        ahead = {rank: holder.index(rank) for rank in range(candidate.degrees.pp)}
        work = [0.0] * candidate.degrees.pp
        for rank, time in zip(holder, times, strict=True):
            work[rank] += number * (time.forward_s + time.input_s + time.weights_s)
        found = 0.0
        for rank, first in ahead.items():
            before = times[:first]
            fill = sum(time.forward_s for time in before)
            drain = 0.0 if candidate.splits_backward else sum(time.input_s + time.weights_s for time in before)
            found = max(found, fill + work[rank] + drain)
        return found
