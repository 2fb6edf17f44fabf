"""Every built-in recipe describes a model that can be built: on the meta device, so that 405 billion parameters cost nothing."""

import pytest
import torch

from paraxis.recipes import RECIPES


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_builds_on_meta(name: str):
    config = RECIPES[name]()
    with torch.device("meta"):
        model = config.model.build()
    assert config.name == name
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) > 0
    assert model.blocks()
