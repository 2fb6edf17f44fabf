"""How fast a run is: the wall time of each step, the time it waited for data, and model FLOPs utilisation."""

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache

log = logging.getLogger(__name__)

# Peak dense TFLOP/s of matrix products as the vendors state them (NVIDIA's sheets print twice as much, "with sparsity"):
# NVIDIA H100, H200, DGX/HGX B200 and A100 data sheets; AMD Instinct MI300X data sheet. fp32 is what the hardware can do
# with fp32 operands in matrix units (TF32 on NVIDIA and AMD). The first pattern found in the device's name counts.
PEAK_TFLOPS: dict[str, dict[str, float]] = {
    r"\bH100 PCIe\b": {"bf16": 756.5, "float8": 1513.0, "fp32": 378.0},
    r"\bH[12]00 NVL\b": {"bf16": 835.5, "float8": 1671.0, "fp32": 417.5},
    r"\bH[12]00\b": {"bf16": 989.4, "float8": 1978.9, "fp32": 494.7},
    r"\bB200\b": {"bf16": 2250.0, "float8": 4500.0, "fp4": 9000.0, "fp32": 1125.0},
    r"\bA100\b": {"bf16": 312.0, "fp32": 156.0},
    r"\bMI300X\b": {"bf16": 1307.4, "float8": 2614.9, "fp32": 653.7},
}


@cache
def peak_flops(device_name: str, precision: str) -> float | None:
    """The peak FLOP/s of a device, by the vendor's name for it, of products in bf16, fp32, float8 or fp4.

    None where no peak is known, which is then said once.
    """
    peaks = next((peaks for pattern, peaks in PEAK_TFLOPS.items() if re.search(pattern, device_name)), {})
    tflops = peaks.get(precision)
    if tflops is None:
        log.warning("mfu is left out: no peak is known for %s at %s (see PEAK_TFLOPS in observe/throughput.py)", device_name, precision)
        return None
    return tflops * 1e12


def mfu(flops_per_token: float, tokens_per_s: float, device_name: str, precision: str) -> float | None:
    """Model FLOPs utilisation, from 0 to 1 (Chowdhery et al., arXiv 2204.02311, appendix B); None where the peak is not known.

    flops_per_token * tokens_per_s / peak, with `tokens_per_s` of one device and `flops_per_token` what the model needs
    for a trained token, forward and backward: recomputed activations are not counted.
    """
    peak = peak_flops(device_name, precision)
    return None if peak is None else flops_per_token * tokens_per_s / peak


@dataclass(frozen=True)
class StepTime:
    """The wall seconds of one step, and those of them spent waiting for data."""

    step_s: float
    data_s: float

    def tokens_per_s(self, tokens: int, devices: int) -> float:
        """Tokens a second of each device, in a step that trained on `tokens` over all of them."""
        return tokens / self.step_s / devices


class StepClock:
    """Times steps back to back: `lap` ends one and starts the next.

    The host's clock, without waiting for the device: a step's share may move to its neighbour, the sum is right.
    """

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> None:
        """Starts the step anew, so that what was done in between (a checkpoint, an evaluation) is charged to none."""
        self._started_s = time.perf_counter()
        self._data_s = 0.0

    @contextmanager
    def waiting_for_data(self) -> Iterator[None]:
        """Counts the time spent inside as waiting for data."""
        started_s = time.perf_counter()
        yield
        self._data_s += time.perf_counter() - started_s

    @property
    def waited_s(self) -> float:
        """The seconds that the running step has waited for data so far."""
        return self._data_s

    def lap(self) -> StepTime:
        """Ends the step that is running and starts the next."""
        now_s = time.perf_counter()
        timed = StepTime(now_s - self._started_s, self._data_s)
        self._started_s, self._data_s = now_s, 0.0
        return timed
