"""What a block should keep for backward when there is room for so many bytes, and what it should compute again: pure functions.

Of one block's operators, the sets worth keeping are the Pareto frontier of bytes against seconds, found operator by operator, with what
is beaten in both left out: Nemhauser and Ullmann 1969, "Discrete dynamic programming and capital allocation". Recomputing one operator may
need another one's output: so the operators that must be there are carried along, from the last to the first.
Of the blocks of one kind the first keep one such set and the last another, which is exact but for sets of three kinds in one run of like
blocks: each set is compiled by itself, and a third one can gain less than what one block differs by.
"""

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

Call = tuple[str, int]  # an operator's family, and which call of it in a block's forward this is, from 0


@dataclass(frozen=True)
class Operator:
    """One costly call in a block's forward: a product, attention, a sum over ranks. `needs` are the numbers of the earlier operators whose
    outputs it is computed from, by way of cheap ones alone; `bytes` is what its outputs take, `seconds` what computing it again costs;
    `place` names the module that makes it.
    """

    call: Call
    bytes: int
    seconds: float
    needs: frozenset[int] = frozenset()
    place: str = ""


@dataclass(frozen=True)
class BlockTable:
    """One block's costly operators in forward order, for one micro-batch.

    `required` are the numbers of those that backward cannot do without: their outputs are kept or computed again. `input_bytes` is the
    block's input, which is always kept; `whole_bytes` all that backward reads, the input too; `cheap_s` the time of computing again all
    that is not costly.
    """

    operators: tuple[Operator, ...]
    required: frozenset[int]
    input_bytes: int
    whole_bytes: int
    cheap_s: float

    @property
    def backward_s(self) -> float:
        """Seconds that computing everything again takes."""
        return self.cheap_s + sum(self.operators[number].seconds for number in _closure(self.operators, self.required))


@dataclass(frozen=True, order=True)
class Choice:
    """What one block keeps, in bytes a micro-batch, and the seconds of computing the rest again. `kept` None: everything."""

    bytes: int
    seconds: float
    kept: tuple[Call, ...] | None


@dataclass(frozen=True)
class Mix:
    """What blocks of one kind keep, first to last."""

    choices: tuple[Choice, ...]

    @property
    def bytes(self) -> int:
        return sum(choice.bytes for choice in self.choices)

    @property
    def seconds(self) -> float:
        return sum(choice.seconds for choice in self.choices)


def choices(table: BlockTable) -> list[Choice]:
    """The Pareto frontier of what a block may keep: more bytes along the list, fewer seconds."""
    states: dict[frozenset[int], list[Choice]] = {table.required: [Choice(table.input_bytes, table.cheap_s, ())]}
    for number in reversed(range(len(table.operators))):
        operator, after = table.operators[number], defaultdict[frozenset[int], list[Choice]](list)
        for wanted, found in states.items():
            if number not in wanted:
                after[wanted] += found
                continue
            others = wanted - {number}
            after[others] += [_keeping(operator, choice) for choice in found]
            after[others | operator.needs] += [Choice(c.bytes, c.seconds + operator.seconds, c.kept) for c in found]
        states = {wanted: pareto(found) for wanted, found in after.items()}
    [found] = states.values()
    return pareto([*found, Choice(table.whole_bytes, 0.0, None)])


def _keeping(operator: Operator, choice: Choice) -> Choice:
    assert choice.kept is not None
    return Choice(choice.bytes + operator.bytes, choice.seconds, (operator.call, *choice.kept))


_Costed = TypeVar("_Costed", Choice, Mix)


def pareto(found: Iterable[_Costed]) -> list[_Costed]:
    """Those that no other one beats in bytes and seconds, by rising bytes."""
    best: list[_Costed] = []
    for one in sorted(found, key=lambda costed: (costed.bytes, costed.seconds)):
        if not best or one.seconds < best[-1].seconds:
            best.append(one)
    return best


def fill(kinds: Sequence[tuple[Sequence[Choice], int]], budget: int) -> list[Mix] | None:
    """For each kind of block (its choices, and how many blocks are of it) what they keep: the least seconds within `budget` bytes in all.

    None where even the least does not fit.
    """
    if not kinds:
        return []
    floors = [found[0].bytes * count for found, count in kinds]
    if sum(floors) > budget:
        return None
    first: list[list[Mix]] = [[]]
    for number, (found, count) in enumerate(kinds[:-1]):
        own = mixes(found, count, budget - sum(floors) + floors[number])
        first = _least([[*before, mix] for before in first for mix in own], budget - sum(floors[number + 1 :]))
    found, count = kinds[-1]
    filled = [[*before, _best_mix(found, count, budget - _bytes(before))] for before in first]
    return min(filled, key=lambda mixes: (_seconds(mixes), _bytes(mixes)))


def mixes(found: Sequence[Choice], count: int, budget: int) -> list[Mix]:
    """The Pareto frontier of `count` blocks, the first of which keep one choice and the last one that takes more."""
    made = [
        _mix(low, high, count, more)
        for number, low in enumerate(found)
        for high in found[number:]
        for more in range(count + 1)
        if low.bytes * (count - more) + high.bytes * more <= budget
    ]
    return pareto(made)


def _best_mix(found: Sequence[Choice], count: int, budget: int) -> Mix:
    """The quickest of `mixes` alone: of every pair, as many blocks keep more as there is room for."""
    best: tuple[float, int, Choice, Choice, int] | None = None
    for number, low in enumerate(found):
        room = budget - low.bytes * count
        if room < 0:
            break
        for high in found[number:]:
            more = count if high.bytes == low.bytes else min(count, room // (high.bytes - low.bytes))
            cost = low.seconds * (count - more) + high.seconds * more, low.bytes * (count - more) + high.bytes * more
            if best is None or cost < best[:2]:
                best = *cost, low, high, more
    assert best is not None, "the caller has left room for the least choice"
    return _mix(*best[2:4], count, best[4])


def _mix(low: Choice, high: Choice, count: int, more: int) -> Mix:
    # The last blocks go backward first, while the others' activations are all still there: they should have the least to make again.
    return Mix((low,) * (count - more) + (high,) * more)


def _bytes(mixes: Iterable[Mix]) -> int:
    return sum(mix.bytes for mix in mixes)


def _seconds(mixes: Iterable[Mix]) -> float:
    return sum(mix.seconds for mix in mixes)


def _least(found: Iterable[list[Mix]], budget: int) -> list[list[Mix]]:
    """As `pareto`, for what several kinds keep together; within `budget`."""
    best: list[list[Mix]] = []
    for one in sorted((mixes for mixes in found if _bytes(mixes) <= budget), key=lambda mixes: (_bytes(mixes), _seconds(mixes))):
        if not best or _seconds(one) < _seconds(best[-1]):
            best.append(one)
    return best


def _closure(operators: Sequence[Operator], required: frozenset[int]) -> frozenset[int]:
    """What has to be computed where nothing is kept."""
    wanted = required
    for number in reversed(range(len(operators))):
        if number in wanted:
            wanted |= operators[number].needs
    return wanted
