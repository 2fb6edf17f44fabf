"""Collectives by themselves: the tables of a cluster file as rows, with the bandwidth that a group's slowest place sees."""

from collections.abc import Iterator
from typing import Any

from paraxis.plan.hardware import Cluster, Exchange


def collective_rows(cluster: Cluster) -> Iterator[dict[str, Any]]:
    """A row for each collective, group and size that was measured: microseconds, and GB/s of payload and on the bus."""
    for link in cluster.links.values():
        for one in sorted(link.exchanges, key=lambda one: (one.hosts, one.ranks, one.kind, one.bytes)):
            yield {
                "name": one.kind,
                "ranks": one.ranks,
                "hosts": one.hosts,
                "bytes": one.bytes,
                "us": round(one.seconds * 1e6, 2),
                "payload_gb_per_s": round(one.bytes / one.seconds / 1e9, 3),
                "bus_gb_per_s": round(bus_bytes_per_s(one) / 1e9, 3),
            }


def bus_bytes_per_s(one: Exchange) -> float:
    """What passes through each rank's port, as nccl-tests counts it, so that groups of any size compare with their link."""
    passes = {"all_reduce": 2.0, "p2p": one.ranks / (one.ranks - 1)}.get(one.kind, 1.0)
    return passes * (one.ranks - 1) / one.ranks * one.bytes / one.seconds
