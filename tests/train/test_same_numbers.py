"""A run starts from the same weights, bit for bit, and follows the same curve on every layout."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from paraxis.base.layout import whole_box
from paraxis.models.llama import LlamaConfig
from paraxis.recipes import RECIPES
from paraxis.train.config import RunConfig
from tests.measure import MadeRows, Part, measure, run_of, with_layout

# Sizes that four ranks cannot share equally: some hold less of a parameter, or nothing.
UNEVEN = LlamaConfig(vocab_size=98, width=36, layers=1, heads=6, kv_heads=2, mlp_width=70)
SEQ_LEN = 16
LAYOUTS = ("dp2", "dp4", "fsdp2", "fsdp4", "dp2xfsdp2", "tp2", "tp4", "fsdp2xtp2")
COVERING = ("dp2xfsdp2", "fsdp4", "tp2", "fsdp2xtp2")

World = Callable[..., list[Any]]


def covering(names: tuple[str, ...]) -> list[Any]:
    return [name if name in COVERING else pytest.param(name, marks=pytest.mark.full) for name in names]


def config_of(model: LlamaConfig, **changes: Any) -> RunConfig:
    config = RECIPES["debug"]()
    data, train = replace(config.data, seq_len=SEQ_LEN), replace(config.train, micro_batch=1, global_tokens=4 * SEQ_LEN)
    return replace(config, model=model, data=data, train=train, **changes)


def first_weights(config: RunConfig) -> list[Part]:
    run = run_of(config, MadeRows(98, SEQ_LEN))
    return [(s.placed.name, s.placed.shape, s.placed.stored, s.local.detach().clone()) for s in run.shards]


def parts_on(world: World, config: RunConfig, layout: str) -> list[list[Part]]:
    config = with_layout(config, layout)
    return world(config.parallel.degrees.ranks, first_weights, config)


def whole(world: World, config: RunConfig) -> dict[str, torch.Tensor]:
    return {name: tensor for name, _, _, tensor in parts_on(world, config, "")[0]}


@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_first_weights_are_bit_equal_on_every_layout(precision: str, tied: bool, world: World):
    config = config_of(replace(UNEVEN, tied=tied), precision=precision)
    alone = whole(world, config)
    for layout in ("fsdp2", "fsdp4", "dp2", "tp2", "fsdp2xtp2"):
        for parts in parts_on(world, config, layout):
            assert [name for name, *_ in parts] == list(alone)
            own = {name: alone[name][box.slices_within(whole_box(shape))] for name, shape, box, _ in parts}
            assert [name for name, _, _, part in parts if not torch.equal(part, own[name])] == [], layout


def test_on_four_ranks_parts_differ_in_size(world: World):
    """Or the test above would not have tried it."""
    boxes = [box for parts in parts_on(world, config_of(UNEVEN), "fsdp4") for name, _, box, _ in parts if "up_proj" in name]
    assert [box.sizes for box in boxes] == [(18, 36)] * 3 + [(16, 36)]


def test_another_seed_gives_other_first_weights(world: World):
    config = config_of(UNEVEN)
    other = replace(config, train=replace(config.train, seed=1))
    a, b = whole(world, config), whole(world, other)
    assert [name for name in a if torch.equal(a[name], b[name])] == [name for name in a if "norm" in name]


class FewRows(MadeRows):
    """The same four rows again and again, so that there is something to learn."""

    def row(self, index: int) -> dict[str, np.ndarray]:
        return super().row(index % 4)


@pytest.mark.parametrize("documents", [False, True], ids=["whole rows", "documents"])
@pytest.mark.parametrize("layout", covering(LAYOUTS))
def test_ten_steps_of_adamw_follow_the_curve_of_one_process(layout: str, documents: bool):
    config = config_of(replace(UNEVEN, width=32, heads=8, kv_heads=4, vocab_size=96, mlp_width=64, layers=2))
    config = replace(config, data=replace(config.data, document_mask=documents), optim=replace(config.optim, lr=3e-3))
    rows = FewRows(96, SEQ_LEN, documents=documents)
    alone, spread = (measure(config=config, layout=name, rows=rows, steps=10) for name in ("", layout))
    assert len(spread.losses) == 10
    assert alone.losses[-1] < 0.95 * alone.losses[0]
    assert spread.losses == pytest.approx(alone.losses, rel=1e-5)
    assert spread.norms == pytest.approx(alone.norms, rel=1e-4)


@pytest.mark.parametrize("layout", ["", "tp2", "fsdp2xtp2"])
@pytest.mark.parametrize("tokens", [0, 7])
def test_how_many_tokens_have_logits_at_a_time_changes_no_number(tokens: int, layout: str):
    config = config_of(UNEVEN, precision="fp64")
    more = replace(config, train=replace(config.train, loss_tokens=tokens))
    plain, other = (measure(config=one, layout=layout, rows=FewRows(98, SEQ_LEN), steps=3) for one in (config, more))
    assert other.losses == pytest.approx(plain.losses, rel=1e-12)
    assert other.norms == pytest.approx(plain.norms, rel=1e-12)


@pytest.mark.parametrize("stored", ["bf16 weights", "bf16 state"])
@pytest.mark.parametrize("layout", covering(LAYOUTS))
def test_what_is_stored_in_bf16_follows_the_curve_of_one_process(layout: str, stored: str):
    """To the rounding of bf16 products: all ranks round what they store at random, but alike."""
    config = config_of(replace(UNEVEN, width=32, heads=8, kv_heads=4, vocab_size=96, mlp_width=64, layers=2), precision="bf16")
    optim = replace(config.optim, lr=3e-3, warmup=1)
    if stored == "bf16 state":
        config = replace(config, optim=replace(optim, state="bf16"))
    else:
        config = replace(config, optim=optim, precision="bf16_weights")
    alone, spread = (measure(config=config, layout=name, rows=FewRows(96, SEQ_LEN), steps=10) for name in ("", layout))
    assert alone.losses[-1] < 0.95 * alone.losses[0]
    assert spread.losses == pytest.approx(alone.losses, rel=1e-2)
    assert spread.norms == pytest.approx(alone.norms, rel=5e-2)
