"""What a run will take: the time of a step and the memory of its fullest rank, for one given configuration on one cluster.

Ranks that do the same are traced once: of each kind of pipeline rank (its stages' layers, the first, the last) the one that keeps the
most micro-batches at once. What a kind of rank takes for an action, every rank of that kind takes.
"""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain

import numpy as np

from paraxis.base.axes import Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.schedule import Action, Schedule, most_in_flight
from paraxis.plan.hardware import Cluster
from paraxis.plan.memory import Peak, Sketch, sketch
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.simulate import Item, Played, Player, Span, finished, play_pipeline
from paraxis.plan.timing import Place, Steps
from paraxis.plan.trace import CATEGORIES, stage_output
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta
from paraxis.train.stages import Stages, build_stages

CURVE = 2000  # points of a prediction's memory over time


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step of a run. Seconds are of a step, bytes of its fullest rank at its peak.

    `tokens_per_s` is that of one device. `mfu` is None where the model does not count its operations. `exposed_s` is the time that the
    rank which waits longest waits for messages with nothing to compute; `bubble` the time ranks wait for each other in a pipeline over the
    time they work. `peak` says what rank `rank` holds at its fullest, by category, and what the caching allocator has reserved then;
    `usable` is what it can have on the device, in bytes. `timeline` has what each rank of a pipeline does when, `memory` what rank `rank`
    holds when: (seconds from the step's start, bytes by category), at most CURVE points.
    """

    step_s: float
    tokens_per_s: float
    mfu: float | None
    exposed_s: float
    bubble: float
    rank: int
    peak: Peak
    usable: int
    timeline: Sequence[Span]
    memory: Sequence[tuple[float, Mapping[str, int]]]

    @property
    def held(self) -> Mapping[str, int]:
        return self.peak.held

    @property
    def allocated(self) -> int:
        return self.peak.bytes

    @property
    def reserved(self) -> int:
        assert self.peak.reserved is not None
        return self.peak.reserved

    @property
    def fits(self) -> bool:
        return self.reserved <= self.usable


def predict(config: RunConfig, cluster: Cluster, ranks: int, *, placement: Sequence[int] | None = None, exact: bool = False) -> Prediction:
    """A step of `config` on `ranks` devices of `cluster`; rank r runs on device `placement[r]`, or on device r.

    `exact` traces every block instead of a few. Raises ConfigError for a configuration that cannot run.
    """
    placement = range(ranks) if placement is None else placement
    if len(placement) != ranks or ranks > cluster.ranks:
        raise ConfigError(f"{ranks} ranks on {len(placement)} devices of {cluster.name}, which has {cluster.ranks}; give it more (--gpus)")
    degrees = config.parallel.degrees.filling(ranks)
    stages = build_stages(config, degrees, on_meta(config))
    first = [pipeline_rank * ranks // degrees.pp for pipeline_rank in range(degrees.pp)]
    places = [Place(cluster, rank, placement, degrees) for rank in first]
    sketches: dict[int, Sketch] = {}
    for pipeline_rank in _representatives(stages):
        on = places[pipeline_rank].accelerator
        device = PretendedDevice("cpu", 0, on.name, on.memory_bytes)
        sketches[pipeline_rank] = sketch(config, ranks, first[pipeline_rank], device, exact=exact)
    steps = {number: _steps(one, places[number], config) for number, one in sketches.items()}
    played = _piped(config, degrees, stages, steps, places) if stages else _alone(config, degrees, steps[0], places[0])
    peaks = {number: one.peak() for number, one in sketches.items()}
    fullest = max(peaks, key=lambda number: (peaks[number].reserved or 0) - places[number].accelerator.usable_bytes)
    tokens = config.rows_per_step(degrees) * config.data.seq_len
    rate = tokens / played.step_s / ranks
    count = getattr(config.model, "flops_per_token", None)
    return Prediction(
        step_s=played.step_s,
        tokens_per_s=rate,
        mfu=count(config.data.seq_len) * rate / places[0].accelerator.peak(config.precision.partition("_")[0]) if count else None,
        exposed_s=played.exposed_s,
        bubble=played.bubble,
        rank=first[fullest],
        peak=peaks[fullest],
        usable=places[fullest].accelerator.usable_bytes,
        timeline=played.spans,
        memory=_curve(sketches[fullest], played.step_s),
    )


def _curve(traced: Sketch, step_s: float) -> list[tuple[float, Mapping[str, int]]]:
    """What the rank holds, each event as long as any other."""
    held = np.concatenate([piece for one in traced.step() for piece in one.pieces])
    kept = np.unique(np.append(np.linspace(0, len(held) - 1, min(CURVE - 1, len(held))).astype(int), held.sum(1).argmax()))
    return [(step_s * n / len(held), dict(zip(CATEGORIES, held[n].tolist(), strict=True))) for n in kept.tolist()]


def _steps(traced: Sketch, place: Place, config: RunConfig) -> Steps:
    extra = [layers - few for layers, few in zip(traced.layers, traced.traced, strict=True)]
    return Steps(traced.base, place, config.compile not in ("none", "aot_eager"), extra, traced.leading, traced.more)


def _kind(stages: Stages, stage: int) -> tuple[int, bool, bool]:
    """What the time of a stage depends on."""
    return len(stages.layers[stage]), stage == 0, stage == stages.schedule.stages - 1


def _kinds(stages: Stages, pipeline_rank: int) -> tuple[tuple[int, bool, bool], ...]:
    return tuple(_kind(stages, stage) for stage in _own(stages, pipeline_rank))


def _own(stages: Stages, pipeline_rank: int) -> list[int]:
    return [stage for stage, holder in enumerate(stages.schedule.rank_of) if holder == pipeline_rank]


def _representatives(stages: Stages | None) -> list[int]:
    """Of each kind of pipeline rank the one that keeps the most activations."""
    if stages is None:
        return [0]
    kept = most_in_flight(stages.schedule)
    best: dict[tuple[tuple[int, bool, bool], ...], int] = {}
    for pipeline_rank in range(stages.schedule.ranks):
        kind = _kinds(stages, pipeline_rank)
        if kind not in best or kept[pipeline_rank] > kept[best[kind]]:
            best[kind] = pipeline_rank
    return list(best.values())


def _alone(config: RunConfig, degrees: Degrees, steps: Steps, place: Place) -> Played:
    """A step without a pipeline: every rank does the same."""
    number = config.rows_per_step(degrees) // (degrees.data_ranks * config.train.micro_batch)
    player = Player(0, place.accelerator.overlap)
    player.play(steps.head(), "start")
    batches = steps.batches()
    for batch in range(number):
        traced = batch if batch < len(batches) - 1 else len(batches) - 1 if batch == number - 1 else len(batches) // 2
        player.play(batches[traced], f"micro-batch {batch}")
    return finished([player], [steps.tail()])


def _piped(config: RunConfig, degrees: Degrees, stages: Stages, steps: Mapping[int, Steps], places: Sequence[Place]) -> Played:
    schedule = stages.schedule
    by_kind: dict[tuple[str, int, int], list[list[Item]]] = {}
    for pipeline_rank, traced in steps.items():
        for action, own in traced.actions().items():
            by_kind.setdefault((action.kind, pipeline_rank, action.stage), []).append(own)
    holders = {_kind(stages, stage): (rank, stage) for rank in steps for stage in _own(stages, rank)}
    turn, turns = _turns(schedule)

    def items(action: Action) -> Sequence[Item]:
        known = by_kind[(action.kind, *holders[_kind(stages, action.stage)])]
        last = turn[action] == turns[action.kind, action.stage] - 1
        return known[-1 if last else turn[action] if turn[action] < len(known) - 1 else len(known) // 2]

    rank_like = {_kinds(stages, rank): rank for rank in steps}
    shape, dtype = stage_output(config, degrees)
    players = play_pipeline(
        schedule,
        items,
        message_s=lambda source, target: places[source].message_s(places[target], math.prod(shape) * dtype.itemsize),
        link=lambda source, target: places[source].link([places[source].device, places[target].device]),
        overlap=[place.accelerator.overlap for place in places],
    )
    return finished(players, [steps[rank_like[_kinds(stages, rank)]].tail() for rank in range(schedule.ranks)])


def _turns(schedule: Schedule) -> tuple[dict[Action, int], Counter[tuple[str, int]]]:
    """Which of its kind on its stage each action is, and how many there are."""
    turn: dict[Action, int] = {}
    turns: Counter[tuple[str, int]] = Counter()
    for action in chain.from_iterable(schedule.actions):
        turn[action] = turns[action.kind, action.stage]
        turns[action.kind, action.stage] += 1
    return turn, turns
