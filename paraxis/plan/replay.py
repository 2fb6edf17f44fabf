"""A candidate's step simulated from the times of its blocks, without a trace of it.

The items are those that a traced step has (`timing.py`): FSDP gathers one block ahead, a block's gradients are reduced while the next
one's are made, exchanges of tensor, context and expert parallelism are waited for where they are. Steps of many micro-batches are played
with few, and go on as these do.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache

from paraxis.base.schedule import Action, Schedule
from paraxis.base.schedules import Plan, build_schedule
from paraxis.plan.candidates import Candidate
from paraxis.plan.closed import BlockTime, Costs, StageTime
from paraxis.plan.simulate import Compute, Item, Played, Player, Start, Wait, finished, play_pipeline
from paraxis.plan.timing import joined


def simulate(costs: Costs, candidate: Candidate) -> Played:
    """The step; never less than `costs.bound_s`."""
    few, more = _numbers(candidate)
    played = _play(costs, candidate, more)
    if candidate.micro_batches > more:
        before = _play(costs, candidate, few)
        played = _gone_on(before, played, (candidate.micro_batches - more) / (more - few))
    return replace(played, step_s=max(played.step_s, costs.bound_s(candidate)))


def _numbers(candidate: Candidate) -> tuple[int, int]:
    """Two numbers of micro-batches that a schedule takes, from which on each further one takes as long as the last."""
    pp, number = candidate.degrees.pp, candidate.micro_batches
    few, more = (2, 3) if pp == 1 else (2 * pp, 3 * pp)
    return (few, more) if number > more else (number, number)


def _gone_on(few: Played, more: Played, times: float) -> Played:
    """`more`, and what it has more than `few` so many times again."""

    def value(name: str) -> float:
        return getattr(more, name) + times * (getattr(more, name) - getattr(few, name))

    step_s, busy_s, exposed_s = value("step_s"), value("busy_s"), value("exposed_s")
    # Idle time is what filling and draining take, whatever the number of micro-batches.
    idle_s = more.bubble * more.step_s / (1 + more.bubble)
    return Played(step_s=step_s, exposed_s=exposed_s, bubble=max(0.0, idle_s / max(step_s - idle_s, 1e-12)), busy_s=busy_s, spans=())


def _play(costs: Costs, candidate: Candidate, number: int) -> Played:
    times, d = costs.stages(candidate), candidate.degrees
    tail = [Compute(costs.optimizer_s(candidate))]
    link = costs.link(d.shards, d.tp)
    if d.pp == 1:
        player = Player(0, costs.device.overlap)
        steps = _Steps(costs, candidate, times[0], link)
        for batch in range(number):
            last = batch + 1 == number
            player.play([*steps.forward(), *steps.backward(reduces=steps.each or last)], f"micro-batch {batch}")
        return finished([player], [[Wait("reduce_scatter", everything=True), *tail]])
    schedule = _schedule(candidate.schedule, d.pp, number, candidate.chunks)
    players = play_pipeline(
        schedule,
        _Actions(costs, candidate, times, link, schedule),
        message_s=lambda source, target: costs.message_s(candidate),
        link=lambda source, target: costs.link(2, costs.ranks // d.pp),
        overlap=[costs.device.overlap] * d.pp,
    )
    return finished(players, [[Wait("reduce_scatter", everything=True), *tail]] * d.pp)


@lru_cache(maxsize=64)
def _schedule(name: str, ranks: int, micro_batches: int, chunks: int) -> Schedule:
    return build_schedule(name, Plan(ranks, micro_batches, chunks))


class _Actions:
    """What each action of a pipeline is made of: parameters are gathered with a stage's first forward or with each pass, gradients
    reduced with its last backward or with each."""

    def __init__(self, costs: Costs, candidate: Candidate, times: Sequence[StageTime], link: str, schedule: Schedule) -> None:
        self._steps = [_Steps(costs, candidate, time, link) for time in times]
        self._made: dict[tuple[str, int, bool], Sequence[Item]] = {}
        last = {a.stage: a for own in schedule.actions for a in own if a.kind in "BW"}
        first = {a.stage: a for own in schedule.actions for a in reversed(own) if a.kind == "F"}
        self._edges = {*last.values(), *first.values()}

    def __call__(self, action: Action) -> Sequence[Item]:
        edge = action in self._edges
        key = action.kind, action.stage, edge
        if key not in self._made:
            steps = self._steps[action.stage]
            self._made[key] = {
                "F": lambda: steps.forward(gathers=steps.frees or edge),
                "B": lambda: steps.backward(reduces=steps.each or edge),
                "I": lambda: steps.backward(reduces=False, weights=False),
                "W": lambda: steps.weights(reduces=edge),
            }[action.kind]()
        return self._made[key]


class _Steps:
    """The passes of one stage as items."""

    def __init__(self, costs: Costs, candidate: Candidate, time: StageTime, link: str) -> None:
        d = candidate.degrees
        self.time, self._link = time, link
        self._inner = costs.link(d.tp, 1) if d.tp > 1 else link
        self.frees = costs.frees(candidate)
        self.each = costs.reduces_each(candidate)

    def _blocks(self) -> list[BlockTime]:
        return [one for one, times in self.time.parts for _ in range(times)]

    def forward(self, gathers: bool = True) -> list[Item]:
        found: list[Item] = []
        for one in self._blocks():
            if gathers and one.gather_s:
                found += [Start("all_gather", one.gather_s, self._link, early=True), Wait("all_gather")]
            found += self._work(one.forward_s, one.forward_exchange_s)
        return joined(found)

    def backward(self, *, reduces: bool, weights: bool = True) -> list[Item]:
        found: list[Item] = []
        blocks = self._blocks()[::-1]
        gathers = self.frees and any(one.gather_s for one in blocks)
        if gathers:
            found.append(Start("all_gather", blocks[0].gather_s, self._link))
        for number, one in enumerate(blocks):
            if gathers:
                found.append(Wait("all_gather"))
                if number + 1 < len(blocks):
                    found.append(Start("all_gather", blocks[number + 1].gather_s, self._link))
            found += self._work(one.input_s + (one.weights_s if weights else 0.0), one.input_exchange_s)
            if reduces and one.reduce_s:
                found += [Wait("reduce_scatter"), Start("reduce_scatter", one.reduce_s, self._link)]
        return joined(found)

    def weights(self, *, reduces: bool) -> list[Item]:
        found: list[Item] = []
        for one in self._blocks()[::-1]:
            found.append(Compute(one.weights_s))
            if reduces and one.reduce_s:
                found += [Wait("reduce_scatter"), Start("reduce_scatter", one.reduce_s, self._link)]
        return joined(found)

    def _work(self, seconds: float, exchanged_s: float) -> list[Item]:
        """Computing, and an exchange in it that is waited for."""
        return [Compute(seconds), *([Start("exchange", exchanged_s, self._inner), Wait("exchange")] if exchanged_s else [])]
