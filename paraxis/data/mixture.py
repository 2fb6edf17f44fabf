"""Several sources in one stream of rows, by weight: which row of which source comes next, as a pure function of its index.

    data.paths   = ["web=web/*.jsonl", "code=code/*.jsonl", "maths=maths.jsonl"]
    data.mixture = ["web=0.7 code=0.3", "1000: web=0.5 code=0.3 maths=0.2"]

A mixture is one of rows, as here, or of whole documents (mixed_documents.py). Of rows each is of one source, and all are of one
length, so weights of rows are weights of tokens. A source goes through its own rows, or documents, one after another, whatever is
drawn in between: a change of weights neither repeats nor loses any of them.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from itertools import pairwise
from typing import Any, Protocol

import numpy as np

from paraxis.base.errors import ConfigError
from paraxis.base.seams import Rows

LONGEST_PERIOD = 100_000  # rows; to make the pattern takes about ten microseconds a row
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")


@dataclass(frozen=True)
class Change:
    """From step `step` on, sources are drawn in these shares, which sum to 1. The first change of a mixture is at step 0."""

    step: int
    shares: Mapping[str, Fraction]


def read_mixture(texts: Sequence[str]) -> list[Change]:
    """The changes that `data.mixture` spells, in order. Raises ConfigError for one that cannot be read."""
    changes = [_read_change(text) for text in texts]
    if changes[0].step:
        raise ConfigError(f"data.mixture={texts[0]!r} must begin at step 0: leave out {changes[0].step}:")
    for before, after in pairwise(changes):
        if after.step <= before.step:
            raise ConfigError(f"data.mixture: the change at step {after.step} comes after that at step {before.step}; put them in order")
    return changes


def _read_change(text: str) -> Change:
    step, colon, words = text.rpartition(":")
    weights: dict[str, Fraction] = {}
    for word in words.split():
        name, equals, number = word.partition("=")
        try:
            weight = Fraction(number)
        except (ValueError, ZeroDivisionError):
            weight = Fraction(-1)
        if not NAME.fullmatch(name) or not equals or weight < 0 or name in weights:
            raise ConfigError(f"data.mixture={text!r}: {word!r} is no weight of a source of its own; write name=0.7")
        weights[name] = weight
    total = sum(weights.values())
    if not total or (colon and not step.strip().isdecimal()):
        raise ConfigError(f"data.mixture={text!r} must be weights, and the step they begin at if not 0, as in '1000: web=0.7 code=0.3'")
    shares = {name: weight / total for name, weight in weights.items() if weight}
    if (length := _period(shares)) > LONGEST_PERIOD:
        raise ConfigError(
            f"data.mixture={text!r} comes out even only after {length} rows, more than {LONGEST_PERIOD}; "
            "round the weights, to three decimals of their sum for instance"
        )
    return Change(int(step) if colon else 0, shares)


def _period(shares: Mapping[str, Fraction]) -> int:
    return math.lcm(*(share.denominator for share in shares.values()))


def whole_weights(shares: Mapping[str, Fraction]) -> dict[str, int]:
    """The smallest whole numbers in these shares: their sum is at most LONGEST_PERIOD."""
    return {name: int(share * _period(shares)) for name, share in shares.items()}


@cache
def pattern(weights: tuple[int, ...]) -> np.ndarray:
    """Which of several sources each of the first sum(weights) rows is from; after them it begins again. int64.

    No source is ever as much as a row away from its share of any number of first rows, so that no stretch between is as much
    as two away: the rule of Tijdeman (1980, "The chairman assignment problem"), in whole numbers.
    """
    total, count = sum(weights), len(weights)
    weight, taken = np.array(weights, np.int64), np.zeros(count, np.int64)
    chosen = np.zeros(total, np.int64)
    if count == 1:
        return chosen
    slack = 2 * count - 2
    for row in range(total):
        behind = slack * (weight * (row + 1) - total * taken)  # in rows: by slack * total
        due = np.where(behind >= total, (total * (slack - 1) - behind) / weight, np.inf)
        chosen[row] = due.argmin()
        taken[chosen[row]] += 1
    return chosen


class Stretch(Protocol):
    """The rows from `row` on, until the next change."""

    change: Change
    row: int

    def read(self, index: int) -> dict[str, int]:
        """How much of each source has been read before row `index`, since the beginning: of what the mixture is of."""
        ...

    def at(self, index: int) -> Mapping[str, Any]:
        """Row `index`."""
        ...


class Mixing(Protocol):
    """How sources are mixed: `of` "rows", or "documents" and then counted in tokens."""

    of: str

    def begin(self, change: Change, row: int, previous: Any) -> Stretch:
        """The rows from `row` on under `change`, after those of the stretch `previous`, if there is one."""
        ...

    def pass_length(self, name: str) -> int:
        """How much a pass over a source is, as `Stretch.read` counts; 0 where that is not known yet."""
        ...


class RowStretch:
    """Rows each of which is a row of a source, of which `before` had been read already."""

    def __init__(self, sources: Mapping[str, Rows], change: Change, row: int, before: Mapping[str, int]) -> None:
        self.change, self.row = change, row
        self._sources, self._before = sources, before
        self._names = list(change.shares)
        self._chosen = pattern(tuple(whole_weights(change.shares).values()))
        # How many rows of each source [place, source] come before each place of the period, and before its end.
        ones = self._chosen[:, None] == np.arange(len(self._names))
        self._counts = np.concatenate([np.zeros((1, len(self._names)), np.int64), np.cumsum(ones, axis=0)])

    def at(self, index: int) -> Mapping[str, Any]:
        """Row `index`: the next of its source."""
        name = self._names[self._chosen[(index - self.row) % len(self._chosen)]]
        return self._sources[name].row(self.read(index)[name])

    def read(self, index: int) -> dict[str, int]:
        """How many rows of each source come before row `index`."""
        periods, place = divmod(index - self.row, len(self._chosen))
        counts = periods * self._counts[-1] + self._counts[place]
        return {**self._before, **{name: self._before.get(name, 0) + int(counts[number]) for number, name in enumerate(self._names)}}


class RowMixing:
    """Mixes whole rows."""

    of = "rows"

    def __init__(self, sources: Mapping[str, Rows]) -> None:
        self._sources = sources

    def begin(self, change: Change, row: int, previous: RowStretch | None) -> RowStretch:
        """The rows from `row` on under `change`."""
        return RowStretch(self._sources, change, row, previous.read(row) if previous else {})

    def pass_length(self, name: str) -> int:
        """How many rows a pass over a source is."""
        return self._sources[name].length


class SourceRows(Rows, Protocol):
    """Training rows that may be read `repeat` times over; 0 for any number."""

    repeat: int


class MixtureRows:
    """Rows of several sources. What is in a row depends on the sources and the changes and on nothing else.

    A change begins at a step, which is a row once it is known how many rows a step has. `log` says at which row each change has
    begun, and is kept with a run: continued with other rows to a step, it goes on where it was.
    """

    def __init__(
        self, sources: Mapping[str, SourceRows], changes: Sequence[Change], rows_per_step: int, mixing: Mixing | None = None
    ) -> None:
        self.sources = sources
        self.mixing: Mixing = mixing or RowMixing(sources)
        # Of all sources; a run that goes on compares only those it has read, each by its own. See record.py.
        prints: dict[str, Any] = {name: rows.fingerprint for name, rows in sources.items()}
        self.fingerprint = hashlib.sha256(json.dumps([self.mixing.of, prints]).encode()).hexdigest()
        self.length = sum(rows.length for rows in sources.values())
        self.vocab_size = next(iter(sources.values())).vocab_size
        self._changes, self._rows_per_step = changes, rows_per_step
        self._stretches: list[Stretch] = []
        self._begin(changes, 0, 0)

    def _begin(self, changes: Sequence[Change], step: int, row: int) -> None:
        """Appends the changes from `step` on, which is at `row`."""
        for change in changes:
            self._append(change, row + (change.step - step) * self._rows_per_step)

    def _append(self, change: Change, row: int) -> None:
        self._stretches.append(self.mixing.begin(change, row, self._stretch(row) if self._stretches else None))

    def _stretch(self, index: int) -> Stretch:
        return next(stretch for stretch in reversed(self._stretches) if stretch.row <= index)

    def read(self, index: int) -> dict[str, int]:
        """How much of each source has been read before row `index`: rows in a mixture of rows, tokens in one of documents."""
        return self._stretch(index).read(index)

    def row(self, index: int) -> Mapping[str, Any]:
        """Row `index`: int64 arrays of length seq_len by Batch field name."""
        return self._stretch(index).at(index)

    def log(self, row: int) -> list[dict[str, Any]]:
        """The changes under which the rows before `row` were read, and where each began, for JSON."""
        return [
            {"step": s.change.step, "row": s.row, "shares": {name: str(share) for name, share in s.change.shares.items()}}
            for s in self._stretches
            if s.row < row
        ]

    def problem_with(self, log: Sequence[Mapping[str, Any]], step: int) -> str | None:
        """Why a run that has done `step` steps under `log` cannot go on with this mixture, or None."""
        was = [_from_log(entry) for entry in log]
        now = [change for change in self._changes if change.step < step]
        if was == now:
            return None
        return (
            f"the mixture {_spelled(was)}, but data.mixture now says {_spelled(now)} of the {step} steps done; only later steps may change"
        )

    def continue_from(self, log: Sequence[Mapping[str, Any]], step: int, row: int) -> None:
        """Goes on at `row` after `step` steps: what was read is as `log` has it, and later changes are of rows of now."""
        self._stretches.clear()
        for entry in log:
            self._append(_from_log(entry), entry["row"])
        self._begin([change for change in self._changes if change.step >= step], step, row)


def _from_log(entry: Mapping[str, Any]) -> Change:
    return Change(entry["step"], {name: Fraction(share) for name, share in entry["shares"].items()})


def _spelled(changes: Sequence[Change]) -> str:
    spelled = (f"{change.step}: " + " ".join(f"{name}={share}" for name, share in change.shares.items()) for change in changes)
    return f"[{', '.join(spelled)}]"
