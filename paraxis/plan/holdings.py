"""What a candidate's ranks hold, by formulas: which blocks each has, and its memory by category, before anything is traced."""

from collections.abc import Mapping
from functools import cached_property
from math import prod
from typing import Any

from torch import nn

from paraxis.base.dtypes import precision
from paraxis.base.partition import cut_stages
from paraxis.base.schedules import SCHEDULES, Plan
from paraxis.optim.build import state_bytes
from paraxis.plan.blocks import BlockKind, Matrix, Shape, read_shape
from paraxis.plan.candidates import Candidate
from paraxis.plan.hardware import Cluster
from paraxis.plan.record import WORKSPACE_BYTES
from paraxis.train.choose import WHOLE_GRADIENT_SHARE
from paraxis.train.config import RunConfig
from paraxis.train.stages import layer_costs

# What the allocator holds beyond what is in use, of that, until a trace of a like candidate has told.
FRAGMENTATION = 0.06


class Holdings:
    """What candidates for a run on `ranks` devices of `cluster` hold. `model` is the whole one, on the meta device."""

    def __init__(self, config: RunConfig, model: nn.Module, cluster: Cluster, ranks: int) -> None:
        self.config, self.model, self.cluster, self.ranks = config, model, cluster, ranks
        self.dtypes = precision(config.precision)
        self.peak_dtype = self.dtypes.products
        self.compute_dtype = {8: "fp64", 4: "fp32", 2: "bf16"}[self.dtypes.compute.itemsize]
        kinds = {cluster.accelerator_of(rank).name: cluster.accelerator_of(rank) for rank in range(ranks)}
        self.device = min(kinds.values(), key=lambda one: one.peak(self.compute_dtype) * one.product_share)
        self.usable = min(one.usable_bytes for one in kinds.values())
        self._known: dict[Any, Any] = {}

    def shape(self, candidate: Candidate) -> Shape:
        """The model as this candidate runs it: compiled or not."""
        return self._fused if self._compiles(candidate) else self._plain

    def _compiles(self, candidate: Candidate) -> bool:
        mode = self.config.compile
        return not candidate.splits_backward if mode == "auto" else mode == "inductor"

    @cached_property
    def _fused(self) -> Shape:
        return read_shape(self.config, self.model, fused=True)

    @cached_property
    def _plain(self) -> Shape:
        return read_shape(self.config, self.model, fused=False)

    def cuts(self, candidate: Candidate) -> list[range]:
        """The blocks of each stage, as training would cut them."""
        stages = candidate.degrees.pp * candidate.chunks
        given = self.config.parallel.cuts
        if ("cuts", stages) not in self._known:
            ends = [sum(given[: n + 1]) for n in range(len(given))]
            made = [range(end - size, end) for end, size in zip(ends, given, strict=True)]
            self._known["cuts", stages] = made if given and stages > 1 else cut_stages(layer_costs(self.config, self.model), stages)
        return self._known["cuts", stages]

    def tokens(self, candidate: Candidate) -> int:
        """Of a micro-batch on one rank, before tensor parallelism cuts the sequence."""
        return candidate.micro_batch * self.config.data.seq_len // candidate.degrees.cp

    def holder(self, candidate: Candidate) -> tuple[int, ...]:
        """Which pipeline rank holds each stage."""
        d = candidate.degrees
        return (0,) if d.pp == 1 else SCHEDULES[candidate.schedule].place(Plan(d.pp, candidate.micro_batches, candidate.chunks))

    def ends_of(self, candidate: Candidate) -> list[int]:
        return sorted({0, candidate.degrees.pp - 1})

    def _own(self, candidate: Candidate, rank: int) -> tuple[list[BlockKind], list[Matrix]]:
        """The blocks of a pipeline rank, and the parameters outside them."""
        shape, holder, cuts = self.shape(candidate), self.holder(candidate), self.cuts(candidate)
        blocks = [shape.kinds[shape.order[n]] for held, own in zip(holder, cuts, strict=True) if held == rank for n in own]
        first = shape.ends.first if holder[0] == rank else ()
        last = [one for one in shape.ends.last if not any(one is other for other in first)] if holder[-1] == rank else []
        return blocks, [*first, *last]

    def _entries(self, candidate: Candidate, rank: int) -> tuple[int, int, int, int]:
        """A pipeline rank's entries while whole: of its dense parameters, its experts, the largest block, and what is not in blocks."""
        d = candidate.degrees
        key = "entries", d.pp, d.tp, d.ep, candidate.schedule, candidate.chunks, rank, self._compiles(candidate)
        if key not in self._known:
            blocks, others = self._own(candidate, rank)
            counts = {id(kind): kind.entries(d.tp, d.ep) for kind in blocks}
            outside = sum(prod(one.cut(d.tp, 1)) for one in others)
            dense = outside + sum(counts[id(kind)][0] for kind in blocks)
            routed = sum(counts[id(kind)][1] for kind in blocks)
            self._known[key] = dense, routed, max((sum(one) for one in counts.values()), default=0), outside
        return self._known[key]

    def stored(self, candidate: Candidate, rank: int) -> float:
        d = candidate.degrees
        dense, routed, _, _ = self._entries(candidate, rank)
        return dense / d.shards + routed / (d.shards // d.ep)

    def memory(self, candidate: Candidate) -> Mapping[str, float]:
        """Bytes by category that the fullest rank of the pipeline's ends holds at its peak, fragmentation included."""
        c, d = candidate, candidate.degrees
        key = ("memory", d, c.micro_batch, min(c.micro_batches, 2), c.schedule, c.chunks, c.cp_kind, c.cp_ulysses, c.remat, c.reshard,
               c.micro_batches if c.schedule in ("gpipe", "bfs") else 0)  # fmt: skip
        if key not in self._known:
            found = [self._memory(candidate, rank) for rank in self.ends_of(candidate)]
            self._known[key] = max(found, key=lambda held: sum(held.values()))
        return self._known[key]

    def _memory(self, candidate: Candidate, rank: int) -> dict[str, float]:
        d, dtypes = candidate.degrees, self.dtypes
        compute, reduce, master = dtypes.compute.itemsize, dtypes.reduce.itemsize, dtypes.master.itemsize
        dense, routed, largest, outside = self._entries(candidate, rank)
        stored, whole = self.stored(candidate, rank), dense + routed
        at_once = min(outside + 2 * largest, whole) if self.frees(candidate) else whole
        gathered = at_once * compute if d.shards * d.dp > 1 or compute != master else 0
        each = self.reduces_each(candidate)
        earlier = (stored * master if each else whole * reduce) if candidate.micro_batches > 1 else 0.0
        first, last = self._activations(candidate, rank)
        # Backward begins with all activations, and ends with all gradients.
        begins, ends = (earlier, first), (max(earlier, stored * master), last)
        gradients, activations = max(begins, ends, key=sum)
        held = {
            "parameters": stored * master + gathered,
            "gradients": gradients,
            "optimizer": stored * state_bytes(self.config.optim, dtypes.master),
            "activations": activations,
            "communication": largest * (compute + reduce) if d.shards * d.dp > 1 else 0.0,
            "other": 2.0 * WORKSPACE_BYTES,
        }
        return {**held, "fragmentation": FRAGMENTATION * sum(held.values())}

    def frees(self, candidate: Candidate) -> bool:
        """Whether gathered parameters are let go between uses, as `train/choose.py` would have it; in a pipeline, of small stages."""
        d = candidate.degrees
        return candidate.reshard == "always" or (candidate.reshard == "auto" and d.pp == 1 and d.shards > 1)

    def reduces_each(self, candidate: Candidate) -> bool:
        """Whether gradients are reduced after each micro-batch, as `train/choose.py` would have it."""
        if self.config.parallel.reduce != "auto":
            return self.config.parallel.reduce == "micro_batch"
        entries = sum(sum(self._entries(candidate, rank)[:2]) for rank in self.ends_of(candidate)) / len(self.ends_of(candidate))
        return not candidate.splits_backward and entries * self.dtypes.reduce.itemsize > WHOLE_GRADIENT_SHARE * self.device.memory_bytes

    def _activations(self, candidate: Candidate, rank: int) -> tuple[float, float]:
        """As backward begins, what is kept for it and what the head, or a block, works with; as it ends, what a block does."""
        c, d = candidate, candidate.degrees
        key = "kept", d.pp, d.cp, d.tp, c.micro_batch, c.schedule, c.chunks, c.remat, rank, in_flight(c, rank), self._compiles(c)
        if key not in self._known:
            self._known[key] = self._first_and_last(candidate, rank)
        return self._known[key]

    def _first_and_last(self, candidate: Candidate, rank: int) -> tuple[float, float]:
        d, tokens = candidate.degrees, self.tokens(candidate)
        blocks, _ = self._own(candidate, rank)
        if not blocks:
            return 0.0, 0.0
        sizes = [self.kept(kind, candidate) * tokens for kind in blocks]
        block = 0.0 if candidate.remat == "none" else max(self._whole(kind, candidate) for kind in blocks) * tokens
        working = block
        if self.holder(candidate)[-1] == rank:
            rows, width = self.shape(candidate).ends.head
            chunk = self.config.train.tokens_with_logits(tokens) * rows / d.tp * (2 * self.dtypes.compute.itemsize + 4)
            working = max(working, chunk + rows / d.tp * width * (self.dtypes.compute.itemsize + 4))
        flying = in_flight(candidate, rank) / candidate.chunks
        return flying * sum(sizes) + working, block

    def _whole(self, kind: BlockKind, candidate: Candidate) -> float:
        # Each rank has the whole input of every module that is cut; without sequence parallelism also that of the norm before it.
        inputs = kind.gathers * (1 if self.config.parallel.sequence_parallel else 2)
        return cut_bytes(kind.whole, inputs * kind.input, candidate.degrees.tp)

    def kept(self, kind: BlockKind, candidate: Candidate) -> float:
        """Bytes that a block keeps of a token for backward, on average; of a budget and of `auto`, which keep more where it fits, the
        least."""
        whole, tp = self._whole(kind, candidate), candidate.degrees.tp
        if candidate.remat == "none":
            return whole
        least = kind.costly if candidate.remat == "selective" else kind.input
        least = cut_bytes(least, 0.0 if self.config.parallel.sequence_parallel else kind.input, tp)
        every = self.every(candidate)
        return least / every + whole * (1 - 1 / every)

    def every(self, candidate: Candidate) -> int:
        """One of how many blocks computes activations again."""
        return self.config.remat.every if candidate.remat == self.config.remat.mode else 1


def cut_bytes(bytes: float, whole: float, tp: int) -> float:
    """What a rank has of `bytes`, of which up to `whole` are not cut."""
    whole = min(bytes, whole)
    return whole + (bytes - whole) / tp


def in_flight(candidate: Candidate, rank: int) -> int:
    """The most micro-batches times stages whose activations a pipeline rank keeps, as `base.schedule.most_in_flight` counts them."""
    pp, chunks, number = candidate.degrees.pp, candidate.chunks, candidate.micro_batches
    total = number * chunks
    if pp == 1:
        return 1
    return {
        "gpipe": total,
        "bfs": total,
        "1f1b": min(pp - rank, number),
        "interleaved": min(2 * (pp - rank - 1) + (chunks - 1) * pp + 1, total),
        "zbh1": min(pp, number),
        "zbv": min(2 * pp, total),
        "dualpipev": min(2 * pp + 1, total),
    }[candidate.schedule]
