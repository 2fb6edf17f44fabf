"""What the pictures of a predicted step show, however they are drawn: what each rank does when, and what the fullest one holds.

A rank's row has a band of work that fills the step (computing by kind, waiting for messages, idle) and tracks of messages. Text, SVG and
pages take their words and colours from here, so that they say the same.
"""

import re
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil, floor, log10

from paraxis.plan.predict import Prediction
from paraxis.plan.simulate import Span

GIB = 2**30


@dataclass(frozen=True)
class Look:
    """How something is shown: its words in a legend, the letter that stands for it in text, its colour, and whether words on that colour
    are dark. `paler` is the colour for every other stage of a rank."""

    words: str
    letter: str
    colour: str
    dark: bool = False
    paler: str = ""


# Colours that the colour-blind tell apart (Okabe and Ito), those of the schedules' pictures in the documents.
WORK = {
    "F": Look("forward", "F", "#0072b2", paler="#8cc4e8"),
    "B": Look("backward", "B", "#e69f00", dark=True, paler="#f5d38a"),
    "I": Look("backward: gradient of inputs", "I", "#d55e00", paler="#f2b48a"),
    "W": Look("backward: gradients of weights", "W", "#009e73", paler="#8fd6bf"),
    "M": Look("forward and backward", "M", "#0072b2"),
    "optimizer": Look("optimizer", "O", "#6d4c41"),
    "other": Look("other work", "S", "#6f6f6f"),
    "wait": Look("waits for messages", "~", "#c51b7d"),
    "idle": Look("idle", "·", "#e6e6e6", dark=True),
}
MESSAGES: dict[str, Look] = {
    "all_gather": Look("all-gather", "g", "#56b4e9"),
    "reduce_scatter": Look("reduce-scatter", "r", "#8c6bb1"),
    "exchange": Look("other exchanges", "x", "#b8860b"),
    "p2p": Look("between stages", "p", "#7f8c8d"),
}
HELD = {
    "parameters": Look("parameters", "P", "#0072b2"),
    "optimizer": Look("optimizer", "O", "#009e73"),
    "gradients": Look("gradients", "G", "#e69f00", dark=True),
    "activations": Look("activations", "A", "#56b4e9", dark=True),
    "communication": Look("communication", "C", "#cc79a7", dark=True),
    "other": Look("other", "+", "#8f8f8f"),
}


@dataclass(frozen=True)
class Piece:
    """A stretch of time of one kind, a key of `WORK` or `MESSAGES`; `label` is the number of a micro-batch, where it is of one.

    `paler`: of the rank's second stage, its fourth, and so on.
    """

    kind: str
    start_s: float
    end_s: float
    label: str = ""
    paler: bool = False


@dataclass(frozen=True)
class Row:
    """A rank of the pipeline. `actions` are what it computes, waiting included; `work` fills the step without a gap or an overlap;
    in a track of `messages`, by lane, none overlap either."""

    rank: int
    actions: Sequence[Piece]
    work: Sequence[Piece]
    messages: Sequence[tuple[str, Sequence[Piece]]]

    @cached_property
    def seconds(self) -> Mapping[str, float]:
        """What it spends on each kind of work, and on messages of each lane."""
        spent: dict[str, float] = {}
        for piece in (*self.work, *(piece for _, track in self.messages for piece in track)):
            spent[piece.kind] = spent.get(piece.kind, 0.0) + piece.end_s - piece.start_s
        return spent


def span_s(prediction: Prediction) -> float:
    """How many seconds a picture covers: the step, and messages that outlast it."""
    return max([prediction.step_s, *(span.end_s for span in prediction.timeline)])


def rows(prediction: Prediction) -> list[Row]:
    """The timeline by rank, in order."""
    of_rank: dict[int, list[Span]] = {}
    for span in prediction.timeline:
        of_rank.setdefault(span.rank, []).append(span)
    end_s = span_s(prediction)
    return [_row(rank, of_rank[rank], end_s) for rank in sorted(of_rank)]


def _row(rank: int, spans: Sequence[Span], end_s: float) -> Row:
    spans = sorted(spans, key=lambda span: span.start_s)
    stages = sorted({int(match[1]) for span in spans if span.lane == "compute" and (match := _ACTION.fullmatch(span.name))})
    actions = [_piece(span, stages) for span in spans if span.lane == "compute"]
    waits = [Piece("wait", span.start_s, span.end_s) for span in spans if span.lane == "wait"]
    messages = list[tuple[str, Sequence[Piece]]]()
    for lane in MESSAGES:
        of_lane = (Piece(lane, span.start_s, span.end_s) for span in spans if span.lane == lane)
        messages.extend((lane, track) for track in _tracks(of_lane))
    return Row(rank, actions, list(_filled(sorted([*_without(actions, waits), *waits], key=lambda piece: piece.start_s), end_s)), messages)


_ACTION = re.compile(r"(\d+)([FBIW])(\d+)")


def _piece(span: Span, stages: Sequence[int]) -> Piece:
    if match := _ACTION.fullmatch(span.name):
        return Piece(match[2], span.start_s, span.end_s, match[3], stages.index(int(match[1])) % 2 == 1)
    phase, _, number = span.name.rpartition(" ")
    if phase == "micro-batch":
        return Piece("M", span.start_s, span.end_s, number)
    return Piece("optimizer" if span.name == "optimizer" else "other", span.start_s, span.end_s)


def _without(pieces: Iterable[Piece], holes: Sequence[Piece]) -> Iterator[Piece]:
    """What is left of `pieces` outside `holes`; both in order and each without overlaps."""
    starts = [hole.start_s for hole in holes]
    for piece in pieces:
        at = piece.start_s
        number = bisect_left(starts, at)
        while number < len(holes) and holes[number].end_s <= piece.end_s:
            if starts[number] > at:
                yield replace(piece, start_s=at, end_s=starts[number])
            at = holes[number].end_s
            number += 1
        if piece.end_s > at:
            yield replace(piece, start_s=at)


def _filled(pieces: Iterable[Piece], end_s: float) -> Iterator[Piece]:
    """`pieces`, idle between them. Times that were added up in another order may cross by a rounding."""
    at = 0.0
    for piece in pieces:
        if piece.start_s > at:
            yield Piece("idle", at, piece.start_s)
        if piece.end_s > at:
            yield replace(piece, start_s=max(at, piece.start_s))
            at = piece.end_s
    if end_s > at:
        yield Piece("idle", at, end_s)


def _tracks(pieces: Iterable[Piece]) -> list[list[Piece]]:
    """As few tracks as show messages that travel at once, over links of their own, beside each other."""
    tracks: list[list[Piece]] = []
    for piece in pieces:
        free = next((track for track in tracks if track[-1].end_s <= piece.start_s), None)
        if free is None:
            tracks.append([piece])
        else:
            free.append(piece)
    return tracks


def columns(memory: Sequence[tuple[float, Mapping[str, int]]], end_s: float, number: int) -> list[Mapping[str, int]]:
    """What is held in each of `number` equal stretches of `end_s` seconds: that of the moment with the most, so that no peak is lost."""
    found: list[Mapping[str, int]] = []
    at, now = 0, memory[0][1]
    for column in range(number):
        most = now
        while at < len(memory) and (column == number - 1 or memory[at][0] < end_s * (column + 1) / number):
            now = memory[at][1]
            most = max(most, now, key=lambda held: sum(held.values()))
            at += 1
        found.append(most)
    return found


def stack(held: Mapping[str, int]) -> list[tuple[str, int]]:
    """Categories in the order in which they are piled up, each with the bytes up to its top."""
    total, piled = 0, []
    for category in HELD:
        total += held.get(category, 0)
        piled.append((category, total))
    return piled


def summary(prediction: Prediction) -> str:
    """The step in one sentence."""
    said = f"A step of {seconds(prediction.step_s)}: {seconds(prediction.exposed_s)} of it the rank that waits longest waits for messages"
    return f"{said}; the pipeline idles for {percent(prediction.bubble)} of the work." if len(_ranks(prediction)) > 1 else f"{said}."


def memory_summary(prediction: Prediction) -> str:
    """The fullest rank in one sentence."""
    said = f"Rank {prediction.rank} is the fullest: {size(prediction.allocated)} at its peak, {size(prediction.reserved)} reserved, of "
    lacking = prediction.reserved - prediction.usable
    slowly = " to run without giving memory back in every step" if prediction.runs else ""
    return f"{said}{size(prediction.usable)} usable" + (f"; {size(lacking)} too much{slowly}." if lacking > 0 else ".")


def _ranks(prediction: Prediction) -> set[int]:
    return {span.rank for span in prediction.timeline}


def row_name(rank: int, ranks: int) -> str:
    """A row's name: its place in the pipeline, or that every rank does the same."""
    return f"pp {rank}" if ranks > 1 else "rank"


def ticks(end: float, about: int) -> list[float]:
    """About so many round numbers from 0 to `end`."""
    if end <= 0:
        return [0.0]
    rough = end / about
    unit = 10.0 ** floor(log10(rough))
    step = next(times * unit for times in (1, 2, 5, 10) if times * unit >= rough * 0.999)
    return [number * step for number in range(ceil(end / step) + 1) if number * step <= end * 1.0001]


def seconds(value: float) -> str:
    unit, times = next(((unit, times) for unit, times in (("s", 1.0), ("ms", 1e3)) if value * times >= 1), ("µs", 1e6))
    return f"{_short(value * times)} {unit}" if value else "0 s"


def size(held: float) -> str:
    unit, times = next(((unit, times) for unit, times in (("GiB", 2**30), ("MiB", 2**20)) if held >= times), ("KiB", 2**10))
    return f"{_short(held / times)} {unit}"


def percent(share: float) -> str:
    return f"{share:.1%}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.4g}"
