"""Packing documents into rows of one length, and the order of a pass: all a pure function of a row's index.

The documents of a pass are laid end to end and cut every seq_len tokens; row r holds tokens r * seq_len to
(r + 1) * seq_len inclusive, so that each row's last target is the next row's first token and every token is predicted once.
"""

import hashlib
import json
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from paraxis.base.errors import DataError
from paraxis.base.seams import IGNORE
from paraxis.data.shards import Documents, Prepared

DOCUMENTS, ROWS = 0, 1  # what is put in order: distinct words in the key of the hash


def shuffled(count: int, *key: int) -> np.ndarray:
    """The numbers 0 to count-1 in an order that `key` determines: sorted by a hash, the same with every NumPy.

    The hash is SplitMix64 (Steele, Lea & Flood 2014): number n gets the n-th output of the stream that `key` starts, and no
    two outputs are equal. Takes 24 bytes a number while it works, and returns int64.
    """
    golden = np.uint64(0x9E3779B97F4A7C15)
    state = np.zeros(1, np.uint64)
    for word in key:
        state = _mix(state + golden + np.uint64(word % 2**64))
    return np.argsort(_mix(state + golden * np.arange(1, count + 1, dtype=np.uint64)), kind="stable")


def _mix(x: np.ndarray) -> np.ndarray:
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def row_fingerprint(data: str, **settings: object) -> str:
    """The fingerprint of training rows: that of the data, and of what decides which tokens a row has."""
    return hashlib.sha256(json.dumps([data, settings], sort_keys=True).encode()).hexdigest()


def within_repeat(index: int, length: int, repeat: int) -> tuple[int, int]:
    """The pass of row `index`, and its place in it. Raises DataError for one beyond `repeat` passes, where that is not 0."""
    number, place = divmod(index, length)
    if repeat and number >= repeat:
        raise DataError(
            f"row {index} is of pass {number + 1} over its data, and data.repeat={repeat} allows {repeat} of {length} rows; "
            "give more data, lower train.steps or raise data.repeat (0: any number)"
        )
    return number, place


class Stream:
    """Documents laid end to end: any stretch of tokens, and which document each is of.

    At place p is document `documents[p]` of `data[sources[p]]`, and it ends at token ends[p]. Without `documents` these are all of
    them in their own order, without `sources` they are all of data[0]. The first begins at token `begin`. All arrays are int64.
    """

    def __init__(
        self,
        data: Sequence[Documents],
        ends: np.ndarray,
        documents: np.ndarray | None = None,
        sources: np.ndarray | None = None,
        begin: int = 0,
    ) -> None:
        self.ends, self.documents = ends, documents
        self._data, self._sources, self._begin = data, sources, begin

    def read(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The tokens at `start` to `stop`, those as targets, and the documents they belong to, numbered from 0: int64 arrays."""
        tokens, targets, documents = np.empty((3, stop - start), np.int64)
        place = int(np.searchsorted(self.ends, start, side="right"))
        number, at = 0, start
        while at < stop:
            begin = int(self.ends[place - 1]) if place else self._begin
            until = min(stop, int(self.ends[place]))
            document = place if self.documents is None else int(self.documents[place])
            data = self._data[0 if self._sources is None else self._sources[place]]
            here = slice(at - start, until - start)
            tokens[here] = data.read(document, at - begin, until - begin)
            targets[here] = data.targets(document, at - begin, until - begin)
            documents[here] = number
            place, number, at = place + 1, number + 1, until
        return tokens, targets, documents


def in_order(data: Documents, order: np.ndarray | None) -> Stream:
    """All documents once, in `order`, or in their own where there is none."""
    return Stream([data], data.ends if order is None else np.cumsum(np.diff(data.ends, prepend=0)[order]), order)


def row_of(tokens: np.ndarray, targets: np.ndarray, documents: np.ndarray, document_mask: bool) -> dict[str, np.ndarray]:
    """A row by Batch field name, of one token more than it is long, what each is as a target, and its document."""
    count = len(tokens) - 1
    places = np.arange(count, dtype=np.int64)
    row = {"tokens_bt": tokens[:-1], "targets_bt": targets[1:], "positions_bt": places}
    if document_mask:
        crosses = documents[1:] != documents[:-1]
        row["targets_bt"] = np.where(crosses, IGNORE, targets[1:])
        starts = np.concatenate(([0], np.where(crosses, places + 1, 0)[:-1]))
        row["positions_bt"] = places - np.maximum.accumulate(starts)
        row["documents_bt"] = documents[:-1]
    return row


class TrainingRows:
    """Training rows, pass after pass: row `i` is of pass `i // length`. What does not fill a row at a pass's end is left out.

    Where `shuffle`, each pass puts the documents in an order of its own before cutting them into rows, and then the rows,
    so that neither long documents nor the order of the files make neighbouring rows alike. A document that a row starts in
    the middle of counts its positions from there.
    """

    def __init__(self, data: Prepared, *, seq_len: int, document_mask: bool, shuffle: bool, seed: int, repeat: int = 0) -> None:
        if data.tokens <= seq_len:
            raise DataError(
                f"data.paths hold {data.tokens} tokens, too few for one row of data.seq_len={seq_len} and its last target; "
                f"give more text or set data.seq_len to {data.tokens - 1} or less"
            )
        self.fingerprint = row_fingerprint(data.fingerprint, shuffle=shuffle, packing="concatenate")
        self.data = data
        self.vocab_size = data.tokenizer.vocab_size
        self.eos_id = data.tokenizer.eos_id
        self.length = (data.tokens - 1) // seq_len
        self.repeat = repeat
        self._seq_len, self._document_mask = seq_len, document_mask
        self._shuffle, self._seed = shuffle, seed
        # A pass's order takes 16 bytes a document and 8 a row: keep only the one being read.
        self._pass = lru_cache(maxsize=1)(self._make_pass)

    def documents_of(self, number: int) -> Stream:
        """The documents of pass `number`, before they are cut into rows."""
        return in_order(self.data, shuffled(self.data.documents, self._seed, number, DOCUMENTS) if self._shuffle else None)

    def _make_pass(self, number: int) -> tuple[Stream, np.ndarray | None]:
        return self.documents_of(number), shuffled(self.length, self._seed, number, ROWS) if self._shuffle else None

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Row `index`, counted over all passes: int64 arrays of length seq_len by Batch field name."""
        number, place = within_repeat(index, self.length, self.repeat)
        stream, order = self._pass(number)
        start = (place if order is None else int(order[place])) * self._seq_len
        return row_of(*stream.read(start, start + self._seq_len + 1), self._document_mask)


class FilledRows:
    """All of the documents once, end to end, in their own order or another; the last row is filled up with targets that are ignored.

    Fewer than two tokens are no row.
    """

    def __init__(self, data: Documents, *, seq_len: int, document_mask: bool, order: np.ndarray | None = None) -> None:
        self.length = max(0, -(-(data.tokens - 1) // seq_len))
        self._stream, self._tokens = in_order(data, order), data.tokens
        self._seq_len, self._document_mask = seq_len, document_mask

    def row(self, index: int) -> dict[str, np.ndarray]:
        """Row `index` of `length`: int64 arrays of length seq_len by Batch field name."""
        start = index * self._seq_len
        tokens, targets, documents = self._stream.read(start, min(start + self._seq_len + 1, self._tokens))
        missing = self._seq_len + 1 - len(tokens)
        return row_of(
            np.pad(tokens, (0, missing)),
            np.pad(targets, (0, missing), constant_values=IGNORE),
            np.pad(documents, (0, missing), constant_values=documents[-1] + 1),
            self._document_mask,
        )


class HeldOutRows(FilledRows):
    """All of the held-out data once, in its own order."""

    def __init__(self, data: Prepared, *, seq_len: int, document_mask: bool) -> None:
        if data.tokens < 2:
            raise DataError(f"the held-out data have {data.tokens} tokens, and there is nothing to predict in fewer than 2; give more text")
        super().__init__(data, seq_len=seq_len, document_mask=document_mask)
        self.fingerprint = data.fingerprint
        self.vocab_size = data.tokenizer.vocab_size
        self.eos_id = data.tokenizer.eos_id
