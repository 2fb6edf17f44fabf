"""Packing whole documents into rows: best fit decreasing, so that few documents are cut and few places stay empty.

After Ding et al. 2024, "Fewer Truncations Improve Language Modeling": a document longer than a row is cut into full rows and
a rest (or left out), and each rest goes to the row it fills best. Which documents share a row is decided once for the data
and row length, whatever the seed, and kept beside the tokens; each pass puts the rows in an order of its own.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal, Protocol

import numpy as np

from paraxis.base.errors import DataError
from paraxis.base.seams import IGNORE
from paraxis.data.cache import made_once
from paraxis.data.mapped import Mapped, hash_parts
from paraxis.data.rows import ROWS, row_fingerprint, shuffled, within_repeat
from paraxis.data.shards import Documents, Prepared

FORMAT = 2
ARRAYS = ("row_ends", "documents", "starts", "counts")


def best_fit(sizes: np.ndarray, room: int) -> np.ndarray:
    """The bin of each item, where items of `sizes` (1 to `room`) are put, largest first, into the fullest bin that has room.

    Equally large items come in a fixed mixed order. int64.
    """
    mixed = shuffled(len(sizes))
    order = mixed[np.argsort(-sizes[mixed], kind="stable")]
    bins = np.empty(len(sizes), np.int64)
    open_bins: list[list[int]] = [[] for _ in range(room + 1)]  # by how much still goes in
    rooms = 0  # bit r is set where open_bins[r] has any
    count = 0
    ends = np.flatnonzero(np.diff(sizes[order], append=0)) + 1
    first = 0
    for end in ends.tolist():
        size = int(sizes[order[first]])
        while first < end:
            fitting = rooms >> size
            if fitting:
                left = size + (fitting & -fitting).bit_length() - 1
                number = open_bins[left].pop()
                if not open_bins[left]:
                    rooms ^= 1 << left
            else:
                left, number, count = room, count, count + 1
            # The bin it is in is then the fullest with room, so equal items go on into it.
            taken = min(left // size, end - first)
            bins[order[first : first + taken]] = number
            first += taken
            left -= taken * size
            if left:
                open_bins[left].append(number)
                rooms |= 1 << left
    return bins


class Entries(Protocol):
    """An int64 array in memory, or one in a file, of which what is read is compared with its hash first."""

    def __len__(self) -> int: ...

    def __getitem__(self, entries: slice, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Plan:
    """Row r is made of pieces row_ends[r-1] to row_ends[r]: `counts` inputs of `documents`, from `starts` on."""

    row_ends: Entries
    documents: Entries
    starts: Entries
    counts: Entries

    def pieces(self, row: int) -> list[tuple[int, int, int]]:
        """The document, the start and the count of each piece of a row."""
        begin = int(self.row_ends[row - 1 : row][0]) if row else 0
        pieces = slice(begin, int(self.row_ends[row : row + 1][0]))
        return list(zip(self.documents[pieces].tolist(), self.starts[pieces].tolist(), self.counts[pieces].tolist(), strict=True))


def make_plan(data: Documents, seq_len: int, long_documents: Literal["split", "drop"]) -> Plan:
    """Which part of which document goes to which row. A document of n tokens has n-1 inputs, each with the next as its target."""
    inputs = np.diff(data.ends, prepend=0) - 1
    if long_documents == "drop":
        inputs = np.where(inputs > seq_len, 0, inputs)
    full, rest = inputs // seq_len, inputs % seq_len
    long, short = np.flatnonzero(full), np.flatnonzero(rest)
    of_long = np.repeat(long, full[long])
    number = np.arange(len(of_long)) - np.repeat(np.cumsum(full[long]) - full[long], full[long])
    rows = np.concatenate([np.arange(len(of_long)), len(of_long) + best_fit(rest[short], seq_len)])
    documents = np.concatenate([of_long, short])
    starts = np.concatenate([number * seq_len, full[short] * seq_len])
    counts = np.concatenate([np.full(len(of_long), seq_len), rest[short]])
    order = np.argsort(rows, kind="stable")
    return Plan(np.cumsum(np.bincount(rows)), documents[order], starts[order], counts[order])


def kept_plan(data: Prepared, seq_len: int, long_documents: Literal["split", "drop"], cache: Path) -> Plan:
    """The plan from `cache`, or made into it. Any number of ranks may call this at once."""
    key = hashlib.sha256(json.dumps([FORMAT, data.fingerprint, seq_len, long_documents]).encode()).hexdigest()[:24]

    def make(partial: Path) -> None:
        plan = make_plan(data, seq_len, long_documents)
        for name in ARRAYS:
            getattr(plan, name).astype("<i8").tofile(partial / f"{name}.bin")
            hash_parts(partial / f"{name}.bin")

    folder = made_once(cache, f"packed-{key}", make)
    try:
        return Plan(*(_map(folder / f"{name}.bin") for name in ARRAYS))
    except OSError as error:
        raise DataError(f"the data cache is damaged: {error}; delete the folder {folder} and it is made again") from error


def _map(path: Path) -> Mapped:
    dtype = np.dtype("<i8")
    entries = Mapped(path, dtype, path.stat().st_size // dtype.itemsize)
    entries.read(max(0, len(entries) - 1), len(entries))  # by its last part's hash the file is as long as it was
    return entries


class PlannedRows:
    """The rows of a plan, in its order. No target crosses from one document to the next; empty places have none."""

    def __init__(self, data: Documents, plan: Plan, *, seq_len: int, document_mask: bool) -> None:
        self.length = len(plan.row_ends)
        self._data, self._plan, self._seq_len, self._document_mask = data, plan, seq_len, document_mask

    def row(self, row: int) -> dict[str, np.ndarray]:
        """Row `row` of `length`: int64 arrays of length seq_len by Batch field name."""
        tokens, targets = np.zeros(self._seq_len, np.int64), np.full(self._seq_len, IGNORE, np.int64)
        positions, documents = np.arange(self._seq_len), np.zeros(self._seq_len, np.int64)
        at = 0
        for document, start, count in self._plan.pieces(row):
            tokens[at : at + count] = self._data.read(document, start, start + count)
            targets[at : at + count] = self._data.targets(document, start + 1, start + count + 1)
            at += count
            documents[at:] += 1
            positions[at:] = np.arange(self._seq_len - at)
        if not self._document_mask:
            return {"tokens_bt": tokens, "targets_bt": targets, "positions_bt": np.arange(self._seq_len)}
        return {"tokens_bt": tokens, "targets_bt": targets, "positions_bt": positions, "documents_bt": documents}


class PackedRows:
    """Training rows of whole documents, pass after pass: row `i` is of pass `i // length`; every input once a pass.

    No target crosses from one document to the next, with or without the mask; a row's empty places have no targets.
    """

    def __init__(
        self,
        data: Prepared,
        plan: Plan,
        *,
        seq_len: int,
        document_mask: bool,
        shuffle: bool,
        seed: int,
        long_documents: str = "split",
        repeat: int = 0,
    ) -> None:
        if not len(plan.row_ends):
            raise DataError(
                f"data.long_documents={long_documents} leaves no document of two tokens or more for rows of data.seq_len={seq_len}; "
                "raise data.seq_len or set data.long_documents=split"
            )
        self.fingerprint = row_fingerprint(data.fingerprint, shuffle=shuffle, packing="best_fit", long_documents=long_documents)
        self.data = data
        self.vocab_size = data.tokenizer.vocab_size
        self.eos_id = data.tokenizer.eos_id
        self.length = len(plan.row_ends)
        self.repeat = repeat
        self._planned = PlannedRows(data, plan, seq_len=seq_len, document_mask=document_mask)
        self._plan, self._seq_len, self._shuffle, self._seed = plan, seq_len, shuffle, seed
        self._order = lru_cache(maxsize=1)(self._make_order)

    def _make_order(self, number: int) -> np.ndarray | None:
        return shuffled(self.length, self._seed, number, ROWS) if self._shuffle else None

    @property
    def waste(self) -> float:
        """The share of places that stay empty."""
        return 1 - int(self._plan.counts[:].sum()) / (self.length * self._seq_len)

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`, counted over all passes: int64 arrays of length seq_len by Batch field name."""
        number, place = within_repeat(index, self.length, self.repeat)
        order = self._order(number)
        return self._planned.row(place if order is None else int(order[place]))
