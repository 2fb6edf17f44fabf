"""The most memory that one rank holds during a training step, from traces of a few blocks.

Blocks are alike, so at a given point of a step the bytes held are a linear function of how many blocks each of the rank's stages has.
They are fitted point by point, for the first and last blocks of every pass, and put together to the step of the whole model; blocks
between are linear in their place. Only then the maximum is taken: fitted itself, it would be wrong where it moves to another place.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray
from torch import nn

from paraxis.base.axes import AXES, Degrees
from paraxis.base.schedule import most_in_flight
from paraxis.parallel.world import World
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.trace import CATEGORIES, Trace, trace_step
from paraxis.train.choose import build_strategy
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta
from paraxis.train.stages import Stages, build_order, build_stages

Held = NDArray[np.int64]  # bytes by category (columns, as CATEGORIES) after each event (rows)

EDGE = 2  # the first and the second block of a pass, and likewise its last ones, are fitted by themselves


@dataclass(frozen=True)
class Pass:
    """What is held while a stage's blocks run one after another (forward or backward), or in one phase outside blocks."""

    kind: str
    stage: int
    pieces: Sequence[Held]


@dataclass(frozen=True)
class Peak:
    """The most a rank holds, in bytes by category, and when: a phase's kind, and of a block's the stage and number on this rank.

    `reserved` is what the caching allocator then has of the device; None where not every block was traced.
    """

    held: dict[str, int]
    kind: str
    stage: int
    block: int
    reserved: int | None = None

    @property
    def bytes(self) -> int:
        return sum(self.held.values())


def exact_peak(config: RunConfig, ranks: int, rank: int, device: PretendedDevice) -> Peak:
    """The peak of the whole model's step. Raises ConfigError for what cannot run."""
    return sketch(config, ranks, rank, device, exact=True).peak()


def predict_peak(config: RunConfig, ranks: int, rank: int, device: PretendedDevice) -> Peak:
    """As `exact_peak`, from steps of a few blocks where blocks are alike. Raises ConfigError for what cannot run."""
    return sketch(config, ranks, rank, device).peak()


@dataclass(frozen=True)
class Sketch:
    """One rank's step, traced with few blocks: `base`, and `more[s]` with one block more in the rank's s-th stage.

    `layers` are those that the rank's stages really have, `traced` those in `base`; the first `leading` blocks are not like the others.
    """

    base: Trace
    more: Mapping[int, Trace]
    layers: Sequence[int]
    traced: Sequence[int]
    leading: int

    def step(self) -> list[Pass]:
        """What the whole model's step holds."""
        return extended(passes(self.base), {stage: passes(trace) for stage, trace in self.more.items()}, self.layers, self.leading + EDGE)

    def peak(self) -> Peak:
        """Where the step holds the most. What is reserved beyond that, in holes and page ends, is taken to be what it is in `base`."""
        found = peak(self.step())
        return replace(found, reserved=found.bytes + self.base.reserved - peak(passes(self.base)).bytes)


def sketch(config: RunConfig, ranks: int, rank: int, device: PretendedDevice, *, exact: bool = False) -> Sketch:
    """Traces rank `rank` of `ranks`; all of its blocks if `exact`, or where blocks differ. Raises ConfigError for what cannot run."""
    degrees = config.parallel.degrees.filling(ranks)
    whole = on_meta(config)
    stages = build_stages(config, degrees, whole)
    at = coordinates(rank, degrees)
    settled = settle(config, World(rank, ranks, 0, device, dist.HashStore()), at, stages, whole)
    settled = with_fewer_micro_batches(settled, degrees, stages)
    layers = [len(own) for own in stages.layers] if stages else [len(whole.blocks())]  # type: ignore[arg-type,operator]
    own = [n for n, holder in enumerate(stages.schedule.rank_of) if holder == at["pp"]] if stages else [0]
    held = [layers[stage] for stage in own]
    leading = different_at_first(whole)
    mixed = config.remat.every > 1 or config.remat.mode in ("budget", "auto")  # blocks do not all keep the same
    if exact or mixed or leading is None or (leading and stages):
        counts = layers if stages else None
        return Sketch(trace_step(with_layers(settled, counts) if counts else settled, ranks, rank, device), {}, held, held, leading or 0)
    assert leading is not None
    few = leading + 2 * EDGE - 1
    small = [min(count, few) if stage in own else 1 for stage, count in enumerate(layers)]

    def traced(counts: Sequence[int]) -> Trace:
        return trace_step(with_layers(settled, counts), ranks, rank, device)

    base, more = traced(small), {}
    for place, stage in enumerate(own):
        if layers[stage] > small[stage]:
            more[place] = traced([count + (number == stage) for number, count in enumerate(small)])
    return Sketch(base, more, held, [small[stage] for stage in own], leading)


def with_fewer_micro_batches(config: RunConfig, degrees: Degrees, stages: Stages | None) -> RunConfig:
    """The same run with as few micro-batches as show what every one of them meets: a first, a last and one between; in a pipeline, enough
    that each rank keeps as many at once as in the whole step."""
    rows = config.rows_per_step(degrees) // (degrees.data_ranks * config.train.micro_batch)

    def with_number(number: int) -> RunConfig:
        parallel = replace(config.parallel, microbatches=number)
        return replace(config, train=replace(config.train, global_tokens=0), parallel=parallel)

    if stages is None:
        return with_number(min(rows, 3))
    if config.parallel.schedule.endswith(".csv"):
        return config
    wanted = most_in_flight(stages.schedule)
    for number in range(2 * degrees.pp, rows, degrees.pp):
        fewer = with_number(number)
        if most_in_flight(build_order(fewer, degrees)) == wanted:
            return fewer
    return config


def coordinates(rank: int, degrees: Degrees) -> dict[str, int]:
    """A rank's index along each axis, as the mesh has it."""
    return {str(axis): int(place) for axis, place in zip(AXES, np.unravel_index(rank, [getattr(degrees, a) for a in AXES]), strict=True)}


def settle(config: RunConfig, world: World, at: dict[str, int], stages: Stages | None, model: nn.Module) -> RunConfig:
    """The configuration without what `auto` would choose by the model's size."""
    strategy = build_strategy(config, world, at, stages, model)
    reshard, reduce = "always" if strategy.reshard else "never", "micro_batch" if strategy.reduce_each_micro_batch else "step"
    return replace(config, compile=strategy.compile, parallel=replace(config.parallel, reshard=reshard, reduce=reduce))


def different_at_first(model: nn.Module) -> int | None:
    """How many first blocks are not like the last one; None where blocks are mixed otherwise."""
    blocks: list[nn.Module] = list(model.blocks())  # type: ignore[operator]
    kinds = [{name: p.shape for name, p in block.named_parameters()} for block in blocks]
    leading = next((n for n, kind in enumerate(kinds) if kind == kinds[-1]), len(kinds))
    return leading if all(kind == kinds[-1] for kind in kinds[leading:]) else None


def with_layers(config: RunConfig, counts: Sequence[int]) -> RunConfig:
    """The same run with so many layers in each stage."""
    model = replace(config.model, layers=sum(counts))
    return replace(config, model=model, parallel=replace(config.parallel, cuts=tuple(counts) if len(counts) > 1 else ()))


def passes(trace: Trace) -> list[Pass]:
    """What a traced step holds, cut at its phases, the blocks of each pass together."""
    columns = {category: number for number, category in enumerate(CATEGORIES)}
    changes = np.zeros((len(trace.events) + 1, len(CATEGORIES)), dtype=np.int64)
    for number, held in trace.before.items():
        changes[0, columns[trace.category[number]]] += held
    for event, (number, change) in enumerate(trace.events):
        changes[event + 1, columns[trace.category[number]]] = change
    held = changes.cumsum(0)
    found: list[Pass] = []
    after = -2
    for phase, end in zip(trace.phases, [*(p.start for p in trace.phases[1:]), len(trace.events)], strict=True):
        piece = held[phase.start : end + 1]  # what it finds, and after each of its events
        if phase.block >= 0 and found and (found[-1].kind, found[-1].stage) == (phase.kind, phase.stage) and abs(phase.block - after) == 1:
            found[-1] = replace(found[-1], pieces=[*found[-1].pieces, piece])
        else:
            found.append(Pass(phase.kind, phase.stage, [piece]))
        after = phase.block
    return found


def extended(base: Sequence[Pass], more: dict[int, Sequence[Pass]], layers: Sequence[int], edge: int) -> list[Pass]:
    """The passes of a step with `layers` blocks in each of the rank's stages. `more[s]` are those of a step with one block more in
    stage s than `base`; a stage that is not there has all its blocks in `base`.
    """
    assert all(len(others) == len(base) for others in more.values()), "a step has the same passes whatever the number of blocks"
    lengths = {p.stage: len(p.pieces) for p in base if p.kind == "forward"}
    missing = {stage: layers[stage] - lengths[stage] for stage in more}
    return [_extended(number, one, more, missing, edge) for number, one in enumerate(base)]


def _extended(number: int, one: Pass, more: dict[int, Sequence[Pass]], missing: dict[int, int], edge: int) -> Pass:
    def fitted(place: int) -> Held:
        """The piece so far from the beginning, or (negative) from the end."""
        return _fit(one.pieces[place], [(missing[stage], others[number].pieces[place]) for stage, others in more.items()])

    few = len(one.pieces)
    if one.kind not in ("forward", "backward") or one.stage not in more:
        return replace(one, pieces=[fitted(place) for place in range(few)])
    at_first = edge if one.kind == "forward" else EDGE
    at_last = EDGE if one.kind == "forward" else edge
    first, last = [fitted(n) for n in range(at_first)], [fitted(n) for n in range(-at_last, 0)]
    between = few + missing[one.stage] - at_first - at_last
    steps = [_between(first[-1], last[0], (n + 1) / (between + 1)) for n in range(between)]
    return replace(one, pieces=[*first, *steps, *last])


def _fit(piece: Held, others: Sequence[tuple[int, Held]]) -> Held:
    """`piece` with the difference of each other one added so many times; event by event, or at the most where events differ."""
    if any(other.shape != piece.shape for _, other in others):
        piece, others = _most(piece), [(times, _most(other)) for times, other in others]
    return piece + sum((times * (other - piece) for times, other in others), np.zeros_like(piece))


def _between(first: Held, last: Held, part: float) -> Held:
    if first.shape != last.shape:
        first, last = _most(first), _most(last)
    return (first + part * (last - first)).astype(np.int64)


def _most(piece: Held) -> Held:
    return piece[[piece.sum(1).argmax()]]


def peak(step: Sequence[Pass]) -> Peak:
    """Where the step holds the most."""
    everything = [(int(piece.sum(1).max()), one, place) for one in step for place, piece in enumerate(one.pieces)]
    _, one, place = max(everything, key=lambda found: found[0])
    held: dict[str, int] = dict(zip(CATEGORIES, _most(one.pieces[place])[0].tolist(), strict=True))
    in_blocks = one.kind in ("forward", "backward")
    block = (place if one.kind == "forward" else len(one.pieces) - 1 - place) if in_blocks else -1
    return Peak(held, one.kind, one.stage, block)
