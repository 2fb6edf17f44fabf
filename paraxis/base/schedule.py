"""Pipeline schedules as lists of actions: made here, executed by training, replayed by the planner.

A model is cut into stages; each rank holds one or several. For each micro-batch a stage runs

    F   forward
    B   backward, or split in two: I (the gradient of the stage's input) and W (the gradients of its weights)

and a rank runs its list in order, waiting for what an action needs. `check` proves lists legal before anything runs.
The lists themselves are made in `schedules.py`.
"""

import csv
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Literal, get_args

from paraxis.base.errors import ConfigError

Kind = Literal["F", "B", "I", "W"]
KINDS: tuple[Kind, ...] = get_args(Kind)


@dataclass(frozen=True, order=True)
class Action:
    """One stage's work on one micro-batch; written `2F0` for stage 2 and micro-batch 0."""

    kind: Kind
    stage: int
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


@dataclass(frozen=True)
class Schedule:
    """Every rank's actions in order. `rank_of[stage]` is who holds a stage."""

    name: str
    rank_of: tuple[int, ...]
    micro_batches: int
    actions: tuple[tuple[Action, ...], ...]

    @property
    def ranks(self) -> int:
        return len(self.actions)

    @property
    def stages(self) -> int:
        return len(self.rank_of)

    @property
    def splits_backward(self) -> bool:
        """Whether some weight gradients are an action of their own."""
        return any(action.kind == "W" for action in chain.from_iterable(self.actions))


def needs(action: Action, stages: int) -> tuple[Action, ...]:
    """The actions of which one must have run before `action` can, wherever it ran; none for the first stage's forward."""
    stage, micro_batch = action.stage, action.micro_batch
    if action.kind == "F":
        return (Action("F", stage - 1, micro_batch),) if stage else ()
    if action.kind == "W":
        return (Action("I", stage, micro_batch),)
    if stage == stages - 1:
        return (Action("F", stage, micro_batch),)
    return (Action("B", stage + 1, micro_batch), Action("I", stage + 1, micro_batch))


def check(schedule: Schedule) -> None:
    """Proves that every micro-batch passes every stage forward and backward once, on the right rank, and that nothing waits for ever.

    Raises ConfigError naming the first action that is missing, repeated, misplaced or stuck.
    """
    found = Counter(chain.from_iterable(schedule.actions))
    for stage in range(schedule.stages):
        for micro_batch in range(schedule.micro_batches):
            counts = {kind: found.pop(Action(kind, stage, micro_batch), 0) for kind in KINDS}
            if tuple(counts.values()) not in ((1, 1, 0, 0), (1, 0, 1, 1)):
                had = ", ".join(f"{count} {kind}" for kind, count in counts.items())
                raise ConfigError(
                    f"schedule {schedule.name}: stage {stage} has {had} of micro-batch {micro_batch}; "
                    f"it needs one F, and one B or one I and one W"
                )
    if found:
        raise ConfigError(
            f"schedule {schedule.name}: {min(found)} is of no stage or micro-batch of it "
            f"({schedule.stages} stages, {schedule.micro_batches} micro-batches)"
        )
    for rank, actions in enumerate(schedule.actions):
        for action in actions:
            if schedule.rank_of[action.stage] != rank:
                raise ConfigError(
                    f"schedule {schedule.name}: {action} is in rank {rank}'s list, but rank {schedule.rank_of[action.stage]} holds it"
                )
    finish_times(schedule, dict.fromkeys(KINDS, 1.0))


def finish_times(schedule: Schedule, cost: Mapping[Kind, float]) -> dict[Action, float]:
    """When each action ends if each takes `cost[kind]` and what it hands on arrives at once. Raises ConfigError for a wait without end."""
    ended: dict[Action, float] = {}
    free = [0.0] * schedule.ranks
    left = [list(reversed(actions)) for actions in schedule.actions]
    moved = True
    while moved:
        moved = False
        for rank, waiting in enumerate(left):
            while waiting and (ready := _ready(waiting[-1], schedule, ended)) is not None:
                action = waiting.pop()
                ended[action] = free[rank] = max(ready, free[rank]) + cost[action.kind]
                moved = True
    if stuck := {rank: waiting[-1] for rank, waiting in enumerate(left) if waiting}:
        waits = ", ".join(f"rank {rank} at {action}" for rank, action in stuck.items())
        raise ConfigError(f"schedule {schedule.name} never ends: {waits} wait for each other")
    return ended


def _ready(action: Action, schedule: Schedule, ended: Mapping[Action, float]) -> float | None:
    """When what `action` needs has ended, or None while it has not."""
    times = [[ended[needed] for needed in one if needed in ended] for one in _inputs(action, schedule.stages)]
    return max((min(time) for time in times), default=0.0) if all(times) else None


def _inputs(action: Action, stages: int) -> list[tuple[Action, ...]]:
    own = Action("F", action.stage, action.micro_batch)
    required = [needs(action, stages)] if needs(action, stages) else []
    return required if action.kind in "FW" else [*required, (own,)]


def idle_share(schedule: Schedule, cost: Mapping[Kind, float]) -> float:
    """The bubble: idle time of all ranks in a step, as a fraction of their working time."""
    span = max(finish_times(schedule, cost).values())
    busy = sum(cost[action.kind] for action in chain.from_iterable(schedule.actions))
    return span * schedule.ranks / busy - 1


def most_in_flight(schedule: Schedule) -> list[int]:
    """For each rank, the most micro-batches times stages whose forward has run and whose weight gradients have not: kept activations."""
    most: list[int] = []
    for actions in schedule.actions:
        kept = peak = 0
        for action in actions:
            kept += {"F": 1, "B": -1, "I": 0, "W": -1}[action.kind]
            peak = max(peak, kept)
        most.append(peak)
    return most


def write_csv(schedule: Schedule, path: Path) -> None:
    """A line for each rank, its actions separated by commas."""
    with open(path, "w", newline="") as file:
        csv.writer(file).writerows([map(str, actions) for actions in schedule.actions])


def read_csv(path: Path) -> Schedule:
    """The schedule in a file as `write_csv` leaves it; blank cells are skipped. Raises ConfigError, also for a list that is not legal."""
    try:
        with open(path, newline="") as file:
            rows = [[cell.strip() for cell in row if cell.strip()] for row in csv.reader(file)]
    except OSError as error:
        raise ConfigError(f"parallel.schedule={path}: the file cannot be read: {error.strerror}") from error
    actions = tuple(tuple(_parsed(cell, path, line) for cell in row) for line, row in enumerate(rows, 1))
    schedule = Schedule(
        str(path), _holders(actions, path), 1 + max((a.micro_batch for a in chain.from_iterable(actions)), default=-1), actions
    )
    check(schedule)
    return schedule


def _parsed(cell: str, path: Path, line: int) -> Action:
    kind: Kind | None = next((kind for kind in KINDS if kind in cell), None)
    stage, _, micro_batch = cell.partition(kind or " ")
    if kind is None or not stage.isdecimal() or not micro_batch.isdecimal():
        raise ConfigError(
            f"{path}, line {line}: {cell!r} is no action; write stage, one of {', '.join(KINDS)}, and micro-batch, such as 2F0"
        )
    return Action(kind, int(stage), int(micro_batch))


def _holders(actions: Iterable[Iterable[Action]], path: Path) -> tuple[int, ...]:
    held = {action.stage: rank for rank, own in enumerate(actions) for action in own}
    if sorted(held) != list(range(len(held))):
        raise ConfigError(f"{path}: the stages are {sorted(held)}; number them from 0 without gaps")
    return tuple(held[stage] for stage in range(len(held)))
