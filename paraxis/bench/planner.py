"""`paraxis bench planner`: published step times and memory beside what the planner, and others' equations, say of the same runs.

Device constants are fitted on rows that calibrate, and on nothing else, and stand in the cluster files beside the rows. vTrain's A100:
the share of the peak that products reach, the share of the memory's bandwidth, what the host needs to start a kernel, and how late the
last rank comes to a collective, such that the mean error over what a block takes is least (`samples`). Machines with one calibration row:
the share of products alone.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean
from typing import Any, Protocol

from paraxis.base.axes import Degrees
from paraxis.bench.megatron import MegatronStep, Pieces, Shape, shape, trace_pieces
from paraxis.bench.percent import percent
from paraxis.bench.published import Published
from paraxis.models.gpt import GPTConfig
from paraxis.plan.hardware import Cluster
from paraxis.plan.memory import sketch
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.published import GPTStep, amp_s, pipette_s
from paraxis.plan.rates import Accelerator
from paraxis.plan.record import Trace
from paraxis.plan.simulate import Player, finished
from paraxis.plan.timing import Place, Steps

EQUATIONS: Mapping[str, Callable[[GPTStep], float]] = {"amp": amp_s, "pipette": pipette_s}


@dataclass(frozen=True, kw_only=True)
class Said:
    """What is predicted of a row: seconds of a step, by the planner and by each equation, and bytes reserved, where that is known."""

    step_s: float
    by_equation: Mapping[str, float]
    reserved: int | None = None


class Traced(Protocol):
    """A row that was traced, and can be priced on any cluster."""

    @property
    def row(self) -> Published: ...

    def said(self, cluster: Cluster) -> Said:
        """What the row takes on `cluster`."""
        ...


@dataclass(frozen=True)
class OurRun:
    """A run of ours, without a pipeline; `extra` of its blocks were not traced."""

    row: Published
    trace: Trace
    extra: int
    reserved: int | None

    def said(self, cluster: Cluster) -> Said:
        config, cluster = self.row.config, _large_enough(cluster, self.row.ranks)
        degrees = config.parallel.degrees.filling(self.row.ranks)
        place = Place(cluster, 0, range(self.row.ranks), degrees)
        steps = Steps(self.trace, place, config.compile == "inductor", [self.extra])
        return Said(step_s=_alone_s(self.row, degrees, steps), by_equation={}, reserved=self.reserved)


@dataclass(frozen=True)
class MegatronRun:
    """A run of Megatron's."""

    row: Published
    pieces: Pieces = field(repr=False)

    def said(self, cluster: Cluster) -> Said:
        step = MegatronStep(self.row.config, self.pieces, _large_enough(cluster, self.row.ranks))
        equations = gpt_step(step)
        return Said(step_s=step.step_s, by_equation={name: equation(equations) for name, equation in EQUATIONS.items()})


def _large_enough(cluster: Cluster, ranks: int) -> Cluster:
    [pool] = cluster.pools
    return cluster.with_devices(-(-ranks // pool.devices) * pool.devices)


def trace(row: Published, known: dict[Shape, Pieces]) -> Traced:
    """Traces a row; of Megatron's, only what is not `known` yet. Raises ConfigError for what cannot run."""
    if isinstance(row.config.model, GPTConfig):
        return MegatronRun(row, trace_pieces(row.config, known))
    found = sketch(row.config, row.ranks, 0, PretendedDevice("cpu", 0, row.cluster, 94 << 30, (9, 0)))
    [extra] = [layers - few for layers, few in zip(found.layers, found.traced, strict=True)]
    return OurRun(row, found.base, extra, found.peak().reserved)


def _alone_s(row: Published, degrees: Degrees, steps: Steps) -> float:
    batches = steps.batches()
    player = Player(0, steps.place.accelerator.overlap)
    player.play(steps.head(), "start")
    number = row.config.rows_per_step(degrees) // (degrees.data_ranks * row.config.train.micro_batch)
    for batch in range(number):
        player.play(batches[0 if batch == 0 else -1 if batch == number - 1 else 1], f"micro-batch {batch}")
    return finished([player], [steps.tail()]).step_s


def gpt_step(step: MegatronStep) -> GPTStep:
    """The row as the published equations see it, with the planner's seconds and the data sheet's bandwidths."""
    config, cluster = step.config, step.cluster
    parallel, model = config.parallel, config.model
    stage = parallel.dp * parallel.tp
    forward_s, backward_s = step.slowest()
    between = cluster.link_of(0, cluster.host_of(stage)) if parallel.pp > 1 else cluster.link_of(0, 0)
    among = cluster.link_of(0, cluster.host_of(stage - parallel.tp))
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


@dataclass(frozen=True)
class Sample:
    """What constants are fitted on: the time of a step, or by how much one is longer than another that has fewer blocks."""

    longer: Traced
    shorter: Traced | None = None

    @property
    def seconds(self) -> float:
        return self.longer.row.step_s - (self.shorter.row.step_s if self.shorter else 0.0)

    def said_s(self, cluster: Cluster) -> float:
        return self.longer.said(cluster).step_s - (self.shorter.said(cluster).step_s if self.shorter else 0.0)


def samples(rows: Sequence[Published], known: dict[Shape, Pieces]) -> list[Sample]:
    """Of rows that differ in nothing but their blocks, without a pipeline: for each shape of a block and micro-batch the deepest and the
    shallowest of those with most micro-batches. What else is in a step, such as a head whose vocabulary nobody has written down, is in
    both. A single row is taken as it is."""
    if len(rows) == 1:
        return [Sample(trace(rows[0], known))]
    alike: dict[Shape, list[Published]] = {}
    for row in rows:
        if row.config.parallel.pp == 1:
            alike.setdefault(shape(row.config), []).append(row)
    found = []
    for own in alike.values():
        most = max(row.config.train.global_tokens // row.config.parallel.dp for row in own)
        kept = [row for row in own if row.config.train.global_tokens // row.config.parallel.dp == most]
        fewest = min(row.config.parallel.dp for row in kept)
        ordered = sorted((row for row in kept if row.config.parallel.dp == fewest), key=lambda row: row.config.model.layers)
        found.append(Sample(trace(ordered[-1], known), trace(ordered[0], known)))
    return found


def fitted(of: Sequence[Sample], cluster: Cluster, names: Sequence[str], tell: Callable[[str], None]) -> Cluster:
    """The cluster whose constants `names` have the least mean error over samples of rows that calibrate, by coordinate descent."""
    rows = [traced.row for one in of for traced in (one.longer, one.shorter) if traced]
    assert all(row.use == "calibrate" for row in rows), "scored rows are not fitted on"
    return descended(lambda tried: _error(of, tried), cluster, names, tell)


def descended(error_of: Callable[[Cluster], float], cluster: Cluster, names: Sequence[str], tell: Callable[[str], None]) -> Cluster:
    """The cluster whose constants `names` have the least error, by coordinate descent."""
    best, error = cluster, error_of(cluster)
    for step in (1.5, 1.2, 1.1, 1.04, 1.02):
        moved = True
        while moved:
            moved = False
            for name in names:
                for factor in (step, 1 / step):
                    tried = changed(best, name, factor)
                    if tried is not None and (new := error_of(tried)) < error:
                        best, error, moved = tried, new, True
        tell(f"{', '.join(f'{name}={constant(best, name):.4g}' for name in names)}: error {error:.1%}")
    return best


def _error(of: Sequence[Sample], cluster: Cluster) -> float:
    return fmean(abs(one.said_s(cluster) / one.seconds - 1) for one in of)


def accelerator(cluster: Cluster) -> Accelerator:
    [only] = cluster.accelerators.values()
    return only


def constant(cluster: Cluster, name: str) -> float:
    """One of the accelerator's, or `skew_s` of the link inside hosts."""
    return getattr(cluster.links[cluster.pools[0].inside] if name == "skew_s" else accelerator(cluster), name)


def changed(cluster: Cluster, name: str, factor: float) -> Cluster | None:
    """The cluster with one constant multiplied; None where a share would be over one, or computing faster beside messages."""
    value = constant(cluster, name) * factor
    if (name.endswith("_share") and value > 1) or (name in ("overlap", "posted") and value < 1):
        return None
    if name == "skew_s":
        inside = cluster.pools[0].inside
        return replace(cluster, links={**cluster.links, inside: replace(cluster.links[inside], skew_s=value)})
    return replace(cluster, accelerators={key: replace(one, **{name: value}) for key, one in cluster.accelerators.items()})


def calibrations(rows: Sequence[Published], known: Mapping[str, Cluster], tell: Callable[[str], None]) -> dict[str, Cluster]:
    """Each machine with constants fitted on its rows, of which `tell` hears. Rows that cannot be predicted are left out."""
    found, pieces = dict(known), dict[Shape, Pieces]()
    for machine, cluster in known.items():
        own = [row for row in rows if row.cluster == machine]
        if not own:
            continue
        names = ("product_share", "memory_share", "launch_s", "skew_s") if len(own) > 1 else ("product_share",)
        of = samples(own, pieces)
        tell(f"{machine}: {', '.join(names)} on {len(of)} samples of {len(own)} rows")
        found[machine] = fitted(of, cluster, names, tell)
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
        "planner_percent": percent(said.step_s if said else None, row.step_s),
        **{f"{name}_percent": percent(by_equation.get(name), row.step_s) for name in EQUATIONS},
        "measured_gib": row.reserved_gib,
        "predicted_gib": round(gib, 2) if gib else None,
        "memory_percent": percent(gib, row.reserved_gib),
        "problem": problem or None,
    }
