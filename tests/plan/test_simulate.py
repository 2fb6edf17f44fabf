"""The simulation: bubbles of known schedules, and what no step can beat."""

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise

import pytest

from paraxis.base.schedule import Action, Kind, idle_share
from paraxis.base.schedules import SCHEDULES, Plan, build_schedule
from paraxis.plan.simulate import Compute, Item, Played, Player, Read, Start, Wait, finished, play_pipeline

EQUAL: dict[Kind, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}


def played(name: str, ranks: int, micro_batches: int, message_s: float = 0.0, per_rank: int = 0) -> Played:
    schedule = build_schedule(name, Plan(ranks, micro_batches, per_rank or SCHEDULES[name].stages_a_rank or 2))
    players = play_pipeline(schedule, lambda action: [Compute(EQUAL[action.kind])], lambda source, target: message_s)
    return finished(players, [[] for _ in players])


BUBBLES: dict[str, Callable[[int, int], float]] = {
    "gpipe": lambda p, m: (p - 1) / m,
    "1f1b": lambda p, m: (p - 1) / m,
    "interleaved": lambda p, m: (p - 1) / (2 * m),
    "bfs": lambda p, m: (p - 1) / (2 * m),
    "zbh1": lambda p, m: (p - 1) / (3 * m),  # (p - 1) (F + B - W) of m (F + B + W)
}


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("name", BUBBLES)
def test_bubbles_are_those_of_the_closed_forms(name: str, ranks: int):
    for micro_batches in (2 * ranks, 4 * ranks):
        assert played(name, ranks, micro_batches).bubble == pytest.approx(BUBBLES[name](ranks, micro_batches))


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_messages_the_simulation_is_the_schedules_own_count(name: str):
    schedule = build_schedule(name, Plan(4, 8, SCHEDULES[name].stages_a_rank or 2))
    assert played(name, 4, 8).bubble == pytest.approx(idle_share(schedule, EQUAL))


@pytest.mark.parametrize("name", SCHEDULES)
def test_slower_links_never_make_a_step_shorter(name: str):
    steps = [played(name, 4, 8, message_s).step_s for message_s in (0.0, 0.05, 0.2, 0.5, 2.0)]
    assert all(faster <= slower for faster, slower in pairwise(steps))
    assert steps[-1] > steps[0]


def layered(blocks: int, compute_s: float, gather_s: float, reduce_s: float) -> list[Item]:
    """A sharded model's forward and backward, as FSDP asks for it."""
    items: list[Item] = []
    for _ in range(blocks):
        items += [Start("all_gather", gather_s, "inside", early=True), Wait("all_gather"), Compute(compute_s)]
    for block in range(blocks):
        if block + 1 < blocks:
            items.append(Start("all_gather", gather_s, "inside"))
        items += [Compute(2 * compute_s), Wait("reduce_scatter"), Start("reduce_scatter", reduce_s, "inside")]
        if block + 1 < blocks:
            items.append(Wait("all_gather"))
    return [*items, Wait("reduce_scatter", everything=True)]


def alone(items: list[Item], overlap: float = 1.0) -> Played:
    player = Player(overlap=overlap)
    player.play(items, "step")
    return finished([player], [[]])


def test_gathering_hides_behind_computing_but_for_the_first_and_the_last():
    step = alone(layered(8, 1.0, 0.4, 0.8))
    assert step.busy_s == pytest.approx(24.0)
    assert step.exposed_s == pytest.approx(0.4 + 0.8)
    assert step.step_s == pytest.approx(25.2)


@pytest.mark.parametrize(("compute_s", "gather_s", "reduce_s"), [(1, 0.1, 0.1), (1, 2, 1), (0.1, 1, 3), (0, 1, 1), (1, 0, 0)])
def test_a_step_never_takes_less_than_its_busiest_resource(compute_s: float, gather_s: float, reduce_s: float):
    step = alone(layered(6, compute_s, gather_s, reduce_s))
    computing, link = 18 * compute_s, 11 * gather_s + 6 * reduce_s
    assert max(computing, link) <= step.step_s + 1e-9
    assert step.step_s <= computing + link + 1e-9
    assert step.step_s == pytest.approx(step.busy_s + step.exposed_s)
    for lane in ("compute", "all_gather", "reduce_scatter"):
        spans = [span for span in step.spans if span.lane == lane]
        assert all(before.end_s <= after.start_s + 1e-9 for before, after in pairwise(spans)), lane


def test_faster_links_and_less_interference_never_cost():
    steps = [alone(layered(6, 1.0, 2.0 / speed, 3.0 / speed)).step_s for speed in (1, 2, 4, 8, 100)]
    assert all(slower >= faster for slower, faster in pairwise(steps))
    slowed = [alone(layered(6, 1.0, 0.5, 0.5), overlap).step_s for overlap in (1.0, 1.1, 1.3)]
    assert slowed[0] < slowed[1] < slowed[2]


def test_messages_on_one_link_share_it_and_on_two_do_not():
    def both(other: str) -> float:
        items: list[Item] = [
            Start("all_gather", 1.0, "inside"),
            Start("reduce_scatter", 1.0, other),
            Wait("all_gather"),
            Wait("reduce_scatter"),
        ]
        return alone(items).step_s

    assert both("inside") == pytest.approx(2.0)
    assert both("across") == pytest.approx(1.0)


def test_a_ring_waits_for_the_message_it_names():
    items: list[Item] = [
        Start("exchange", 1.0, "inside", number=5),
        Start("exchange", 3.0, "inside", number=6),
        Compute(2.0),
        Wait("exchange", number=5),
        Compute(1.0),
        Wait("exchange", number=6),
    ]
    step = alone(items)
    assert (step.step_s, step.exposed_s) == (pytest.approx(4.0), pytest.approx(1.0))


def test_ranks_wait_for_the_slowest_before_the_optimizer():
    schedule = build_schedule("1f1b", Plan(2, 4, 1))

    def items(action: Action) -> list[Item]:
        return [Compute(EQUAL[action.kind] * (1 + action.stage))]

    players = play_pipeline(schedule, items, lambda source, target: 0.0)
    done = [replace(player) for player in players]
    step = finished(players, [[Compute(0.5)], [Compute(0.25)]])
    assert step.step_s == pytest.approx(max(player.now_s for player in done) + 0.5)


def asked(host_s: float, kernel_s: float = 1.0) -> list[Item]:
    """Kernels, and one message that they wait for, each of which the host takes so long to ask for."""
    kernel = Compute(kernel_s, host_s, host_s)
    return [kernel, Start("exchange", 0.5, "inside", host_s=host_s), kernel, Wait("exchange"), kernel, kernel]


def test_a_host_that_asks_in_no_time_changes_nothing():
    assert alone(asked(0.0)) == alone([Compute(1.0), Start("exchange", 0.5, "inside"), Compute(1.0), Wait("exchange"), Compute(2.0)])


def test_a_host_slower_than_the_device_sets_the_steps_time():
    assert alone(asked(10.0)).step_s == pytest.approx(5 * 10.0 + 1.0)


def test_a_bigger_host_cost_never_shortens_a_step():
    steps = [alone(asked(host_s)).step_s for host_s in (0.0, 0.1, 0.5, 0.9, 1.0, 1.5, 3.0, 10.0)]
    assert all(faster <= slower for faster, slower in pairwise(steps))


def test_joined_kernels_wait_for_the_host_as_they_do_one_by_one():
    kernels = [Compute(seconds, host_s, host_s) for seconds, host_s in ((1.0, 0.2), (0.1, 2.0), (3.0, 0.1), (0.2, 0.3), (0.1, 4.0))]
    total = kernels[0]
    for kernel in kernels[1:]:
        total = total + kernel
    for head in ([], [Compute(1.5)], [Compute(20.0)]):
        apart, joined = (Player() for _ in range(2))
        apart.play([*head, *kernels], "apart")
        joined.play([*head, total], "joined")
        assert (joined.now_s, joined.host_s) == (pytest.approx(apart.now_s), pytest.approx(apart.host_s))


def test_a_host_that_reads_a_value_cannot_run_ahead():
    ahead = [Compute(4.0), *asked(1.0)]
    reading = [Compute(4.0), Read(), *asked(1.0)]
    assert alone(ahead).step_s == pytest.approx(8.0)
    assert alone(reading).step_s == pytest.approx(4.0 + 5 * 1.0 + 1.0)


def test_computing_beside_receives_that_wait_takes_longer_until_the_pipeline_is_done():
    schedule = build_schedule("1f1b", Plan(2, 4, 1))
    plain, held = (
        play_pipeline(schedule, lambda action: [Compute(EQUAL[action.kind])], lambda source, target: 0.0, posted=posted)
        for posted in ([], [1.2, 1.2])
    )
    tails = [[Compute(1.0)]] * 2
    assert finished(held, tails).step_s - 1.0 == pytest.approx(1.2 * (finished(plain, tails).step_s - 1.0))
