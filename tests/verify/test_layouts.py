"""Which layouts `paraxis verify ... --layouts all` tries."""

from collections import Counter
from dataclasses import replace

import pytest

from paraxis.base.axes import AXES
from paraxis.base.layout import parse_layout
from paraxis.base.schedules import SCHEDULES
from paraxis.models.qwen3 import qwen3_30b_a3b
from paraxis.recipes import RECIPES
from paraxis.verify.layouts import legal_layouts, why_not


def ranks_of(text: str) -> int:
    product = 1
    for axis, degree in parse_layout(text).items():
        product *= degree if axis in AXES and isinstance(degree, int) else 1
    return product


@pytest.fixture(scope="module")
def of_debug() -> list[str]:
    return legal_layouts(RECIPES["debug"](), "fp64")


def test_all_of_debug_has_sixty_layouts_at_least_on_two_to_eight_ranks(of_debug):
    counts = Counter(ranks_of(text) for text in of_debug)
    assert len(of_debug) == len(set(of_debug)) >= 60
    assert set(counts) == {2, 3, 4, 5, 6, 7, 8}


def test_all_has_every_axis_schedule_and_way_across_a_split_context(of_debug):
    said = [parse_layout(text) for text in of_debug]
    assert {axis for layout in said for axis in layout if axis in AXES} == set(AXES)
    assert {layout["schedule"] for layout in said if "schedule" in layout} == set(SCHEDULES) - {"1f1b"}
    assert {layout["cp_kind"] for layout in said if "cp_kind" in layout} == {"ring", "ulysses", "allgather", "usp"}
    assert not [layout for layout in said if "ep" in layout], "a model without experts has none to share out"


@pytest.mark.parametrize("text", ["pp2xfsdp2xtp2", "pp2xcp2xtp2", "fsdp2xcp2xtp2", "dp2xfsdp2xtp2", "pp3.zbvxfsdp2", "fsdp3xcp2.ring"])
def test_all_has_products_of_axes_and_degrees_that_are_no_powers_of_two(of_debug, text):
    assert text in of_debug


def test_a_mixture_of_experts_is_spread_over_expert_ranks_too():
    config = replace(RECIPES["debug"](), model=qwen3_30b_a3b())
    layouts = legal_layouts(config, "fp64", 4)
    assert {"fsdp2xep2", "cp2xep2", "fsdp4xep2", "fsdp4xep4", "fsdp2xtp2xep2", "pp2xfsdp2xep2"} <= set(layouts)


def test_what_the_model_cannot_do_is_left_out_with_the_run_s_own_reason(of_debug):
    assert "tp8" not in of_debug
    assert "model.kv_heads=4 is not divisible by parallel.tp=8" in (why_not(RECIPES["debug"](), "tp8", "fp64") or "")
