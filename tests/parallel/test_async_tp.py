"""Overlapping tensor parallelism's messages with its products changes no number, on any mesh, compiled, recomputed or split backward."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.distributed as dist

from paraxis.base.errors import ConfigError
from paraxis.base.layout import Gather
from paraxis.base.strategy import ParallelConfig, RematConfig
from paraxis.data.config import DataConfig
from paraxis.models.decoder import Decoder
from paraxis.models.llama import LlamaConfig
from paraxis.models.mlp import MLP
from paraxis.models.qwen2 import Qwen2Config
from paraxis.models.qwen3 import Qwen3MoEConfig
from paraxis.ops.routing import RoutingConfig
from paraxis.optim.config import OptimConfig
from paraxis.parallel.overlap import read_while_gathering, scatter_while_multiplying
from paraxis.train.config import RunConfig, TrainConfig
from tests.measure import MadeRows, Measured, measure, worst_difference
from tests.order import Order
from tests.worlds import WorldError, run_world

ROWS, SEQ_LEN, VOCAB = 8, 32, 64
MODEL = LlamaConfig(vocab_size=VOCAB, width=32, layers=2, heads=8, kv_heads=4, mlp_width=64)
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "width": 32, "layers": 2, "heads": 8}
BIASED = Qwen2Config(**SIZES, kv_heads=4, mlp_width=64)
MIXTURE = Qwen3MoEConfig(**SIZES, kv_heads=4, head_size=4, mlp_width=16, routing=RoutingConfig(experts=4, chosen=2))
BASE = RunConfig(
    model=MODEL,
    data=DataConfig(seq_len=SEQ_LEN),
    train=TrainConfig(micro_batch=2, global_tokens=ROWS * SEQ_LEN),
    optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.05),
    precision="fp64",
)
OPTIONS = {
    "": BASE,
    "compiled": replace(BASE, compile="aot_eager"),
    "selective": replace(BASE, remat=RematConfig(mode="selective")),
    "full": replace(BASE, remat=RematConfig(mode="full")),
    "compiled, selective": replace(BASE, compile="aot_eager", remat=RematConfig(mode="selective")),
    "compiled, full": replace(BASE, compile="aot_eager", remat=RematConfig(mode="full")),
    "documents": replace(BASE, data=DataConfig(seq_len=SEQ_LEN, document_mask=True)),
    "one row": replace(BASE, train=replace(BASE.train, micro_batch=1)),
}


def measured(config: RunConfig, layout: str, overlap: bool) -> Measured:
    rows = MadeRows(VOCAB, SEQ_LEN, documents=config.data.document_mask)
    return measure(config=config, layout=layout, rows=rows, parallel={"async_tp": overlap})


@cache
def alone(config: RunConfig) -> Measured:
    return measured(replace(config, compile="none", remat=RematConfig()), "", overlap=False)


def assert_same(found: Measured, expected: Measured, tolerance: float = 1e-10) -> None:
    assert found.losses == pytest.approx(expected.losses, rel=tolerance)
    assert found.norms == pytest.approx(expected.norms, rel=tolerance)
    assert worst_difference(found.grads, expected.grads) < (tolerance, "")
    assert worst_difference(found.weights, expected.weights) < (10 * tolerance, "")


COVERED = [("tp2", option) for option in OPTIONS if option != "compiled, full"] + [("tp4", ""), ("tp4", "documents")]
MATRIX = [
    pytest.param(layout, option, marks=() if (layout, option) in COVERED else pytest.mark.full, id=f"{layout}-{option}".replace(" ", "_"))
    for layout in ("tp2", "tp4")
    for option in OPTIONS
]


@pytest.mark.parametrize(("layout", "option"), MATRIX)
def test_overlapping_changes_no_number(layout: str, option: str):
    assert_same(measured(OPTIONS[option], layout, overlap=True), alone(OPTIONS[option]))


@pytest.mark.parametrize("layout", ["tp2", "tp4"])
def test_on_and_off_agree(layout: str):
    assert_same(measured(BASE, layout, overlap=True), measured(BASE, layout, overlap=False), 1e-13)


@pytest.mark.parametrize("layout", ["fsdp2 x tp2", "pp2 x tp2", "pp2.zbh1 x tp2", "pp2.zbv x tp2", "cp2.ring x tp2"])
def test_other_axes_beside_it_change_no_number(layout: str):
    config = replace(BASE, model=replace(MODEL, layers=4), train=replace(BASE.train, micro_batch=1))
    assert_same(measured(config, layout, overlap=True), alone(config))


@pytest.mark.parametrize("model", [pytest.param(BIASED, id="biases"), pytest.param(MIXTURE, id="mixture of experts")])
def test_every_kind_of_model_overlaps_what_it_can(model: Any):
    config = replace(BASE, model=model)
    assert_same(measured(config, "tp2", overlap=True), alone(config))


def test_every_exchange_starts_before_the_products_that_hide_it():
    started = run_world(_order, 2)
    for forward, backward in started:
        assert forward == ["send", "product", "product", "wait", "product", "product", "product", "send", "product", "wait"]
        # Of the output's gradient, then of the input's; the weights' gradients are made while those travel.
        assert backward == ["send", "product", "wait", "product", "product"] + ["product"] * 2 + ["send"] + ["product"] * 4 + ["wait"]


def _order() -> tuple[list[str], list[str]]:
    mlp, group = MLP(4, 8), dist.distributed_c10d._get_default_group()
    read_while_gathering(mlp, ("gate_proj", "up_proj"), group)
    scatter_while_multiplying(mlp.down_proj, group)
    x = torch.randn(1, 3, 4, requires_grad=True)
    with Order() as forward:
        y = mlp(x)
    with Order() as backward:
        y.backward(torch.randn(1, 3, 4))
    return forward.seen, backward.seen


def test_it_is_refused_without_tensor_parallelism():
    with pytest.raises(ConfigError, match=r"parallel.async_tp=True says nothing while parallel.tp=1; raise that, or leave this out"):
        ParallelConfig(async_tp=True)


def test_a_reader_that_is_not_split_along_its_outputs_is_refused():
    with pytest.raises(WorldError, match=r"mlp.down_proj reads what layers.0.mlp gathers, but does not split its weight by"):
        measured(replace(BASE, model=WrongReaders(**SIZES, kv_heads=4, mlp_width=64)), "tp2", True)


class WrongReaders(LlamaConfig):
    """A Llama whose table says that its last product reads what is gathered."""

    def build(self) -> Decoder:
        model = super().build()
        model.layout = {**Decoder.layout, "layers.*.mlp": Gather(readers=("gate_proj", "down_proj"))}  # type: ignore[misc]
        return model
