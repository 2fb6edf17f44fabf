"""Which device each rank runs on: the assignment with the least communication, searched for where links are not alike.

    placement = place(cluster, degrees, traffic_of(config, cluster, ranks))
    predict(config, cluster, ranks, placement=placement.order)

The search knows only links and messages. That data and tensor groups stay within a fast island, and pipelines cross slow links, is what
it finds where that is cheaper. Up to eight devices it tries every order. Beyond, it permutes blocks of neighbouring devices of a host, and
then, where there are few, single devices: two change places, one moves elsewhere, or a stretch is turned around (the 2-opt of Croes 1958,
Operations Research 6), accepted by simulated annealing (Kirkpatrick et al. 1983, Science 220). A move prices again only what it touches.

What is least is a pipeline's critical path: with c_s and o_s for what pipeline rank s's slowest groups take in a micro-batch and once a
step, and m micro-batches,

    (m - 1) max_s c_s + sum_s c_s + max_s o_s + rounds * (messages of the slowest pipeline, both ways) + what slower devices add
"""

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, permutations
from math import exp, gcd

import numpy as np

from paraxis.base.axes import AXES, Degrees
from paraxis.base.errors import ConfigError
from paraxis.plan.board import Board, Links
from paraxis.plan.hardware import Cluster
from paraxis.plan.traffic import Traffic

ALL = 8  # up to so many devices every order is tried: 40,320
STARTS = 3  # so many of the first orders are searched from
FEW = 64  # up to so many ranks, single devices move, every order of axes is tried, and every swap at the end
MOVES_A_PAIR, LEAST_MOVES, MOST_MOVES = 60, 6_000, 24_000
STRETCH = 16  # the most places that something is moved over, or turned around
# What is worse by this part of the cost is accepted with a chance of 1 / e, at first and at last.
HOT, COLD = 0.03, 1e-4
TYPICAL = 0.1  # how much the average counts beside the slowest
LESS = 1 - 1e-9  # what is less only by rounding is not


@dataclass(frozen=True, kw_only=True)
class Placement:
    """Rank r runs on device `order[r]`; `order` is a `range` where nothing beats that of the numbers. Costs are seconds of a step, of this
    order and of that one; `moves` is how many were tried."""

    order: Sequence[int]
    cost_s: float
    natural_s: float
    moves: int

    @property
    def gain(self) -> float:
        """The part of the natural order's cost that is saved."""
        return 1 - self.cost_s / self.natural_s if self.natural_s else 0.0


def cost_s(cluster: Cluster, degrees: Degrees, traffic: Traffic, order: Sequence[int]) -> float:
    """What `place` makes least, in seconds of a step, for rank r on device `order[r]`."""
    return Board(Links(cluster), degrees, traffic, np.arange(len(order))).put([cluster.host_of(device) for device in order])


def place(cluster: Cluster, degrees: Degrees, traffic: Traffic, *, seed: int = 0, moves: int = 0) -> Placement:
    """The best order found: the same for the same arguments, and never worse than the natural one.

    `moves` bounds the search from each start; 0 means what suits the number of blocks. Raises ConfigError where the cluster has fewer
    devices than `degrees` need.
    """
    ranks = degrees.ranks
    if ranks > cluster.ranks:
        raise ConfigError(f"{degrees} needs {ranks} devices, and {cluster.name} has {cluster.ranks}; add hosts to it, or lower a degree")
    links, draw, tried = Links(cluster), random.Random(seed), 0
    best: Sequence[int] = range(ranks)
    best_s = natural_s = cost_s(cluster, degrees, traffic, best)
    a_host = {pool.devices for pool in cluster.pools}
    block = gcd(ranks, *a_host)
    few = cluster.ranks <= ALL
    for size in sorted({1} if few else {block, 1} if ranks <= FEW else {block}, reverse=True):
        starts = sorted(_starts(links, degrees, traffic, size, best), key=lambda start: start.cost_s)[: 1 if few else STARTS]
        alike = links.uniform and (a_host == {size} or cluster.hosts == 1)  # then blocks in another order are the same
        for start in starts:
            search = _Search(start, links.hosts_of_devices, draw)
            if few and not alike:
                search.try_all()
            elif not alike:
                pairs = len(start.units) ** 2 // 2
                search.anneal((moves or min(MOST_MOVES, max(LEAST_MOVES, MOVES_A_PAIR * pairs))) // STARTS)
                if start.board.slots <= FEW:
                    search.polish()
            tried += search.moves
            if search.best_s < best_s * LESS:
                best, best_s = start.devices(search.best), search.best_s
    return Placement(order=best, cost_s=best_s, natural_s=natural_s, moves=tried)


@dataclass
class _Start:
    """A first order: the slot of each rank and its place in it; slot s has the `size` devices from `units[s] * size` on. Units beyond the
    slots are idle."""

    board: Board
    slot_of: Sequence[int]
    place_in: Sequence[int]
    size: int
    units: list[int]
    cost_s: float

    def devices(self, units: Sequence[int]) -> tuple[int, ...]:
        return tuple(units[slot] * self.size + place for slot, place in zip(self.slot_of, self.place_in, strict=True))


def _starts(links: Links, degrees: Degrees, traffic: Traffic, size: int, best: Sequence[int]) -> Iterator[_Start]:
    """Ranks along the devices in several orders of axes, hosts as they are numbered and as links chain them; of single devices, the best
    order so far too."""
    hosts = links.hosts_of_devices[::size]
    by_number = list(range(len(hosts)))
    by_links = [unit for host in links.chain() for unit in by_number if hosts[unit] == host]
    for axes in _axis_orders(degrees):
        shape = [getattr(degrees, axis) for axis in axes]
        at = np.arange(degrees.ranks).reshape(shape).transpose([axes.index(axis) for axis in AXES]).ravel()
        board = Board(links, degrees, traffic, at // size)
        for units in (by_number, by_links):
            cost = board.put([hosts[unit] for unit in units[: board.slots]])
            yield _Start(board, (at // size).tolist(), (at % size).tolist(), size, list(units), cost)
    if size == 1:
        units = [*best, *sorted({*by_number} - {*best})]
        board = Board(links, degrees, traffic, np.arange(len(best)))
        yield _Start(board, range(len(best)), [0] * len(best), 1, units, board.put([hosts[device] for device in best]))


def _axis_orders(degrees: Degrees) -> Iterator[Sequence[str]]:
    """Orders of the axes from the outermost, the usual one first: all of the used ones; with many ranks, one axis moved."""
    used = [axis for axis in AXES if getattr(degrees, axis) > 1]
    unused = [axis for axis in AXES if axis not in used]
    if degrees.ranks <= FEW:
        found = permutations(used)
    else:
        moved = ((axis, [other for other in used if other != axis], place) for axis in used for place in range(len(used)))
        found = ((*others[:place], axis, *others[place:]) for axis, others, place in moved)
    for order in dict.fromkeys(found):
        yield [*unused, *order]


def _swaps(size: int) -> Iterator[tuple[int, int]]:
    """Pairs of places that change, one pair after another, until `size` things have been in every order (Heap 1963, Computer Journal 6)."""
    turns, place = [0] * size, 1
    while place < size:
        if turns[place] < place:
            yield (0 if place % 2 == 0 else turns[place]), place
            turns[place] += 1
            place = 1
        else:
            turns[place] = 0
            place += 1


class _Search:
    """Moves from one order to better ones. `best` has the units of the best one met."""

    def __init__(self, start: _Start, hosts_of_devices: Sequence[int], draw: random.Random) -> None:
        self.board, self.draw, self.moves = start.board, draw, 0
        self.hosts = hosts_of_devices[:: start.size]
        self.units = list(start.units)
        self.best, self.best_s = list(start.units), start.cost_s
        self.board.put([self.hosts[unit] for unit in self.units[: self.board.slots]])
        self.now_s = self._energy(start.cost_s)

    def try_all(self) -> None:
        """Every order, each a swap away from the one before."""
        units, hosts = self.units, self.hosts
        for a, b in _swaps(len(units)):
            self.moves += 1
            units[a], units[b] = units[b], units[a]
            changes = [(place, hosts[units[place]]) for place in (a, b) if place < self.board.slots]
            if changes and hosts[units[a]] != hosts[units[b]] and (cost_s := self.board.move(changes)) < self.best_s * LESS:
                self.best, self.best_s = list(units), cost_s

    def anneal(self, moves: int) -> None:
        """Tries so many moves, and goes back to the best order."""
        for number in range(moves):
            heat = self.best_s * HOT * (COLD / HOT) ** (number / moves)
            places, units = self._proposed()
            self._try(places, units, heat)
        self.units = list(self.best)
        self.now_s = self._energy(self.board.put([self.hosts[unit] for unit in self.units[: self.board.slots]]))

    def polish(self) -> None:
        """Swaps as long as one makes the cost less."""
        before = float("inf")
        while self.best_s < before * LESS:
            before = self.best_s
            for a, b in combinations(range(len(self.units)), 2):
                self._try([a, b], [self.units[b], self.units[a]], 0.0)

    def _proposed(self) -> tuple[Sequence[int], list[int]]:
        """Places, one of them often of what is slowest, and the units that shall be there instead."""
        draw, size = self.draw, len(self.units)
        a = self.board.critical(draw) if draw.random() < 0.5 else draw.randrange(self.board.slots)
        kind = draw.random()
        b = draw.randrange(size) if kind < 0.6 else draw.randrange(max(0, a - STRETCH), min(size, a + STRETCH + 1))
        if kind < 0.6 or abs(a - b) < 2:
            return [a, b], [self.units[b], self.units[a]]
        places = range(min(a, b), max(a, b) + 1)
        units = [self.units[place] for place in places]
        if kind < 0.8:
            return places, units[::-1]
        return places, [*units[1:], units[0]] if a < b else [units[-1], *units[:-1]]

    def _try(self, places: Sequence[int], units: Sequence[int], heat: float) -> None:
        """Keeps the move where it is better, or with the chance that heat gives it."""
        self.moves += 1
        slots, hosts, board = self.board.slots, self.hosts, self.board
        changes = [(p, hosts[u]) for p, u in zip(places, units, strict=True) if p < slots and hosts[u] != hosts[self.units[p]]]
        if not changes:
            return
        cost_s = board.move(changes)
        now_s = self._energy(cost_s)
        worse_s = now_s - self.now_s
        if worse_s > 0 and (not heat or self.draw.random() >= exp(-worse_s / heat)):
            board.undo()
            return
        self.now_s = now_s
        for place, unit in zip(places, units, strict=True):
            self.units[place] = unit
        if cost_s < self.best_s * LESS:
            self.best, self.best_s = list(self.units), cost_s

    def _energy(self, cost_s: float) -> float:
        return cost_s + TYPICAL * self.board.typical_s()
