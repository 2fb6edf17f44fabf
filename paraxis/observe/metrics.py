"""The numbers of each step, into `metrics.jsonl` and TensorBoard. One rank writes; the values it is given are already global."""

import logging
from collections.abc import Mapping
from pathlib import Path

from paraxis.base.errors import StorageError
from paraxis.observe.config import MetricsConfig
from paraxis.observe.folder import RunFolder
from paraxis.observe.sinks import JsonLines, cut_after

log = logging.getLogger(__name__)


class MetricsLog:
    """Where the metrics of a run go. `done` is the last step of the checkpoint that the run continues from, 0 for a new run.

    Lines of later steps, from an attempt that got further, are cut: those steps are done again. Raises StorageError
    when the run folder cannot be written.
    """

    def __init__(self, folder: RunFolder, config: MetricsConfig, done: int = 0) -> None:
        self._every = config.every
        cut_after(folder.metrics_file, done)
        self._lines = JsonLines(folder.metrics_file)
        self._board = _TensorBoard(folder.tensorboard, done) if config.tensorboard else None

    def due(self, step: int) -> bool:
        """Whether this step's metrics are wanted (`metrics.every`)."""
        return step % self._every == 0

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Records the values of one step, by name; None where a value is not known."""
        self._lines.write({"step": step, **values})
        if self._board:
            self._board.write(step, values)

    def curve(self, step: int, values: Mapping[str, float | int | None]) -> None:
        """Values that belong to no training step, such as a held-out loss: to TensorBoard only (events.jsonl has them too)."""
        if self._board:
            self._board.write(step, values)

    def close(self) -> None:
        self._lines.close()
        if self._board:
            self._board.close()


class _TensorBoard:
    """Curves for TensorBoard; steps after `done` that an earlier attempt wrote are hidden by it."""

    def __init__(self, path: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where curves are wanted

        try:
            self._writer: SummaryWriter | None = SummaryWriter(str(path), purge_step=done + 1)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}; free space, or set metrics.tensorboard=false") from error

    def write(self, step: int, values: Mapping[str, float | int | None]) -> None:
        if self._writer is None:
            return
        try:
            for name, value in values.items():
                if value is not None:
                    self._writer.add_scalar(name, value, step)
        except OSError as error:
            self._give_up(error)

    def close(self) -> None:
        try:
            if self._writer is not None:
                self._writer.close()
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: OSError) -> None:
        """Writing goes through a thread of the writer's, which does not survive an error."""
        log.warning("TensorBoard curves stop here (%s): training and metrics.jsonl go on", error.strerror)
        self._writer = None
