"""A traced step in pieces: what each action, or micro-batch, does outside blocks and in each of them; and the whole step made of them."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from paraxis.base.schedule import Action
from paraxis.plan.record import CATEGORIES, Mark, Phase, Trace

Held = NDArray[np.int64]  # bytes by category, as CATEGORIES
Part = Action | int | str  # of a step: an action of a pipeline, a micro-batch by number, "head" and "tail"

# The block that stands for those that were not traced, counted from the first like it. Its backward asks, as theirs do, for what the
# second block before it needs, which only this one has.
TYPICAL = 2
FEW = 4  # blocks that are traced: the first two, the typical one, the last
IN_BLOCKS = ("forward", "backward", "weights")


@dataclass(frozen=True, eq=False)
class Piece:
    """A stretch of a trace within one phase. `most` is what it holds at its fullest, `change` at its end, both beyond its beginning."""

    part: Part
    kind: str
    stage: int
    block: int
    operators: range
    most: Held
    change: Held

    @property
    def in_block(self) -> bool:
        return self.kind in IN_BLOCKS and self.block >= 0


def cut(trace: Trace, typical: int, times: Sequence[int]) -> dict[Part, list[Piece]]:
    """The pieces of each part, in order. Where something outside blocks is done to what block `typical` of the rank's stage s has made, or
    needs, or owns, it is done `times[s]` as often: it stands for so many."""
    changes, weights = _changes(trace), weights_of(trace, typical, times)
    found: dict[Part, list[Piece]] = {}
    for part, phase, events, operators in _stretches(trace):
        if weights and not _in_block(phase):
            for event in events:
                if (weight := weights.get(trace.events[event][0], 1.0)) != 1:
                    changes[event] = np.rint(changes[event] * weight)
        held = changes[events.start : events.stop].cumsum(0)
        total = held.sum(1)
        most = held[total.argmax()] if len(held) and total.max() > 0 else np.zeros(len(CATEGORIES), np.int64)
        end = held[-1] if len(held) else np.zeros(len(CATEGORIES), np.int64)
        found.setdefault(part, []).append(Piece(part, phase.kind, phase.stage, phase.block, operators, most, end))
    return found


def _in_block(phase: Phase) -> bool:
    return phase.kind in IN_BLOCKS and phase.block >= 0


def _changes(trace: Trace) -> Held:
    columns = {category: number for number, category in enumerate(CATEGORIES)}
    changes = np.zeros((len(trace.events), len(CATEGORIES)), dtype=np.int64)
    for event, (number, change) in enumerate(trace.events):
        changes[event, columns[trace.category[number]]] = change
    return changes


def _stretches(trace: Trace) -> Iterator[tuple[Part, Phase, range, range]]:
    """Part, phase, events and operators between each two places where a phase or a part begins."""
    piped = any(mark.kind == "action" for mark in trace.marks)
    begins = ("tail", "action" if piped else "batch")
    places: list[tuple[int, int, Phase | Mark]] = [(phase.start, phase.operator, phase) for phase in trace.phases]
    places += [(mark.event, mark.operator, mark) for mark in trace.marks if mark.kind in begins]
    places.sort(key=lambda place: (*place[:2], isinstance(place[2], Phase)))  # a part's first phase may begin with it
    part: Part = "head"
    phase, batches = Phase("start", 0), 0
    end = len(trace.events), len(trace.operators), phase
    for (event, operator, what), (next_event, next_operator, _) in pairwise([*places, end]):
        if isinstance(what, Phase):
            phase = what
        else:
            if what.kind == "batch":
                part, batches = batches, batches + 1
            else:
                part = what.action or "tail"
            # Whatever ran last, what follows on it is not in a block.
            kind = "between" if what.action is not None and what.action.kind in "BI" else "start"
            phase = Phase(kind, event, phase.stage, -1, operator)
        if event < next_event or operator < next_operator:
            yield part, phase, range(event, next_event), range(operator, next_operator)


def weights_of(trace: Trace, typical: int, times: Sequence[int]) -> dict[int, float]:
    """By allocation: for how many it stands outside blocks, or how many times as large it is, as it holds a part of every block."""
    if all(number == 1 for number in times):
        return {}
    weights: dict[int, float] = {number: float(times[stage]) for number, (stage, block) in trace.owner.items() if block == typical}
    born: set[int] = set(trace.before)
    for part, phase, events, _ in _stretches(trace):
        if part == "tail":
            break
        inside = _in_block(phase) and phase.block == typical
        for number, change in trace.events[events.start : events.stop]:
            if inside and (change < 0 or number not in born):
                weights[number] = float(times[phase.stage])
            born.add(number)
    start = next(mark for mark in trace.marks if mark.kind == "tail").operator
    for operator in trace.operators[start:]:
        read = sum(bytes for _, bytes in operator.reads)
        if read and (weight := sum(bytes * weights.get(number, 1.0) for number, bytes in operator.reads) / read) != 1:
            weights |= {number: weight for number, _ in operator.writes if number not in born}
    return weights


def extended(pieces: Sequence[Piece], typical: int, extra: Sequence[int]) -> Iterator[tuple[Piece, int]]:
    """The pieces of a part of the whole model, each with its block's number in its stage there."""
    for number, piece in enumerate(pieces):
        more = extra[piece.stage] if piece.in_block else 0
        if not piece.in_block or piece.block < typical:
            yield piece, piece.block
        elif piece.block > typical:
            yield piece, piece.block + more
        elif number and _same_block(pieces[number - 1], piece):
            continue  # went with the one before
        else:
            run = [piece]
            for after in pieces[number + 1 :]:
                if not _same_block(piece, after):
                    break
                run.append(after)
            for copy in range(more + 1):
                place = copy if piece.kind == "forward" else more - copy
                yield from ((one, typical + place) for one in run)


def _same_block(one: Piece, other: Piece) -> bool:
    return (one.kind, one.stage, one.block) == (other.kind, other.stage, other.block)


def stored(trace: Trace, typical: int, extra: Sequence[int]) -> Held:
    """What the whole model's step finds."""
    columns = {category: number for number, category in enumerate(CATEGORIES)}
    found = np.zeros(len(CATEGORIES), np.int64)
    for number, held in trace.before.items():
        stage, block = trace.owner.get(number, (0, -1))
        found[columns[trace.category[number]]] += held * (1 + (extra[stage] if block == typical else 0))
    return found
