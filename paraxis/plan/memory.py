"""The most memory that one rank holds during a training step, from a trace of a few blocks and micro-batches.

Blocks are alike, and so are micro-batches: what one adds to the bytes held, and how much more it holds meanwhile, is the same for every
one like it. The step of the whole model is put together of such pieces, each beginning with what the one before has left. Only then the
maximum is taken: taken of few blocks it would be wrong, as it moves to another place.
"""

import functools
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch.distributed as dist
from torch import nn

from paraxis.base.axes import AXES, Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.schedule import Action, Schedule, write_csv
from paraxis.parallel.world import World
from paraxis.plan.pieces import FEW, TYPICAL, Held, Part, Piece, cut, extended, stored
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.record import CATEGORIES, ROUND, Trace
from paraxis.plan.steady import StandIn, shortened, stand_ins
from paraxis.plan.trace import stage_output, trace_step
from paraxis.train.choose import build_strategy
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta
from paraxis.train.stages import Stages, build_stages

UNBALANCED = 0.002  # of what a step finds may be missing or left over when it is put together of pieces
KEPT_TRACES = 64  # of the last predictions, for those that differ in what a trace does not depend on


@dataclass(frozen=True)
class Peak:
    """The most a rank holds, in bytes by category, and when: a phase's kind, and of a block's the stage and number on this rank.

    `reserved` is what the caching allocator then has of the device.
    """

    held: dict[str, int]
    kind: str
    stage: int
    block: int
    reserved: int | None = None

    @property
    def bytes(self) -> int:
        return sum(self.held.values())


@dataclass(frozen=True, eq=False)
class Sketch:
    """One rank's step: the trace `base` of a step with `traced` blocks in each of the rank's stages and a few micro-batches.

    `layers` are those that the stages really have; the first `leading` blocks are not like the others. In a pipeline, the traced rank is
    number `like` of `short`, and the rank meant is number `place` of `whole`; without, there are `batches` micro-batches.
    """

    base: Trace
    layers: Sequence[int]
    traced: Sequence[int]
    leading: int
    batches: int = 1
    message: int = 0
    whole: Schedule | None = None
    short: Schedule | None = None
    place: int = 0
    like: int = 0

    def of(self, place: int, layers: Sequence[int]) -> "Sketch":
        """Another rank of the pipeline, which does the same with other numbers of blocks."""
        return replace(self, place=place, layers=layers)

    @property
    def extra(self) -> list[int]:
        return [layers - few for layers, few in zip(self.layers, self.traced, strict=True)]

    @property
    def typical(self) -> int:
        return self.leading + TYPICAL

    @functools.cached_property
    def pieces(self) -> dict[Part, list[Piece]]:
        return cut(self.base, self.typical, [1 + more for more in self.extra])

    @functools.cached_property
    def stand_ins(self) -> dict[Action, StandIn]:
        if self.whole is None or self.short is None:
            return {}
        return stand_ins(self.whole, self.place, self.short, self.like)

    def parts(self) -> list[tuple[Part, Part]]:
        """The parts of the whole step in order, each with the traced one that stands for it."""
        if self.whole is None:
            few = sum(isinstance(part, int) for part in self.pieces)
            middle: list[tuple[Part, Part]] = [(n, stand_in(n, self.batches, few)) for n in range(self.batches)]
        else:
            middle = [(action, self.stand_ins[action].action) for action in self.whole.actions[self.place]]
        return [("head", "head"), *middle, ("tail", "tail")]

    @functools.cached_property
    def step(self) -> "Step":
        """What the whole step holds, piece by piece."""
        parts = self.parts()
        known = {like: list(extended(self.pieces.get(like, ()), self.typical, self.extra)) for like in {like for _, like in parts}}
        message = np.array([self.message * (category == "communication") for category in CATEGORIES])
        sent = np.array([self.message * (category == "activations") for category in CATEGORIES])
        rows: list[tuple[Part, Piece, int]] = []
        starts: list[Held] = []
        level = stored(self.base, self.typical, self.extra)
        for part, like in parts:
            differs = self.stand_ins.get(part) if isinstance(part, Action) else None
            if differs is not None and differs.room:
                level = level + differs.room * message
            for piece, block in known[like]:
                rows.append((part, piece, block))
                starts.append(level)
                level = level + piece.change
            if differs is not None and differs.lets_go:
                level = level - differs.lets_go * sent
        return Step(rows, np.array(starts), level)

    def peak(self) -> Peak:
        """Where the step holds the most. What is reserved beyond that, in holes and page ends, is taken to be what it is in the trace."""
        found, traced = self.step.peak(), self.as_traced.step.peak()
        return replace(found, reserved=found.bytes + self.base.reserved - traced.bytes)

    def runs_in(self, usable: float) -> bool:
        """Whether the step runs at all in so many bytes: where it needs them, the allocator gives back what it has reserved in vain."""
        return self.base.fits(usable - (self.step.peak().bytes - self.as_traced.step.peak().bytes))

    @functools.cached_property
    def as_traced(self) -> "Sketch":
        """The traced step itself."""
        few = sum(isinstance(part, int) for part in self.pieces)
        return replace(self, layers=self.traced, batches=few, whole=self.short, place=self.like)


def stand_in(batch: int, batches: int, traced: int) -> int:
    """Which traced micro-batch stands for one of `batches`, without a pipeline: the first, the last, or one between."""
    return traced - 1 if batch == batches - 1 else min(batch, max(0, traced - 2))


@dataclass(frozen=True, eq=False)
class Step:
    """The whole step: each piece with its part and the number of its block, what is held when it starts, and what is left in the end."""

    rows: Sequence[tuple[Part, Piece, int]]
    starts: Held
    left: Held

    @property
    def balanced(self) -> bool:
        """Whether the step leaves what it found, as every step does: else some pieces were put together that do not belong together."""
        return bool(np.abs(self.left - self.starts[0]).sum() <= UNBALANCED * self.starts[0].sum())

    def fullest(self) -> Held:
        """What each piece holds at its fullest."""
        return self.starts + np.array([piece.most for _, piece, _ in self.rows])

    def peak(self) -> Peak:
        held = self.fullest()
        at = int(held.sum(1).argmax())
        _, piece, block = self.rows[at]
        in_block = piece.in_block
        return Peak(dict(zip(CATEGORIES, held[at].tolist(), strict=True)), piece.kind, piece.stage, block if in_block else -1)


def refuse_untraceable(config: RunConfig, model: nn.Module) -> None:
    """Raises ConfigError for a model (on the meta device) that says too little of itself for this run to be traced."""
    name = type(model).__name__
    if not hasattr(model, "blocks"):
        raise ConfigError(
            f"a run of {name} cannot be planned: it has no blocks(), of which a few are traced for all; see docs/how-to-add-a-model.md"
        )
    if config.parallel.pp > 1 and not hasattr(config.model, "width"):
        raise ConfigError(
            f"parallel.pp={config.parallel.pp} cannot be planned: {type(config.model).__name__} has no field `width`, the size of what a "
            f"stage of {name} hands to the next; add it, or use pp=1"
        )


def sketch(config: RunConfig, ranks: int, rank: int, device: PretendedDevice, *, exact: bool = False) -> Sketch:
    """Traces rank `rank` of `ranks`; all of its blocks and micro-batches if `exact`. Raises ConfigError for what cannot run."""
    degrees = config.parallel.degrees.filling(ranks)
    whole = whole_model(config)
    refuse_untraceable(config, whole)
    stages = build_stages(config, degrees, whole)
    at = coordinates(rank, degrees)
    settled = settle(config, World(rank, ranks, 0, device, dist.HashStore()), at, stages, whole)
    layers = [len(own) for own in stages.layers] if stages else [len(whole.blocks())]  # type: ignore[arg-type,operator]
    own = [n for n, holder in enumerate(stages.schedule.rank_of) if holder == at["pp"]] if stages else [0]
    held = [layers[stage] for stage in own]
    leading = different_at_first(whole)
    mixed = config.remat.every > 1 or config.remat.mode in ("budget", "auto")  # blocks do not all keep the same
    named = hasattr(config.model, "layers")  # so that fewer can be asked for
    small = layers
    if named and not (exact or mixed or leading is None or (leading and stages)):
        small = [min(count, leading + FEW) if stage in own else 1 for stage, count in enumerate(layers)]
    batches = config.rows_per_step(degrees) // (degrees.data_ranks * config.train.micro_batch)
    message = _message(config, degrees) if stages else 0
    few = shortened(stages.schedule, [at["pp"]]) if stages and not exact else None
    for counts, short in dict.fromkeys([(tuple(small), few), (tuple(small), None), (tuple(layers), None)]):
        schedule = short or (stages.schedule if stages else None)
        number = schedule.micro_batches if schedule else batches if exact else min(batches, 3)
        reduced = with_layers(settled, counts) if stages or counts != tuple(layers) else settled
        base = _traced(with_micro_batches(reduced, number), schedule, ranks, rank, device)
        found = Sketch(
            base=base,
            layers=held,
            traced=[counts[stage] for stage in own],
            leading=leading or 0,
            batches=batches,
            message=message,
            whole=stages.schedule if stages else None,
            short=schedule,
            place=at["pp"],
            like=at["pp"],
        )
        if found.step.balanced:
            break
    return found


def _message(config: RunConfig, degrees: Degrees) -> int:
    """Bytes that hold what one stage hands to the next."""
    shape, dtype = stage_output(config, degrees)
    return -(-math.prod(shape) * dtype.itemsize // ROUND) * ROUND


def with_micro_batches(config: RunConfig, number: int) -> RunConfig:
    """The same run with so many micro-batches a step."""
    return replace(config, train=replace(config.train, global_tokens=0), parallel=replace(config.parallel, microbatches=number))


_TRACES: dict[object, Trace] = {}


def _traced(config: RunConfig, schedule: Schedule | None, ranks: int, rank: int, device: PretendedDevice) -> Trace:
    """The trace of a step, of a pipeline of one that does what `schedule` says; the last ones are remembered."""
    named = config if schedule is None else replace(config, parallel=replace(config.parallel, schedule="auto"))
    key = replace(named, name=""), schedule and (schedule.rank_of, schedule.actions), ranks, rank, device
    if not _hashable(key):
        return _made(config, schedule, ranks, rank, device)
    if (found := _TRACES.pop(key, None)) is None:
        found = _made(config, schedule, ranks, rank, device)
    _TRACES[key] = found
    if len(_TRACES) > KEPT_TRACES:
        del _TRACES[next(iter(_TRACES))]
    return found


def _made(config: RunConfig, schedule: Schedule | None, ranks: int, rank: int, device: PretendedDevice) -> Trace:
    with tempfile.TemporaryDirectory() as folder:
        if schedule is not None:
            path = Path(folder) / "schedule.csv"
            write_csv(schedule, path)
            config = replace(config, parallel=replace(config.parallel, schedule=str(path)))
        return trace_step(config, ranks, rank, device)


def _hashable(key: object) -> bool:
    """Whether it can be remembered: a model's configuration of one's own may have a list in it."""
    try:
        hash(key)
    except TypeError:
        return False
    return True


def whole_model(config: RunConfig) -> nn.Module:
    """The whole model on the meta device, to be looked at only: the last ones are remembered."""
    return _built(config.model) if _hashable(config.model) else on_meta(config)


@functools.lru_cache(maxsize=4)
def _built(model: Any) -> nn.Module:
    return on_meta(RunConfig(model=model))


def coordinates(rank: int, degrees: Degrees) -> dict[str, int]:
    """A rank's index along each axis, as the mesh has it."""
    return {str(axis): int(place) for axis, place in zip(AXES, np.unravel_index(rank, [getattr(degrees, a) for a in AXES]), strict=True)}


def settle(config: RunConfig, world: World, at: dict[str, int], stages: Stages | None, model: nn.Module) -> RunConfig:
    """The configuration without what `auto` would choose by the model's size."""
    strategy = build_strategy(config, world, at, stages, model)
    reshard, reduce = "always" if strategy.reshard else "never", "micro_batch" if strategy.reduce_each_micro_batch else "step"
    parallel = replace(config.parallel, reshard=reshard, reduce=reduce, travel="computed" if strategy.half_travels else "reduced")
    return replace(config, compile=strategy.compile, parallel=parallel)


def different_at_first(model: nn.Module) -> int | None:
    """How many first blocks are not like the last one; None where blocks are mixed otherwise."""
    blocks: list[nn.Module] = list(model.blocks())  # type: ignore[operator]
    kinds = [{name: p.shape for name, p in block.named_parameters()} for block in blocks]
    leading = next((n for n, kind in enumerate(kinds) if kind == kinds[-1]), len(kinds))
    return leading if all(kind == kinds[-1] for kind in kinds[leading:]) else None


def with_layers(config: RunConfig, counts: Sequence[int]) -> RunConfig:
    """The same run with so many layers in each stage. Where that is all of them, the model's configuration need not name them."""
    whole = getattr(config.model, "layers", sum(counts)) == sum(counts)
    model = config.model if whole else replace(config.model, layers=sum(counts))
    return replace(config, model=model, parallel=replace(config.parallel, cuts=tuple(counts) if len(counts) > 1 else ()))
