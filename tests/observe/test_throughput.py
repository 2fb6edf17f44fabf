"""Utilisation is measured against the vendor's peak, and unknown devices are said to be unknown."""

import logging
import time

import pytest

from paraxis.base.dtypes import PRECISIONS
from paraxis.observe.throughput import StepClock, StepTime, mfu, peak_flops


@pytest.mark.parametrize(
    ("device", "tflops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.5),
        ("NVIDIA H100 NVL", 835.5),
        ("NVIDIA H200", 989.4),
        ("NVIDIA B200", 2250.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA A100 80GB PCIe", 312.0),
        ("AMD Instinct MI300X", 1307.4),
    ],
)
def test_devices_are_known_by_their_vendors_names(device, tflops):
    assert peak_flops(device, "bf16") == pytest.approx(tflops * 1e12)


def test_every_precision_has_the_peak_of_its_products():
    peaks = {name: peak_flops("NVIDIA B200", precision.products) for name, precision in PRECISIONS.items()}
    assert peaks["bf16"] == peaks["bf16_weights"] == pytest.approx(2250e12)
    assert [peaks[name] for name in peaks if name.startswith(("float8", "mxfp8"))] == [pytest.approx(4500e12)] * 4
    assert peaks["nvfp4"] == pytest.approx(9000e12)


@pytest.mark.parametrize(
    ("device", "precision"), [("NVIDIA GH200 480GB", "bf16"), ("CPU", "fp32"), ("NVIDIA A100-SXM4-80GB", "float8")]
)
def test_what_is_not_known_is_said_once(device, precision, caplog):
    peak_flops.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert [mfu(6e9, 1e4, device, precision) for _ in range(3)] == [None] * 3
    (said,) = caplog.messages
    assert device in said
    assert precision in said


def test_utilisation_is_flops_done_over_flops_possible():
    assert mfu(989.4e12 / 2e4, 1e4, "NVIDIA H200", "bf16") == pytest.approx(0.5)


def test_a_step_is_charged_with_its_data_but_not_with_what_came_before_a_restart():
    clock = StepClock()
    time.sleep(0.05)
    clock.restart()
    with clock.waiting_for_data():
        time.sleep(0.01)
    first, second = clock.lap(), clock.lap()
    assert 0.01 <= first.data_s <= first.step_s
    assert second.data_s == 0
    assert second.step_s < first.step_s


def test_tokens_are_counted_for_each_device():
    assert StepTime(step_s=0.5, data_s=0.0).tokens_per_s(4096, devices=4) == 2048
