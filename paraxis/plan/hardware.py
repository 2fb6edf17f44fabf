"""A cluster as the planner knows it: pools of like hosts, their accelerators, and the links that ranks talk over.

A rank stands for a place: place 0 is the first device of the first host. Times of collectives are those of measured tables where a
link has any, scaled from the nearest measured group; else those of a ring, after the model in NCCL's tuning (src/graph/tuning.cc).
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Literal, get_args

from paraxis.base.errors import ConfigError
from paraxis.plan.rates import Accelerator

ExchangeKind = Literal["all_gather", "reduce_scatter", "all_reduce", "all_to_all", "p2p"]
EXCHANGES: tuple[ExchangeKind, ...] = get_args(ExchangeKind)


@dataclass(frozen=True)
class LinkKind:
    """What links of a kind have in common: the `share` of their bandwidth that large messages get, the latency of a hop in seconds, and
    whether NCCL can trade bandwidth for latency on them."""

    share: float
    latency_s: float
    low_latency: bool


# Latencies: NCCL 2.2x, tuning.cc, hwLat of a ring with the Simple protocol (NVLink, PCI, network). Shares: what nccl-tests is commonly
# seen to reach of the data sheet. TCP's are those of an untuned 10 to 100 Gb/s network, and of processes on one host.
LINK_KINDS = {
    "nvlink": LinkKind(0.8, 3.4e-6, True),
    "pcie": LinkKind(0.75, 5.7e-6, True),
    "infiniband": LinkKind(0.9, 14e-6, True),
    "roce": LinkKind(0.85, 14e-6, True),
    "ethernet": LinkKind(0.8, 60e-6, False),
    "memory": LinkKind(0.5, 40e-6, False),
}
START_S = 8.4e-6  # of a collective, tuning.cc's baseLat of the same
# NCCL's LL protocol sends a flag with every word: half of the bandwidth, at about a fifth of the latency (0.6 of 3.4 us, 2.7 of 14 us).
LOW_LATENCY = (0.5, 0.19)


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """A measured collective among `ranks`, spread evenly over `hosts`. `bytes` is the whole buffer of a rank: what an all-gather leaves,
    what a reduce-scatter starts from, what an all-reduce or all-to-all works on, what a message carries."""

    kind: ExchangeKind
    ranks: int
    hosts: int = 1
    bytes: int
    seconds: float


@dataclass(frozen=True, kw_only=True)
class Link:
    """What devices talk over; `bytes_per_s` is that of one device in one direction. A `share` or latency of 0 is its kind's.

    `skew_s`: ranks of a step come to a collective at different times, which a benchmark of collectives does not see. The last of n is
    late by this times log2(n), as the largest of n random delays grows. `host_s`: what of a measured exchange's time the host took to ask
    for it, which in a step it does while the device is busy.
    """

    name: str
    kind: str
    bytes_per_s: float
    latency_s: float = 0.0
    share: float = 0.0
    skew_s: float = 0.0
    host_s: float = 0.0
    source: str = ""
    measured: str = ""
    exchanges: tuple[Exchange, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if self.kind not in LINK_KINDS:
            raise ConfigError(f"link {self.name}: kind={self.kind!r} is unknown; choose one of {', '.join(LINK_KINDS)}")
        if not self.bytes_per_s > 0:
            raise ConfigError(f"link {self.name}: bytes_per_s={self.bytes_per_s} must be more than 0")
        if not 0 <= self.share <= 1 or min(self.latency_s, self.skew_s, self.host_s) < 0:
            times = f"latency_s={self.latency_s}, skew_s={self.skew_s} and host_s={self.host_s}"
            said = f"share={self.share} must be from 0 to 1, {times} 0 or more"
            raise ConfigError(f"link {self.name}: {said}")

    @property
    def reached(self) -> float:
        """Bytes/s that large messages get."""
        return self.bytes_per_s * (self.share or LINK_KINDS[self.kind].share)

    @property
    def hop_s(self) -> float:
        return self.latency_s or LINK_KINDS[self.kind].latency_s


@dataclass(frozen=True, kw_only=True)
class Pool:
    """Like hosts: `devices` a host of the accelerator called so, the link `inside` a host and the `network` between hosts of the pool."""

    hosts: int
    devices: int
    accelerator: str
    inside: str
    network: str = ""

    def __post_init__(self) -> None:
        for name in ("hosts", "devices"):
            if getattr(self, name) < 1:
                raise ConfigError(f"a pool's {name}={getattr(self, name)} must be 1 or more")
        if self.hosts > 1 and not self.network:
            raise ConfigError(f"a pool of {self.hosts} hosts needs network: the name of the link between them")


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """Pools of hosts. `between` is the link between hosts of different pools; `matrix[i][j]`, where it was measured, the bytes/s that one
    device of host i gets to one of host j, in place of what the links' data sheets say.
    """

    name: str
    accelerators: Mapping[str, Accelerator]
    links: Mapping[str, Link]
    pools: tuple[Pool, ...]
    between: str = ""
    matrix: tuple[tuple[float, ...], ...] = ()
    source: str = ""
    versions: Mapping[str, str] = field(default_factory=dict)
    date: str = ""

    def __post_init__(self) -> None:
        if not self.pools:
            raise ConfigError(f"cluster {self.name} has no pools of hosts; add one")
        for number, pool in enumerate(self.pools):
            self._known("accelerator", pool.accelerator, self.accelerators, f"pool {number}")
            for link in filter(None, (pool.inside, pool.network)):
                self._known("link", link, self.links, f"pool {number}")
        if self.between:
            self._known("link", self.between, self.links, "between")
        elif len(self.pools) > 1:
            raise ConfigError(f"cluster {self.name} has {len(self.pools)} pools; between must name the link that joins them")
        if self.matrix and {len(self.matrix), *map(len, self.matrix)} != {self.hosts}:
            raise ConfigError(f"cluster {self.name}: the matrix must have a row and a column for each of its {self.hosts} hosts")

    def _known(self, what: str, name: str, known: Iterable[str], where: str) -> None:
        if name not in known:
            raise ConfigError(
                f"cluster {self.name}: {where} names the {what} {name!r}, which the file does not describe ({', '.join(known)})"
            )

    @property
    def hosts(self) -> int:
        return sum(pool.hosts for pool in self.pools)

    @property
    def ranks(self) -> int:
        """How many devices there are."""
        return sum(pool.hosts * pool.devices for pool in self.pools)

    def with_devices(self, devices: int) -> "Cluster":
        """The cluster with so many devices: its only kind of host, repeated. Raises ConfigError where that is not clear."""
        if len(self.pools) != 1:
            raise ConfigError(f"--gpus={devices}: cluster {self.name} has {len(self.pools)} kinds of hosts; set their numbers in its file")
        (pool,) = self.pools
        if devices < 1 or (devices > pool.devices and devices % pool.devices):
            raise ConfigError(f"--gpus={devices} is not a multiple of the {pool.devices} devices of a host of {self.name}")
        hosts = max(1, devices // pool.devices)
        if self.matrix and hosts != self.hosts:
            raise ConfigError(f"--gpus={devices}: cluster {self.name} has a measured matrix of {self.hosts} hosts; leave --gpus out")
        return replace(self, pools=(replace(pool, hosts=hosts, devices=min(devices, pool.devices)),))

    @cached_property
    def _pool_of(self) -> list[int]:
        """The number of each host's pool."""
        return [number for number, pool in enumerate(self.pools) for _ in range(pool.hosts)]

    @cached_property
    def _host_of(self) -> list[int]:
        return [host for host, pool in enumerate(self._pool_of) for _ in range(self.pools[pool].devices)]

    def host_of(self, rank: int) -> int:
        """The number of the host that a rank is on. Raises ConfigError for a rank that the cluster has no device for."""
        if rank >= len(self._host_of):
            raise ConfigError(f"cluster {self.name} has {self.ranks} devices, none for rank {rank}; see --gpus, or the file's pools")
        return self._host_of[rank]

    def accelerator_of(self, rank: int) -> Accelerator:
        return self.accelerators[self.pools[self._pool_of[self.host_of(rank)]].accelerator]

    def link_of(self, one: int, other: int) -> Link:
        """What two hosts, or the devices of one, talk over, with the matrix's figure where there is one."""
        first, second = self._pool_of[one], self._pool_of[other]
        pool = self.pools[first]
        name = pool.inside if one == other else pool.network if first == second else self.between
        if not name:
            raise ConfigError(f"cluster {self.name} says nothing of the link between hosts {one} and {other}; give its pool a network")
        link = self.links[name]
        return replace(link, bytes_per_s=self.matrix[one][other], share=1.0) if self.matrix and one != other else link

    def exchange_s(self, kind: ExchangeKind, bytes: float, ranks: Sequence[int]) -> float:
        """Seconds that a collective takes on a buffer of `bytes` (see `Exchange`), alone on its links.

        All groups of a kind run at once, as they do in a step: each device has the bandwidth of its own port. For `p2p` two ranks.
        """
        if len(ranks) < 2:
            return 0.0
        key = kind, int(bytes), tuple(self.host_of(rank) for rank in ranks)
        if key not in self._timed:
            self._timed[key] = self._route(key[2]).exchange_s(kind, bytes)
        return self._timed[key]

    @cached_property
    def _timed(self) -> dict[tuple[str, int, tuple[int, ...]], float]:
        """Times that were asked for."""
        return {}

    def _route(self, hosts: tuple[int, ...]) -> "Route":
        counts = Counter(hosts)
        ring = list(counts)
        inside = [self.link_of(host, host) for host in ring if counts[host] > 1]
        across = [self.link_of(one, other) for one, other in pairwise([*ring, ring[0]]) if one != other]
        slowest = [min(links, key=lambda link: link.reached) if links else None for links in (inside, across)]
        # In and out through the ports of all of the group's devices on a host: the one with the fewest is the narrowest.
        return Route(len(hosts), len(ring), min(counts.values()), *slowest)


@dataclass(frozen=True)
class Route:
    """What a group of `ranks` on `hosts` talks over: the slowest link inside a host and across hosts, where it uses one.
    `ports` is the least number of the group's devices on a host."""

    ranks: int
    hosts: int
    ports: int
    inside: Link | None
    across: Link | None

    def _device_s(self, kind: ExchangeKind, bytes: float) -> float:
        """Without what the host takes to ask, where measurements have it."""
        measured, model = _measured(self, kind, bytes), modelled(self, kind, bytes)
        host_s = max(link.host_s for link in (self.inside, self.across) if link)
        return max(measured - host_s, min(measured, model)) if measured else model

    @property
    def skew_s(self) -> float:
        """How late the last rank comes: delays arise in hosts, so the link inside them has it where there is one."""
        link = self.inside or self.across
        return link.skew_s * math.log2(self.ranks) if link else 0.0

    def exchange_s(self, kind: ExchangeKind, bytes: float) -> float:
        """Seconds of a collective on a buffer of `bytes`: measured where a link has a table, else modelled."""
        seconds = self._device_s(kind, bytes)
        return seconds if kind == "p2p" else seconds + self.skew_s


def modelled(route: Route, kind: ExchangeKind, bytes: float) -> float:
    """The time of a ring, or of every rank sending to every other: a start, hops, and bytes over the narrowest place."""
    link = route.across or route.inside
    assert link is not None, "a group of two at least"
    protocols = [(1.0, 1.0), LOW_LATENCY] if LINK_KINDS[link.kind].low_latency else [(1.0, 1.0)]
    return START_S + min(latency * _hops_s(route, kind) + _bytes_s(route, kind, bytes) / share for share, latency in protocols)


def _hops_s(route: Route, kind: ExchangeKind) -> float:
    inside = route.inside.hop_s if route.inside else 0.0
    across = route.across.hop_s if route.across else 0.0
    if kind in ("p2p", "all_to_all"):
        return max(inside, across)
    ring = (route.ranks - route.hosts) * inside + (route.hosts - 1) * across
    if kind != "all_reduce":
        return ring
    tree = 2 * ((route.ranks / route.hosts - 1) * inside + math.ceil(math.log2(route.hosts)) * across)
    return min(2 * ring, tree) if route.hosts > 1 else 2 * ring


def _bytes_s(route: Route, kind: ExchangeKind, bytes: float) -> float:
    inside = route.inside.reached if route.inside else math.inf
    across = route.across.reached if route.across else math.inf
    if kind == "p2p":
        return bytes / min(inside, across)
    if kind == "all_to_all":
        near = bytes * (route.ranks / route.hosts - 1) / route.ranks
        return max(near / inside, bytes * (1 - 1 / route.hosts) / across)
    passed = bytes * (route.ranks - 1) / route.ranks * (2 if kind == "all_reduce" else 1)
    return passed / min(inside, across * route.ports)


def _measured(route: Route, kind: ExchangeKind, bytes: float) -> float | None:
    """What the nearest measured group takes for the nearest size, times what the model says of the difference; None without a table."""
    link = route.across or route.inside
    assert link is not None
    groups = {(e.ranks, e.hosts) for e in link.exchanges if e.kind == kind and (e.hosts > 1) == (route.hosts > 1)}
    if not groups:
        return None
    ranks, hosts = min(groups, key=lambda g: (abs(math.log(g[1] / route.hosts)), abs(math.log(g[0] / route.ranks)), g))
    table = sorted((e.bytes, e.seconds) for e in link.exchanges if (e.kind, e.ranks, e.hosts) == (kind, ranks, hosts))
    like = replace(route, ranks=ranks, hosts=hosts, ports=max(1, ranks // hosts))
    at = min(max(bytes, table[0][0]), table[-1][0])
    return _between(table, at) * modelled(route, kind, bytes) / modelled(like, kind, at)


def _between(table: Sequence[tuple[int, float]], bytes: float) -> float:
    """A time within the table, straight in log-log between two of its sizes."""
    for (small, small_s), (large, large_s) in pairwise(table):
        if bytes <= large:
            part = math.log(bytes / small) / math.log(large / small)
            return math.exp(math.log(small_s) + part * math.log(large_s / small_s))
    return table[-1][1]
