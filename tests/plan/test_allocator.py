"""The allocator's model: what it reserves, as CUDA's caching allocator with expandable segments would."""

import random
from itertools import accumulate, pairwise

import pytest

from paraxis.plan.allocator import LARGE_PAGE, MIB, SMALL_PAGE, Segment, fits, reserved_bytes


def take(segment: Segment, size: int) -> int:
    found = segment.find(size)
    return segment.map(size) if found is None else found


def take_or_give_back(segment: Segment, used: dict[int, int], chance: random.Random, largest: int) -> None:
    """One block more, or less, at random; none is in two places."""
    if used and chance.random() < 0.5:
        address = chance.choice(list(used))
        segment.give_back(address, used.pop(address))
    else:
        size = chance.randrange(MIB + 512, largest, 512)
        used[take(segment, size)] = size
    assert all(address + size <= after for (address, size), (after, _) in pairwise(sorted(used.items())))


def test_memory_is_reserved_by_whole_pages():
    assert reserved_bytes([(0, 0, 512)], []) == SMALL_PAGE
    assert reserved_bytes([(0, 0, MIB + 512)], []) == LARGE_PAGE
    assert reserved_bytes([(0, 0, 21 * MIB)], []) == 2 * LARGE_PAGE


def test_streams_do_not_share_what_they_reserve():
    one_after_another = [(0, 0, 40 * MIB), (0, 0, -40 * MIB), (1, 1, 40 * MIB), (1, 1, -40 * MIB)]
    assert reserved_bytes([], one_after_another) == 80 * MIB
    assert reserved_bytes([], [(0, number, change) for _, number, change in one_after_another]) == 40 * MIB


def test_a_hole_that_is_too_small_is_reserved_in_vain():
    step = [(0, 0, 20 * MIB), (0, 1, 20 * MIB), (0, 0, -20 * MIB), (0, 2, 30 * MIB), (0, 1, -20 * MIB), (0, 2, -30 * MIB)]
    assert reserved_bytes([], step) == 80 * MIB  # 20 free, 20 held, 30 in two pages


def test_the_smallest_block_that_holds_a_request_is_taken_and_neighbours_merge():
    segment = Segment(LARGE_PAGE)
    sizes = [size * MIB for size in (10, 4, 6, 4, 15, 1)]
    blocks = list(zip([take(segment, size) for size in sizes], sizes, strict=True))
    assert segment.size == 40 * MIB
    for place in (0, 2, 4):
        segment.give_back(*blocks[place])
    assert take(segment, 5 * MIB) == 14 * MIB  # of 10, 6 and 15
    segment.give_back(14 * MIB, 5 * MIB)
    segment.give_back(*blocks[1])
    assert take(segment, 18 * MIB) == 0  # 10, 4 and 6 in one


def test_the_end_is_kept_for_what_fits_nowhere_else():
    segment = Segment(LARGE_PAGE)
    first, second = take(segment, 12 * MIB), take(segment, 4 * MIB)
    segment.give_back(first, 12 * MIB)
    assert take(segment, 3 * MIB) == first  # though 4 at the end would fit better
    assert take(segment, 10 * MIB) == second + 4 * MIB
    assert segment.size == 2 * LARGE_PAGE


@pytest.mark.parametrize("seed", range(5))
def test_blocks_in_use_never_overlap_and_nothing_is_lost(seed: int):
    chance, segment = random.Random(seed), Segment(LARGE_PAGE)
    used: dict[int, int] = {}
    for _ in range(400):
        take_or_give_back(segment, used, chance, 40 * MIB)
    for block in used.items():
        segment.give_back(*block)
    assert take(segment, segment.size) == 0


def test_what_is_free_in_whole_pages_is_given_back_before_a_request_fails():
    page = LARGE_PAGE
    step = [(0, 0, 2 * page), (0, 0, -2 * page), (1, 1, 2 * page), (1, 1, -2 * page)]
    assert reserved_bytes([], step) == 4 * page
    assert fits([], step, 2 * page)
    assert not fits([], step, 2 * page - 1)


def test_a_page_in_which_anything_lies_is_not_given_back():
    page = LARGE_PAGE
    step = [(0, 0, page), (0, 1, 2 * MIB), (0, 0, -page), (1, 2, 2 * page), (1, 2, -2 * page), (0, 1, -2 * MIB)]
    assert not fits([], step, 2 * page + 2 * MIB)
    assert fits([], step, 3 * page)


def test_a_request_is_refused_by_all_of_its_size_though_part_of_it_lies_free():
    page = LARGE_PAGE
    held = [(0, 0, page), (0, 1, page // 2), (0, 2, page + page // 2)]  # the last lies in half a page that was free, and one more
    step = [*held, *((stream, number, -size) for stream, number, size in held)]
    assert reserved_bytes([], step) == 3 * page
    assert not fits([], step, 3 * page)
    assert fits([], step, 3 * page + page // 2)


@pytest.mark.parametrize("seed", range(5))
def test_pages_given_back_leave_no_block_in_two_places(seed: int):
    chance, segment = random.Random(seed), Segment(LARGE_PAGE)
    used: dict[int, int] = {}
    for _ in range(400):
        if chance.random() < 0.1:
            segment.release()
            assert segment.mapped < sum(used.values()) + 2 * LARGE_PAGE * (len(used) + 1)
        take_or_give_back(segment, used, chance, 60 * MIB)
        assert segment.mapped >= sum(used.values())
    for block in used.items():
        segment.give_back(*block)
    segment.release()
    assert segment.mapped == segment.size == 0


@pytest.mark.parametrize("seed", range(5))
def test_a_step_never_fits_into_less_than_it_holds_and_here_into_what_it_reserves(seed: int):
    chance = random.Random(seed)
    step: list[tuple[int, int, int]] = []
    live: dict[int, tuple[int, int]] = {}
    for number in range(200):
        if live and chance.random() < 0.5:
            freed = chance.choice(list(live))
            stream, size = live.pop(freed)
            step.append((stream, freed, -size))
        else:
            live[number] = chance.randrange(2), chance.choice([512 * chance.randrange(1, 4000), MIB * chance.randrange(2, 60)])
            step.append((live[number][0], number, live[number][1]))
    step += [(stream, number, -size) for number, (stream, size) in live.items()]
    most = max(accumulate(change for _, _, change in step))
    assert fits([], step, reserved_bytes([], step))
    assert not fits([], step, most - 1)
