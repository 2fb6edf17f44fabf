"""Few micro-batches in the place of many: every circumstance of a schedule is in the short one, for every schedule and rank."""

import pytest

from paraxis.base.schedule import check
from paraxis.base.schedules import SCHEDULES, Plan, build_schedule
from paraxis.plan.steady import circumstances, of_micro_batches, shortened, stand_ins


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_a_few_micro_batches_stand_for_many_on_every_rank(name: str, ranks: int):
    whole = build_schedule(name, Plan(ranks, 4 * ranks, SCHEDULES[name].stages_a_rank or 2))
    for rank in range(ranks):
        short = shortened(whole, [rank])
        check(short)
        assert short.micro_batches <= 8
        own = circumstances(short, rank)
        chosen = stand_ins(whole, rank, short, rank)
        for action, found in circumstances(whole, rank).items():
            assert own[chosen[action].action].key == found.key


@pytest.mark.parametrize("name", SCHEDULES)
def test_messages_are_made_room_for_once_each(name: str):
    whole = build_schedule(name, Plan(4, 8, SCHEDULES[name].stages_a_rank or 2))
    for rank in range(4):
        arriving = sum(
            1
            for own in whole.actions
            for action in own
            if whole.rank_of[action.stage] != rank
            and 0 <= (to := action.stage + {"F": 1, "B": -1, "I": -1, "W": 10**6}[action.kind]) < whole.stages
            and whole.rank_of[to] == rank
        )
        assert sum(found.room for found in circumstances(whole, rank).values()) == arriving


def test_a_schedule_of_some_micro_batches_is_a_legal_one():
    whole = build_schedule("zbv", Plan(4, 16, 2))
    short = of_micro_batches(whole, [0, 3, 15])
    check(short)
    assert short.micro_batches == 3
