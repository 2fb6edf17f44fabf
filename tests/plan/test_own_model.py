"""Models of one's own are planned as far as they say what planning needs, and refused with what is lacking."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from torch import nn

from paraxis.base.errors import ConfigError
from paraxis.plan.candidates import Space, planned
from paraxis.plan.cluster_file import read_cluster
from paraxis.plan.predict import Prediction, predict
from paraxis.plan.search import Effort, Search
from paraxis.recipes.find import find
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta

OWN = f"{Path(__file__).parents[2]}/examples/convolutional.py:tiny"


def config_of(settings: dict[str, object]) -> RunConfig:
    return find(OWN, {"compile": "none", "precision": "bf16", **settings})[0]


def predicted(config: RunConfig, ranks: int, **options: Any) -> Prediction:
    return predict(config, read_cluster("dgx_h100").with_devices(ranks), ranks, **options)


def test_a_model_that_calls_its_layers_otherwise_is_predicted_with_all_of_them(apart: Callable[..., Any]):
    def both() -> list[Prediction]:
        settings = {"model.depth": 6, "parallel.microbatches": 4}
        return [predicted(config_of({**settings, "parallel.pp": pp}), pp, exact=exact) for pp in (1, 2) for exact in (False, True)]

    for few, whole in zip(*[iter(apart(both))] * 2, strict=True):
        assert few.reserved == pytest.approx(whole.reserved, rel=0.005)
        if few.rank == whole.rank:  # of so small a model two ranks reserve as many pages
            assert few.allocated == pytest.approx(whole.allocated, rel=0.005)
        assert few.step_s == pytest.approx(whole.step_s, rel=0.01)


@dataclass(frozen=True, kw_only=True)
class Listed:
    """The example's model, with a list among its settings."""

    inner: Any
    sizes: list[int]
    vocab_size: int = 512

    def build(self) -> nn.Module:
        return self.inner.build()


def test_settings_that_cannot_be_hashed_are_predicted_all_the_same(apart: Callable[..., Any]):
    plain = config_of({})
    listed = replace(plain, model=Listed(inner=plain.model, sizes=[1, 2]))
    one, other = apart(lambda: [predicted(config, 1).allocated for config in (plain, listed)])
    assert one == other


def test_pipelines_of_a_model_without_a_width_are_refused():
    plain = config_of({"parallel.pp": 2})
    with pytest.raises(ConfigError, match="no field `width`"):
        predicted(replace(plain, model=Listed(inner=plain.model, sizes=[])), 2)


class Whole(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Linear(8, 8)


@dataclass(frozen=True, kw_only=True)
class WholeConfig:
    vocab_size: int = 512

    def build(self) -> nn.Module:
        return Whole()


def test_a_model_without_blocks_is_refused():
    config = replace(config_of({}), model=WholeConfig())
    with pytest.raises(ConfigError, match=r"Whole cannot be planned: it has no blocks\(\)"):
        predicted(config, 1)
    cluster = read_cluster("dgx_h100").with_devices(2)
    with pytest.raises(ConfigError, match=r"no blocks\(\)"):
        Search(Space(planned(config, 2, {}), on_meta(config), 2, {}), cluster, Effort()).run()


def test_stages_that_are_set_have_the_models_layers():
    fixed = {"parallel.cuts": "2,1"}
    config = config_of(fixed | {"parallel.auto": True})
    with pytest.raises(ConfigError, match=r"parallel\.cuts=2,1 gives stages 3 layers in all, and the model has 2"):
        Space(planned(config, 2, fixed), on_meta(config), 2, fixed)
