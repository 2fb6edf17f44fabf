"""What a run that fits nowhere lacks, and the smallest change that would let it fit."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from paraxis.base.axes import DEGREES
from paraxis.base.errors import ConfigError
from paraxis.plan.candidates import Candidate, Space
from paraxis.plan.closed import Costs
from paraxis.plan.hardware import Cluster
from paraxis.plan.search import Option, Search, trace_all
from paraxis.train.check import check

# What is changed first: what costs time alone, then how the work is cut.
ORDER = ("remat.mode", "parallel.reshard", "train.micro_batch", "parallel.schedule", *(f"parallel.{axis}" for axis in DEGREES))
MOST_DOUBLINGS = 8  # of the devices, looking for enough
FASTEST = 200  # options among which the one that changes least is taken
MOST_TRACED = 3  # of them, where a trace says that the one before does not fit after all


@dataclass(frozen=True, kw_only=True)
class Change:
    """A change after which a run would fit: settings by dotted path, how many devices more, and the option that it leads to."""

    settings: Mapping[str, Any]
    devices: int
    option: Option

    @property
    def words(self) -> str:
        said = [f"--{path}={value}" for path, value in self.settings.items()]
        if self.devices:
            said.append(f"{self.devices} devices more ({self.option.candidate.layout})")
        return " ".join(said)


@dataclass(frozen=True, kw_only=True)
class Lacking:
    """The option that takes least memory, which may fit after all; the bytes that it lacks; and changes that would do, smallest first."""

    option: Option
    bytes: float
    changes: list[Change]


def least(search: Search) -> Option:
    """The option with the least memory by estimate, traced if there is time. Raises ConfigError where training refuses it."""
    families = search.space.families()
    found = min((one for family in families for one in search.space.members(family)[:1]), key=_memory(search.costs))
    option = search.estimate(found)
    check(option.config, search.space.ranks, search.space.model)
    return next(iter(trace_all([option], search.cluster, search.space.ranks, search.left_s())), option)


def _memory(costs: Costs) -> Any:
    return lambda candidate: (sum(costs.memory(candidate).values()), costs.least_s(candidate) / candidate.rows)


def find_lacking(search: Search) -> Lacking:
    """What `search`, which found nothing, lacks. Changes are looked for where even the least option does not fit.

    Raises ConfigError where it found nothing because of what training refuses.
    """
    option = least(search)
    lacks = option.reserved - option.usable
    ratio = option.reserved / sum(search.costs.memory(option.candidate).values())
    return Lacking(option=option, bytes=lacks, changes=list(_changes(search, ratio)) if lacks > 0 else [])


def _changes(search: Search, ratio: float) -> Iterator[Change]:
    """One setting let go at a time, then more devices. `ratio` is what traces say of memory over estimates."""
    space = search.space
    for path in sorted(space.fixed, key=lambda path: ORDER.index(path) if path in ORDER else len(ORDER)):
        if path not in ORDER and not path.startswith("remat."):
            continue
        if search.left_s() <= 0:
            return
        left = {other: value for other, value in space.fixed.items() if other != path}
        if found := _fitting(replace(space, fixed=left), search.cluster, search, ratio):
            settings = found.candidate.settings(space.config)
            yield Change(settings={p: v for p, v in settings.items() if p == path} or settings, devices=0, option=found)
    for doubling in range(1, MOST_DOUBLINGS + 1):
        ranks = space.ranks << doubling
        if search.left_s() <= 0:
            return
        try:
            cluster = search.cluster.with_devices(ranks)
        except ConfigError:
            return  # of several kinds of hosts there is no telling which to add
        if found := _fitting(replace(space, ranks=ranks), cluster, search, ratio):
            yield Change(settings={}, devices=ranks - space.ranks, option=found)
            return


def _fitting(space: Space, cluster: Cluster, search: Search, ratio: float) -> Option | None:
    """The option of `space` that changes least of what fits by the corrected estimate, and by its trace where there is time for one."""
    other = Search(space, cluster, search.effort)
    costs = other.costs
    smallest = (one for family in space.families() for one in space.members(family)[:1])
    fitting = sorted(
        (one for one in smallest if sum(costs.memory(one).values()) * ratio <= costs.usable), key=lambda one: costs.least_s(one) / one.rows
    )
    nearest = sorted(fitting[:FASTEST], key=lambda one: _distance(one, space))
    for option in map(other.estimate, nearest[:MOST_TRACED]):
        told = next(iter(trace_all([option], cluster, space.ranks, search.left_s())), option)
        if other.accepts(told) and (told.fits or told.source == "simulated"):
            return told
    return None


def _distance(candidate: Candidate, space: Space) -> int:
    """How many settings it changes."""
    return len(candidate.settings(space.config))
