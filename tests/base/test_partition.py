"""Stages are cut as well as trying every cut would."""

import random
from itertools import combinations, pairwise

import pytest

from paraxis.base.errors import ConfigError
from paraxis.base.partition import cut_stages


def every_cut(layers: int, stages: int):
    for ends in combinations(range(1, layers), stages - 1):
        bounds = [0, *ends, layers]
        yield [range(a, b) for a, b in pairwise(bounds)]


def judge(cut, cost, speed, memory, cap):
    """(slowest stage, sum of squares), or None where a stage holds more than its cap."""
    if any(sum(held[i] for i in own) > limit for own, held, limit in zip(cut, memory, cap, strict=True)):
        return None
    times = [sum(cost[i] for i in own) / s for own, s in zip(cut, speed, strict=True)]
    return max(times), sum(t * t for t in times)


@pytest.mark.parametrize("seed", [*range(40), *(pytest.param(seed, marks=pytest.mark.full) for seed in range(40, 400))])
def test_the_cut_is_the_best_of_all(seed):
    draw = random.Random(seed)
    layers = 12 if seed < 8 else draw.randint(2, 12)
    stages = draw.randint(1, layers)
    cost = [draw.uniform(0.5, 4) for _ in range(layers)]
    speed = [draw.choice([1.0, 1.0, 0.5, 2.0]) for _ in range(stages)]
    kept = [draw.uniform(1, 3) for _ in range(layers)]
    memory = [[held * (1 + (stages - stage) / 4) for held in kept] for stage in range(stages)]  # the first keeps most micro-batches
    cap = [draw.uniform(0.8, 2.0) * sum(kept) * (1 + (stages - stage) / 4) / stages for stage in range(stages)]
    judged = [found for cut in every_cut(layers, stages) if (found := judge(cut, cost, speed, memory, cap))]
    if not judged:
        with pytest.raises(ConfigError, match="no cut into"):
            cut_stages(cost, stages, speed=speed, memory=memory, cap=cap)
        return
    ours = cut_stages(cost, stages, speed=speed, memory=memory, cap=cap)
    assert judge(ours, cost, speed, memory, cap) == pytest.approx(min(judged))


def test_a_heavy_head_takes_layers_from_the_last_stage():
    assert cut_stages([0.1, *[1.0] * 8, 3.0], 2) == [range(6), range(6, 10)]  # five blocks beside the embedding, three beside the head


def test_equal_layers_are_cut_evenly():
    assert [len(own) for own in cut_stages([1.0] * 32, 4)] == [8, 8, 8, 8]


def test_a_faster_device_takes_more_layers():
    assert [len(own) for own in cut_stages([1.0] * 9, 2, speed=[2.0, 1.0])] == [6, 3]


def test_stages_whose_speeds_are_as_26_to_22_share_48_layers_so():
    assert [len(own) for own in cut_stages([1.0] * 48, 2, speed=[26.0, 22.0])] == [26, 22]


def test_a_stage_that_keeps_more_of_each_layer_has_fewer():
    memory = [[3.0] * 8, [1.0] * 8]
    assert [len(own) for own in cut_stages([1.0] * 8, 2, memory=memory, cap=[9.0, 9.0])] == [3, 5]
    with pytest.raises(ConfigError, match="fits the memory of every stage"):
        cut_stages([1.0] * 8, 2, memory=memory, cap=[9.0, 4.0])


def test_more_stages_than_layers_are_refused():
    with pytest.raises(ConfigError, match=r"3 layers cannot be cut into 4 pipeline stages; lower parallel\.pp"):
        cut_stages([1.0] * 3, 4)
