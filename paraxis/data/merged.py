"""Endless streams of documents merged into one by weight, so that any stretch of it can be laid out without what is before.

Two streams are merged by virtual time, as packets are in fair queueing (Demers, Keshav & Shenker 1989; Goyal, Vin & Cheng 1996):
a document of n tokens whose first is token S of a stream of weight w has the tag (S + n/2) / w, the time at which its middle is due,
and documents come in the order of their tags. More streams are merged two by two, in a tree: merged all at once, many of little
weight may be due together, and a stream of great weight would fall behind by a document for each of them.

How far from its share a stream may be: once the documents with tags below v are out, which are those whose middle lies before token
w * v of their stream, it has given x tokens, at most half its longest document L more or less than w * v. Another of share 1 - w and
longest document M has given y, and x - w (x + y) = (1 - w) (x - w v) - w (y - (1 - w) v): at most ((1 - w) L + w M) / 2 either way. In
the midst of a document the same holds, with its tag as v. Further down in the tree w times what the branch itself is off is added.
"""

from collections.abc import Callable, Sequence
from fractions import Fraction
from functools import cache
from itertools import count
from typing import NamedTuple, Protocol

import numpy as np


class Laid(NamedTuple):
    """Documents one after another: of which source, which of it, where in the stream it begins, its tokens. All int64 [documents]."""

    sources: np.ndarray
    documents: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray

    def cut(self, begin: int, end: int) -> "Laid":
        """Documents `begin` to `end`."""
        return Laid(*(array[begin:end] for array in self))


class Branch(Protocol):
    """An endless stream of documents, of which the longest has `longest` tokens; shares are those of the weights."""

    weight: int
    longest: int

    def laid(self, start: int, stop: int) -> Laid:
        """The documents that have tokens `start` to `stop`, which is more than `start`."""
        ...

    def counts(self, token: int) -> dict[int, int]:
        """How many tokens of each source come before `token`."""
        ...

    def furthest(self, above: Fraction) -> Fraction:
        """The most tokens that a source may be off its share, where this stream is `above` off its own."""
        ...


class Leaf:
    """A source by itself: `own` lays out its documents, and is asked for them from token `offset` on, where a document begins."""

    def __init__(self, number: int, weight: int, longest: int, own: Callable[[int, int], Laid], offset: int) -> None:
        self.weight, self.longest = weight, longest
        self._number, self._own, self._offset = number, own, offset

    def laid(self, start: int, stop: int) -> Laid:
        """The documents that have tokens `start` to `stop` after the offset."""
        found = self._own(self._offset + start, self._offset + stop)
        return found._replace(sources=np.full_like(found.documents, self._number), starts=found.starts - self._offset)

    def counts(self, token: int) -> dict[int, int]:
        """All tokens are of this source."""
        return {self._number: token}

    def furthest(self, above: Fraction) -> Fraction:
        """It is all there is here."""
        return above


class Pair:
    """Two streams merged."""

    def __init__(self, first: Branch, second: Branch) -> None:
        self.weight = first.weight + second.weight
        self.longest = max(first.longest, second.longest)
        self._both = first, second

    def laid(self, start: int, stop: int) -> Laid:
        """The documents that have tokens `start` to `stop`."""
        return self._merged(start, stop)[0]

    def counts(self, token: int) -> dict[int, int]:
        """How many tokens of each source come before `token`."""
        laid, second, own = self._merged(token, token + 1)
        of_one = int(own[0]) + token - int(laid.starts[0])
        of_each = (token - of_one, of_one) if second[0] else (of_one, token - of_one)
        return {k: v for branch, tokens in zip(self._both, of_each, strict=True) for k, v in branch.counts(tokens).items()}

    def furthest(self, above: Fraction) -> Fraction:
        """The larger of what the two may be off: see the head of this file."""
        found = []
        for one, other in (self._both, self._both[::-1]):
            here = Fraction(other.weight * one.longest + one.weight * other.longest, 2 * self.weight)
            found.append(one.furthest(here + above * Fraction(one.weight, self.weight)))
        return max(found)

    def _merged(self, start: int, stop: int) -> tuple[Laid, np.ndarray, np.ndarray]:
        """The documents that have tokens `start` to `stop`; which are of the second stream, and where in its own each begins."""
        # At time v both have given v tokens, one longest document more or less, and each its share of v, half a document more or
        # less. So with two documents more on either side of its share nothing of a stream is missing between.
        margin = 2 * self.longest + 2
        parts = [
            branch.laid(max(0, start * branch.weight // self.weight - margin), -(-stop * branch.weight // self.weight) + margin)
            for branch in self._both
        ]
        tags = self._tags(parts)
        order = np.argsort(np.concatenate(tags), kind="stable")  # of two that are due together the first stream's comes first
        sources, documents, own, lengths = (np.concatenate(arrays)[order] for arrays in zip(*parts, strict=True))
        starts = int(parts[0].starts[0]) + int(parts[1].starts[0]) + np.cumsum(lengths) - lengths
        begin, end = int(np.searchsorted(starts, start, side="right")) - 1, int(np.searchsorted(starts, stop, side="left"))
        due = np.concatenate(tags)[order][[begin, end - 1]]
        assert all(part.starts[0] == 0 or tag[0] <= due[0] for part, tag in zip(parts, tags, strict=True))
        assert all(due[1] <= tag[-1] for tag in tags)
        second = order >= len(parts[0].starts)
        return Laid(sources, documents, starts, lengths).cut(begin, end), second[begin:end], own[begin:end]

    def _tags(self, parts: Sequence[Laid]) -> list[np.ndarray]:
        """Numbers in the order of the tags: twice the tag times both weights, less what the first has, or they would not fit in int64."""
        others = [branch.weight for branch in reversed(self._both)]
        firsts = [2 * int(part.starts[0]) * other for part, other in zip(parts, others, strict=True)]
        return [
            (2 * (part.starts - part.starts[0]) + part.lengths) * other + (first - firsts[0])
            for part, other, first in zip(parts, others, firsts, strict=True)
        ]


def merged(sources: Sequence[Branch]) -> Branch:
    """One stream of all, each by its weight.

    The tree decides how far a source of weight w may be off: half a longest document, and w / W of one more half for each branch of
    weight W that it is in, the whole aside. So it is cut, heaviest first, such that no source has more than `limit` of these, for
    the lowest limit in sixteenths from 1 on at which that can be done: at 1 none is off by more than the longest document.
    """
    heaviest_first = sorted(sources, key=lambda source: -source.weight)
    sums = np.cumsum([0, *(source.weight for source in heaviest_first)]).tolist()
    weights = [source.weight for source in heaviest_first]
    cuts = next(found for parts in count(16) if (found := _cuts(weights, sums, parts / 16)) is not None)

    def tree(begin: int, end: int) -> Branch:
        if end - begin == 1:
            return heaviest_first[begin]
        cut = cuts[begin, end]
        return Pair(tree(begin, cut), tree(cut, end))

    return tree(0, len(heaviest_first))


def _cuts(weights: Sequence[int], sums: Sequence[int], limit: float) -> dict[tuple[int, int], int] | None:
    """Where to cut each branch in two so that w / W of its branches adds up to `limit` at most for every source; None if nowhere."""
    cuts: dict[tuple[int, int], int] = {}

    @cache
    def room(begin: int, end: int) -> float:
        """The largest sum of 1 / W over the branches above that leaves each source in this one within the limit."""
        if end - begin == 1:
            return limit / weights[begin]
        rooms = [(min(room(begin, cut), room(cut, end)), cut) for cut in range(begin + 1, end)]
        most, cuts[begin, end] = max(rooms)
        whole = end - begin == len(weights)
        return most if whole else most - 1 / (sums[end] - sums[begin])

    # From the short to the long, or a hundred sources would be a deep recursion.
    for length in range(1, len(weights) + 1):
        for begin in range(len(weights) - length + 1):
            room(begin, begin + length)
    return cuts if room(0, len(weights)) >= 0 else None
