"""`paraxis bench planner`: published step times and memory beside what the planner, and others' equations, say of the same runs.

Device constants are fitted on rows that calibrate, and on nothing else, and stand in the cluster files beside the rows. vTrain's A100:
the share of the peak that products reach, the share of the memory's bandwidth, and the least that a kernel takes, such that the mean
error over every THINNED-th row on one host is least. Machines with one calibration row: the share of products alone.

Of a pipeline each kind of stage is traced, the first, the last and one between, and the schedule is played with what each takes. Megatron
sums replicas' gradients in half precision once backward has ended, so that is added at the end rather than traced.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any

from paraxis.base.axes import Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.schedule import Action, Schedule
from paraxis.base.strategy import ParallelConfig
from paraxis.bench.published import Published
from paraxis.models.gpt import GPTConfig
from paraxis.plan.hardware import Cluster
from paraxis.plan.memory import sketch
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.published import GPTStep, amp_s, pipette_s
from paraxis.plan.rates import Accelerator
from paraxis.plan.simulate import Compute, Item, Player, Start, finished, play_pipeline
from paraxis.plan.timing import TYPICAL, Place, Steps, total_s
from paraxis.plan.trace import Trace, trace_step
from paraxis.train.config import RunConfig
from paraxis.train.stages import build_order

THINNED = 45
EQUATIONS: Mapping[str, Callable[[GPTStep], float]] = {"amp": amp_s, "pipette": pipette_s}
TRACED = TYPICAL + 1  # blocks of a stage; the others are like the one between
STAGES = 3  # of a traced pipeline: a first, one between, a last


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is predicted of a row: seconds of a step, by the planner and by each equation, and bytes reserved, where that is known."""

    step_s: float
    by_equation: Mapping[str, float]
    reserved: int | None = None


@dataclass(frozen=True)
class Traced:
    """A row whose kinds of stages were traced, each on a rank of its own; without a pipeline there is one. `extra` blocks of each were
    not; `reserved` bytes are known of runs of ours alone."""

    row: Published
    traces: Sequence[Trace]
    degrees: Degrees
    extra: int
    merges: bool
    reserved: int | None = None
    more: Mapping[int, Trace] = field(default_factory=dict)

    def said(self, cluster: Cluster) -> Said:
        """What the row takes on `cluster`."""
        config, cluster = self.row.config, _large_enough(cluster, self.row.ranks)
        schedule = build_order(config, config.parallel.degrees) if config.parallel.pp > 1 else None
        placement = range(self.degrees.ranks)
        places = [Place(cluster, rank * self.degrees.tp, placement, self.degrees) for rank in range(len(self.traces))]
        steps = [Steps(trace, place, self.merges, [self.extra], more=self.more) for trace, place in zip(self.traces, places, strict=True)]
        played_s = _alone_s(config, steps[0]) if schedule is None else _piped_s(config, schedule, steps, cluster)
        if not isinstance(config.model, GPTConfig):
            return Said(step_s=played_s, by_equation={}, reserved=self.reserved)
        gradients_s = cluster.exchange_s("all_reduce", gradient_bytes(config), replicas(config))
        chunks = config.parallel.stages_a_rank or 1
        forward_s, backward_s = _slowest(steps)
        equations = gpt_step(config, cluster, chunks * forward_s, chunks * backward_s)
        return Said(step_s=played_s + gradients_s, by_equation={name: equation(equations) for name, equation in EQUATIONS.items()})


def _large_enough(cluster: Cluster, ranks: int) -> Cluster:
    [pool] = cluster.pools
    return cluster.with_devices(-(-ranks // pool.devices) * pool.devices)


def trace(row: Published) -> Traced:
    """Traces the kinds of stages that a row's pipeline has, or the model without one. Raises ConfigError for what cannot run."""
    if row.problem:
        raise ConfigError(row.problem)
    return _trace_megatron(row) if isinstance(row.config.model, GPTConfig) else _trace_ours(row)


def _trace_ours(row: Published) -> Traced:
    """A run of ours, without a pipeline: as it is, its replicas and shards too."""
    degrees = row.config.parallel.degrees.filling(row.ranks)
    found = sketch(row.config, row.ranks, 0, PretendedDevice("cpu", 0, row.cluster, 94 << 30))
    [extra] = [layers - few for layers, few in zip(found.layers, found.traced, strict=True)]
    return Traced(row, [found.base], degrees, extra, row.config.compile == "inductor", found.peak().reserved, found.more)


def _trace_megatron(row: Published) -> Traced:
    config = row.config
    whole, chunks = config.parallel.degrees, config.parallel.stages_a_rank or 1
    layers = config.model.layers // (whole.pp * chunks)
    few, pp = min(layers, TRACED), min(whole.pp * chunks, STAGES)
    degrees = Degrees(pp=pp, tp=whole.tp)
    tp = {"tp": whole.tp, "sequence_parallel": config.parallel.sequence_parallel} if whole.tp > 1 else {}
    pipeline = {"pp": pp, "schedule": "1f1b", "cuts": (few,) * pp} if pp > 1 else {}
    small = replace(
        config,
        model=replace(config.model, layers=few * pp),
        train=replace(config.train, global_tokens=0),
        parallel=ParallelConfig(**tp, **pipeline, microbatches=max(pp, STAGES), reduce="step", reshard="never"),  # type: ignore[arg-type]
        compile="none",  # what a compiler would merge is merged when it is priced
    )
    device = PretendedDevice("cpu", 0, row.cluster, 1 << 60)
    traces = [trace_step(small, degrees.ranks, stage * degrees.tp, device) for stage in range(pp)]
    return Traced(row, traces, degrees, layers - few, merges=True)


def _alone_s(config: RunConfig, steps: Steps) -> float:
    batches = steps.batches()
    player = Player(0, steps.place.accelerator.overlap)
    player.play(steps.head(), "start")
    degrees = config.parallel.degrees
    number = config.rows_per_step(degrees) // (degrees.data_ranks * config.train.micro_batch)
    for batch in range(number):
        player.play(batches[0 if batch == 0 else -1 if batch == number - 1 else 1], f"micro-batch {batch}")
    return finished([player], [_tail(steps, config.model)]).step_s


def _tail(steps: Steps, model: Any) -> list[Item]:
    """What follows the passes, of blocks that were not traced too: its time goes with the parameters that a rank has."""
    if steps.more or not isinstance(model, GPTConfig):
        return steps.tail()
    block, embedding = 4 * model.width**2 + 2 * model.width * model.inner_width, model.vocab_size * model.width
    traced = len({phase.block for phase in steps.trace.phases if phase.block >= 0})
    return [*steps.tail(), Compute(total_s(steps.tail()) * steps.extra[0] * block / (traced * block + embedding))]


def _piped_s(config: RunConfig, schedule: Schedule, steps: Sequence[Steps], cluster: Cluster) -> float:
    of_action: dict[tuple[str, int], list[Sequence[Item]]] = {}  # by kind and traced stage: the first of a stage's micro-batches, and so on
    for traced in steps:
        for action, taken in traced.actions().items():
            of_action.setdefault((action.kind, action.stage), []).append(taken)

    def items(action: Action) -> Sequence[Item]:
        known = of_action[action.kind, _kind(action.stage, schedule.stages, len(steps))]
        return known[0 if action.micro_batch == 0 else -1 if action.micro_batch == schedule.micro_batches - 1 else len(known) // 2]

    ranks_a_stage = config.parallel.dp * config.parallel.tp
    bytes = 2 * config.train.micro_batch * config.data.seq_len * config.model.width

    def message_s(source: int, target: int) -> float:
        return cluster.exchange_s("p2p", bytes, [source * ranks_a_stage, target * ranks_a_stage])

    overlap = [steps[0].place.accelerator.overlap] * schedule.ranks
    players = play_pipeline(schedule, items, message_s, overlap=overlap)
    ends = [steps[0], *[steps[len(steps) // 2]] * (schedule.ranks - 2), steps[-1]]
    return finished(players, [_tail(one, config.model) for one in ends]).step_s


def _kind(stage: int, stages: int, traced: int) -> int:
    """Which of the traced stages one is like."""
    return 0 if stage == 0 else traced - 1 if stage == stages - 1 else 1


def _slowest(steps: Sequence[Steps]) -> tuple[float, float]:
    """Seconds of one micro-batch's forward and backward on the slowest kind of stage, exchanges included; all in backward, of a model
    without a pipeline: the equations use their sum alone."""
    if len(steps) == 1:
        return 0.0, _alone(steps[0].batches()[1])
    found = []
    for one in steps:
        actions = one.actions()
        found.append(tuple(max(_alone(items) for action, items in actions.items() if action.kind == kind) for kind in "FB"))
    return max(found, key=sum)


def _alone(items: Iterable[Item]) -> float:
    return sum(item.seconds for item in items if isinstance(item, Compute | Start))


def replicas(config: RunConfig) -> range:
    """The devices that sum the first stage's gradients."""
    return range(0, config.parallel.dp * config.parallel.tp, config.parallel.tp)


def gradient_bytes(config: RunConfig) -> int:
    """Of one rank's half-precision gradients, on the first stage."""
    model, parallel = config.model, config.parallel
    blocks = model.layers // parallel.pp * (4 * model.width**2 + 2 * model.width * model.inner_width)
    return 2 * (blocks + model.vocab_size * model.width) // parallel.tp


def gpt_step(config: RunConfig, cluster: Cluster, forward_s: float, backward_s: float) -> GPTStep:
    """The row as the published equations see it, with the planner's seconds and the data sheet's bandwidths."""
    parallel, model = config.parallel, config.model
    stage = parallel.dp * parallel.tp
    between = cluster.link_of(0, cluster.host_of(stage)) if parallel.pp > 1 else cluster.link_of(0, 0)
    among = cluster.link_of(0, cluster.host_of(replicas(config)[-1]))
    return GPTStep(
        width=model.width,
        layers=model.layers,
        vocab_size=model.vocab_size,
        seq_len=config.data.seq_len,
        micro_batch=config.train.micro_batch,
        micro_batches=config.rows_per_step(parallel.degrees) // (parallel.dp * config.train.micro_batch),
        tensor=parallel.tp,
        stages=parallel.pp,
        replicas=parallel.dp,
        forward_s=forward_s,
        backward_s=backward_s,
        stages_bytes_per_s=between.bytes_per_s,
        replicas_bytes_per_s=among.bytes_per_s,
    )


def fitted(traced: Sequence[Traced], cluster: Cluster, names: Sequence[str], tell: Callable[[str], None]) -> Cluster:
    """The cluster whose accelerator has the constants `names` with the least mean error over rows that calibrate, by coordinate descent."""
    assert all(one.row.use == "calibrate" for one in traced), "scored rows are not fitted on"
    best, error = cluster, _error(traced, cluster)
    for step in (1.5, 1.2, 1.1, 1.04, 1.02):
        moved = True
        while moved:
            moved = False
            for name in names:
                for factor in (step, 1 / step):
                    tried = changed(best, name, factor)
                    if tried is not None and (new := _error(traced, tried)) < error:
                        best, error, moved = tried, new, True
        tell(f"{', '.join(f'{name}={getattr(accelerator(best), name):.4g}' for name in names)}: mean error {error:.1%}")
    return best


def _error(traced: Sequence[Traced], cluster: Cluster) -> float:
    return fmean(abs(one.said(cluster).step_s / one.row.step_s - 1) for one in traced)


def accelerator(cluster: Cluster) -> Accelerator:
    [only] = cluster.accelerators.values()
    return only


def changed(cluster: Cluster, name: str, factor: float) -> Cluster | None:
    """The cluster with one constant of its accelerator multiplied; None where a share would be over one."""
    value = getattr(accelerator(cluster), name) * factor
    if name.endswith("_share") and value > 1:
        return None
    return replace(cluster, accelerators={key: replace(one, **{name: value}) for key, one in cluster.accelerators.items()})


def calibrations(rows: Sequence[Published], known: Mapping[str, Cluster], tell: Callable[[str], None]) -> dict[str, Cluster]:
    """Each machine with constants fitted on its rows, of which `tell` hears. Rows that cannot be predicted are left out."""
    found = dict(known)
    for machine, cluster in known.items():
        own = [row for row in rows if row.cluster == machine and not row.problem]
        if not own:
            continue
        names = ("product_share", "memory_share", "launch_s") if len(own) > 1 else ("product_share",)
        tell(f"{machine}: {', '.join(names)} on {len(own[::THINNED])} of {len(own)} rows")
        traced = [trace(row) for row in own[::THINNED]]
        found[machine] = fitted(traced, cluster, names, tell)
    return found


def record(row: Published, said: Said | None, problem: str = "") -> dict[str, Any]:
    """A row of the results file. Percents are how far from what was measured, with their sign."""
    by_equation = said.by_equation if said else {}
    gib = said.reserved / 2**30 if said and said.reserved else None
    return {
        "set": row.set,
        "row": row.name,
        "measured_s": round(row.step_s, 4),
        "predicted_s": round(said.step_s, 4) if said else None,
        "planner_percent": _percent(said.step_s if said else None, row.step_s),
        **{f"{name}_percent": _percent(by_equation.get(name), row.step_s) for name in EQUATIONS},
        "measured_gib": row.reserved_gib,
        "predicted_gib": round(gib, 2) if gib else None,
        "memory_percent": _percent(gib, row.reserved_gib),
        "problem": problem or None,
    }


def _percent(said: float | None, measured: float | None) -> float | None:
    return None if said is None or measured is None else round(100 * (said / measured - 1), 1)


def summaries(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each set of rows, and each way of predicting: the mean of what it is off by without sign, with its sign, and the worst."""
    keys = [key for key in records[0] if key.endswith("_percent")] if records else []
    for name in dict.fromkeys(record["set"] for record in records):
        off = {key: [record[key] for record in records if record["set"] == name and record[key] is not None] for key in keys}
        number = sum(record["set"] == name for record in records)
        for what, of in (("mean", _mean_size), ("mean with sign", fmean), ("worst", _largest)):
            yield {"set": name, "row": f"{what} of {number}", **{key: round(of(all), 1) if all else None for key, all in off.items()}}


def _mean_size(values: Sequence[float]) -> float:
    return fmean(map(abs, values))


def _largest(values: Sequence[float]) -> float:
    return max(values, key=abs)
