"""Batches of one data rank: of training, prepared ahead in a thread; of held-out data, every row once."""

import queue
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from paraxis.base.seams import IGNORE, Batch, Rows

CLOSE_S = 5.0


class Loader:
    """The micro-batches of each optimizer step from `start_row` on, for one of `data_ranks`.

    Row `start + (m * data_ranks + data_rank) * micro_batch + j` of a step is row j of micro-batch m, so that a step trains on
    the same `rows_per_step` rows however they are spread. Up to `prefetch` steps are made ahead in a thread; an exception
    there is raised by the `next` that would have returned the step. `batch_type` is Batch or a recipe's subclass of it.
    """

    def __init__(
        self,
        rows: Rows,
        *,
        micro_batch: int,
        data_rank: int,
        data_ranks: int,
        rows_per_step: int,
        start_row: int,
        pin: bool,
        prefetch: int = 2,
        batch_type: type[Batch] = Batch,
    ) -> None:
        assert 0 <= data_rank < data_ranks
        assert rows_per_step % (micro_batch * data_ranks) == 0
        self.cursor = start_row  # the first row of the step that comes next: what a checkpoint stores
        self._rows, self._pin, self._batch_type = rows, pin, batch_type
        self._rows_per_step = rows_per_step
        firsts = range(data_rank * micro_batch, rows_per_step, data_ranks * micro_batch)
        self._offsets = [range(first, first + micro_batch) for first in firsts]
        self._ready: queue.SimpleQueue[list[Batch] | BaseException] = queue.SimpleQueue()
        self._room = threading.Semaphore(prefetch)
        self._closed = False
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._work, args=(start_row,), name="data-loader", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[list[Batch]]:
        return self

    def __next__(self) -> list[Batch]:
        """The micro-batches of the next step, on the CPU (in pinned memory where asked)."""
        assert not self._closed, "the loader is closed"
        if self._error is None:
            item = self._ready.get()
            if not isinstance(item, BaseException):
                self._room.release()
                self.cursor += self._rows_per_step
                return item
            self._error = item
        raise self._error

    def close(self) -> None:
        """Ends the thread after the step that it is making; one that hangs in the file system does not outlive the process."""
        self._closed = True
        self._room.release()
        self._thread.join(timeout=CLOSE_S)

    def _work(self, start: int) -> None:
        try:
            while True:
                self._room.acquire()
                if self._closed:
                    return
                self._ready.put([self._batch([start + offset for offset in offsets]) for offsets in self._offsets])
                start += self._rows_per_step
        except BaseException as error:
            self._ready.put(error)

    def _batch(self, indices: Sequence[int]) -> Batch:
        return _collate([self._rows.row(index) for index in indices], self._batch_type, self._pin)


def evaluation_batches(
    rows: Rows, micro_batch: int, data_rank: int, data_ranks: int, *, batch_type: type[Batch] = Batch, pin: bool = False
) -> Iterator[Batch]:
    """Held-out rows, each on exactly one rank, in equally many batches on all; what is missing at the end has no targets."""
    share = micro_batch * data_ranks
    for first in range(data_rank * micro_batch, -(-rows.length // share) * share, share):
        yield _collate([_row_or_padding(rows, index) for index in range(first, first + micro_batch)], batch_type, pin)


def _row_or_padding(rows: Rows, index: int) -> Mapping[str, Any]:
    if index < rows.length:
        return rows.row(index)
    # A real row has the fields and the shapes that the model expects; without targets it adds nothing to the loss.
    row = rows.row(rows.length - 1)
    return {**row, "targets_bt": np.full_like(row["targets_bt"], IGNORE)}


def _collate(rows: Sequence[Mapping[str, Any]], batch_type: type[Batch], pin: bool) -> Batch:
    stacked = {name: torch.from_numpy(np.stack([row[name] for row in rows])) for name in rows[0]}
    return batch_type(**{name: tensor.pin_memory() if pin else tensor for name, tensor in stacked.items()})
