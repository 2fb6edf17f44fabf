"""A run's checkpoints as the loop sees them: save now, in the foreground or behind the steps, and what has become of it."""

import time
from collections.abc import Mapping
from functools import partial
from types import TracebackType

from paraxis.base.errors import StorageError
from paraxis.checkpoint.background import BackgroundSaver, Outcome
from paraxis.checkpoint.place import Location
from paraxis.parallel.meeting import helpers_meeting
from paraxis.train.record import Record
from paraxis.train.run import Run
from paraxis.train.state import pieces, save_run


class Saving:
    """Saves `run` under `folder`, with `files` beside its tensors; every rank calls each method alike. Also a context manager.

    With checkpoint.mode=async a save on the way holds the steps up for a copy alone, and one at a time is under way: a save that is due
    before the last is done waits for it. The last save of a run is always made in the foreground: there is nothing left to do beside it.
    """

    def __init__(self, run: Run, record: Record, folder: Location, files: Mapping[str, bytes]) -> None:
        self._run, self._record = run, record
        self._save = partial(save_run, run, folder, files)
        self._background: BackgroundSaver | None = None
        if run.config.checkpoint.mode == "async" and run.config.checkpoint.every:
            self._background = BackgroundSaver(helpers_meeting(run.world), run.world.device)
            try:
                self._background.prepare(pieces(run), files)
            except BaseException:
                self._background.close()
                raise

    def save(self, held_out_loss: float | None, *, last: bool) -> None:
        """Saves the run as it stands, with its held-out loss where it was just scored.

        A save that fails is a warning, at once or when it turns out; StorageError on every rank where it is the last chance.
        """
        started_s = time.perf_counter()
        self.finish()
        waited_s = time.perf_counter() - started_s
        if self._background is not None and not last:
            self._save(held_out_loss, save=self._background.save)
            stall_s = time.perf_counter() - started_s
            self._record.event("checkpoint", "saving", step=self._run.step, stall_s=round(stall_s, 4), waited_s=round(waited_s, 4))
            return
        try:
            path = self._save(held_out_loss)
        except StorageError as error:
            if last:
                raise
            self._warn(self._run.step, str(error))
        else:
            seconds = time.perf_counter() - started_s
            self._saved(self._run.step, str(path), seconds - waited_s, stall_s=round(seconds, 4))

    def look(self) -> None:
        """Tells what has become of a save that was under way, if that is known by now; never waits."""
        self._tell(wait=False)

    def finish(self) -> None:
        """Waits for the save that is under way, if there is one, and tells what has become of it."""
        self._tell(wait=True)

    def _tell(self, *, wait: bool) -> None:
        outcome: Outcome | None = self._background.outcome(wait=wait) if self._background is not None else None
        if outcome is not None and outcome.failed:
            self._warn(outcome.step, outcome.failed)
        elif outcome is not None:
            self._saved(outcome.step, outcome.path, outcome.seconds)

    def _saved(self, step: int, path: str, seconds: float, **fields: float) -> None:
        self._record.event("checkpoint", "saved", step=step, path=path, seconds=round(seconds, 4), **fields)

    def _warn(self, step: int, why: str) -> None:
        self._record.event("warning", f"the checkpoint of step {step} could not be saved, training goes on: {why}", step=step)

    def __enter__(self) -> "Saving":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._background is not None:
            self._background.close()
