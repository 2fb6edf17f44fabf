"""A shrunken recipe is small and of the same kind."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from paraxis.base.errors import ConfigError
from paraxis.models.qwen3 import qwen3_30b_a3b
from paraxis.ops.routing import RoutingConfig
from paraxis.recipes import RECIPES
from paraxis.recipes.find import find
from paraxis.verify.shrink import shrunk, shrunk_model

EXAMPLE = Path(__file__).parents[2] / "examples" / "convolutional.py"


def built(config) -> nn.Module:
    with torch.device("meta"):
        return config.build()


def parts(model: nn.Module) -> set[str]:
    """What a model is made of: parameter names without the numbers of layers."""
    return {".".join(word for word in name.split(".") if not word.isdigit()) for name, _ in model.named_parameters()}


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_becomes_small_and_keeps_its_parts(name):
    config = RECIPES[name]()
    small = shrunk(config, "pp2", "fp64")
    model = built(small.model)
    assert parts(model) == parts(built(config.model))
    assert sum(parameter.numel() for parameter in model.parameters()) < 1_000_000
    assert len(list(model.blocks())) == 4
    assert (small.precision, small.train.micro_batch, small.data.seq_len) == ("fp64", 1, 32)


@pytest.mark.parametrize("name", ["llama3_1b", "llama3_8b", "llama3_405b"])
def test_grouped_heads_stay_grouped_as_they_are(name):
    model = RECIPES[name]().model
    small = shrunk_model(model, 2)
    assert small.heads / small.kv_heads == model.heads / model.kv_heads
    assert small.tied == model.tied


def test_routing_keeps_its_gate_and_its_limits():
    routing = RoutingConfig(experts=256, chosen=8, gate="sigmoid", scale=2.5, groups=8, chosen_groups=4, group_score="top2", z_loss=0.1)
    small = shrunk_model(replace(qwen3_30b_a3b(), routing=routing), 2).routing
    assert small == replace(routing, experts=8, chosen=3, groups=4, chosen_groups=2)


@dataclass(frozen=True, kw_only=True)
class Wide:
    """A model of one's own, larger than is taken as it is."""

    vocab_size: int = 16
    width: int = 3000

    def build(self) -> nn.Module:
        return nn.Linear(self.width, self.width)


class KnowsHow(Wide):
    def shrunk(self) -> "Wide":
        return Wide(width=8)


def test_a_small_model_of_one_s_own_is_taken_as_it_is():
    config, _ = find(f"{EXAMPLE}:tiny")
    assert shrunk(config, "dp2", "fp64").model == config.model


def test_a_large_one_is_asked_how_and_refused_where_it_does_not_know():
    with pytest.raises(ConfigError, match=r"Wide has 9,003,000 parameters.* give it a method shrunk\(\)"):
        shrunk_model(Wide(), 2)
    assert shrunk_model(KnowsHow(), 2).width == 8


def test_a_layout_that_leaves_a_degree_open_is_refused():
    with pytest.raises(ConfigError, match="write a degree"):
        shrunk(RECIPES["debug"](), "fsdp-1", "fp64")
