"""Finished steps as the host reads them, one step late: metrics, skipped steps, and whether to stop."""

from collections import deque

from paraxis.base.errors import TrainingError
from paraxis.observe.throughput import StepTime
from paraxis.train.record import Record, speed
from paraxis.train.run import Run
from paraxis.train.step import StepReport


class Settlement:
    """Takes every step's report and acts on it once the next step is queued, so that the device never waits for the host.

    Every rank reads the same numbers, so all count the same skipped steps and stop at the same one.
    """

    def __init__(self, run: Run, record: Record) -> None:
        self._run, self._record = run, record
        self._waiting: deque[tuple[int, StepReport, StepTime, float]] = deque()
        self._bad = 0
        self.stop = False  # a rank was asked to stop

    def add(self, step: int, report: StepReport, timed: StepTime, lr: float) -> None:
        """Takes a step's report and settles the ones before it."""
        self._waiting.append((step, report, timed, lr))
        self.settle(keep=1)

    def settle(self, keep: int = 0) -> None:
        """Reads all but the last `keep` reports. Raises TrainingError when too many steps in a row were not finite."""
        while len(self._waiting) > keep:
            step, report, timed, lr = self._waiting.popleft()
            self.stop |= report.stop
            self._write(step, report, timed, lr)
            self._bad = 0 if report.finite else self._bad + 1
            if not report.finite:
                self._skipped(step, report)

    def _write(self, step: int, report: StepReport, timed: StepTime, lr: float) -> None:
        run = self._run
        tokens = run.rows_per_step * run.config.data.seq_len
        pace = speed(tokens, timed, run.world, run.strategy, run.flops_per_token)
        values = {
            "lr": lr,
            "tokens": step * tokens,
            "targets": report.targets,
            **pace,
            "memory_gib": report.memory_gib,
            "skipped": int(not report.finite),
            "skipped_records": run.skipped_records,
        }
        self._record.step(step, report, timed, values)

    def _skipped(self, step: int, report: StepReport) -> None:
        ranks = ", ".join(map(str, report.bad_ranks))
        self._record.event(
            "warning",
            f"step {step}: loss or gradient is not finite (loss {report.loss}, gradient norm {report.grad_norm}, "
            f"first seen on rank {ranks}); the update was skipped on all ranks",
            step=step,
            ranks=report.bad_ranks,
        )
        if self._bad >= self._run.config.train.bad_steps:
            raise TrainingError(
                f"{self._bad} steps in a row, up to step {step}, had a loss or gradient that is not finite (rank {ranks}), "
                f"and none was applied. The last checkpoint is kept: lower optim.lr, or look at the data from row "
                f"{(step - self._bad) * self._run.rows_per_step} on; train.bad_steps sets the limit"
            )
