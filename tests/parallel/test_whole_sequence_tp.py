"""Tensor parallelism without sequence parallelism: the numbers of one process, on any mesh, for every kind of model."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode

from paraxis.base.errors import ConfigError
from paraxis.base.strategy import ParallelConfig, RematConfig
from paraxis.data.config import DataConfig
from paraxis.models.deepseek import DeepSeekConfig
from paraxis.models.gpt import GPTConfig
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen3 import Qwen3Config, Qwen3MoEConfig
from paraxis.ops.routing import RoutingConfig
from paraxis.optim.config import OptimConfig
from paraxis.recipes.find import find
from paraxis.train.check import check
from paraxis.train.config import RunConfig, TrainConfig
from tests.measure import MadeRows, Measured, batches_of, measure, run_of, with_layout
from tests.properties.test_layouts import assert_same
from tests.worlds import run_world

ROWS, SEQ_LEN, VOCAB = 8, 32, 64
SIZES: dict[str, Any] = {"vocab_size": VOCAB, "width": 32, "layers": 4, "heads": 8}
ROUTING = RoutingConfig(experts=8, chosen=2, balance_loss=0.1, z_loss=0.1, bias_rate=0.05)
MODELS: dict[str, Any] = {
    "gpt": GPTConfig(**SIZES, max_seq_len=40),
    "gpt, free head": GPTConfig(**SIZES, max_seq_len=40, tied=False),
    "llama": LlamaConfig(**SIZES, kv_heads=4, mlp_width=64),
    "norms of heads": Qwen3Config(**SIZES, kv_heads=4, head_size=4, mlp_width=64),
    "experts": Qwen3MoEConfig(**SIZES, kv_heads=4, head_size=4, mlp_width=16, routing=ROUTING),
    "latent attention": DeepSeekConfig(
        **SIZES, q_rank=24, kv_rank=16, nope_width=8, rope_width=4, value_width=8, mlp_width=48, expert_width=16, routing=ROUTING
    ),
}


def config_of(model: str, **changes: Any) -> RunConfig:
    settings = {
        "model": MODELS[model],
        "data": DataConfig(seq_len=SEQ_LEN),
        "train": TrainConfig(micro_batch=1, global_tokens=ROWS * SEQ_LEN),
        "optim": OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.05),
        "precision": "fp64",
    }
    return RunConfig(**settings | changes)


def rows_of(config: RunConfig) -> MadeRows:
    return MadeRows(VOCAB, SEQ_LEN, documents=config.data.document_mask)


@cache
def one_process(model: str, documents: bool) -> Measured:
    config = config_of(model, data=DataConfig(seq_len=SEQ_LEN, document_mask=documents))
    return measure(config=config, layout="", rows=rows_of(config))


def agrees(layout: str, model: str, **changes: Any) -> None:
    config = config_of(model, **changes)
    found = measure(config=config, layout=layout, rows=rows_of(config), parallel={"sequence_parallel": False})
    assert_same(found, one_process(model, config.data.document_mask), "fp64")


@pytest.mark.parametrize("model", MODELS)
def test_every_kind_of_model_gives_the_numbers_of_one_process(model: str):
    agrees("tp2", model)


COVERED = ("fsdp2 x tp2", "pp2 x tp2")
LAYOUTS = ("tp4", "pp2.zbh1 x tp2", "cp2.ring x tp2", "cp2.ulysses x tp2", "pp2.zbv x fsdp2 x tp2")


@pytest.mark.parametrize("layout", [*COVERED, *(pytest.param(layout, marks=pytest.mark.full) for layout in LAYOUTS)])
def test_other_axes_beside_it_change_no_number(layout: str):
    agrees(layout, "gpt")


OPTIONS: dict[str, dict[str, Any]] = {
    "selective": {"remat": RematConfig(mode="selective")},
    "full": {"remat": RematConfig(mode="full")},
    "compiled, selective": {"remat": RematConfig(mode="selective"), "compile": "aot_eager"},
    "documents": {"data": DataConfig(seq_len=SEQ_LEN, document_mask=True)},
}


@pytest.mark.parametrize("option", OPTIONS)
def test_recomputing_compiling_and_documents_change_no_number(option: str):
    agrees("tp2", "gpt", **OPTIONS[option])


class Exchanges(TorchDispatchMode):
    """Counts the collectives of activations, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.count: dict[str, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "_c10d_functional" and "wait" not in func.name() and "wrap" not in func.name():
            name = func.name().split("::")[1]
            self.count[name] = self.count.get(name, 0) + 1
        return func(*args, **(kwargs or {}))


def _exchanges(config: RunConfig) -> tuple[dict[str, int], dict[str, int]]:
    run = run_of(config, rows_of(config))
    with Exchanges() as forward:
        loss = run.modules[0](batches_of(rows_of(config), 0, 1))
    with Exchanges() as backward:
        loss.backward()
    assert dist.get_world_size() == 2
    return forward.count, backward.count


def test_a_block_sums_its_two_outputs_in_forward_and_as_often_in_backward_and_gathers_nothing():
    config = with_layout(config_of("gpt"), "tp2")
    config = replace(config, parallel=replace(config.parallel, sequence_parallel=False))
    for counts in run_world(_exchanges, 2, config):
        assert counts == ({"all_reduce": 9}, {"all_reduce": 9})  # four blocks, and the embedding


def test_rows_need_not_be_cut_evenly():
    config = config_of("gpt", data=DataConfig(seq_len=33), train=TrainConfig())
    config = with_layout(config, "tp2")
    with pytest.raises(ConfigError, match=r"data.seq_len=33 is not a multiple of 2"):
        check(config, 2)
    check(replace(config, parallel=replace(config.parallel, sequence_parallel=False)), 2)


def test_rows_longer_than_the_learned_positions_are_refused():
    with pytest.raises(ConfigError, match=r"data.seq_len=64 is longer than the 40 positions that GPT learns .* model.max_seq_len=64"):
        check(config_of("gpt", data=DataConfig(seq_len=64), train=TrainConfig()), 1)


def test_what_would_say_nothing_is_refused():
    with pytest.raises(ConfigError, match=r"parallel.sequence_parallel=False says nothing while parallel.tp=1"):
        ParallelConfig(sequence_parallel=False)
    with pytest.raises(ConfigError, match=r"parallel.async_tp=True .* leave one of them out"):
        ParallelConfig(tp=2, sequence_parallel=False, async_tp=True)


def test_the_setting_reaches_runs_from_the_command_line():
    config, _ = find("debug", {"parallel.tp": "2", "parallel.sequence_parallel": "false"})
    assert not config.parallel.sequence_parallel
    assert not with_layout(config, "tp4").parallel.sequence_parallel
    assert with_layout(config, "fsdp2").parallel.sequence_parallel
