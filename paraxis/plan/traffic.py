"""What a step's ranks say to each other, in closed form: which collectives among which groups, how often, on how many bytes.

This is for choosing where ranks run, before anything is traced; it is held to what a traced step exchanges by `tests/plan/test_place.py`.
Sources: tensor parallelism, Korthikanti et al. 2022, "Reducing activation recomputation" (arXiv:2205.05198, section 4.2.2); sharding,
Zhao et al. 2023, "PyTorch FSDP" (arXiv:2304.11277); experts, Lepikhin et al. 2020, "GShard" (arXiv:2006.16668); sequences in rings, Liu
et al. 2023, "Ring attention" (arXiv:2310.01889), and across heads, Jacobs et al. 2023, "DeepSpeed Ulysses" (arXiv:2309.14509); how often
a pipeline's path is paid, Yim et al. 2024, "Pipette" (DATE): once a round of as many micro-batches as there are pipeline ranks.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any, Literal

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from paraxis.base.axes import AXES, Degrees
from paraxis.base.dtypes import precision
from paraxis.base.layout import place
from paraxis.base.schedule import Schedule
from paraxis.base.seams import routed_layers
from paraxis.parallel.world import World
from paraxis.plan.cuts import dtype_of, speed_of
from paraxis.plan.hardware import Cluster, ExchangeKind
from paraxis.plan.memory import settle
from paraxis.plan.pretend import pretended
from paraxis.plan.trace import stage_output
from paraxis.train.check import context_kind
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta
from paraxis.train.stages import Stages, build_stages

# Groups of ranks that differ in one respect: place along tp, along cp, along fsdp and cp together (`shards`), among the ranks that share
# out the experts (`ep`), among those that have the same ones (`experts`), along dp.
GroupKind = Literal["tp", "cp", "shards", "ep", "experts", "dp"]
FIRST: dict[str, int] = {str(axis): 0 for axis in AXES}  # the first rank's place along each axis; all hold as much
FOLLOWED_BY_BACKWARD = ("gpipe", "bfs")  # schedules that run every forward, then every backward: the path is paid once


def groups_of(kind: GroupKind, degrees: Degrees) -> NDArray[np.int64]:
    """The ranks of every group of a kind: int64 [pipeline ranks, groups, ranks of a group], in the order of their ring."""
    d = degrees
    pp_dp_shard_tp = np.arange(d.ranks).reshape(d.pp, d.dp, d.shards, d.tp)
    shapes: dict[GroupKind, tuple[tuple[int, ...], int]] = {
        "tp": ((d.dp, d.shards, d.tp), 3),
        "cp": ((d.dp, d.fsdp, d.cp, d.tp), 3),
        "shards": ((d.dp, d.shards, d.tp), 2),
        "ep": ((d.dp, d.shards // d.ep, d.ep, d.tp), 3),
        "experts": ((d.dp, d.shards // d.ep, d.ep, d.tp), 2),
        "dp": ((d.dp, d.shards, d.tp), 1),
    }
    shape, axis = shapes[kind]
    return np.moveaxis(pp_dp_shard_tp.reshape(d.pp, *shape), axis, -1).reshape(d.pp, -1, shape[axis - 1])


@dataclass(frozen=True, kw_only=True)
class Collective:
    """A collective among every group of a kind: `bytes` as in `hardware.Exchange`, `times` how often each rank of the pipeline has it."""

    group: GroupKind
    exchange: ExchangeKind
    bytes: float
    times: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """A step's messages: collectives of `each` of its `micro_batches`, and those of the step `once`.

    A message of `message_bytes` passes between pipeline ranks over every one of `hops`, and its gradient back, `rounds` times one after
    another. `work_s` is what the step computes, in `dtype`, in seconds on the cluster's fastest devices. Collectives that computing hides
    count in full; whoever knows better scales their `times`.
    """

    each: tuple[Collective, ...] = ()
    once: tuple[Collective, ...] = ()
    micro_batches: int = 1
    message_bytes: float = 0.0
    hops: tuple[tuple[int, int], ...] = ()
    rounds: float = 0.0
    work_s: float = 0.0
    dtype: str = "bf16"


def traffic_of(config: RunConfig, cluster: Cluster, ranks: int) -> Traffic:
    """What `config` says on `ranks` devices of `cluster`, whose accelerators decide only what `auto` leaves open.

    Left out: what is small (norms, losses, counts), and a tied embedding's sum across a pipeline. `usp` counts as if heads crossed all of
    `cp`. Raises ConfigError for what cannot run.
    """
    degrees = config.parallel.degrees.filling(ranks)
    model = on_meta(config)
    stages = build_stages(config, degrees, model)
    on = cluster.accelerator_of(0)
    world = World(0, ranks, 0, pretended(on), dist.HashStore())
    step = _Step(settle(config, world, FIRST, stages, model), degrees, model, stages)
    count = getattr(config.model, "flops_per_token", None)
    flops = count(config.data.seq_len) * config.rows_per_step(degrees) * config.data.seq_len / ranks if count else 0.0
    schedule = stages.schedule if stages else None
    return Traffic(
        each=_joined(step.each()),
        once=_joined(step.once()),
        micro_batches=step.micro_batches,
        message_bytes=_message_bytes(config, degrees) if schedule else 0.0,
        hops=tuple((a, b) for a, b in pairwise(schedule.rank_of) if a != b) if schedule else (),
        rounds=_rounds(schedule),
        work_s=flops / max(speed_of(accelerator, dtype_of(config)) for accelerator in cluster.accelerators.values()),
        dtype=dtype_of(config),
    )


def _message_bytes(config: RunConfig, degrees: Degrees) -> float:
    """What one pipeline rank hands to the next, of a micro-batch."""
    shape, dtype = stage_output(config, degrees)
    return float(prod(shape) * dtype.itemsize)


def _rounds(schedule: Schedule | None) -> float:
    """How often a step waits for a message to pass the whole pipeline."""
    if schedule is None:
        return 0.0
    return 1.0 if schedule.name in FOLLOWED_BY_BACKWARD else float(max(1, schedule.micro_batches // schedule.ranks))


def _joined(found: Iterator[Collective]) -> tuple[Collective, ...]:
    """Those that say the same as one; none that says nothing."""
    times: dict[Any, NDArray[np.float64]] = {}
    for one in found:
        if one.bytes and any(one.times):
            key = one.group, one.exchange, one.bytes
            times[key] = times.get(key, np.zeros(len(one.times))) + one.times
    return tuple(Collective(group=g, exchange=e, bytes=b, times=tuple(t.tolist())) for (g, e, b), t in times.items())


@dataclass
class _Step:
    """One step of a settled configuration, as the collectives of its ranks."""

    config: RunConfig
    degrees: Degrees
    model: nn.Module
    stages: Stages | None

    def __post_init__(self) -> None:
        dtypes, d = precision(self.config.precision), self.degrees
        self.itemsize, self.reduced = dtypes.compute.itemsize, dtypes.reduce.itemsize
        self.micro_batches = self.config.rows_per_step(d) // (d.data_ranks * self.config.train.micro_batch)
        self.positions = self.config.train.micro_batch * self.config.data.seq_len // d.cp
        self.blocks: list[nn.Module] = list(self.model.blocks())  # type: ignore[operator]
        # What is recomputed is gathered again; only full recomputation goes on to scatter what it has made.
        self.again = 1 / self.config.remat.every if self.config.remat.mode in ("full", "selective") else 0.0
        self.scatters_again = self.again if self.config.remat.mode == "full" else 0.0
        reshard = self.config.parallel.reshard == "always"
        # A pipeline that keeps what it has gathered does so from a step's first forward to its last backward.
        self.gathers_once = d.pp > 1 and not reshard
        self.gatherings = 2 if reshard else 1

    def each(self) -> Iterator[Collective]:
        """Of a micro-batch."""
        if self.degrees.tp > 1:
            yield from self._tensors()
        if self.degrees.cp > 1:
            yield from self._sequences()
        if self.degrees.ep > 1:
            yield from self._experts()
        if not self.gathers_once:
            yield from self._parameters("all_gather", self.itemsize, self.gatherings)
        if self.config.parallel.reduce == "micro_batch":
            yield from self._gradients(added=False)

    def once(self) -> Iterator[Collective]:
        """Of a step."""
        if self.gathers_once:
            yield from self._parameters("all_gather", self.itemsize)
        if self.config.parallel.reduce != "micro_batch":
            yield from self._gradients(added=self.micro_batches > 1 or self.degrees.pp > 1)
        if self.degrees.dp > 1:
            for one in self._parameters("reduce_scatter", self.reduced, alone=True):
                parts = self.degrees.shards // (self.degrees.ep if one.group == "experts" else 1)
                yield Collective(group="dp", exchange="all_reduce", bytes=one.bytes / parts, times=one.times)

    def _gradients(self, added: bool) -> Iterator[Collective]:
        """To the ranks that store them: as they were computed, unless some were `added` to others before."""
        if self.config.parallel.travel == "computed" and not added:
            yield from self._parameters("all_to_all", self.itemsize)
        else:
            yield from self._parameters("reduce_scatter", self.reduced)

    def _tensors(self) -> Iterator[Collective]:
        """A block gathers the sequence twice and scatters it twice, forward and backward; the embedding and the head once each way."""
        held, bytes = self._blocks_of(), float(self.positions * self.config.model.width * self.itemsize)
        ends = np.zeros(self.degrees.pp)
        ends[self._rank_of(0)] += 1
        ends[self._rank_of(-1)] += 1
        if self.config.parallel.sequence_parallel:
            yield _collective("tp", "all_gather", bytes, held * (4 + 2 * self.again) + ends)
            yield _collective("tp", "reduce_scatter", bytes, held * (4 + self.scatters_again) + ends)
        else:
            yield _collective("tp", "all_reduce", bytes, held * (4 + self.scatters_again) + ends)

    def _sequences(self) -> Iterator[Collective]:
        """What attention moves along `cp`."""
        model, kind, held = self.config.model, context_kind(self.config, self.degrees), self._blocks_of()
        head = model.head_width * self.positions * self.itemsize / self.degrees.tp
        heads, kv_heads = model.heads, getattr(model, "kv_heads", model.heads)
        if kind in ("ulysses", "usp"):
            for own in (heads, kv_heads):  # queries and outputs, keys and values
                yield _collective("cp", "all_to_all", head * own, held * (4 + 2 * self.again))
        elif kind == "ring":  # keys and values pass all ranks but their own, their gradients, which are sums, that one too
            keys, ranks = head * kv_heads, self.degrees.cp
            yield _collective("cp", "p2p", keys, held * (2 * (ranks - 1) * (2 + self.again)))
            yield _collective("cp", "p2p", keys * max(1.0, 4 / self.itemsize), held * (2 * ranks))
        else:
            whole = head * kv_heads * self.degrees.cp
            yield _collective("cp", "all_gather", whole, held * (2 + 2 * self.again))
            yield _collective("cp", "reduce_scatter", whole, held * 2)

    def _experts(self) -> Iterator[Collective]:
        """Rows travel to their experts and back, forward and backward."""
        bytes = float(self.positions * self.config.model.routing.chosen * self.config.model.width * self.itemsize)
        routed = [bool(routed_layers(block)) for block in self.blocks]
        yield _collective("ep", "all_to_all", bytes, self._blocks_of(routed) * (4 + 2 * self.again))

    def _parameters(self, exchange: ExchangeKind, itemsize: int, gatherings: int = 1, alone: bool = False) -> Iterator[Collective]:
        """Every block's parameters by themselves, and what is beside blocks at either end, which is gathered once."""
        d = self.degrees
        for layer, entries in enumerate(self._entries_of_blocks()):
            for group, number in entries.items():
                if alone or (d.shards if group == "shards" else d.shards // d.ep) > 1:
                    yield _collective(group, exchange, float(number * itemsize), gatherings * self._of(self._holder(layer)))
        for stage, number in self._entries_of_ends().items():
            if alone or d.shards > 1:
                yield _collective("shards", exchange, float(number * itemsize), self._of(self._rank_of(stage)))

    def _of(self, pipeline_rank: int) -> NDArray[np.float64]:
        return np.eye(self.degrees.pp)[pipeline_rank]

    def _rank_of(self, stage: int) -> int:
        return self.stages.schedule.rank_of[stage] if self.stages else 0

    def _holder(self, layer: int) -> int:
        """The pipeline rank that has a layer."""
        return next(self._rank_of(s) for s, own in enumerate(self.stages.layers) if layer in own) if self.stages else 0

    def _blocks_of(self, counted: Sequence[bool] = ()) -> NDArray[np.float64]:
        """How many blocks each pipeline rank has, of those that are `counted`."""
        found = Counter(self._holder(n) for n in range(len(self.blocks)) if not counted or counted[n])
        return np.array([float(found[rank]) for rank in range(self.degrees.pp)])

    def _entries(self, module: nn.Module) -> dict[nn.Parameter, tuple[GroupKind, int]]:
        """How much of each parameter a rank computes with, and among which ranks it is sharded."""
        layout = getattr(module, "layout", {})
        found: dict[nn.Parameter, tuple[GroupKind, int]] = {}
        for name, parameter in module.named_parameters():
            placed = place(name, tuple(parameter.shape), layout, self.degrees, FIRST)
            found[parameter] = "experts" if placed.split_along("ep") else "shards", placed.computed.numel
        return found

    def _entries_of_blocks(self) -> list[Counter[GroupKind]]:
        known, found = self._entries(self.model), []
        for block in self.blocks:
            entries: Counter[GroupKind] = Counter()
            for parameter in block.parameters():
                entries[known[parameter][0]] += known[parameter][1]
            found.append(entries)
        return found

    def _entries_of_ends(self) -> Counter[int]:
        """By stage (0, -1): what a stage has beside its blocks."""
        found: Counter[int] = Counter()
        for stage in (0, -1) if self.stages else (0,):
            model = on_meta(self.config)
            if self.stages:
                model.keep(self.stages.layers[stage])  # type: ignore[operator]
            within = {parameter for block in model.blocks() for parameter in block.parameters()}  # type: ignore[operator]
            found[stage] = sum(number for parameter, (_, number) in self._entries(model).items() if parameter not in within)
        return found


def _collective(group: GroupKind, exchange: ExchangeKind, bytes: float, times: NDArray[np.float64]) -> Collective:
    return Collective(group=group, exchange=exchange, bytes=bytes, times=tuple(times.tolist()))
