"""The grammar of layouts, and which part of a tensor each rank holds."""

from itertools import product
from math import prod

import pytest

from paraxis.base.axes import AXES, Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.layout import Box, Split, parse_layout, place, whole_box


@pytest.mark.parametrize(
    ("text", "degrees"),
    [
        ("fsdp2xtp2", {"fsdp": 2, "tp": 2}),
        ("dp2 x fsdp4", {"dp": 2, "fsdp": 4}),
        (" tp8 ", {"tp": 8}),
        ("fsdp-1", {"fsdp": -1}),
        ("pp2.zbh1 x ep2 x fsdp2", {"pp": 2, "schedule": "zbh1", "ep": 2, "fsdp": 2}),
        ("pp2.interleaved3", {"pp": 2, "schedule": "interleaved", "stages_a_rank": 3}),
        ("cp4.ulysses2 x tp2", {"cp": 4, "cp_kind": "usp", "cp_ulysses": 2, "tp": 2}),
        ("cp2.allgather", {"cp": 2, "cp_kind": "allgather"}),
    ],
)
def test_a_layout_is_axes_with_degrees_joined_by_x(text, degrees):
    assert parse_layout(text) == degrees


@pytest.mark.parametrize("text", ["dp1", "fsdp2", "fsdp2xtp2", "dp2xfsdp3xtp4", "pp2xfsdp2xcp2xep4"])
def test_degrees_write_themselves_in_that_grammar(text):
    assert Degrees(**parse_layout(Degrees(**parse_layout(text)).layout)) == Degrees(**parse_layout(text))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fsdp", "cannot read 'fsdp'"),
        ("zz2", "cannot read 'zz2'"),
        ("tp2xtp4", "tp stands twice"),
        ("tp0", "parallel.tp=0"),
        ("fsdp2.ring", "cannot read"),
        ("cp2.square", "not 'square'"),
        ("cp2.ring2", "not 'ring2'"),
        ("fsdp2 x ep3", "parallel.ep=3 does not divide"),
        ("", "cannot read"),
    ],
)
def test_what_is_no_layout_is_refused_with_the_part_that_is_wrong(text, said):
    with pytest.raises(ConfigError, match=said):
        parse_layout(text)


def coordinates(degrees: Degrees):
    return [dict(zip(AXES, at, strict=True)) for at in product(*(range(getattr(degrees, axis)) for axis in AXES))]


@pytest.mark.parametrize(
    "degrees", [Degrees(fsdp=3), Degrees(tp=2), Degrees(dp=2, fsdp=3, tp=2), Degrees(fsdp=8), Degrees(fsdp=2, cp=2, ep=2)]
)
@pytest.mark.parametrize("rule", [None, Split("tp", 0), Split("tp", 1), (Split("ep", 0), Split("tp", 1))])
@pytest.mark.parametrize("shape", [(10, 4), (2, 6), (4, 2, 3)])
def test_the_ranks_hold_every_element_and_number_those_that_hold_the_same(degrees, rule, shape):
    placed = [place("w", shape, {} if rule is None else {"w": rule}, degrees, at) for at in coordinates(degrees)]
    held: dict[Box, list[int]] = {}
    for where in placed:
        held.setdefault(where.stored, []).append(where.replica)
    assert sum(box.numel for box in held) == prod(shape)
    assert all(not a.overlap(b) for a in held for b in held if a is not b and a.numel and b.numel)
    for box, replicas in held.items():
        if box.numel:
            assert sorted(replicas) == list(range(placed[0].replicas))


def test_a_split_that_does_not_divide_is_refused_with_the_parameter_s_name():
    with pytest.raises(ConfigError, match=r"parallel.tp=3 does not divide up.weight: dimension 0 has 8 entries"):
        place("up.weight", (8, 4), {"*.weight": Split("tp", 0)}, Degrees(tp=3), dict.fromkeys(AXES, 0))


def test_a_box_within_a_box_is_indexed_from_its_corner():
    assert Box((4, 1), (2, 2)).slices_within(Box((3, 0), (5, 4))) == (slice(1, 3), slice(1, 3))
    assert whole_box((3,)).overlap(Box((3,), (2,))) is None
