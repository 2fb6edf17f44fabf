"""Finished steps as the host reads them, one step late: metrics, skipped steps, and whether to stop."""

from collections import deque
from dataclasses import dataclass

from paraxis.base.errors import TrainingError
from paraxis.observe.throughput import StepTime
from paraxis.train.record import Record, speed
from paraxis.train.run import Run
from paraxis.train.step import StepReport


@dataclass(frozen=True)
class Finished:
    """A step that was queued: its number, the tokens and the first data row after it, and what the loop knows of it."""

    step: int
    tokens: int
    row: int
    lr: float
    timed: StepTime
    report: StepReport


class Settlement:
    """Takes every step's report and acts on it once the next step is queued, so that the device never waits for the host.

    Every rank reads the same numbers, so all count the same skipped steps and stop at the same one.
    """

    def __init__(self, run: Run, record: Record) -> None:
        self._run, self._record = run, record
        self._waiting: deque[Finished] = deque()
        self.stop = False  # a rank was asked to stop

    def add(self, report: StepReport, timed: StepTime, lr: float) -> None:
        """Takes the report of the step that the run has just counted, and settles the ones before it."""
        self._waiting.append(Finished(self._run.step, self._run.tokens, self._run.row, lr, timed, report))
        self.settle(keep=1)

    def settle(self, keep: int = 0) -> None:
        """Reads all but the last `keep` reports. Raises TrainingError when too many steps in a row were not finite."""
        while len(self._waiting) > keep:
            done = self._waiting.popleft()
            self.stop |= done.report.stop
            self._write(done)
            self._run.skipped_steps = 0 if done.report.finite else self._run.skipped_steps + 1
            if not done.report.finite:
                self._skipped(done)

    def _write(self, done: Finished) -> None:
        run, report = self._run, done.report
        pace = speed(run.rows_per_step * run.config.data.seq_len, done.timed, run.world, run.strategy, run.flops_per_token)
        values = {
            "lr": done.lr,
            "tokens": done.tokens,
            "targets": report.targets,
            **pace,
            **report.experts,
            "memory_gib": report.memory_gib,
            "skipped": int(not report.finite),
            "skipped_records": run.skipped_records,
        }
        self._record.step(done.step, report, done.timed, values)

    def _skipped(self, done: Finished) -> None:
        step, report, skipped = done.step, done.report, self._run.skipped_steps
        ranks = ", ".join(map(str, report.bad_ranks))
        self._record.event(
            "warning",
            f"step {step}: loss or gradient is not finite (loss {report.loss}, gradient norm {report.grad_norm}, "
            f"first seen on rank {ranks}); the update was skipped on all ranks",
            step=step,
            ranks=report.bad_ranks,
        )
        if skipped >= self._run.config.train.bad_steps:
            raise TrainingError(
                f"{skipped} steps in a row, up to step {step}, had a loss or gradient that is not finite (rank {ranks}), "
                f"and none was applied. The last checkpoint is kept: lower optim.lr, or look at the data from row "
                f"{done.row - skipped * self._run.rows_per_step} on; train.bad_steps sets the limit"
            )
