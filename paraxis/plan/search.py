"""The fastest ways to run a recipe on a cluster that fit: pruned by formulas, the best of them simulated, the best of those traced.

Families of candidates are taken in the order of what they take at the least (`Costs.least_s`, then the tighter `Costs.bound_s`), and
their members simulated, until no bound is below the worst of the times that are kept: no family that is left can be better. This is
branch and bound, best first (Land and Doig 1960, Econometrica 28). Memory is estimated first; what is proposed is traced, and what
traces say of memory and time corrects the estimates of what was not.
"""

import heapq
import logging
import signal
import time
from bisect import insort
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import islice
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from os import kill
from statistics import median
from typing import Any, Literal

import torch

from paraxis.base.errors import ConfigError
from paraxis.base.forked import Forked
from paraxis.plan.candidates import Candidate, Space
from paraxis.plan.closed import Costs
from paraxis.plan.cuts import cuts_by_speed
from paraxis.plan.hardware import Cluster
from paraxis.plan.memory import refuse_untraceable
from paraxis.plan.place import place
from paraxis.plan.predict import Prediction, predict
from paraxis.plan.replay import simulate
from paraxis.plan.traffic import traffic_of
from paraxis.train.check import check
from paraxis.train.config import RunConfig

log = logging.getLogger("paraxis")

Source = Literal["simulated", "traced", "exact"]
AT_ONCE = 2  # traces, each in a process of its own
PARTS = (1.0, 0.7, 0.5, 0.3)  # of the memory there is, for each of which the fastest candidate is sought
ALIKE = 1.03  # predictions closer than this do not tell which is faster
CLEAR = 1.03  # a candidate this many times slower than the best traced one is not traced


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long a search goes on: `keep` candidates are simulated in order, at most `simulated` in all, `traced` are traced; `seconds`
    bounds it all. Without, the same search finds the same, however busy the machine is."""

    keep: int = 12
    simulated: int = 200
    traced: int = 6
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class Option:
    """A way to run, and what it takes: a step's seconds, bytes of the fullest rank by category. `cuts` are the layers of each pipeline
    stage, `order` the device of each rank (a `range` for that of the numbers)."""

    candidate: Candidate
    config: RunConfig
    source: Source
    step_s: float
    tokens_per_s: float
    mfu: float | None
    exposed_s: float
    bubble: float
    held: Mapping[str, float]
    usable: int
    cuts: Sequence[int] = ()
    order: Sequence[int] = ()
    prediction: Prediction | None = field(default=None, compare=False, repr=False)

    @property
    def reserved(self) -> float:
        return sum(self.held.values())

    @property
    def fits(self) -> bool:
        return self.reserved <= self.usable


@dataclass(frozen=True, kw_only=True)
class Found:
    """What a search found: options that fit, fastest first; those among all of which none is both faster and smaller (`pareto`); faster
    ones that were refused for their memory; and how it went. `complete` says that nothing was left out for want of effort."""

    options: Sequence[Option]
    pareto: Sequence[Option]
    refused: Sequence[Option]
    candidates: int
    simulated: int
    traced: int
    complete: bool


class Search:
    """One search for `config` (as `candidates.planned` leaves it) on `ranks` devices of `cluster`."""

    def __init__(self, space: Space, cluster: Cluster, effort: Effort, evaluate: Callable[..., Option] | None = None) -> None:
        self.space, self.cluster, self.effort = space, cluster, effort
        self.costs = Costs(space.config, space.model, cluster, space.ranks)
        self.started_s = time.monotonic()
        self.simulated: dict[Candidate, Option] = {}
        self.candidates, self.complete = 0, True
        self._evaluate = evaluate or self.estimate

    def run(self) -> Found:
        """Raises ConfigError where there is no candidate at all, and for a run that cannot be predicted."""
        refuse_untraceable(self.space.config, self.space.model)
        families = list(self.space.families())
        self.candidates = sum(self.space.size(family) for family in families)
        if not families:
            raise ConfigError(
                f"no layout of {self.space.config.name} on {self.space.ranks} ranks keeps what is set "
                f"({', '.join(self.space.fixed) or 'nothing'}): leave a setting out, or change train.global_tokens or --gpus"
            )
        # First of all without context parallelism, which estimates know least about.
        self._best([one for one in families if one.degrees.cp == 1], self.costs.usable, self.effort.keep)
        for part in PARTS:
            self._best(families, part * self.costs.usable, self.effort.keep if part == 1 else 2)
        options = distinct(sorted(self.simulated.values(), key=by_time))
        traced = self._traced(options)
        return self._judged(options, traced)

    def left_s(self) -> float:
        """Seconds that may still pass."""
        return float("inf") if self.effort.seconds is None else self.started_s + self.effort.seconds - time.monotonic()

    def _best(self, families: Sequence[Candidate], memory: float, keep: int) -> None:
        """Simulates until the `keep` fastest that take no more than `memory` are known: by seconds a row, as steps may differ in theirs."""
        costs = self.costs
        waiting = [(costs.least_s(family) / family.rows, number, False) for number, family in enumerate(families)]
        heapq.heapify(waiting)
        best: list[float] = []  # without repetitions: many candidates come to the same
        limit = len(self.simulated) + (self.effort.simulated if keep > 2 else self.effort.simulated // 5)
        while waiting and not (len(best) >= keep and waiting[0][0] >= best[keep - 1]):
            if len(self.simulated) >= limit or self.left_s() < 0.5 * (self.effort.seconds or 0):
                self.complete = False
                return
            _, number, bounded = heapq.heappop(waiting)
            family = families[number]
            if not bounded:
                if self._takes(family) <= memory:
                    heapq.heappush(waiting, (costs.bound_s(family) / family.rows, number, True))
                continue
            for member in self.space.members(family):
                if self._takes(member) <= memory:
                    if member not in self.simulated:
                        self.simulated[member] = self._evaluate(member)
                    if (seconds := round(self.simulated[member].step_s / member.rows, 15)) not in best:
                        insort(best, seconds)

    def _takes(self, candidate: Candidate) -> float:
        return sum(self.costs.memory(candidate).values())

    def estimate(self, candidate: Candidate) -> Option:
        """A candidate simulated."""
        played, config = simulate(self.costs, candidate), candidate.config(self.space.config)
        rate, mfu = self._rates(config, candidate, played.step_s)
        return Option(
            candidate=candidate,
            config=config,
            source="simulated",
            step_s=played.step_s,
            tokens_per_s=rate,
            mfu=mfu,
            exposed_s=played.exposed_s,
            bubble=played.bubble,
            held=self.costs.memory(candidate),
            usable=self.costs.usable,
            cuts=tuple(map(len, self.costs.cuts(candidate))) if candidate.degrees.pp > 1 else (),
            order=range(self.space.ranks),
        )

    def _rates(self, config: RunConfig, candidate: Candidate, step_s: float) -> tuple[float, float | None]:
        length = config.data.seq_len
        rate = config.rows_per_step(candidate.degrees) * length / step_s / self.space.ranks
        count = getattr(config.model, "flops_per_token", None)
        return rate, count(length) * rate / self.costs.device.peak(self.costs.peak_dtype) if count else None

    def _traced(self, options: Sequence[Option]) -> dict[Candidate, Option]:
        """The best options traced, two at a time, until the best is clear or the effort is spent."""
        done: dict[Candidate, Option] = {}
        tried, longest_s = set[Candidate](), 0.0
        while len(tried) < self.effort.traced:
            left = [_scaled(one, *_ratio(one, options, done)) for one in options if one.candidate not in tried]
            clear = max((one.tokens_per_s for one in done.values() if one.fits), default=0.0) / CLEAR
            wanted = {one.candidate for one in left if one.fits and one.tokens_per_s >= clear}
            next_ones = [one for one in options if one.candidate in wanted]
            if not next_ones or self.left_s() < longest_s:
                break
            batch = next_ones[: min(AT_ONCE, self.effort.traced - len(tried))]
            tried |= {one.candidate for one in batch}
            started_s = time.monotonic()
            done |= {one.candidate: one for one in trace_all(batch, self.cluster, self.space.ranks, self.left_s())}
            longest_s = max(longest_s, time.monotonic() - started_s)
        return done

    def _judged(self, options: Sequence[Option], traced: Mapping[Candidate, Option]) -> Found:
        """All options with what traces said, in order."""
        known = [traced.get(one.candidate) or _scaled(one, *_ratio(one, options, traced, known=True)) for one in options]
        fitting = sorted((one for one in known if one.fits), key=by_time)
        best = simplest_first(list(islice(filter(self.accepts, fitting), self.effort.keep)))
        fastest = max((one.tokens_per_s for one in best), default=0.0)
        return Found(
            options=best,
            pareto=[one for one in pareto(fitting) if self.accepts(one)],
            refused=sorted((one for one in known if not one.fits and one.tokens_per_s > fastest), key=by_time),
            candidates=self.candidates,
            simulated=len(self.simulated),
            traced=len(traced),
            complete=self.complete,
        )

    def accepts(self, option: Option) -> bool:
        """Whether training's own checks let it pass: what a search proposes has to."""
        with suppress(ConfigError):
            check(option.config, self.space.ranks, self.space.model)
            return True
        return False


def with_known(found: Found, whole: Option) -> Found:
    """`found` with what is now known of one of its options, which is put where that belongs."""

    def known(options: Sequence[Option]) -> list[Option]:
        told = (whole if one.candidate == whole.candidate else one for one in options)
        return sorted((one for one in told if one.fits), key=by_time)

    refused = found.refused if whole.fits else sorted([*found.refused, whole], key=by_time)
    return replace(found, options=simplest_first(known(found.options)), pareto=pareto(known(found.pareto)), refused=refused)


def distinct(options: Iterable[Option]) -> list[Option]:
    """Without those that by estimate take what an earlier one takes, in time and in memory."""
    return list({(round(one.tokens_per_s, 6), round(one.reserved)): one for one in reversed(list(options))}.values())[::-1]


def simplest_first(options: Sequence[Option]) -> list[Option]:
    """`options`, fastest first, but before all the one on the fewest axes of those that predictions do not tell from the fastest."""
    if not options:
        return []
    alike = [one for one in options if one.tokens_per_s * ALIKE >= options[0].tokens_per_s]
    first = min(alike, key=lambda one: sum(getattr(one.candidate.degrees, axis) > 1 for axis in ("pp", "cp", "tp")))
    return [first, *(one for one in options if one is not first)]


def pareto(fitting: Sequence[Option]) -> list[Option]:
    """Of options in order of time those that take less memory than every faster one."""
    found: list[Option] = []
    for one in fitting:
        if not found or one.reserved < found[-1].reserved:
            found.append(one)
    return found


def by_time(option: Option) -> tuple[float, int, int]:
    """Fastest first: by tokens a second, as steps may differ in their tokens; of equals, what takes less memory, and fewer axes."""
    d = option.candidate.degrees
    return -round(option.tokens_per_s, 6), round(option.reserved), d.cp * d.tp * d.pp


def _ratio(option: Option, options: Iterable[Option], traced: Mapping[Candidate, Option], *, known: bool = False) -> tuple[float, float]:
    """What traces of options on the same axes as `option` say over what was estimated: of time, and of memory. Where there are none, one
    over one, so that it is worth a trace; or (`known`) what those on other axes say."""
    every = [(one, traced[one.candidate]) for one in options if one.candidate in traced]
    both = [pair for pair in every if _axes(pair[0]) == _axes(option)] or (every if known else [])
    if not both:
        return 1.0, 1.0
    return median(b.step_s / a.step_s for a, b in both), median(b.reserved / a.reserved for a, b in both)


def _axes(option: Option) -> tuple[bool, ...]:
    d = option.candidate.degrees
    return d.pp > 1, d.cp > 1, d.tp > 1, d.ep > 1


def _scaled(option: Option, seconds: float, memory: float) -> Option:
    held = {category: held * memory for category, held in option.held.items()}
    rates = {"tokens_per_s": option.tokens_per_s / seconds, "mfu": option.mfu / seconds if option.mfu is not None else None}
    return replace(option, step_s=option.step_s * seconds, exposed_s=option.exposed_s * seconds, held=held, **rates)


def trace_all(options: Sequence[Option], cluster: Cluster, ranks: int, seconds: float) -> list[Option]:
    """`options` traced side by side, each in a copy of this process; without those that are not done in time, or fail: logs why, where
    there is no other."""
    running: list[tuple[Forked, Connection]] = []
    for option in options:
        here, there = Pipe(duplex=False)
        running.append((Forked(partial(_send, there, option, cluster, ranks)), here))
        there.close()
    found: list[Option] = []
    failed: list[str] = []
    deadline_s = time.monotonic() + seconds
    for child, here in running:
        left_s = min(max(0.0, deadline_s - time.monotonic()), 1e6)
        if here.poll(left_s):
            with suppress(EOFError):
                told = here.recv()
                found += [told] if isinstance(told, Option) else []
                failed += [told] if isinstance(told, str) else []
        if child.poll() is None:
            kill(child.pid, signal.SIGKILL)
        child.wait()
        here.close()
    if failed and not found:
        log.warning("%s could not be traced: %s", options[0].candidate.layout, failed[0])
    return found


def _send(there: Connection, option: Option, cluster: Cluster, ranks: int) -> int:
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    try:
        there.send(traced(option, cluster, ranks))
    except ConfigError as error:  # no way to run after all
        there.send(str(error))
    return 0


def traced(option: Option, cluster: Cluster, ranks: int, *, exact: bool = False, placed: bool = True) -> Option:
    """`option` with what a trace of it says; placed (unless ranks stay in order), and its stages cut, by the cluster's links and speeds.

    Raises ConfigError for what cannot run.
    """
    config, order = option.config, range(ranks)
    settings: dict[str, Any] = {}
    if len(cluster.pools) > 1 or cluster.matrix:
        degrees = config.parallel.degrees.filling(ranks)
        order = place(cluster, degrees, traffic_of(config, cluster, ranks)).order if placed else order
        if degrees.pp > 1 and not config.parallel.cuts and (cuts := cuts_by_speed(config, cluster, order)):
            config = replace(config, parallel=replace(config.parallel, cuts=cuts))
            settings["cuts"] = cuts
    prediction = predict(config, cluster, ranks, placement=order, exact=exact)
    return replace(
        option,
        config=config,
        source="exact" if exact else "traced",
        step_s=prediction.step_s,
        tokens_per_s=prediction.tokens_per_s,
        mfu=prediction.mfu,
        exposed_s=prediction.exposed_s,
        bubble=prediction.bubble,
        held=held_of(prediction),
        usable=prediction.usable,
        order=order,
        prediction=prediction,
        **settings,
    )


def held_of(prediction: Prediction) -> dict[str, float]:
    """Bytes by category, with what the allocator has beyond them as fragmentation."""
    return {**prediction.held, "fragmentation": float(prediction.reserved - prediction.allocated)}
