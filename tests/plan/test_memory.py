"""Memory predicted from a few blocks: equal to the trace of the whole step, on every axis and for every kind of recomputation."""

from collections.abc import Callable
from typing import Any

import pytest

from paraxis.plan.memory import Peak, coordinates, different_at_first, sketch
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.record import ROUND, Trace
from paraxis.plan.trace import trace_step
from paraxis.recipes.find import find
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta

H200 = PretendedDevice("cpu", 0, "NVIDIA H200", 140 << 30, (9, 0))
ALLOWED = 0.005
GATHERED_IN_FLOAT8: dict[str, object] = {"precision": "float8_tensorwise", "float8.gather": "float8"}

# A recipe with few or narrow blocks, so many ranks and one of them, and how they are spread.
RUNS: dict[str, tuple[str, int, int, dict[str, object]]] = {
    "sharded, full": ("llama3_8b", 8, 0, {"parallel.fsdp": 8, "model.layers": 6, "remat.mode": "full", "data.seq_len": 1024}),
    "tensors, selective": ("llama3_8b", 16, 5, {"parallel.fsdp": 8, "parallel.tp": 2, "model.layers": 6, "data.seq_len": 1024}),
    "pipeline, none": ("debug", 4, 2, {"parallel.tp": 2, "parallel.pp": 2, "parallel.microbatches": 3, "model.layers": 9}),
    "compiled": ("llama3_8b", 4, 3, {"parallel.fsdp": 4, "model.layers": 6, "compile": "inductor", "data.seq_len": 1024}),
    "as memory allows": (
        *("llama3_8b", 2, 1),
        {"parallel.fsdp": 2, "model.layers": 6, "remat.mode": "budget", "remat.budget": 0.5, "data.seq_len": 1024},
    ),
    "in pieces": ("llama3_8b", 2, 1, {"parallel.cp": 2, "model.layers": 6, "compile": "inductor", "data.seq_len": 1024}),
    "experts": ("qwen3_30b_a3b", 16, 9, {"parallel.fsdp": 16, "model.layers": 5, "data.seq_len": 512}),
    "gathered in float8": ("llama3_8b", 2, 0, {"parallel.fsdp": 2, "model.layers": 6, "data.seq_len": 1024, **GATHERED_IN_FLOAT8}),
}
MORE: dict[str, tuple[str, int, int, dict[str, object]]] = {
    "sharded, none": ("debug", 8, 3, {"parallel.fsdp": 8, "model.layers": 9, "data.seq_len": 512, "precision": "bf16"}),
    "replicas": ("debug", 8, 7, {"parallel.fsdp": 2, "parallel.dp": 4, "model.layers": 8}),
    "micro-batches": ("debug", 2, 1, {"parallel.fsdp": 2, "parallel.microbatches": 3, "parallel.reduce": "step", "model.layers": 7}),
    "zbv": ("debug", 4, 2, {"parallel.fsdp": 2, "parallel.pp": 2, "parallel.schedule": "zbv", "model.layers": 14}),
    "ring": ("debug", 4, 3, {"parallel.cp": 2, "parallel.cp_kind": "ring", "parallel.fsdp": 2, "model.layers": 7, "precision": "bf16"}),
    "ulysses": ("debug", 2, 0, {"parallel.cp": 2, "parallel.cp_kind": "ulysses", "model.layers": 7, "precision": "bf16"}),
    "gathered in float8, compiled": (
        *("llama3_8b", 2, 0),
        {"parallel.fsdp": 2, "model.layers": 6, "compile": "inductor", "data.seq_len": 1024, **GATHERED_IN_FLOAT8},
    ),
    "dense blocks first": ("deepseek_v2_lite", 16, 9, {"parallel.fsdp": 16, "model.layers": 6, "data.seq_len": 512}),
}


def config_of(recipe: str, settings: dict[str, object]) -> RunConfig:
    return find(recipe, {"compile": "none", **settings})[0]


@pytest.mark.parametrize("name", [*RUNS, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_a_prediction_from_few_blocks_is_the_whole_steps_peak(name: str, apart: Callable[..., Any]):
    recipe, ranks, rank, settings = (RUNS | MORE)[name]

    def both() -> tuple[Peak, Peak]:
        config = config_of(recipe, settings)
        return sketch(config, ranks, rank, H200).peak(), sketch(config, ranks, rank, H200, exact=True).peak()

    predicted, exact = apart(both)
    assert predicted.bytes == pytest.approx(exact.bytes, rel=ALLOWED)
    assert exact.reserved is not None
    assert exact.reserved > exact.bytes
    assert (predicted.kind, predicted.stage) == (exact.kind, exact.stage)
    for category, held in exact.held.items():
        assert abs(predicted.held[category] - held) <= ALLOWED * exact.bytes, category


def test_a_step_finds_what_the_state_takes_and_leaves_it(apart: Callable[..., Any]):
    def traced() -> Trace:
        return trace_step(config_of("debug", {"parallel.fsdp": 4, "model.layers": 3}), 4, 1, H200)

    trace: Trace = apart(traced)
    parts = [-(-p.numel() // 4) * 4 for p in on_meta(config_of("debug", {"model.layers": 3})).parameters()]  # fp32, a quarter each
    stored = sum(-(-size // ROUND) * ROUND for size in parts)
    found = dict.fromkeys(trace.category, 0)
    for number, held in trace.before.items():
        found[trace.category[number]] += held
    assert found["parameters"] == pytest.approx(stored, abs=ROUND)
    assert found["optimizer"] == pytest.approx(2 * stored, abs=ROUND)
    assert sum(change for _, change in trace.events) == 0


def test_recomputation_and_sharding_save_memory(apart: Callable[..., Any]):
    def peaks() -> dict[str, int]:
        modes = {mode: {"remat.mode": mode} for mode in ("none", "selective", "full")}
        settings = {**modes, "fsdp": {"parallel.fsdp": 8}}
        common = {"model.layers": 6, "data.seq_len": 512, "precision": "bf16"}
        runs = {name: config_of("debug", {**common, **more}) for name, more in settings.items()}
        return {name: sketch(config, config.parallel.fsdp, 0, H200).peak().held for name, config in runs.items()}

    held = apart(peaks)
    assert held["none"]["activations"] > held["selective"]["activations"] > held["full"]["activations"]
    assert held["fsdp"]["optimizer"] == pytest.approx(held["none"]["optimizer"] / 8, rel=0.05)


def test_all_logits_at_once_are_counted(apart: Callable[..., Any]):
    common = {"model.layers": 2, "data.seq_len": 8192}

    def peaks() -> tuple[int, int, int]:
        few, all_at_once = (config_of("llama3_8b", {**common, "train.loss_tokens": tokens}) for tokens in (1024, 0))
        least, most = (sketch(config, 1, 0, H200).peak().bytes for config in (few, all_at_once))
        return least, most, few.model.vocab_size

    least, most, vocabulary = apart(peaks)
    assert most - least == pytest.approx((8192 - 1024) * vocabulary * 4, rel=0.15)  # in fp32; for a few, gradients count too


def test_documents_are_traced_as_rows_of_one_document(apart: Callable[..., Any]):
    common = {"model.layers": 3, "precision": "bf16"}

    def peaks() -> list[int]:
        settings = ({**common, "data.document_mask": masked} for masked in (False, True))
        return [sketch(config_of("debug", one), 1, 0, H200).peak().bytes for one in settings]

    whole, documents = apart(peaks)
    assert documents == pytest.approx(whole, rel=0.02)


def test_coordinates_are_the_meshs():
    degrees = config_of("debug", {"parallel.pp": 2, "parallel.fsdp": 3, "parallel.tp": 2}).parallel.degrees
    assert coordinates(7, degrees) == {"pp": 1, "dp": 0, "fsdp": 0, "cp": 0, "tp": 1}


def test_blocks_that_differ_are_counted_from_the_first():
    assert different_at_first(on_meta(config_of("debug", {}))) == 0
    assert different_at_first(on_meta(config_of("deepseek_v2_lite", {}))) == 1
