"""The training loop: steps, and between them whatever is due. What a step computes stands in step.py."""

import gc
from dataclasses import dataclass

from paraxis.base.errors import Preempted, TrainingError
from paraxis.observe.throughput import StepClock
from paraxis.observe.trace import Profile
from paraxis.optim.curves import learning_rate
from paraxis.train.evaluate import evaluate
from paraxis.train.record import Record, said
from paraxis.train.run import Run
from paraxis.train.saving import Saving
from paraxis.train.settle import Settlement
from paraxis.train.step import train_step
from paraxis.train.unregistered import FirstStep


@dataclass
class StopRequest:
    """Set by a signal, read by the loop: why to stop, or empty."""

    reason: str = ""


def train(run: Run, record: Record, profile: Profile, saving: Saving, stop: StopRequest) -> None:
    """Trains from `run.step` to `train.steps`, saving and evaluating where due and at the end.

    Raises Preempted once a rank was asked to stop and the state is saved, TrainingError when too many steps in a row were not
    finite, StorageError when the last checkpoint cannot be written.
    """
    total = run.config.train.steps
    settlement, clock, loader = Settlement(run, record), StepClock(), run.loader()
    first_step, unsaved = run.step + 1, FirstStep(run)
    try:
        while run.step < total and not settlement.stop:
            profile.before_step(run.step + 1)
            with clock.waiting_for_data():
                batches = [run.take(batch) for batch in next(loader)]
            lr = learning_rate(run.config.optim, run.step, total)
            report = train_step(run, batches, lr=lr, said=said(run.world, bool(stop.reason), clock.waited_s))
            run.step, run.row = run.step + 1, loader.cursor
            run.tokens += run.rows_per_step * run.config.data.seq_len
            profile.after_step(run.step)
            saving.look()
            settlement.add(report, clock.lap(), lr)
            if run.step == first_step:
                settlement.settle()
                unsaved.refuse()
                run.world.expect_quick_steps()
                look_for_new_garbage_only()
            if run.step == total or settlement.stop or due(run, run.config.checkpoint.every) or due(run, run.config.eval.every):
                settlement.settle()
                between_steps(run, record, saving, last=run.step == total or settlement.stop)
                clock.restart()
        saving.finish()
    except TrainingError:  # raised by every rank: the run is over, and what it has saved is what remains of it
        saving.finish()
        raise
    finally:
        loader.close()
        gc.unfreeze()
    if run.step < total:
        record.event("stop", stop.reason or "another rank was asked to stop", step=run.step)
        raise Preempted(f"stopped on request after step {run.step} of {total}, with everything saved; the same command continues the run")
    record.event("stop", "finished", step=run.step)


def look_for_new_garbage_only() -> None:
    """Has Python's collector pass over all that there is after the first step, which stays: to look again would stop a rank for long."""
    gc.collect()
    gc.freeze()
    gc.enable()


def due(run: Run, every: int) -> bool:
    """Whether something done every so many steps (0: never) is due after the run's step."""
    return every > 0 and run.step % every == 0


def between_steps(run: Run, record: Record, saving: Saving, *, last: bool) -> None:
    """Scores the held-out data and saves, where due."""
    finished = run.step == run.config.train.steps
    held_out_loss: float | None = None
    if run.held_out is not None and (due(run, run.config.eval.every) or finished):
        held_out_loss, targets = evaluate(run)
        record.event("evaluation", "held-out loss", step=run.step, loss=held_out_loss, targets=targets)
        record.evaluation(run.step, held_out_loss)
    if finished and not run.config.checkpoint.at_end:
        return
    if last or due(run, run.config.checkpoint.every):
        saving.save(held_out_loss, last=last)
