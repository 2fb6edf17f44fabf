"""The known pipeline schedules, by name: functions from ranks, micro-batches and stages a rank to lists of actions.

gpipe        all forwards, then all backwards                     Huang et al. 2019, arXiv:1811.06965
1f1b         backward as soon as possible, fewer in flight        Narayanan et al. 2020, arXiv:2006.09503
interleaved  1f1b over several stages a rank                      Narayanan et al. 2021, arXiv:2104.04473, section 2.2
bfs          several stages a rank, a stage at a time             Lamy-Poirier 2022, arXiv:2211.05953
zbh1         1f1b with weight gradients moved into the bubble     Qi et al. 2023, arXiv:2401.10241, section 2.3
zbv          two stages a rank, down and up again, no bubble      Qi et al. 2024, arXiv:2405.15362, section 4
dualpipev    the same placement, forward paired with backward     DeepSeek-AI 2024, arXiv:2412.19437, section 3.2.1, cut in half
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from paraxis.base.errors import ConfigError
from paraxis.base.schedule import Action, Kind, Schedule, check


@dataclass(frozen=True)
class Plan:
    """What a schedule is made for: `ranks`, `micro_batches`, and `stages_a_rank`."""

    ranks: int
    micro_batches: int
    stages_a_rank: int


def looped(plan: Plan) -> tuple[int, ...]:
    """Stage s on rank s modulo ranks: the model runs round and round."""
    return tuple(stage % plan.ranks for stage in range(plan.ranks * plan.stages_a_rank))


def folded(plan: Plan) -> tuple[int, ...]:
    """Two stages a rank, down the ranks and up again: the first rank holds the first stage and the last."""
    return (*range(plan.ranks), *reversed(range(plan.ranks)))


def gpipe(plan: Plan, rank: int) -> Iterator[Action]:
    return bfs(plan, rank)


def bfs(plan: Plan, rank: int) -> Iterator[Action]:
    """Each stage takes all micro-batches before the next one starts."""
    own = range(rank, plan.ranks * plan.stages_a_rank, plan.ranks)
    yield from (Action("F", stage, m) for stage in own for m in range(plan.micro_batches))
    yield from (Action("B", stage, m) for stage in reversed(own) for m in range(plan.micro_batches))


def one_forward_one_backward(plan: Plan, rank: int) -> Iterator[Action]:
    """Warms up with as many forwards as there are ranks behind, then alternates."""
    ahead = min(plan.ranks - rank - 1, plan.micro_batches)
    yield from (Action("F", rank, m) for m in range(ahead))
    for m in range(plan.micro_batches):
        if ahead + m < plan.micro_batches:
            yield Action("F", rank, ahead + m)
        yield Action("B", rank, m)


def interleaved(plan: Plan, rank: int) -> Iterator[Action]:
    """1F1B over all of a rank's stages: micro-batches go through in groups of `ranks`, each group through every stage in turn."""
    total = plan.micro_batches * plan.stages_a_rank

    def nth(kind: Kind, n: int) -> Action:
        group, within = divmod(n, plan.ranks * plan.stages_a_rank)
        turn, member = divmod(within, plan.ranks)
        chunk = turn if kind == "F" else plan.stages_a_rank - 1 - turn
        return Action(kind, chunk * plan.ranks + rank, group * plan.ranks + member)

    ahead = min(2 * (plan.ranks - rank - 1) + (plan.stages_a_rank - 1) * plan.ranks, total)
    yield from (nth("F", n) for n in range(ahead))
    for n in range(total):
        if ahead + n < total:
            yield nth("F", ahead + n)
        yield nth("B", n)


def zbh1(plan: Plan, rank: int) -> Iterator[Action]:
    """1F1B whose weight gradients lag by `rank` micro-batches, so that every rank keeps as many activations as the first does there."""
    for action in one_forward_one_backward(plan, rank):
        if action.kind == "F":
            yield action
            continue
        yield Action("I", rank, action.micro_batch)
        if action.micro_batch >= rank:
            yield Action("W", rank, action.micro_batch - rank)
    yield from (Action("W", rank, m) for m in range(max(0, plan.micro_batches - rank), plan.micro_batches))


class _Folded:
    """A rank's two stages (0 on the way down, 1 on the way up) with the next micro-batch of each kind of work."""

    def __init__(self, plan: Plan, rank: int) -> None:
        self._stages = (rank, 2 * plan.ranks - 1 - rank)
        self._next: dict[tuple[Kind, int], int] = {}
        self._late: list[Action] = []

    def done(self, kind: Kind, chunk: int) -> int:
        """How many micro-batches chunk `chunk` has taken through `kind`."""
        return self._next.get((kind, chunk), 0)

    def forward(self, chunk: int) -> Action:
        return self._take("F", chunk)

    def backward(self, chunk: int) -> Action:
        return self._take("B", chunk)

    def input_gradient(self, chunk: int) -> Action:
        """The backward's first half; its second is owed."""
        action = self._take("B", chunk)
        self._late.append(Action("W", action.stage, action.micro_batch))
        return Action("I", action.stage, action.micro_batch)

    def weight_gradient(self) -> Action:
        """The oldest second half that is owed."""
        return self._late.pop(0)

    def weight_gradients(self) -> Iterator[Action]:
        """All that are owed."""
        while self._late:
            yield self.weight_gradient()

    def _take(self, kind: Kind, chunk: int) -> Action:
        micro_batch = self._next.get((kind, chunk), 0)
        self._next[kind, chunk] = micro_batch + 1
        return Action(kind, self._stages[chunk], micro_batch)


def zbv(plan: Plan, rank: int) -> Iterator[Action]:
    """Zero bubble on a folded pipeline, at the activation memory of 1f1b. Input gradients travel before weight gradients are made."""
    own, behind = _Folded(plan, rank), plan.ranks - rank

    def backward(chunk: int) -> Iterator[Action]:
        yield own.input_gradient(chunk)
        yield own.weight_gradient()

    yield from (own.forward(0) for _ in range(2 * behind - 1))
    for _ in range(rank):
        yield own.forward(1)
        yield own.forward(0)
    for _ in range(behind):
        yield own.forward(1)
        yield from backward(1)
    while own.done("F", 1) < plan.micro_batches:
        if own.done("F", 0) < plan.micro_batches:
            yield own.forward(0)
        yield from backward(0)
        yield own.forward(1)
        yield from backward(1)
    for _ in range(rank):
        yield own.input_gradient(0)
        yield own.input_gradient(1)
    for _ in range(behind):
        yield from backward(0)
    yield from own.weight_gradients()


def dualpipev(plan: Plan, rank: int) -> Iterator[Action]:
    """Forward and backward of different chunks side by side; weight gradients are put off where others wait for input gradients."""
    own, behind = _Folded(plan, rank), plan.ranks - rank - 1
    yield from (own.forward(0) for _ in range(2 * behind))
    for _ in range(rank + 1):
        yield own.forward(0)
        yield own.forward(1)
    for _ in range(behind):
        yield own.input_gradient(1)
        yield own.weight_gradient()
        yield own.forward(1)
    for _ in range(plan.micro_batches - 2 * plan.ranks + rank + 1):
        yield own.forward(0)
        yield own.backward(1)
        yield own.forward(1)
        yield own.backward(0)
    for _ in range(behind):
        yield own.backward(1)
        yield own.forward(1)
        yield own.backward(0)
    for step in range(rank + 1):
        # From the middle on weight gradients are put off; the second chunk of the pair is first to do so on every other rank.
        late = step > (rank + 1) // 2 or (step == (rank + 1) // 2 and rank % 2 == 1)
        yield own.input_gradient(1) if late else own.backward(1)
        late = step >= (rank + 1) // 2
        yield own.input_gradient(0) if late else own.backward(0)
    for _ in range(behind):
        yield own.weight_gradient()
        yield own.input_gradient(0)
    yield from own.weight_gradients()


@dataclass(frozen=True)
class Known:
    """A schedule's maker, where it puts stages, how many a rank holds (None: as many as wished), and what it asks of micro-batches."""

    make: Callable[[Plan, int], Iterator[Action]]
    place: Callable[[Plan], tuple[int, ...]] = looped
    stages_a_rank: int | None = 1
    least: Callable[[int], int] = lambda ranks: 1
    in_groups: bool = False


SCHEDULES = {
    "gpipe": Known(gpipe),
    "1f1b": Known(one_forward_one_backward),
    "interleaved": Known(interleaved, stages_a_rank=None, in_groups=True),
    "bfs": Known(bfs, stages_a_rank=None),
    "zbh1": Known(zbh1),
    "zbv": Known(zbv, folded, stages_a_rank=2, least=lambda ranks: 2 * ranks - 1),
    "dualpipev": Known(dualpipev, folded, stages_a_rank=2, least=lambda ranks: 2 * ranks),
}


def build_schedule(name: str, plan: Plan) -> Schedule:
    """The schedule called `name`, proved legal. Raises ConfigError for what it is not made for, with the nearest numbers that it is."""
    if name not in SCHEDULES:
        raise ConfigError(f"parallel.schedule={name!r} is unknown; choose one of {', '.join(SCHEDULES)}, or the path of a CSV file")
    known = SCHEDULES[name]
    if known.stages_a_rank not in (None, plan.stages_a_rank):
        raise ConfigError(f"parallel.schedule={name} takes {known.stages_a_rank} stages a rank, not {plan.stages_a_rank}")
    if plan.micro_batches < known.least(plan.ranks):
        raise ConfigError(
            f"parallel.schedule={name} needs at least {known.least(plan.ranks)} micro-batches on {plan.ranks} ranks, "
            f"not {plan.micro_batches}; raise train.global_tokens (or parallel.microbatches), lower train.micro_batch, or take 1f1b"
        )
    if known.in_groups and plan.micro_batches % plan.ranks:
        below = plan.micro_batches // plan.ranks * plan.ranks
        near = f"{below} or {below + plan.ranks}" if below else f"{plan.ranks}"
        raise ConfigError(
            f"parallel.schedule={name} takes micro-batches in groups of pp={plan.ranks}, "
            f"and {plan.micro_batches} is no multiple; use {near}"
        )
    actions = tuple(tuple(known.make(plan, rank)) for rank in range(plan.ranks))
    schedule = Schedule(name, known.place(plan), plan.micro_batches, actions)
    check(schedule)
    return schedule
