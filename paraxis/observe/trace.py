"""A profile of chosen steps: a Chrome trace, and a record of memory, in the run folder's `trace`."""

import logging
from pathlib import Path

from torch.profiler import ProfilerActivity, profile, record_function

from paraxis.base.device import Device
from paraxis.observe.config import ProfileConfig
from paraxis.observe.memory import start_recording, stop_recording, write_recording

log = logging.getLogger(__name__)


class Profile:
    """Traces the steps of `config.window` on the ranks of `config.ranks` into `folder`; elsewhere it does nothing.

    Call `before_step` and `after_step` around each step, and `close` at the end, which writes a window that the run
    did not finish. Files are named `rank0-steps10-12.json.gz` (open it in https://ui.perfetto.dev) and
    `rank0-steps10-12-memory.*`. A profile that cannot be written is a warning, not the end of a run.
    """

    def __init__(self, config: ProfileConfig, folder: Path, rank: int, device: Device) -> None:
        self._window = config.window if rank in config.ranks else range(0)
        self._memory = config.memory
        self._folder = folder
        self._rank = rank
        self._device = device
        self._profiler: profile | None = None
        self._first = 0
        self._last = 0

    def before_step(self, step: int) -> None:
        """Starts the profile where `step` is the first of the window that this process runs."""
        if step not in self._window:
            return
        if self._profiler is None:
            self._start(step)
        self._label = record_function(f"step {step}")
        self._label.__enter__()

    def after_step(self, step: int) -> None:
        """Writes the profile where `step` is the last of the window."""
        if self._profiler is None:
            return
        self._label.__exit__(None, None, None)
        self._last = step
        if step == self._window[-1]:
            self._write()

    def close(self) -> None:
        """Writes what there is of a window that the run did not finish."""
        if self._profiler is not None:
            self._write()

    def _start(self, step: int) -> None:
        self._first = self._last = step
        activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if self._device.is_cuda else [])
        if self._memory:
            start_recording(self._device)
        self._profiler = profile(activities=activities, profile_memory=self._memory)
        self._profiler.start()

    def _write(self) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        profiler.stop()
        name = f"rank{self._rank}-steps{self._first}-{self._last}"
        trace = self._folder / f"{name}.json.gz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            profiler.export_chrome_trace(str(trace))
            log.info("wrote %s", trace)
            if self._memory:
                log.info("wrote %s", write_recording(self._device, self._folder / f"{name}-memory", trace))
        except (OSError, RuntimeError) as error:  # RuntimeError: the profiler's own writer
            log.warning("the profile of steps %d to %d could not be written to %s: %s", self._first, self._last, self._folder, error)
        finally:
            if self._memory:
                stop_recording(self._device)
