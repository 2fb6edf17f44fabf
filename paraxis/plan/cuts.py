"""Stages whose layers follow the speed of the devices that they run on, where hosts are not alike."""

from collections.abc import Sequence

from paraxis.base.dtypes import precision
from paraxis.base.errors import ConfigError
from paraxis.base.partition import cut_stages
from paraxis.plan.hardware import Cluster
from paraxis.plan.rates import Accelerator
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta
from paraxis.train.stages import build_order, layer_costs

PRODUCT = 8192  # rows, columns and depth of the matrix product that a device's speed is taken from


def speed_of(accelerator: Accelerator, dtype: str) -> float:
    """FLOP/s of a large matrix product, by the accelerator's tables. Raises ConfigError for a dtype whose peak is not known."""
    return 2.0 * PRODUCT**3 / accelerator.product_s(dtype, PRODUCT, PRODUCT, PRODUCT)


def dtype_of(config: RunConfig) -> str:
    """What most of a run's products are in, as the accelerators' tables call it."""
    return precision(config.precision).products


def stage_speeds(cluster: Cluster, stages: int, order: Sequence[int], dtype: str) -> list[float]:
    """FLOP/s of each pipeline rank when rank r runs on device `order[r]`: that of its slowest device, for which the others wait."""
    size = len(order) // stages
    found: list[float] = []
    for first in range(0, len(order), size):
        on = {accelerator.name: accelerator for accelerator in map(cluster.accelerator_of, order[first : first + size])}
        found.append(min(speed_of(accelerator, dtype) for accelerator in on.values()))
    return found


def cuts_by_speed(
    config: RunConfig, cluster: Cluster, order: Sequence[int], *, memory: Sequence[Sequence[float]] | None = None
) -> tuple[int, ...]:
    """`parallel.cuts` for rank r on device `order[r]`: the slowest stage's time is least; empty where training's own cut is that.

    `memory[s][i]` is what stage s holds for layer i, in bytes; then no stage holds more than its smallest device can have.
    Raises ConfigError where no cut fits, or what is asked for cannot run.
    """
    degrees = config.parallel.degrees.filling(len(order))
    if degrees.pp == 1:
        return ()
    holders = build_order(config, degrees).rank_of
    speeds = stage_speeds(cluster, degrees.pp, order, dtype_of(config))
    if memory is None and len(set(speeds)) == 1:
        return ()
    if memory is not None and len(memory) != len(holders):
        raise ConfigError(f"memory of {len(memory)} stages was given for a pipeline of {len(holders)}")
    costs = layer_costs(config, on_meta(config))
    size = len(order) // degrees.pp
    usable = [min(cluster.accelerator_of(device).usable_bytes for device in order[n * size : (n + 1) * size]) for n in range(degrees.pp)]
    cap = None if memory is None else [usable[rank] / holders.count(rank) for rank in holders]
    cut = cut_stages(costs, len(holders), speed=[speeds[rank] for rank in holders], memory=memory, cap=cap)
    return tuple(len(own) for own in cut)
