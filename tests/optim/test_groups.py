"""Weight decay falls on the parameters that the name rule leaves to it."""

import pytest

from paraxis.base.errors import ConfigError
from paraxis.optim.config import NO_DECAY, OptimConfig
from paraxis.optim.groups import group_names

SHAPES = {
    "embed.weight": (256, 8),
    "layers.0.attention_norm.weight": (8,),
    "layers.0.attention.q_proj.weight": (8, 8),
    "layers.0.attention.q_proj.bias": (8,),
    "layers.0.mlp.gate": (8,),
    "head.weight": (256, 8),
}


def test_norms_biases_embeddings_and_vectors_do_not_decay_by_default():
    groups = group_names(SHAPES, OptimConfig())
    assert groups["decay"] == ["layers.0.attention.q_proj.weight", "head.weight"]
    assert sorted(groups["decay"] + groups["no_decay"]) == sorted(SHAPES)


def test_vectors_decay_where_asked_and_no_pattern_names_them():
    assert "layers.0.mlp.gate" in group_names(SHAPES, OptimConfig(decay_vectors=True))["decay"]
    assert group_names(SHAPES, OptimConfig(decay_vectors=True, no_decay=()))["no_decay"] == []


def test_a_pattern_of_ones_own_is_followed():
    assert "head.weight" in group_names(SHAPES, OptimConfig(no_decay=(*NO_DECAY, "head.*")))["no_decay"]


def test_a_pattern_of_ones_own_that_matches_nothing_is_refused_with_the_nearest_name():
    with pytest.raises(ConfigError, match=r"'haed\.weight' matches no parameter.*'head\.weight'"):
        group_names(SHAPES, OptimConfig(no_decay=("haed.weight",)))


def test_default_patterns_may_match_nothing():
    assert group_names({"w": (4, 4)}, OptimConfig()) == {"decay": ["w"], "no_decay": []}
