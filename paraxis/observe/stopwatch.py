"""How long something takes on a device: medians, after a warm-up, with the device waited for."""

import time
from collections.abc import Callable
from statistics import median

import torch

from paraxis.base.device import Device

WARM_UP, TIMED = 3, 10


def median_s(run: Callable[[], object], device: Device, *, times: int = TIMED) -> float:
    """The median seconds of `times` calls of `run`, timed on the device, after WARM_UP that are not counted."""
    for _ in range(WARM_UP):
        run()
    return median(_cuda_s(run, device) if device.is_cuda else _host_s(run) for _ in range(times))


def _host_s(run: Callable[[], object]) -> float:
    since_s = time.perf_counter()
    run()
    return time.perf_counter() - since_s


def _cuda_s(run: Callable[[], object], device: Device) -> float:
    before, after = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    before.record()
    run()
    after.record()
    torch.cuda.synchronize(device.torch)
    return before.elapsed_time(after) / 1000
