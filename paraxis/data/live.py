"""Training rows of text that is tokenised meanwhile: the same stream of rows on any number of ranks, from any row on.

Pools follow each other in an order that the data and the seed determine (pools.py). Each is packed by itself, and its rows are put
in an order of their own, so row r is the row that is r minus the rows of the pools before it. That sum is known for the pools that
have been read, and a checkpoint keeps it with the place of the pool that its next row is in: to go on, that pool is tokenised again
and none before it. Neither ranks, micro-batches nor the number of processes have a say in any of this.
"""

import threading
from bisect import bisect_left, bisect_right
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from paraxis.base.errors import DataError
from paraxis.data.config import DataConfig
from paraxis.data.packing import PlannedRows, make_plan
from paraxis.data.pools import Pool, Pools
from paraxis.data.rows import DOCUMENTS, ROWS, FilledRows, row_fingerprint, shuffled

KEPT_POOLS = 3  # open at a time
KEPT_MARKS = 4096  # pools behind the reader whose beginnings are remembered

Position = dict[str, Any]  # where a pool begins: its `row` and `place`, and the records read and skipped before it


class LiveRows:
    """Training rows, pass after pass, of which none has to be there before it is asked for; `length` is 0, for not known.

    Every document is in one pool of each pass. `packing=concatenate` lays those of a pool end to end; the last row of each pool is
    filled up with targets that are ignored.
    """

    length = 0

    def __init__(self, pools: Pools, config: DataConfig, seed: int) -> None:
        settings = {"packing": config.packing, "shuffle": config.shuffle, "long_documents": config.long_documents}
        self.fingerprint = row_fingerprint(pools.fingerprint, tokenize="live", **settings)
        self.files, self.tokenizer = pools.files, pools.tokenizer
        self.vocab_size, self.eos_id = pools.tokenizer.vocab_size, pools.tokenizer.eos_id
        self.repeat = config.repeat
        self._pools, self._config, self._seed = pools, config, seed
        self._lock = threading.Lock()  # the loader reads ahead in a thread
        self.continue_from({"row": 0, "place": pools.first, "records": 0, "skipped": 0})

    def continue_from(self, position: Position) -> None:
        """Rows are from now on read from the pool at `position`, and none before it."""
        with self._lock:
            self._marks = [position]
            self._open: dict[int, _PoolRows] = {}  # by the row the pool begins at
            self._pass: tuple[int, int] | None = None  # the pass being read, and its first row if that is known

    @property
    def skipped(self) -> int:
        """Broken records left out of the pools read so far."""
        return self._marks[-1]["skipped"]

    def row(self, index: int) -> Mapping[str, np.ndarray]:
        """Row `index`, counted over all passes: int64 arrays of length seq_len by Batch field name. Waits until it is tokenised."""
        with self._lock:
            self._read_until(index + 1)
            mark = self._marks[bisect_right(self._marks, index, key=_row) - 1]
            rows = self._open.get(mark["row"])
            if rows is None:
                rows = self._packed(self._pools.open(mark["place"]))
                self._keep(mark["row"], rows)
        return rows.row(index - mark["row"])

    def position(self, row: int) -> Position:
        """From where a run goes on whose next row is `row`, for JSON. Waits until the rows before it are tokenised, and no longer."""
        if _row(self._marks[-1]) < row:
            with self._lock:
                self._read_until(row)
        marks = list(self._marks)  # the loader, which may be waiting for rows of later, appends to it
        at = bisect_left(marks, row, key=_row)
        return marks[at if at < len(marks) and _row(marks[at]) == row else at - 1]

    def close(self) -> None:
        """Ends the processes that tokenise."""
        self._pools.close()

    def _read_until(self, row: int) -> None:
        """Reads pools until it is known in which one the row before `row` is."""
        assert row >= _row(self._marks[0]), f"row {row} is behind what is remembered"
        while _row(self._marks[-1]) < row:
            self._read_next()

    def _read_next(self) -> None:
        mark = self._marks[-1]
        pool = self._pools.open(mark["place"])
        if self.repeat and pool.repetition >= self.repeat:
            raise DataError(
                f"row {mark['row']} is of pass {pool.repetition + 1} over its data, and data.repeat={self.repeat} allows {self.repeat}; "
                "give more data, lower train.steps or raise data.repeat (0: any number)"
            )
        self._refuse_nothing(pool, mark["row"])
        records = mark["records"] + pool.data.documents + pool.data.empty + pool.data.skipped
        skipped = mark["skipped"] + pool.data.skipped
        if skipped > self._config.most_skipped * records:
            raise DataError(
                f"{skipped} of {records} records read so far were skipped, a larger share than data.most_skipped="
                f"{self._config.most_skipped}; one of them: {pool.data.first_skipped}; mend them, or raise data.most_skipped"
            )
        rows = self._packed(pool)
        self._keep(mark["row"], rows)
        self._marks.append({"row": mark["row"] + rows.length, "place": pool.after, "records": records, "skipped": skipped})
        del self._marks[:-KEPT_MARKS]

    def _refuse_nothing(self, pool: Pool, row: int) -> None:
        """Raises DataError where a whole pass has given no row."""
        if self._pass is None:
            starts = pool.number == 0
            self._pass = (pool.repetition, row if starts else -1)
        elif self._pass[0] != pool.repetition:
            if self._pass[1] == row:
                raise DataError(
                    "data.paths: no text to train on in any of the files; give files that hold text, or, where data.long_documents=drop "
                    "has left all of them out, raise data.seq_len"
                )
            self._pass = (pool.repetition, row)

    def _packed(self, pool: Pool) -> "_PoolRows":
        config, data = self._config, pool.data
        if config.packing == "best_fit":
            plan = make_plan(data, config.seq_len, config.long_documents)
            rows = PlannedRows(data, plan, seq_len=config.seq_len, document_mask=config.document_mask)
        else:
            order = shuffled(data.documents, self._seed, pool.number, DOCUMENTS) if config.shuffle else None
            rows = FilledRows(data, seq_len=config.seq_len, document_mask=config.document_mask, order=order)
        return _PoolRows(rows, shuffled(rows.length, self._seed, pool.number, ROWS) if config.shuffle else None)

    def _keep(self, row: int, rows: "_PoolRows") -> None:
        if rows.length:  # an empty pool begins where the next one does
            self._open[row] = rows
        while len(self._open) > KEPT_POOLS:
            del self._open[next(iter(self._open))]


@dataclass(frozen=True)
class _PoolRows:
    """The rows of a pool, in an order."""

    rows: FilledRows | PlannedRows
    order: np.ndarray | None

    @property
    def length(self) -> int:
        return self.rows.length

    def row(self, place: int) -> dict[str, np.ndarray]:
        return self.rows.row(place if self.order is None else int(self.order[place]))


def _row(mark: Position) -> int:
    return mark["row"]
