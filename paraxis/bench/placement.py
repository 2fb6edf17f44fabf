"""How much a placement of hosts saves, by how much their links differ: made matrices, searched on one snapshot and judged on another.

A pair of hosts has its link's bandwidth times a draw of a normal distribution, the same in both snapshots; each snapshot adds noise of
its own. No device is needed: it is arithmetic, the same everywhere but for the search's own time.
"""

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from statistics import fmean
from typing import Any

from paraxis.base.axes import Degrees
from paraxis.plan.hardware import Cluster
from paraxis.plan.place import cost_s, place
from paraxis.plan.traffic import Traffic, traffic_of
from paraxis.train.config import RunConfig

VARIATIONS = (0.0, 0.05, 0.1, 0.2, 0.3, 0.4)  # standard deviation of links over their mean
NOISE = 0.02  # the like, of one link from one snapshot to the next
SLOWEST = 0.1  # of the mean: links do not get slower
RANDOM_ORDERS = 20

Matrix = tuple[tuple[float, ...], ...]


def snapshots(hosts: int, mean: float, variation: float, seed: int) -> tuple[Matrix, Matrix]:
    """Two measurements, in bytes/s, of the same links, which vary by `variation`; the same in both directions but for noise."""
    draw = random.Random(seed)
    structure = {(a, b): max(SLOWEST, draw.gauss(1, variation)) for a in range(hosts) for b in range(a)}

    def snapshot() -> Matrix:
        def measured(a: int, b: int) -> float:
            return mean * max(SLOWEST, structure[max(a, b), min(a, b)] * draw.gauss(1, NOISE)) if a != b else mean

        return tuple(tuple(measured(a, b) for b in range(hosts)) for a in range(hosts))

    return snapshot(), snapshot()


def placement_rows(
    config: RunConfig, cluster: Cluster, variations: Sequence[float] = VARIATIONS, seeds: int = 3
) -> Iterator[dict[str, Any]]:
    """A row for each variation: the mean over `seeds` matrices of what is saved, in percent of communication time (more is better).

    `cluster` has one pool of hosts. Raises ConfigError for a configuration that cannot run on all of its devices.
    """
    degrees = config.parallel.degrees.filling(cluster.ranks)
    traffic = replace(traffic_of(config, cluster, cluster.ranks), work_s=0.0)
    mean = cluster.link_of(0, cluster.hosts - 1).reached
    for variation in variations:
        found = [_saved(cluster, degrees, traffic, mean, variation, seed) for seed in range(seeds)]
        row: dict[str, Any] = {"system": "paraxis", "name": f"links vary by {variation:.0%}"}
        row |= {"model": config.name, "layout": degrees.layout}
        row |= {"hosts": cluster.hosts, "devices": cluster.ranks, "variation_percent": round(100 * variation, 1), "matrices": seeds}
        row |= {name: round(fmean(one[name] for one in found), 4 if name.endswith("_s") else 2) for name in found[0]}
        yield row


def _saved(cluster: Cluster, degrees: Degrees, traffic: Traffic, mean: float, variation: float, seed: int) -> dict[str, float]:
    """One matrix: seconds of a step, and the percent that the placement saves of others', on the snapshot that it was made for and on
    the next."""
    draw, numbers = random.Random(seed), range(cluster.ranks)
    now, after = (replace(cluster, matrix=matrix) for matrix in snapshots(cluster.hosts, mean, variation, seed))
    before_s = time.process_time()
    placed = place(now, degrees, traffic, seed=seed)
    search_s = time.process_time() - before_s
    a_host = cluster.ranks // cluster.hosts
    shuffled = [draw.sample(range(cluster.hosts), cluster.hosts) for _ in range(RANDOM_ORDERS)]
    orders = [[host * a_host + device for host in hosts for device in range(a_host)] for hosts in shuffled]

    def percent(on: Cluster, order: Sequence[int], others: Sequence[Sequence[int]]) -> float:
        return 100 * (1 - cost_s(on, degrees, traffic, order) / fmean(cost_s(on, degrees, traffic, other) for other in others))

    return {
        "natural_s": placed.natural_s,
        "placed_s": placed.cost_s,
        "saved_of_natural_percent": percent(now, placed.order, [numbers]),
        "saved_of_random_percent": percent(now, placed.order, orders),
        "next_snapshot_of_natural_percent": percent(after, placed.order, [numbers]),
        "next_snapshot_of_random_percent": percent(after, placed.order, orders),
        "search_cpu_s": search_s,
    }
