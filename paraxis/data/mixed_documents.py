"""Mixtures of whole documents: closer to the weights than mixtures of rows where documents are shorter than rows.

The documents of each source, pass after pass, are merged by weight into one stream (merged.py), which is cut into rows as a pass is:
row r holds tokens r * seq_len to (r + 1) * seq_len inclusive. A change of weights begins with the first document that begins after
the first token of its row, so that what has been read stays as it was, and every source goes on with the next of its documents.
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np

from paraxis.base.errors import DataError
from paraxis.data.merged import Branch, Laid, Leaf, merged
from paraxis.data.mixture import Change, whole_weights
from paraxis.data.rows import Stream, TrainingRows, row_of

WINDOW_TOKENS = 1 << 18  # laid out at once: some thousand documents take milliseconds


class _Passes:
    """The documents of a source for ever, pass after pass, each in its own order."""

    def __init__(self, rows: TrainingRows) -> None:
        self.tokens, self.repeat = rows.data.tokens, rows.repeat
        self.longest = int(np.diff(rows.data.ends, prepend=0).max())
        self._pass = lru_cache(maxsize=2)(rows.documents_of)  # two where one ends and the next begins

    def laid(self, start: int, stop: int) -> Laid:
        """The documents that have tokens `start` to `stop`, counted over all passes."""
        found = [self._laid(number, start, stop) for number in range(start // self.tokens, -(-stop // self.tokens))]
        return Laid(*map(np.concatenate, zip(*found, strict=True)))

    def _laid(self, number: int, start: int, stop: int) -> Laid:
        stream, before = self._pass(number), number * self.tokens
        first = int(np.searchsorted(stream.ends, max(0, start - before), side="right"))
        last = int(np.searchsorted(stream.ends, min(self.tokens, stop - before), side="left"))
        ends = np.asarray(stream.ends[first : last + 1])
        starts = np.concatenate(([stream.ends[first - 1] if first else 0], ends[:-1]))
        documents = np.arange(first, last + 1) if stream.documents is None else stream.documents[first : last + 1]
        return Laid(np.zeros_like(documents), documents, starts + before, ends - starts)


class _Window(NamedTuple):
    """Some of the stream, laid out; `allowed` unless a pass more than there may be begins in it."""

    stream: Stream
    allowed: bool


class DocumentMixing:
    """Mixes whole documents of `sources`; rows are of `seq_len` tokens, and confined to documents where `document_mask`."""

    of = "documents"

    def __init__(self, sources: Mapping[str, TrainingRows], *, seq_len: int, document_mask: bool) -> None:
        self.seq_len, self.document_mask = seq_len, document_mask
        self.names = sorted(sources)  # the order in which weights are spelled has no say
        self.data = [sources[name].data for name in self.names]
        self.passes = [_Passes(sources[name]) for name in self.names]

    @property
    def longest(self) -> int:
        """The tokens of the longest document of all sources."""
        return max(passes.longest for passes in self.passes)

    def begin(self, change: Change, row: int, previous: "DocumentStretch | None") -> "DocumentStretch":
        """The rows from `row` on under `change`, after those of the stretch `previous`, if there is one."""
        return DocumentStretch(self, change, row, previous)

    def pass_length(self, name: str) -> int:
        """How many tokens a pass over a source is."""
        return self.passes[self.names.index(name)].tokens

    def merged(self, change: Change, before: Mapping[str, int]) -> Branch:
        """The sources in the shares of `change`, of each of which `before` tokens have been read: whole documents."""
        weights = whole_weights(change.shares)
        return merged(
            [
                Leaf(number, weights[name], passes.longest, passes.laid, before.get(name, 0))
                for number, (name, passes) in enumerate(zip(self.names, self.passes, strict=True))
                if name in weights
            ]
        )

    def furthest(self, change: Change) -> float:
        """The most tokens that a source may be off its share after any number of tokens under `change`; twice that over any stretch."""
        return float(self.merged(change, {}).furthest(Fraction(0)))


class DocumentStretch:
    """The stream from its token `begin` on, where a document begins; rows from `row` on may still have some of the one before."""

    def __init__(self, mixing: DocumentMixing, change: Change, row: int, previous: "DocumentStretch | None") -> None:
        self.change, self.row = change, row
        self._mixing, self._previous = mixing, previous
        self._begin = previous.end_of_document(row * mixing.seq_len + 1) if previous else 0
        self._before = previous.counts(self._begin) if previous else {}
        self._merged = mixing.merged(change, self._before)
        self._window = lru_cache(maxsize=2)(self._make_window)

    def read(self, index: int) -> dict[str, int]:
        """How many tokens of each source the rows before `index` hold; the last is the first of row `index`."""
        return self.counts(index * self._mixing.seq_len + 1) if index else {}

    def counts(self, token: int) -> dict[str, int]:
        """How many tokens of each source come before `token` of the stream."""
        if self._previous and token < self._begin:
            return self._previous.counts(token)
        counts = self._merged.counts(token - self._begin)
        return self._before | {(name := self._mixing.names[n]): self._before.get(name, 0) + count for n, count in counts.items()}

    def end_of_document(self, token: int) -> int:
        """The first token from `token` on that a document ends before."""
        if token <= self._begin:
            return self._begin
        laid = self._merged.laid(token - self._begin - 1, token - self._begin)
        return self._begin + int(laid.starts[0] + laid.lengths[0])

    def at(self, index: int) -> Mapping[str, Any]:
        """Row `index`: int64 arrays of length seq_len by Batch field name. Raises DataError beyond the passes that are allowed."""
        start = index * self._mixing.seq_len
        return row_of(*self.tokens(start, start + self._mixing.seq_len + 1), self._mixing.document_mask)

    def tokens(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens `start` to `stop` of the stream, those as targets, and the documents they belong to, from 0 on: int64 arrays."""
        if self._previous and start < self._begin:
            head = self._previous.tokens(start, min(stop, self._begin))
            if stop <= self._begin:
                return head
            tail = self.tokens(self._begin, stop)
            tokens, targets = (np.concatenate(parts) for parts in zip(head[:2], tail[:2], strict=True))
            return tokens, targets, np.concatenate([head[2], tail[2] + head[2][-1] + 1])
        window = self._window((start - self._begin) // WINDOW_TOKENS)
        if not window.allowed:
            self._check(stop)
        return window.stream.read(start - self._begin, stop - self._begin)

    def _make_window(self, number: int) -> _Window:
        stop = (number + 1) * WINDOW_TOKENS + self._mixing.seq_len + 1
        laid = self._merged.laid(number * WINDOW_TOKENS, stop)
        stream = Stream(self._mixing.data, laid.starts + laid.lengths, laid.documents, laid.sources, int(laid.starts[0]))
        return _Window(stream, self._exhausted(self._begin + stop) is None)

    def _exhausted(self, token: int) -> int | None:
        """A source of which more than the allowed passes are read before `token`."""
        counts = self.counts(token)
        for number, (name, passes) in enumerate(zip(self._mixing.names, self._mixing.passes, strict=True)):
            if passes.repeat and counts.get(name, 0) > passes.repeat * passes.tokens:
                return number
        return None

    def _check(self, stop: int) -> None:
        if (number := self._exhausted(stop)) is not None:
            name, passes = self._mixing.names[number], self._mixing.passes[number]
            raise DataError(
                f"row {(stop - 2) // self._mixing.seq_len} is of pass {passes.repeat + 1} over the source {name}, and data.repeat="
                f"{passes.repeat} allows {passes.repeat} of {passes.tokens} tokens; "
                "give more data, lower train.steps or raise data.repeat (0: any number)"
            )
