"""The allocator's model: what it reserves, as CUDA's caching allocator with expandable segments would."""

import random
from itertools import pairwise

import pytest

from paraxis.plan.allocator import LARGE_PAGE, MIB, SMALL_PAGE, Segment, reserved_bytes


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
    blocks = list(zip([segment.take(size) for size in sizes], sizes, strict=True))
    assert segment.size == 40 * MIB
    for place in (0, 2, 4):
        segment.give_back(*blocks[place])
    assert segment.take(5 * MIB) == 14 * MIB  # of 10, 6 and 15
    segment.give_back(14 * MIB, 5 * MIB)
    segment.give_back(*blocks[1])
    assert segment.take(18 * MIB) == 0  # 10, 4 and 6 in one


def test_the_end_is_kept_for_what_fits_nowhere_else():
    segment = Segment(LARGE_PAGE)
    first, second = segment.take(12 * MIB), segment.take(4 * MIB)
    segment.give_back(first, 12 * MIB)
    assert segment.take(3 * MIB) == first  # though 4 at the end would fit better
    assert segment.take(10 * MIB) == second + 4 * MIB
    assert segment.size == 2 * LARGE_PAGE


@pytest.mark.parametrize("seed", range(5))
def test_blocks_in_use_never_overlap_and_nothing_is_lost(seed: int):
    chance, segment = random.Random(seed), Segment(LARGE_PAGE)
    used: dict[int, int] = {}
    for _ in range(400):
        if used and chance.random() < 0.5:
            address = chance.choice(list(used))
            segment.give_back(address, used.pop(address))
        else:
            size = chance.randrange(MIB + 512, 40 * MIB, 512)
            used[segment.take(size)] = size
        ranges = sorted(used.items())
        assert all(address + size <= after for (address, size), (after, _) in pairwise(ranges))
    for block in used.items():
        segment.give_back(*block)
    assert segment.take(segment.size) == 0
