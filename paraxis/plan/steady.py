"""Which micro-batches of a pipeline stand for all: what a rank does in an action depends on the circumstances, not on the number.

A rank's list without some of its micro-batches is still in a legal order. As long as every circumstance of the whole list occurs in it,
the whole step is put together from its actions; messages that are held a little earlier or later are counted apart.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from paraxis.base.schedule import Action, Schedule
from paraxis.parallel.pipeline import sent_to

MOST_ENDS = 4  # micro-batches from either end, and in the middle, that are tried


@dataclass(frozen=True)
class Circumstance:
    """`key` has what a trace shows: the kind of an action, its stage (counted from the rank's first), whether it is the first of its kind
    there, and whether the last of all. `room` is for how many messages it makes room; `lets_go` says that it frees the gradient that was
    sent before; `at_once` that a backward follows the sending of the very output that it is of."""

    key: tuple[str, int, int, bool]
    room: int = 0
    lets_go: bool = False
    at_once: bool = False


def circumstances(schedule: Schedule, rank: int) -> dict[Action, Circumstance]:
    """What makes a difference to each action of a rank."""
    own = schedule.actions[rank]
    stages = sorted({action.stage for action in own})
    made = {(a.stage, a.micro_batch): a for actions in schedule.actions for a in actions if a.kind in "BI"}
    arriving = {
        source: [a for a in actions if (to := sent_to(a, schedule)) is not None and schedule.rank_of[to] == rank]
        for source, actions in enumerate(schedule.actions)
        if source != rank
    }
    place = {action: n for actions in arriving.values() for n, action in enumerate(actions)}
    posted: Counter[int] = Counter()  # of each rank's messages
    last_of = {action.stage: n for n, action in enumerate(own)}
    turns: Counter[tuple[str, int]] = Counter()
    sent: Action | None = None
    done: set[Action] = set()
    found: dict[Action, Circumstance] = {}
    for number, action in enumerate(own):
        key = action.kind, stages.index(action.stage), min(turns[action.kind, action.stage], 1), last_of[action.stage] == number
        turns[action.kind, action.stage] += 1
        room = 0
        if (taken := _taken(action, schedule, made)) is not None and (source := schedule.rank_of[taken.stage]) != rank:
            before, posted[source] = posted[source], max(posted[source], min(place[taken] + 2, len(arriving[source])))
            room = posted[source] - before
        sends = (to := sent_to(action, schedule)) is not None and schedule.rank_of[to] != rank
        lets_go = sends and sent is not None and (sent.kind in "BI" or made[sent.stage, sent.micro_batch] in done)
        found[action] = Circumstance(key, room, lets_go, sent == Action("F", action.stage, action.micro_batch))
        sent = action if sends else sent
        done.add(action)
    return found


def _taken(action: Action, schedule: Schedule, made: dict[tuple[int, int], Action]) -> Action | None:
    if action.kind == "F":
        return Action("F", action.stage - 1, action.micro_batch) if action.stage else None
    if action.kind == "W" or action.stage == schedule.stages - 1:
        return None
    return made[action.stage + 1, action.micro_batch]


def of_micro_batches(schedule: Schedule, kept: Sequence[int]) -> Schedule:
    """The same schedule for these micro-batches alone, numbered anew."""
    number = {micro_batch: n for n, micro_batch in enumerate(kept)}
    actions = tuple(
        tuple(Action(a.kind, a.stage, number[a.micro_batch]) for a in own if a.micro_batch in number) for own in schedule.actions
    )
    return Schedule(schedule.name, schedule.rank_of, len(kept), actions)


def shortened(schedule: Schedule, ranks: Sequence[int]) -> Schedule:
    """The fewest micro-batches in which these ranks meet every circumstance that they meet in the whole schedule; all where few do not."""
    wanted = {rank: _met(schedule, rank) for rank in ranks}
    for kept in _candidates(schedule.micro_batches):
        short = of_micro_batches(schedule, kept)
        if all(wanted[rank] <= _met(short, rank) for rank in ranks):
            return short
    return schedule


def _met(schedule: Schedule, rank: int) -> set[tuple[tuple[str, int, int, bool], bool]]:
    return {(found.key, found.at_once) for found in circumstances(schedule, rank).values()}


def _candidates(number: int) -> Iterator[list[int]]:
    tried: set[tuple[int, ...]] = set()
    choices = sorted(product(range(1, MOST_ENDS + 1), (0, 2, 3), range(1, MOST_ENDS + 1)), key=sum)
    for first, between, last in choices:
        middle = range(number // 2, number // 2 + between)
        kept = sorted({*range(first), *middle, *range(number - last, number)} & set(range(number)))
        if len(kept) < number and tuple(kept) not in tried:
            tried.add(tuple(kept))
            yield kept


@dataclass(frozen=True)
class StandIn:
    """The action of a short schedule that one of the whole schedule is like; of messages, how many more it makes room for, and whether it
    lets one more go (or, -1, one fewer)."""

    action: Action
    room: int
    lets_go: int


def stand_ins(whole: Schedule, rank: int, short: Schedule, like: int) -> dict[Action, StandIn]:
    """For each action of `rank` one of rank `like` of the `short` schedule, which holds stages like `rank`'s."""
    if whole is short and rank == like:
        return {action: StandIn(action, 0, 0) for action in whole.actions[rank]}
    known: dict[tuple[tuple[str, int, int, bool], bool], tuple[Action, Circumstance]] = {}
    for action, found in circumstances(short, like).items():
        known.setdefault((found.key, found.at_once), (action, found))
    for (key, at_once), one in list(known.items()):
        known.setdefault((key, not at_once), one)
    chosen: dict[Action, StandIn] = {}
    for action, found in circumstances(whole, rank).items():
        other, there = known[found.key, found.at_once]
        chosen[action] = StandIn(other, found.room - there.room, int(found.lets_go) - int(there.lets_go))
    return chosen
