"""A step played through event by event: every pipeline rank computes, gathers, reduces and sends, each on a resource of its own.

A rank's work is a list of items in the order in which the host asks for them. Computing goes in that order; messages travel on streams
beside it, and computing waits only where the list says so. Nothing begins before the host has asked for it. Messages of a rank that use
one link share it: they go one after another, as they were asked for, which is as long as side by side. The order of a pipeline is the
very list of actions that training executes.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from paraxis.base.schedule import Action, Schedule, needs

Lane = Literal["compute", "all_gather", "reduce_scatter", "exchange", "p2p", "wait"]


@dataclass(frozen=True)
class Compute:
    """Kernels that take so long, one after another. The host asks for them in `host_s`; that the device never waits for it in between, it
    has to begin `lag_s` after the host at the earliest."""

    seconds: float
    host_s: float = 0.0
    lag_s: float = 0.0

    def __add__(self, other: "Compute") -> "Compute":
        lag_s = max(self.lag_s, self.host_s + other.lag_s - self.seconds)
        return Compute(self.seconds + other.seconds, self.host_s + other.host_s, lag_s)


@dataclass(frozen=True)
class Start:
    """A collective begins to travel over `link`, on the stream `lane`. `early`: the host asked for it while the device was one gathering
    behind, as it does in forward. `number` says which one a `Wait` means; without, it is the oldest. The host takes `host_s` to ask."""

    lane: Lane
    seconds: float
    link: str
    early: bool = False
    number: int = -1
    host_s: float = 0.0


@dataclass(frozen=True)
class Wait:
    """Computing goes on when the oldest collective on `lane` has ended, or the one of that number, or (`everything`) the last."""

    lane: Lane
    number: int = -1
    everything: bool = False


@dataclass(frozen=True)
class Read:
    """The host waits for a value that the device computes."""

    host_s: float = 0.0


Item = Compute | Start | Wait | Read


@dataclass(frozen=True)
class Span:
    """What a rank of the pipeline does from `start_s` to `end_s`; `name` is an action such as 2F0, or a phase.

    On the lane `wait` it waits for messages with nothing to compute, for those of the lane `name`: within an action's time on `compute`
    for collectives, before it for what another rank sends (p2p).
    """

    rank: int
    lane: Lane
    name: str
    start_s: float
    end_s: float


@dataclass
class Player:
    """One rank while it is played: when its device, its streams and its links are free again.

    `overlap` is how many times as long computing takes while messages travel, `posted` beside receives that wait in a pipeline. The host,
    whose clock is `host_s`, asks for all that the device does and runs ahead of it; `starved_s` is how long the device had nothing that it
    was asked for.
    """

    rank: int = 0
    overlap: float = 1.0
    posted: float = 1.0
    now_s: float = 0.0
    host_s: float = 0.0
    starved_s: float = 0.0
    busy_s: float = 0.0
    exposed_s: float = 0.0
    spans: list[Span] = field(default_factory=list)
    _free: dict[str, float] = field(default_factory=dict)  # streams and links
    _under_way: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    _gathered: list[float] = field(default_factory=lambda: [0.0, 0.0])
    _travels: list[tuple[float, float]] = field(default_factory=list)

    def play(self, items: Sequence[Item], name: str) -> None:
        """Works through a list of items."""
        started_s = self.now_s
        for item in items:
            if isinstance(item, Compute):
                self._compute(item)
            elif isinstance(item, Start):
                self._start(item, name)
            elif isinstance(item, Read):
                self.host_s = max(self.host_s, self.now_s) + item.host_s
            else:
                self._wait(item)
        if self.now_s > started_s:
            self.spans.append(Span(self.rank, "compute", name, started_s, self.now_s))

    def send(self, name: str, seconds: float, link: str) -> float:
        """A message leaves when the link is free; returns when it arrives."""
        if not seconds:
            return self.now_s
        return self._travel("p2p", max(self.now_s, self._free.get(link, 0.0)), seconds, link, name)

    def await_message(self, ready_s: float, travelled_s: float) -> None:
        """Waits for what another rank sends: the time that it travelled is exposed, the rest is the pipeline's."""
        idle_s = max(0.0, ready_s - self.now_s)
        self.now_s += idle_s
        self._exposed("p2p", self.now_s - min(idle_s, travelled_s))

    def _exposed(self, lane: Lane, start_s: float) -> None:
        """It has waited since `start_s` for messages of `lane`."""
        if self.now_s > start_s:
            self.exposed_s += self.now_s - start_s
            self.spans.append(Span(self.rank, "wait", lane, start_s, self.now_s))

    def _compute(self, item: Compute) -> None:
        asked_s = self.host_s + item.lag_s
        self.host_s += item.host_s
        if item.seconds and asked_s > self.now_s:
            self.starved_s += asked_s - self.now_s
            self.now_s = asked_s
        end_s = self.now_s + item.seconds * self.posted
        if self.overlap > 1:
            self._travels = [(a, b) for a, b in self._travels if b > self.now_s]
            end_s += (self.overlap - 1) * sum(max(0.0, min(b, end_s) - max(a, self.now_s)) for a, b in _union(self._travels))
        self.busy_s += end_s - self.now_s
        self.now_s = end_s

    def _start(self, item: Start, name: str) -> None:
        # Forward gathers ahead of the device: as soon as the gathering before the last one was taken.
        self.host_s += item.host_s
        asked_s = max(self.host_s, self._gathered[-2] if item.early else self.now_s)
        start_s = max(asked_s, self._free.get(item.lane, 0.0), self._free.get(item.link, 0.0))
        end_s = self._travel(item.lane, start_s, item.seconds, item.link, name)
        self._free[item.lane] = end_s
        self._under_way.setdefault(item.lane, []).append((item.number, end_s))

    def _travel(self, lane: Lane, start_s: float, seconds: float, link: str, name: str) -> float:
        end_s = self._free[link] = start_s + seconds
        if seconds:
            self.spans.append(Span(self.rank, lane, name, start_s, end_s))
            self._travels.append((start_s, end_s))
        return end_s

    def _wait(self, item: Wait) -> None:
        waiting = self._under_way.get(item.lane, [])
        if item.everything:
            taken = waiting[:]
        elif item.number >= 0:
            taken = [one for one in waiting if one[0] == item.number][-1:]
        else:
            taken = waiting[:1]
        for one in taken:
            waiting.remove(one)
        end_s = max((end_s for _, end_s in taken), default=0.0)
        start_s, self.now_s = self.now_s, max(self.now_s, end_s)
        self._exposed(item.lane, start_s)
        if item.lane == "all_gather":
            self._gathered = [self._gathered[-1], self.now_s]


def _union(intervals: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The same stretches of time without what overlaps."""
    joined: list[tuple[float, float]] = []
    for start, end in sorted(intervals):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


@dataclass(frozen=True, kw_only=True)
class Played:
    """A step that was played: how long it took, the most that a rank waited for messages, idle time of all ranks over working time."""

    step_s: float
    exposed_s: float
    bubble: float
    busy_s: float
    spans: Sequence[Span]


def play_pipeline(
    schedule: Schedule,
    items: Callable[[Action], Sequence[Item]],
    message_s: Callable[[int, int], float],
    *,
    link: Callable[[int, int], str] = lambda source, target: "across",
    overlap: Sequence[float] = (),
    posted: Sequence[float] = (),
) -> list[Player]:
    """Every rank through its actions. `message_s(source, target)` is what a message between two ranks of the pipeline takes.

    Raises AssertionError for a schedule that `base.schedule.check` refuses.
    """
    players = [Player(rank, overlap[rank] if overlap else 1.0, posted[rank] if posted else 1.0) for rank in range(schedule.ranks)]
    sent: dict[Action, float] = {}
    left = [list(reversed(actions)) for actions in schedule.actions]
    arrives: dict[tuple[Action, int], float] = {}
    moved = True
    while moved:
        moved = False
        for rank, waiting in enumerate(left):
            while waiting and (inputs := _inputs(waiting[-1], schedule, sent)) is not None:
                action = waiting.pop()
                for needed in inputs:
                    source = schedule.rank_of[needed.stage]
                    players[rank].await_message(arrives[needed, rank], message_s(source, rank) if source != rank else 0.0)
                players[rank].play(items(action), str(action))
                sent[action] = players[rank].now_s
                _hand_on(action, schedule, players[rank], arrives, message_s, link)
                moved = True
    assert not any(left), "a legal schedule ends"
    return players


def _inputs(action: Action, schedule: Schedule, done: Mapping[Action, float]) -> list[Action] | None:
    """What `action` takes from other stages; None while it is not made."""
    wanted = needs(action, schedule.stages)
    if not wanted:
        return []
    made = [one for one in wanted if one in done]
    return made[:1] if made else None


def _hand_on(
    action: Action,
    schedule: Schedule,
    player: Player,
    arrives: dict[tuple[Action, int], float],
    message_s: Callable[[int, int], float],
    link: Callable[[int, int], str],
) -> None:
    """Sends what `action` made to the rank that takes it, where that is another one."""
    step = {"F": 1, "B": -1, "I": -1, "W": 0}[action.kind]
    stage = action.stage + step
    own = schedule.rank_of[action.stage]
    arrives[action, own] = player.now_s
    if step and 0 <= stage < schedule.stages and (to := schedule.rank_of[stage]) != own:
        arrives[action, to] = player.send(str(action), message_s(own, to), link(own, to))


def finished(players: Sequence[Player], tails: Sequence[Sequence[Item]]) -> Played:
    """The step's end: all ranks agree on the gradient's norm, so what follows the pipeline starts when the last rank is there."""
    there_s = max(player.now_s for player in players)
    worked_s = sum(player.busy_s + player.exposed_s + player.starved_s for player in players)
    bubble = there_s * len(players) / worked_s - 1 if worked_s else 0.0
    for player, tail in zip(players, tails, strict=True):
        player.now_s, player.posted = there_s, 1.0
        player.play(tail, "optimizer")
    return Played(
        step_s=max(player.now_s for player in players),
        exposed_s=max(player.exposed_s for player in players),
        bubble=max(0.0, bubble),
        busy_s=max(player.busy_s for player in players),
        spans=sorted((span for player in players for span in player.spans), key=lambda span: (span.rank, span.start_s)),
    )
