"""What a run will take: the time of a step and the memory of its fullest rank, for one given configuration on one cluster.

Ranks that do the same are traced once, with few blocks and micro-batches: of each kind of pipeline rank (whether it has the model's first
stage or its last) one. The others' steps are put together of the same pieces.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from paraxis.base.axes import Degrees
from paraxis.base.dtypes import precision
from paraxis.base.errors import ConfigError
from paraxis.base.schedule import Action, Schedule
from paraxis.parallel.apply import untraceable
from paraxis.plan.hardware import Cluster
from paraxis.plan.memory import Peak, Sketch, Step, refuse_untraceable, sketch, whole_model
from paraxis.plan.pieces import FEW, Part
from paraxis.plan.pretend import pretended
from paraxis.plan.record import CATEGORIES
from paraxis.plan.simulate import Item, Played, Player, Span, finished, play_pipeline
from paraxis.plan.steady import circumstances
from paraxis.plan.timing import Place, Steps, total_s
from paraxis.plan.trace import stage_output
from paraxis.train.config import RunConfig
from paraxis.train.stages import Stages, build_stages

CURVE = 2000  # points of a prediction's memory over time


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A step of a run. Seconds are of a step, bytes of its fullest rank at its peak.

    `tokens_per_s` is that of one device. `mfu` is None where the model does not count its operations. `exposed_s` is the time that the
    rank which waits longest waits for messages with nothing to compute; `bubble` the time ranks wait for each other in a pipeline over the
    time they work. `peak` says what rank `rank` holds at its fullest, by category, and what the caching allocator has reserved then;
    `usable` is what it can have on the device, in bytes; `runs` says whether the step can do with that, if only by giving back what is
    reserved in vain and asking for it again in every step, which takes time that is not foretold. `timeline` has what each rank of a
    pipeline does when, `memory` what rank `rank`
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
    runs: bool
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
    stages, places, sketches, steps = _sketches(config, cluster, placement, exact)
    first = [place.rank for place in places]
    played = _piped(config, degrees, stages.schedule, sketches, steps) if stages else _alone(sketches[0], steps[0])
    peaks = [one.peak() for one in sketches]
    fullest = max(range(degrees.pp), key=lambda number: (peaks[number].reserved or 0) - places[number].usable_bytes)
    tokens = config.rows_per_step(degrees) * config.data.seq_len
    rate = tokens / played.step_s / ranks
    count = getattr(config.model, "flops_per_token", None)
    return Prediction(
        step_s=played.step_s,
        tokens_per_s=rate,
        mfu=count(config.data.seq_len) * rate / places[0].accelerator.peak(precision(config.precision).products) if count else None,
        exposed_s=played.exposed_s,
        bubble=played.bubble,
        rank=first[fullest],
        peak=peaks[fullest],
        usable=places[fullest].usable_bytes,
        runs=all(_runs(*one) for one in zip(sketches, peaks, [place.usable_bytes for place in places], strict=True)),
        timeline=played.spans,
        memory=_curve(sketches[fullest].step, steps[fullest], [span for span in played.spans if span.rank == fullest]),
    )


def runs_in(config: RunConfig, cluster: Cluster, ranks: int, bytes: float) -> bool:
    """Whether `config` runs where the allocator of each of the first `ranks` devices of `cluster` may have so many bytes, and no more."""
    sketches = _sketches(config, cluster, range(ranks), False)[2]
    return all(_runs(one, one.peak(), bytes) for one in sketches)


def _runs(sketch: Sketch, peak: Peak, usable: float) -> bool:
    return (peak.reserved or 0) <= usable or sketch.runs_in(usable)


def _sketches(
    config: RunConfig, cluster: Cluster, placement: Sequence[int], exact: bool
) -> tuple[Stages | None, list[Place], list[Sketch], list[Steps]]:
    """The stages of a run; and of each of its pipeline ranks the place of the first that does the same, and its step, in memory and in
    time."""
    model = whole_model(config)
    refuse_untraceable(config, model)
    ranks = len(placement)
    degrees = config.parallel.degrees.filling(ranks)
    stages = build_stages(config, degrees, model)
    places = [Place(cluster, pipeline_rank * ranks // degrees.pp, placement, degrees) for pipeline_rank in range(degrees.pp)]
    splits = stages is not None and stages.schedule.splits_backward  # for which `compile=auto` is none
    compiled = config.compile == "inductor" or (config.compile == "auto" and not splits)
    pieces = degrees.cp > 1 or bool(untraceable(model))
    # Under the mode that selective recomputation puts over a block, the pieces that it would be compiled in are not. A budget puts it over
    # eager blocks alone: of those in pieces it keeps all or nothing.
    selective = (not compiled and config.remat.mode not in ("none", "full")) or (pieces and config.remat.mode == "selective")
    traced: dict[object, tuple[Sketch, Steps]] = {}
    sketches: list[Sketch] = []
    steps: list[Steps] = []
    for number, place in enumerate(places):
        device = pretended(place.accelerator)
        kind = (_kind(stages, number) if stages else None), device
        if kind not in traced:
            found = sketch(config, ranks, place.rank, device, exact=exact)
            traced[kind] = found, Steps(found.base, place, compiled, found.extra, found.leading, selective)
        one, own = traced[kind]
        if stages:
            one = one.of(number, [len(stages.layers[stage]) for stage in _own(stages, number)])
        sketches.append(one)
        steps.append(own.of(place, one.extra))
    return stages, places, sketches, steps


def _curve(step: Step, steps: Steps, spans: Sequence[Span]) -> list[tuple[float, Mapping[str, int]]]:
    """What a rank holds over a step: for each piece as it starts and at its fullest. A piece has the share in its part's time that its
    kernels and messages have in those of the part."""
    names = {"head": "start", "tail": "optimizer"}
    during = {span.name: span for span in spans if span.lane == "compute"}
    lasts = [total_s(steps.priced(piece)) for _, piece, _ in step.rows]
    whole: dict[Part, float] = {}
    for (part, _, _), seconds in zip(step.rows, lasts, strict=True):
        whole[part] = whole.get(part, 0.0) + seconds
    fullest, times, at_s, gone, before = step.fullest(), [], 0.0, 0.0, None
    for (part, _, _), seconds in zip(step.rows, lasts, strict=True):
        if part != before:
            before, gone = part, 0.0
            name = f"micro-batch {part}" if isinstance(part, int) else names.get(str(part), str(part))
            span = during.get(name)
            start_s, length_s = (span.start_s, span.end_s - span.start_s) if span else (at_s, 0.0)
        times += [start_s + length_s * (gone / whole[part] if whole[part] else 0.0)]
        gone += seconds
        at_s = start_s + length_s * (gone / whole[part] if whole[part] else 0.0)
        times += [(times[-1] + at_s) / 2]
    held = np.stack([step.starts, fullest], 1).reshape(-1, fullest.shape[1])
    kept = np.unique(np.append(np.linspace(0, len(held) - 1, min(CURVE - 1, len(held))).astype(int), held.sum(1).argmax()))
    return [(times[n], dict(zip(CATEGORIES, held[n].tolist(), strict=True))) for n in kept.tolist()]


def _own(stages: Stages, pipeline_rank: int) -> list[int]:
    return [stage for stage, holder in enumerate(stages.schedule.rank_of) if holder == pipeline_rank]


def _kind(stages: Stages, pipeline_rank: int) -> object:
    """What a trace of a rank depends on, of its stages (which of them are the model's ends, and how many blocks, where they are few) and
    of the circumstances that it meets."""
    own = _own(stages, pipeline_rank)
    met = {found.key for found in circumstances(stages.schedule, pipeline_rank).values()}
    return tuple((stage == 0, stage == stages.schedule.stages - 1, min(len(stages.layers[stage]), FEW)) for stage in own), frozenset(met)


def _alone(traced: Sketch, steps: Steps) -> Played:
    """A step without a pipeline: every rank does the same."""
    player = Player(0, steps.place.accelerator.overlap)
    player.play(steps.head(), "start")
    items = {like: steps.part(like) for part, like in traced.parts() if isinstance(part, int)}
    for part, like in traced.parts():
        if isinstance(part, int):
            player.play(items[like], f"micro-batch {part}")
    return finished([player], [steps.tail()])


def _piped(config: RunConfig, degrees: Degrees, schedule: Schedule, traced: Sequence[Sketch], steps: Sequence[Steps]) -> Played:
    known: dict[tuple[int, Part], Sequence[Item]] = {}

    def items(action: Action) -> Sequence[Item]:
        rank = schedule.rank_of[action.stage]
        like = traced[rank].stand_ins[action].action
        if (rank, like) not in known:
            known[rank, like] = steps[rank].part(like)
        return known[rank, like]

    places = [one.place for one in steps]
    shape, dtype = stage_output(config, degrees)
    players = play_pipeline(
        schedule,
        items,
        message_s=lambda source, target: places[source].message_s(places[target], math.prod(shape) * dtype.itemsize),
        link=lambda source, target: places[source].link([places[source].device, places[target].device]),
        overlap=[place.accelerator.overlap for place in places],
        posted=[place.accelerator.posted for place in places],
    )
    return finished(players, [one.tail() for one in steps])
