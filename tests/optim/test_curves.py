"""The learning rate follows its formula, and is sensible at the edges."""

import math

import pytest

from paraxis.base.errors import ConfigError
from paraxis.optim.config import OptimConfig
from paraxis.optim.curves import learning_rate

SCHEDULES = ("constant", "linear", "cosine", "wsd")


def config(**fields) -> OptimConfig:
    return OptimConfig(**{"lr": 2.0, "warmup": 10, **fields})


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warmup_rises_in_equal_steps_from_above_zero_to_the_peak(schedule):
    curve = config(schedule=schedule)
    assert [learning_rate(curve, step, 100) for step in range(10)] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert learning_rate(curve, 10, 100) == pytest.approx(2.0)


def test_constant_stays_at_the_peak():
    assert {learning_rate(config(schedule="constant"), step, 100) for step in range(9, 100)} == {2.0}


def test_linear_is_halfway_down_halfway_through():
    assert learning_rate(config(schedule="linear", final=0.2), 55, 100) == pytest.approx(2.0 * 0.6)


def test_cosine_follows_its_formula():
    curve = config(schedule="cosine", final=0.1)
    for step in (10, 20, 55, 99):
        expected = 2.0 * (0.1 + 0.9 * (1 + math.cos(math.pi * (step - 10) / 90)) / 2)
        assert learning_rate(curve, step, 100) == pytest.approx(expected)


def test_wsd_is_stable_until_its_last_part_then_falls_linearly():
    curve = config(schedule="wsd", decay=0.2, final=0.0)
    assert {learning_rate(curve, step, 100) for step in range(10, 81)} == {2.0}
    assert learning_rate(curve, 90, 100) == pytest.approx(1.0)
    assert learning_rate(curve, 99, 100) == pytest.approx(0.1)


def test_wsd_never_decays_before_warmup_is_over():
    curve = config(schedule="wsd", decay=1.0, final=0.0)
    assert learning_rate(curve, 10, 20) == pytest.approx(2.0)
    assert learning_rate(curve, 15, 20) == pytest.approx(1.0)


@pytest.mark.parametrize("schedule", ["linear", "cosine", "wsd"])
def test_curves_end_at_the_final_fraction_and_stay_there(schedule):
    curve = config(schedule=schedule, final=0.1)
    assert learning_rate(curve, 100, 100) == pytest.approx(0.2)
    assert learning_rate(curve, 1000, 100) == pytest.approx(0.2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_without_warmup_the_first_step_is_at_the_peak(schedule):
    assert learning_rate(config(schedule=schedule, warmup=0), 0, 100) == pytest.approx(2.0)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("total", [1, 5, 10])
def test_a_run_no_longer_than_its_warmup_only_warms_up(schedule, total):
    rates = [learning_rate(config(schedule=schedule), step, total) for step in range(total)]
    assert rates == sorted(rates)
    assert 0 < rates[0] <= rates[-1] <= 2.0


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"lr": -1.0}, "optim.lr=-1.0"),
        ({"lr": float("nan")}, "optim.lr=nan"),
        ({"warmup": -1}, "optim.warmup=-1"),
        ({"final": 1.5}, "optim.final=1.5"),
        ({"betas": (0.9,)}, "optim.betas"),
        ({"name": "sgd", "momentum": 1.0}, "optim.momentum=1.0"),
        ({"momentum": 0.9}, "optim.momentum=0.9 is read by optim.name=sgd only"),
        ({"schedule": "cosine", "decay": 0.5}, "optim.decay=0.5 is read by optim.schedule=wsd only"),
    ],
)
def test_settings_that_are_wrong_or_that_nothing_would_read_are_refused(fields, named):
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        OptimConfig(**fields)
