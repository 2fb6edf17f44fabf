"""What blocks keep is the quickest there is for the bytes: held to trying everything."""

import random
from collections.abc import Sequence
from itertools import combinations, combinations_with_replacement, product

import pytest

from paraxis.parallel.knapsack import BlockTable, Choice, Mix, Operator, choices, fill


def table_at_random(chance: random.Random, operators: int) -> BlockTable:
    """A block whose operators need earlier ones and take bytes and seconds at random, a few of each so that many sums are equal."""
    made = [
        Operator(("mm", n), chance.randint(1, 6), float(chance.randint(1, 9)), frozenset(m for m in range(n) if chance.random() < 0.3))
        for n in range(operators)
    ]
    required = frozenset(n for n in range(operators) if chance.random() < 0.5)
    return BlockTable(tuple(made), required, input_bytes=3, whole_bytes=3 + sum(o.bytes for o in made) + 5, cheap_s=0.5)


def recomputed_s(table: BlockTable, kept: frozenset[int]) -> float:
    """Seconds of computing again all that backward needs and that is not kept: followed back from where it is needed."""
    waiting, done = set(table.required), set[int]()
    while waiting:
        number = waiting.pop()
        if number not in kept and number not in done:
            done.add(number)
            waiting |= table.operators[number].needs
    return table.cheap_s + sum(table.operators[number].seconds for number in done)


def every_choice(table: BlockTable) -> list[Choice]:
    numbers = range(len(table.operators))
    subsets = [frozenset(some) for size in range(len(numbers) + 1) for some in combinations(numbers, size)]
    found = [
        Choice(
            table.input_bytes + sum(table.operators[n].bytes for n in kept),
            recomputed_s(table, kept),
            tuple(table.operators[n].call for n in sorted(kept)),
        )
        for kept in subsets
    ]
    return [*found, Choice(table.whole_bytes, 0.0, None)]


@pytest.mark.parametrize("seed", range(20))
def test_no_set_of_operators_is_quicker_for_its_bytes(seed: int):
    table = table_at_random(random.Random(seed), operators=8)
    found, everything = choices(table), every_choice(table)
    for budget in range(table.input_bytes, table.whole_bytes + 1):
        best = min(choice.seconds for choice in everything if choice.bytes <= budget)
        assert min(choice.seconds for choice in found if choice.bytes <= budget) == best
    assert [c.bytes for c in found] == sorted({c.bytes for c in found})
    for choice in found[:-1]:
        kept = frozenset(n for n, operator in enumerate(table.operators) if operator.call in (choice.kept or ()))
        assert choice.seconds == recomputed_s(table, kept)
        assert choice.bytes == table.input_bytes + sum(table.operators[n].bytes for n in kept)


def test_keeping_what_an_operator_needs_saves_nothing_while_that_operator_is_kept():
    first, second = Operator(("mm", 0), 4, 3.0), Operator(("reduce_scatter", 0), 4, 2.0, frozenset({0}))
    found = choices(BlockTable((first, second), frozenset({1}), input_bytes=1, whole_bytes=20, cheap_s=0.25))
    assert [(choice.bytes, choice.seconds, choice.kept) for choice in found] == [
        (1, 5.25, ()),
        (5, 0.25, (("reduce_scatter", 0),)),
        (20, 0.0, None),
    ]


def every_mix(found: Sequence[Choice], count: int) -> list[Mix]:
    """Every way for blocks of a kind to keep two choices at most, whichever blocks."""
    return [Mix(some) for some in combinations_with_replacement(found, count) if len(set(some)) <= 2]


@pytest.mark.parametrize("seed", range(12))
def test_no_two_choices_for_blocks_of_a_kind_are_quicker_within_a_budget(seed: int):
    chance = random.Random(seed)
    kinds = [(choices(table_at_random(chance, operators=5)), count) for count in ([4], [2, 3], [1, 2, 2])[seed % 3]]
    everything = [list(mixes) for mixes in product(*(every_mix(found, count) for found, count in kinds))]
    costed = [(sum(mix.bytes for mix in mixes), sum(mix.seconds for mix in mixes)) for mixes in everything]
    least, most = min(costed)[0], max(costed)[0]
    for budget in sorted({least - 1, least, *(chance.randint(least, most) for _ in range(6)), most}):
        filled = fill(kinds, budget)
        within = [seconds for size, seconds in costed if size <= budget]
        if not within:
            assert filled is None
            continue
        assert filled is not None
        assert sum(mix.seconds for mix in filled) == pytest.approx(min(within), abs=1e-9)
        assert sum(mix.bytes for mix in filled) <= budget
        assert [len(mix.choices) for mix in filled] == [count for _, count in kinds]
        for mix in filled:
            assert list(mix.choices) == sorted(mix.choices), "the last blocks, which go backward first, keep the most"
