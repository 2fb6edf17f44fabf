"""What a placement of ranks on hosts costs, kept up to date move by move: only groups and pipelines that a move touches are priced again.

Ranks that always move together are a slot. Prices are those of `Cluster.exchange_s`, which go by a group's numbers of ranks and hosts
and by its ring's slowest links: groups that agree in these take the same time, and are priced once.
"""

from collections import Counter
from collections.abc import Sequence
from random import Random

import numpy as np
from numpy.typing import NDArray

from paraxis.base.axes import Degrees
from paraxis.plan.cuts import speed_of
from paraxis.plan.hardware import Cluster, Route
from paraxis.plan.traffic import Collective, GroupKind, Traffic, groups_of

RouteKey = tuple[int, int, int, int, int]  # ranks, hosts, ports, classes of the slowest links across and inside (-1: none)
Worst = tuple[float, float, float, float]  # of a bucket's groups, for a micro-batch and once a step: the slowest's, and the average's


class Links:
    """The links of a cluster's hosts by speed. Links of one name and bandwidth are of one class."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster
        self.hosts_of_devices = [cluster.host_of(device) for device in range(cluster.ranks)]
        self._device = [self.hosts_of_devices.index(host) for host in range(cluster.hosts)]
        classes: dict[tuple[str, float], int] = {}
        links = [[cluster.link_of(one, other) for other in range(cluster.hosts)] for one in range(cluster.hosts)]
        self.reached = [[link.reached for link in row] for row in links]
        self._class = [[classes.setdefault((link.name, link.bytes_per_s), len(classes)) for link in row] for row in links]
        self._link = {number: link for row, own in zip(self._class, links, strict=True) for number, link in zip(row, own, strict=True)}
        self._insides = len({row[host] for host, row in enumerate(self._class)})

    @property
    def uniform(self) -> bool:
        """Whether no host differs from another."""
        across = {self._class[a][b] for a in range(len(self._class)) for b in range(len(self._class)) if a != b}
        return len(across) <= 1 and len(self.cluster.pools) == 1

    def chain(self) -> list[int]:
        """Every host, from the best connected on always the one next whose link from the last is fastest."""
        left = list(range(len(self.reached)))
        found = [max(left, key=lambda host: sum(self.reached[host]) - self.reached[host][host])]
        left.remove(found[0])
        while left:
            found.append(max(left, key=self.reached[found[-1]].__getitem__))
            left.remove(found[-1])
        return found

    def route(self, hosts: Sequence[int]) -> RouteKey:
        """What the time of a group on these hosts depends on: how many ranks, hosts, ports, and the slowest links across and inside."""
        counts = Counter(hosts)
        ring = list(counts)
        if len(ring) == 1:
            return len(hosts), 1, len(hosts), -1, self._class[ring[0]][ring[0]]
        edges = [self.reached[one][other] for one, other in zip(ring, [*ring[1:], ring[0]], strict=True)]
        slowest = edges.index(min(edges))
        across = self._class[ring[slowest]][ring[(slowest + 1) % len(ring)]]
        inside = -1
        if len(hosts) > len(ring):
            several = [host for host in ring if counts[host] > 1] if self._insides > 1 else [ring[0]]
            narrow = min(several, key=lambda host: self.reached[host][host])
            inside = self._class[narrow][narrow]
        return len(hosts), len(ring), min(counts.values()), across, inside

    def exchange_s(self, one: Collective, key: RouteKey) -> float:
        """Seconds of a collective of a group with this key, as `Cluster.exchange_s` has them."""
        ranks, hosts, ports, across, inside = key
        return Route(ranks, hosts, ports, self._link.get(inside), self._link.get(across)).exchange_s(one.exchange, one.bytes)

    def hop_s(self, one: int, other: int, bytes: float) -> float:
        """A message from one host to the other, and one back."""
        there, back = (self._device[one], self._device[other]), (self._device[other], self._device[one])
        return self.cluster.exchange_s("p2p", bytes, there) + self.cluster.exchange_s("p2p", bytes, back)

    def speeds(self, dtype: str) -> list[float]:
        """Each host's, as a part of the fastest's."""
        found = [speed_of(self.cluster.accelerator_of(device), dtype) for device in self._device]
        return [speed / max(found) for speed in found]


class Board:
    """The cost of slots on hosts. `slot_of[r]` is the slot of rank r; a slot's ranks are on one host."""

    def __init__(self, links: Links, degrees: Degrees, traffic: Traffic, slot_of: NDArray[np.int64]) -> None:
        self.links, self.traffic, self.pp = links, traffic, degrees.pp
        self.slots = int(slot_of.max()) + 1
        self._said: list[list[tuple[Collective, float, float]]] = []  # by bucket: a collective, its times of a micro-batch and of a step
        self._stage: list[int] = []  # of a bucket, as the next two
        self._groups: list[range] = []
        self._members: list[list[int]] = []  # of a group: its slots, in the order of its ring
        self._bucket: list[int] = []
        kinds: list[GroupKind] = [one.group for one in (*traffic.each, *traffic.once)]
        for kind in dict.fromkeys(kinds):
            for stage, groups in enumerate(slot_of[groups_of(kind, degrees)]):
                self._add(kind, stage, np.unique(groups, axis=0).tolist())
        lanes = np.unique(slot_of.reshape(self.pp, -1).T, axis=0).tolist() if traffic.hops else []
        self._lanes = [[(lane[a], lane[b]) for a, b in traffic.hops] for lane in lanes]
        self._groups_at = _at(self._members, self.slots)
        self._lanes_at = _at([[slot for hop in lane for slot in hop] for lane in self._lanes], self.slots)
        self._slots_of_stage = [np.unique(part).tolist() for part in slot_of.reshape(self.pp, -1)]
        speeds = links.speeds(traffic.dtype) if traffic.work_s else [1.0]
        self._speeds = speeds if len({*speeds}) > 1 else []
        self._prices: dict[tuple[int, RouteKey], tuple[float, float]] = {}
        self._hops = [[-1.0] * len(links.reached) for _ in links.reached]  # seconds, where they were asked for
        self.hosts: list[int] = []

    def _add(self, kind: GroupKind, stage: int, groups: list[list[int]]) -> None:
        """A bucket: the groups of a kind in a stage, of which the slowest counts."""
        said = [(one, one.times[stage], 0.0) for one in self.traffic.each if one.group == kind]
        said += [(one, 0.0, one.times[stage]) for one in self.traffic.once if one.group == kind]
        if len(groups[0]) > 1 and any(each or once for _, each, once in said):
            self._groups.append(range(len(self._members), len(self._members) + len(groups)))
            self._bucket += [len(self._said)] * len(groups)
            self._members += groups
            self._said.append(said)
            self._stage.append(stage)

    def put(self, hosts: Sequence[int]) -> float:
        """Every slot on its host. Returns the cost, in seconds."""
        self.hosts = list(hosts)
        self._group_s = [self._price(group) for group in range(len(self._members))]
        self._lane_s = [self._path(lane) for lane in range(len(self._lanes))]
        self._worst = [self._slowest(bucket) for bucket in range(len(self._said))]
        self._before: tuple[list[tuple[int, int]], dict[int, tuple[float, float]], dict[int, float], dict[int, Worst]]
        return self._total()

    def move(self, changes: Sequence[tuple[int, int]]) -> float:
        """These slots to these hosts. Returns the cost; `undo` takes the move back."""
        before = [(slot, self.hosts[slot]) for slot, _ in changes]
        for slot, host in changes:
            self.hosts[slot] = host
        groups = {group: self._group_s[group] for slot, _ in changes for group in self._groups_at[slot]}
        lanes = {lane: self._lane_s[lane] for slot, _ in changes for lane in self._lanes_at[slot]}
        buckets = {bucket: self._worst[bucket] for bucket in {self._bucket[group] for group in groups}}
        self._before = before, groups, lanes, buckets
        for group in groups:
            self._group_s[group] = self._price(group)
        for lane in lanes:
            self._lane_s[lane] = self._path(lane)
        for bucket in buckets:
            self._worst[bucket] = self._slowest(bucket)
        return self._total()

    def undo(self) -> None:
        """Takes the last move back."""
        changes, groups, lanes, buckets = self._before
        for slot, host in changes:
            self.hosts[slot] = host
        for group, seconds in groups.items():
            self._group_s[group] = seconds
        for lane, path_s in lanes.items():
            self._lane_s[lane] = path_s
        for bucket, worst in buckets.items():
            self._worst[bucket] = worst

    def typical_s(self) -> float:
        """The cost if not the slowest but the average of groups and pipelines counted: says which of two equal orders is nearer to less."""
        each_times, lanes = (self.traffic.micro_batches - 1) / self.pp + 1, max(1, len(self._lanes))
        groups = sum(each_times * each + once / self.pp for _, _, each, once in self._worst)
        return groups + self.traffic.rounds * sum(self._lane_s) / lanes

    def critical(self, draw: Random) -> int:
        """A slot of what is slowest: of a pipeline, or of a group of the stage that decides."""
        slow = [slot for hop in self._lanes[self._lane_s.index(max(self._lane_s))] for slot in hop] if self._lanes else []
        for n, by_stage in enumerate(self._by_stage()):
            stage = by_stage.index(max(by_stage))
            for bucket, groups in enumerate(self._groups):
                if self._stage[bucket] == stage and self._worst[bucket][n]:
                    slow += self._members[max(groups, key=lambda group: self._group_s[group][n])]
        return draw.choice(slow) if slow else draw.randrange(self.slots)

    def _price(self, group: int) -> tuple[float, float]:
        """Seconds of a group's collectives: of a micro-batch, and of a step."""
        hosts = [self.hosts[slot] for slot in self._members[group]]
        bucket = self._bucket[group]
        key = bucket, self.links.route(hosts)
        if key not in self._prices:
            each_s = once_s = 0.0
            for one, each, once in self._said[bucket]:
                seconds = self.links.exchange_s(one, key[1]) if each or once else 0.0
                each_s, once_s = each_s + each * seconds, once_s + once * seconds
            self._prices[key] = each_s, once_s
        return self._prices[key]

    def _path(self, lane: int) -> float:
        return sum([self._hop_s(self.hosts[a], self.hosts[b]) for a, b in self._lanes[lane]])

    def _hop_s(self, one: int, other: int) -> float:
        seconds = self._hops[one][other]
        if seconds < 0:
            seconds = self._hops[one][other] = self.links.hop_s(one, other, self.traffic.message_bytes)
        return seconds

    def _slowest(self, bucket: int) -> Worst:
        groups = self._groups[bucket]
        each, once = zip(*self._group_s[groups.start : groups.stop], strict=True)
        return max(each), max(once), sum(each) / len(each), sum(once) / len(once)

    def _by_stage(self) -> tuple[list[float], list[float]]:
        each, once = [0.0] * self.pp, [0.0] * self.pp
        for stage, (each_s, once_s, _, _) in zip(self._stage, self._worst, strict=True):
            each[stage] += each_s
            once[stage] += once_s
        return each, once

    def _total(self) -> float:
        each, once = self._by_stage()
        messages = self.traffic.rounds * max(self._lane_s, default=0.0)
        return (self.traffic.micro_batches - 1) * max(each) + sum(each) + max(once) + messages + self._computing()

    def _computing(self) -> float:
        """What slower devices add: layers are shared out by speed, and a stage is as fast as its slowest device."""
        if not self._speeds:
            return 0.0
        speeds = (min(self._speeds[self.hosts[slot]] for slot in slots) for slots in self._slots_of_stage)
        return self.traffic.work_s * (self.pp / sum(speeds) - 1)


def _at(members: Sequence[Sequence[int]], slots: int) -> list[list[int]]:
    """For each slot, the numbers of those that it is a member of."""
    found: list[list[int]] = [[] for _ in range(slots)]
    for number, own in enumerate(members):
        for slot in dict.fromkeys(own):
            found[slot].append(number)
    return found
