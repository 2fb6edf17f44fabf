"""LowPrecision training: which layers, the same curve on every layout and beside bf16, and what it is refused with."""

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paraxis.base.dtypes import PRECISIONS, Float8Config, low_precision, scoring_dtype
from paraxis.base.errors import ConfigError
from paraxis.base.strategy import RematConfig
from paraxis.models.llama import LlamaConfig
from paraxis.ops.float8 import CPU_SCALES_ROWS, Operand, dequantise
from paraxis.ops.float8_weight import Float8Weight
from paraxis.optim.config import OptimConfig
from paraxis.parallel.lowp import convert_linears
from paraxis.recipes import RECIPES
from paraxis.train.check import check
from paraxis.train.config import RunConfig
from paraxis.train.step import make_gradients, train_step
from tests.measure import MadeRows, Measured, measure, run_of, with_layout
from tests.properties.test_axes import MODELS
from tests.train.test_precision import Seen, Watch, called

FLOAT8 = tuple(name for name, precision in PRECISIONS.items() if precision.scaling)
VOCAB, SEQ_LEN, ROWS = 96, 32, 4
MODEL = LlamaConfig(vocab_size=VOCAB, width=64, layers=2, heads=8, kv_heads=4, mlp_width=128)
BLOCKY = LlamaConfig(vocab_size=VOCAB, width=256, layers=2, heads=4, kv_heads=2, mlp_width=256)  # 128 divides all features

IN_FLOAT8 = Float8Config(gather="float8")

World = Callable[..., list[Any]]


def tiny(layout: str = "", precision: str = "float8_tensorwise", **changes: Any) -> RunConfig:
    """Four rows a step; of 128 tokens for blocks of as many."""
    blocky = precision == "float8_blockwise"
    config = RECIPES["debug"]()
    config = replace(
        config,
        model=BLOCKY if blocky else MODEL,
        data=replace(config.data, seq_len=128 if blocky else SEQ_LEN),
        train=replace(config.train, micro_batch=1, global_tokens=ROWS * (128 if blocky else SEQ_LEN)),
        optim=OptimConfig(lr=1e-3, warmup=0),
        precision=precision,
    )
    return with_layout(replace(config, **changes), layout)


def rows_of(config: RunConfig) -> MadeRows:
    return MadeRows(config.model.vocab_size, config.data.seq_len)


@cache
def one_process(precision: str) -> Measured:
    config = tiny("", precision)
    return measure(config=config, layout="", rows=rows_of(config), steps=3)


def apart(found: Measured, expected: Measured) -> dict[str, float]:
    """The size of each gradient's difference over its own."""
    return {name: float((grad - expected.grads[name]).norm() / expected.grads[name].norm()) for name, grad in found.grads.items()}


LINES: list[tuple[str, str, dict[str, Any]]] = [
    ("float8_tensorwise", "fsdp2", {}),
    ("float8_tensorwise", "tp2", {}),
    ("float8_tensorwise", "pp2", {}),
    ("float8_tensorwise", "cp2.ring", {"remat": RematConfig(mode="selective")}),
    ("float8_tensorwise", "fsdp2xtp2", {"remat": RematConfig(mode="selective"), "compile": "aot_eager"}),
    ("float8_rowwise", "tp2", {"remat": RematConfig(mode="full")}),
    ("float8_rowwise", "fsdp2", {"compile": "aot_eager"}),
    ("float8_blockwise", "fsdp2", {}),
    ("float8_blockwise", "tp2", {}),
    ("mxfp8", "fsdp2", {"compile": "aot_eager"}),
    ("mxfp8", "tp2", {}),
    ("nvfp4", "fsdp2", {}),
    ("nvfp4", "tp2", {"remat": RematConfig(mode="full")}),
    ("float8_tensorwise", "fsdp2xtp2", {"float8": IN_FLOAT8}),
    ("float8_tensorwise", "pp2xfsdp2", {"float8": IN_FLOAT8, "remat": RematConfig(mode="selective")}),
    ("float8_tensorwise", "dp2xfsdp2", {"float8": IN_FLOAT8, "compile": "aot_eager", "remat": RematConfig(mode="selective")}),
]
COVERING = (0, 1, 2, 5, 8, 10, 12, 13)


@pytest.mark.parametrize(
    ("precision", "layout", "changes"),
    [pytest.param(*line, marks=() if n in COVERING else pytest.mark.full, id=f"{line[0]} {line[1]} {n}") for n, line in enumerate(LINES)],
)
def test_a_layout_trains_as_one_process_does(precision, layout, changes):
    """To what bf16 keeps of sums: scales of parts are no coarser than those of wholes, and round alike. Four bits keep less, and gradients
    of a part of the features are rounded stochastically by other numbers."""
    coarser = 4 if precision == "nvfp4" else 1
    config = tiny(layout, precision, **changes)
    found, expected = measure(config=config, layout=layout, rows=rows_of(config), steps=3), one_process(precision)
    assert found.losses == pytest.approx(expected.losses, rel=coarser * 2e-3)
    assert found.norms == pytest.approx(expected.norms, rel=coarser * 2e-2)
    differences = apart(found, expected)
    assert max(differences.values()) < coarser * 0.1, differences


class Steps(MadeRows):
    """Rows that can be learned: each token is five times the one before, and one more; but a third of them are anything."""

    def row(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(index)
        tokens = rng.integers(0, self.vocab_size, self.seq_len + 1)
        for place in range(1, len(tokens)):
            if rng.random() > 1 / 3:
                tokens[place] = (5 * tokens[place - 1] + 1) % self.vocab_size
        return {"tokens_bt": tokens[:-1], "targets_bt": tokens[1:], "positions_bt": np.arange(self.seq_len)}


def losses(config: RunConfig, steps: int) -> list[float]:
    run = run_of(config, Steps(config.model.vocab_size, config.data.seq_len))
    loader = run.loader()
    try:
        return [train_step(run, next(loader), lr=3e-3).loss for _ in range(steps)]
    finally:
        loader.close()


@pytest.mark.parametrize("precision", [FLOAT8[0], *(pytest.param(name, marks=pytest.mark.full) for name in FLOAT8[1:])])
def test_few_bits_learn_as_fast_as_bf16(precision: str, world: World):
    """The mean of the last ten losses, after most of what there is to learn has been learned."""
    config = replace(tiny("", precision), train=replace(tiny("", precision).train, micro_batch=ROWS))
    (found,), (expected,) = (world(1, losses, replace(config, precision=name), 60) for name in (precision, "bf16"))
    assert sum(expected[-10:]) < 0.75 * sum(expected[:10]), "or nothing was learned"
    assert sum(found[-10:]) == pytest.approx(sum(expected[-10:]), rel=0.05 if precision == "nvfp4" else 0.01)


def watched_step(config: RunConfig) -> tuple[Seen, set[torch.dtype]]:
    run = run_of(config, rows_of(config))
    loader = run.loader()
    try:
        with Watch() as watch:
            train_step(run, next(loader), lr=1e-3)
    finally:
        loader.close()
    state = {tensor.dtype for tensors in run.optimizer.state().values() for tensor in tensors.values()}
    return watch.seen, state | {shard.local.dtype for shard in run.shards}


E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
BY_ROWS = pytest.mark.skipif(not CPU_SCALES_ROWS, reason="this torch's CPU kernel has no scales for rows; the reference multiplies")


@pytest.mark.parametrize(("precision", "gradient"), [("float8_tensorwise", E5M2), pytest.param("float8_rowwise", E4M3, marks=BY_ROWS)])
@pytest.mark.parametrize("layout", ["", "tp2"])
def test_every_linear_layer_of_the_blocks_multiplies_in_float8_and_masters_stay_in_fp32(precision, gradient, layout, world: World):
    config = tiny(layout, precision)
    for seen, stored in world(config.parallel.degrees.ranks, watched_step, config):
        products = called(seen, ("_scaled_mm",), collective=False)
        # Of each row and layer: q, k and v in one, o, gate and up in one, down. Forward, and twice backward.
        formats = {dtypes[:2] if dtypes[1] in (E4M3, E5M2) else dtypes[:1] * 2: count for (_, dtypes), count in products.items()}
        forward = ROWS * MODEL.layers * 4
        if gradient == E4M3:
            assert formats == {(E4M3, E4M3): 3 * forward}
        else:
            assert formats == {(E4M3, E4M3): forward, (E5M2, E4M3): 2 * forward}
        rest = called(seen, ("mm", "addmm"), collective=False)
        assert sum(rest.values()) == 3 * ROWS, f"besides, only the head multiplies: {rest}"
        assert stored == {torch.float32}


def layers_in_float8(config: RunConfig, caplog: pytest.LogCaptureFixture) -> tuple[list[str], str]:
    """The linear layers of the blocks that are converted, and what is logged."""
    with torch.device("meta"):
        model = config.model.build()
    recipe = low_precision(PRECISIONS[config.precision], config.float8)
    assert recipe is not None
    before = {name: module.forward for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    caplog.clear()
    with caplog.at_level(logging.INFO, "paraxis"):
        convert_linears(model, model.layout, recipe)
    after = dict(model.named_modules())
    return [name for name, forward in before.items() if after[name].forward != forward], caplog.text


def test_routers_experts_head_and_what_does_not_divide_stay_in_bf16(caplog):
    layers, said = layers_in_float8(tiny(model=replace(MODELS["deepseek"], mlp_width=64)), caplog)
    assert {name.rpartition(".")[2] for name in layers} == {"kv_b_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert not any("router" in name or "experts" in name for name in layers)
    assert "layers.3.mlp.shared.up_proj" in layers
    assert "layers.1.mlp.router" in said
    assert "kv_a_proj" in said, "of 16 + 4 features"


def test_layers_that_are_skipped_stay_in_bf16(caplog):
    layers, said = layers_in_float8(tiny(float8=Float8Config(skip=("layers.0.*", "*.k_proj"))), caplog)
    assert layers == [f"layers.1.{name}_proj" for name in ("attention.q", "attention.v", "attention.o", "mlp.gate", "mlp.up", "mlp.down")]
    assert "8 linear layers stay in bf16, as float8.skip says" in said


def refusal(config: RunConfig, ranks: int = 1) -> str:
    with pytest.raises(ConfigError) as refused:
        check(config, ranks)
    return str(refused.value)


def test_what_float8_cannot_do_is_refused_with_the_reason():
    split = tiny("tp2")
    assert "async_tp" in refusal(replace(split, parallel=replace(split.parallel, async_tp=True)), 2)
    assert "zbh1" in refusal(tiny("pp2.zbh1"), 2)
    odd = tiny(data=replace(tiny().data, seq_len=24), train=replace(tiny().train, global_tokens=96))
    assert "multiples of 16 tokens" in refusal(odd)
    with pytest.raises(ConfigError, match="one way only"):
        tiny(precision="float8_blockwise", float8=Float8Config(fast_sums="all"))
    with pytest.raises(ConfigError, match="float8_rowwise has many"):
        tiny(precision="float8_rowwise", float8=IN_FLOAT8)


def test_settings_without_effect_are_refused():
    with pytest.raises(ConfigError, match=r"float8\.skip says nothing while precision=bf16"):
        tiny(precision="bf16", float8=Float8Config(skip=("*.o_proj",)))
    assert "no weight is gathered" in refusal(tiny("tp2", float8=IN_FLOAT8), 2)
    assert "float8.skip=*.other matches no linear layer" in refusal(tiny(float8=Float8Config(skip=("*.other",))))
    assert "finds no linear layer" in refusal(tiny(float8=Float8Config(skip=("layers.*",))))
    assert "multiples of 128" in refusal(tiny(precision="float8_blockwise", model=MODEL))
    split = replace(tiny("tp4"), model=replace(MODEL, width=32, heads=4, kv_heads=4, mlp_width=32))
    assert "a rank's features are not multiples of 16" in refusal(split, 4)
    check(replace(split, model=replace(split.model, mlp_width=64)), 4)


def test_a_pattern_may_match_layers_of_one_pipeline_stage_alone(world: World):
    config = tiny("pp2", float8=Float8Config(skip=("layers.0.*",)))
    assert [called(seen, ("_scaled_mm",), collective=False) != {} for seen, _ in world(2, watched_step, config)] == [False, True]


def test_scoring_refuses_a_precision_of_training():
    assert scoring_dtype("bf16") == torch.bfloat16
    with pytest.raises(ConfigError, match="float8_rowwise is a way to train"):
        scoring_dtype("float8_rowwise")


def gathered_weights(config: RunConfig) -> list[dict[str, Any]]:
    """For each of three steps: the weights that a block multiplies with, as numbers, and the masters; the types of what else it has."""
    run = run_of(config, rows_of(config))
    steps: list[dict[str, Any]] = []

    def look(block: nn.Module, args: Any) -> None:
        for name, weight in block.named_parameters():
            if isinstance(weight, Float8Weight):
                steps[-1].setdefault(name, dequantise(Operand(weight.values, weight.inverse)).clone())
            else:
                steps[-1].setdefault("other", set()).add((name.rpartition("_")[2], weight.dtype))

    first = run.modules[0].blocks()[0]  # type: ignore[operator]
    first.register_forward_pre_hook(look)  # after FSDP's, which gathers
    loader = run.loader()
    try:
        for _ in range(3):
            masters = {name: parameter.full_tensor().detach().clone() for name, parameter in first.named_parameters()}
            steps.append({"masters": masters})
            train_step(run, next(loader), lr=0.5)
    finally:
        loader.close()
    return steps


@pytest.mark.parametrize("layout", ["fsdp2", "fsdp2xtp2"])
def test_weights_gathered_in_float8_are_the_masters_of_this_step(layout, world: World):
    config = tiny(layout, float8=IN_FLOAT8)
    for steps in world(config.parallel.degrees.ranks, gathered_weights, config):
        for step in steps:
            assert step["other"] == {("norm.weight", torch.bfloat16)}
            masters = {name: master for name, master in step["masters"].items() if "norm" not in name}
            assert len(masters) == 7
            for name, master in masters.items():
                off = (step[name] - master).abs()
                assert bool((off <= (master.abs() * 2.0**-4).clamp(min=float(master.abs().max()) * 2.0**-13)).all()), name
        moved = [(a["masters"][name] - b["masters"][name]).abs().max() for a, b in pairwise(steps) for name in masters]
        assert min(moved) > 0.1, "or following would not show"


def test_gathering_in_float8_sends_half_the_bytes(world: World):
    """Of the blocks' weights; norms travel in bf16, as embedding and head do."""
    sent = {}
    for gather in ("bf16", "float8"):
        config = tiny("fsdp2", float8=Float8Config(gather=gather))
        (sent[gather], _) = world(2, bytes_gathered, config)
    blocks = sum(size for name, size in sizes_of(config).items() if name.endswith("_proj.weight"))
    times = 2 * ROWS // 2  # forward and backward of each of a rank's rows
    assert sent["bf16"] - sent["float8"] == times * blocks // 2, "a byte for each entry of a rank's half"


def sizes_of(config: RunConfig) -> dict[str, int]:
    with torch.device("meta"):
        return {name: parameter.numel() for name, parameter in config.model.build().named_parameters()}


class Bytes(TorchDispatchMode):
    """Adds up what goes into all-gathers."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d" and "allgather" in func.__name__:
            *_, sent = [x for x in tree_leaves(args) if isinstance(x, Tensor)]
            self.sent += sent.numel() * sent.itemsize
        return func(*args, **(kwargs or {}))


def bytes_gathered(config: RunConfig) -> int:
    run = run_of(config, rows_of(config))
    loader = run.loader()
    try:
        with Bytes() as seen:
            make_gradients(run, next(loader))
    finally:
        loader.close()
    return seen.sent
