"""Pipeline schedules are legal, idle as little as their papers say, and keep as few activations."""

from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest

from paraxis.base.errors import ConfigError
from paraxis.base.schedule import Action, Schedule, check, finish_times, idle_share, most_in_flight, read_csv, write_csv
from paraxis.base.schedules import SCHEDULES, Plan, build_schedule

EQUAL = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
STAGES = {"interleaved": 2, "bfs": 2, "zbv": 2, "dualpipev": 2}


def schedule(name: str, ranks: int, micro_batches: int, stages_a_rank: int | None = None) -> Schedule:
    return build_schedule(name, Plan(ranks, micro_batches, stages_a_rank or STAGES.get(name, 1)))


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 8])
def test_every_schedule_is_legal_for_any_number_of_micro_batches_that_it_takes(name, ranks):
    taken = 0
    for micro_batches in range(1, 4 * ranks + 1):
        try:
            made = schedule(name, ranks, micro_batches)
        except ConfigError:
            continue
        check(made)
        taken += 1
    assert taken > 0


# ranks p, micro-batches m, stages a rank v; F = I = W = 1. The idle share is of the working time.
@pytest.mark.parametrize(
    ("name", "stages_a_rank", "idle"),
    [
        ("gpipe", 1, lambda p, m: Fraction(p - 1, m)),
        ("1f1b", 1, lambda p, m: Fraction(p - 1, m)),
        ("interleaved", 2, lambda p, m: Fraction(p - 1, 2 * m)),
        ("interleaved", 4, lambda p, m: Fraction(p - 1, 4 * m)),
        ("bfs", 2, lambda p, m: Fraction(p - 1, 2 * m)),
        ("zbh1", 1, lambda p, m: Fraction(p - 1, 3 * m)),
        ("zbv", 2, lambda p, m: Fraction(p - 1, 6 * m)),
        ("dualpipev", 2, lambda p, m: Fraction(p - 1, 6 * m)),
    ],
)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 8), (4, 16), (8, 32)])
def test_a_schedule_idles_as_its_paper_says(name, stages_a_rank, idle, ranks, micro_batches):
    made = schedule(name, ranks, micro_batches, stages_a_rank)
    assert idle_share(made, EQUAL) == pytest.approx(float(idle(ranks, micro_batches)))


@pytest.mark.parametrize(
    ("name", "kept"),
    [
        ("gpipe", lambda p, m: m),
        ("1f1b", lambda p, m: p),
        ("zbh1", lambda p, m: p),
        ("zbv", lambda p, m: 2 * p),
        ("dualpipev", lambda p, m: 2 * p + 1),
    ],
)
@pytest.mark.parametrize(("ranks", "micro_batches"), [(2, 4), (4, 16), (8, 32)])
def test_a_schedule_keeps_as_many_activations_as_its_paper_says(name, kept, ranks, micro_batches):
    assert max(most_in_flight(schedule(name, ranks, micro_batches))) == kept(ranks, micro_batches)


def test_1f1b_keeps_fewer_the_later_the_rank():
    assert most_in_flight(schedule("1f1b", 4, 8)) == [4, 3, 2, 1]


def test_folded_schedules_put_the_first_and_the_last_stage_on_the_first_rank():
    assert schedule("zbv", 3, 6).rank_of == (0, 1, 2, 2, 1, 0)


@pytest.mark.parametrize(
    ("name", "plan", "said"),
    [
        ("interleaved", Plan(4, 6, 2), "groups of pp=4, and 6 is no multiple; use 4 or 8"),
        ("zbv", Plan(4, 6, 2), "at least 7 micro-batches on 4 ranks, not 6"),
        ("zbv", Plan(4, 8, 1), "takes 2 stages a rank, not 1"),
        ("ring", Plan(4, 8, 1), "'ring' is unknown; choose one of gpipe, 1f1b"),
    ],
)
def test_what_a_schedule_is_not_made_for_is_refused_with_what_it_is(name, plan, said):
    with pytest.raises(ConfigError, match=said):
        build_schedule(name, plan)


def planted(change) -> Schedule:
    """1F1B on two ranks with rank 0's list changed."""
    made = schedule("1f1b", 2, 3)
    first = list(made.actions[0])
    change(first)
    return replace(made, actions=(tuple(first), made.actions[1]))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda own: own.pop(), "stage 0 has 1 F, 0 B, 0 I, 0 W of micro-batch 2"),
        (lambda own: own.append(Action("B", 0, 1)), "stage 0 has 1 F, 2 B"),
        (lambda own: own.append(Action("W", 0, 1)), "stage 0 has 1 F, 1 B, 0 I, 1 W"),
        (lambda own: own.append(Action("F", 5, 0)), "5F0 is of no stage"),
        (lambda own: own.insert(0, own.pop()), "never ends: rank 0 at 0B2, rank 1 at 1F0 wait for each other"),
        (lambda own: own.reverse(), "never ends"),
    ],
)
def test_an_illegal_list_is_refused_with_what_is_wrong(change, said):
    with pytest.raises(ConfigError, match=said):
        check(planted(change))


def test_an_action_on_another_rank_than_its_stage_s_is_refused():
    made = schedule("gpipe", 2, 2)
    with pytest.raises(ConfigError, match="1F0 is in rank 0's list, but rank 1 holds it"):
        check(replace(made, actions=made.actions[::-1]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_a_schedule_comes_back_from_its_file(name, tmp_path):
    made = schedule(name, 4, 8)
    write_csv(made, tmp_path / "schedule.csv")
    read = read_csv(tmp_path / "schedule.csv")
    assert (read.rank_of, read.micro_batches, read.actions) == (made.rank_of, made.micro_batches, made.actions)


def test_a_file_that_is_no_schedule_is_refused_with_the_line(tmp_path):
    path = tmp_path / "bad.csv"
    path.write_text("0F0,0B0\n1X0\n")
    with pytest.raises(ConfigError, match="line 2: '1X0' is no action"):
        read_csv(path)


def test_no_action_starts_before_what_it_needs_has_ended():
    for name in SCHEDULES:
        made = schedule(name, 4, 8)
        ended = finish_times(made, EQUAL)
        assert len(ended) == sum(Counter(len(actions) for actions in made.actions).elements())
        for micro_batch in range(8):
            forwards = [ended[Action("F", stage, micro_batch)] for stage in range(made.stages)]
            assert forwards == sorted(forwards)
