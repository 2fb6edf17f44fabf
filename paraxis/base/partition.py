"""Cutting a chain of layers into pipeline stages: the slowest stage decides the pace, so its time is made as small as it can be."""

from collections.abc import Callable, Sequence
from itertools import accumulate
from math import inf

from paraxis.base.errors import ConfigError


def cut_stages(
    cost: Sequence[float],
    stages: int,
    *,
    speed: Sequence[float] | None = None,
    memory: Sequence[Sequence[float]] | None = None,
    cap: Sequence[float] | None = None,
) -> list[range]:
    """Which layers each stage runs: consecutive, at least one each.

    `cost[i]` is the time of layer i on a device of speed 1, in any unit; `speed[s]` how fast stage s's device is. Where they are given,
    `memory[s][i]` is what layer i takes in stage s (an early stage keeps the activations of more micro-batches), and no stage holds more
    than `cap[s]`. Of all cuts the slowest stage's time is least, and of those the times are as even as can be (least sum of squares).
    Dynamic programming, O(stages * layers^2).
    Raises ConfigError where there are fewer layers than stages, or no cut within the caps.
    """
    layers = len(cost)
    if layers < stages:
        raise ConfigError(f"{layers} layers cannot be cut into {stages} pipeline stages; lower parallel.pp or the stages a rank")
    time_to, memory_to = [0.0, *accumulate(cost)], [[0.0, *accumulate(held)] for held in memory or ()]

    def seconds(stage: int, first: int, end: int) -> float:
        """What `stage` takes for layers `first` to `end`, or infinity where they do not fit."""
        if cap is not None and memory_to[stage][end] - memory_to[stage][first] > cap[stage]:
            return inf
        return (time_to[end] - time_to[first]) / (speed[stage] if speed else 1.0)

    slowest, _ = _best(layers, stages, seconds, max)
    if slowest == inf:
        raise ConfigError(
            f"no cut into {stages} pipeline stages fits the memory of every stage; raise parallel.pp or fsdp, or recompute more"
        )

    def squared(stage: int, first: int, end: int) -> float:
        # Sums are rounded differently than the best cut's own, by far less than any layer.
        taken = seconds(stage, first, end)
        return taken * taken if taken <= slowest * (1 + 1e-12) else inf

    _, ends = _best(layers, stages, squared, lambda a, b: a + b)
    return [range(first, end) for first, end in zip([0, *ends], ends, strict=False)]


def _best(
    layers: int, stages: int, price: Callable[[int, int, int], float], join: Callable[[float, float], float]
) -> tuple[float, list[int]]:
    """The least joined price of cutting all layers into all stages, and where each stage ends."""
    table: list[dict[int, tuple[float, list[int]]]] = [{0: (0.0, [])}]
    for stage in range(stages):
        row: dict[int, tuple[float, list[int]]] = {}
        for end in range(stage + 1, layers - (stages - stage - 1) + 1):
            best = min((join(before, price(stage, first, end)), first) for first, (before, _) in table[-1].items() if first < end)
            row[end] = (best[0], [*table[-1][best[1]][1], end])
        table.append(row)
    return table[-1][layers]
