"""Timed steps: what is priced, what a compiler merges, and what follows for whole runs."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from paraxis.plan.cluster_file import read_cluster
from paraxis.plan.fusion import inlined, last_uses, merged
from paraxis.plan.operators import GATHERED, Operator
from paraxis.plan.predict import Prediction, predict
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.rates import HOST
from paraxis.plan.record import Trace
from paraxis.plan.trace import trace_step
from paraxis.recipes.find import find
from paraxis.train.config import RunConfig

H100 = PretendedDevice("cpu", 0, "NVIDIA H100 80GB HBM3", 79 << 30, (9, 0))


def config_of(settings: dict[str, object]) -> RunConfig:
    """A wide model, so that work counts; with short rows, and nothing recomputed."""
    return find("llama3_8b", {"compile": "none", "remat.mode": "none", "data.seq_len": 1024, **settings})[0]


def predicted(ranks: int, settings: dict[str, object], *, host: float = 1.0, **options: Any) -> Prediction:
    """On a DGX H100 whose host takes `host` times as long to ask for operators."""
    cluster = read_cluster("dgx_h100").with_devices(ranks)
    [(name, chip)] = cluster.accelerators.items()
    chip = replace(chip, **{constant: getattr(chip, constant) * host for constant in HOST})
    return predict(config_of(settings), replace(cluster, accelerators={name: chip}), ranks, **options)


def elementwise(reads: list[int], writes: list[int], bytes: int = 100) -> Operator:
    touched = {"reads": tuple((place, bytes) for place in reads), "writes": tuple((place, bytes) for place in writes)}
    return Operator(name="aten::mul", sort="traffic", fusible=True, **touched)


def product(reads: list[int], writes: list[int]) -> Operator:
    touched = {"reads": tuple((place, 100) for place in reads), "writes": tuple((place, 100) for place in writes)}
    return Operator(name="aten::mm", sort="product", dtype="bf16", sizes=(8, 8, 8, 1), **touched)


def test_elementwise_neighbours_are_one_kernel_that_leaves_out_what_is_between():
    chain = [elementwise([0], [1]), elementwise([1], [2]), elementwise([2, 0], [3]), product([3], [4])]
    found, inside = merged(chain, len(chain), last_uses(chain))
    assert [one.name for one in found] == ["merged", "aten::mm"]
    assert (found[0].reads, found[0].writes) == (((0, 100),), ((3, 100),))
    assert inside == {1, 2}


def test_a_product_on_the_way_keeps_kernels_apart():
    chain = [elementwise([0], [1]), product([1], [2]), elementwise([2, 0], [3]), product([3, 1], [4])]
    found, inside = merged(chain, len(chain), last_uses(chain))
    assert [one.name for one in found] == ["merged", "aten::mm", "merged", "aten::mm"]
    assert not inside


def test_what_is_used_after_the_phase_is_written():
    chain = [elementwise([0], [1]), elementwise([1], [2]), product([2], [3]), product([1], [4])]
    assert merged(chain[:3], 3, last_uses(chain))[1] == set()
    assert merged(chain[:3], 3, last_uses(chain[:3]))[1] == {1}


def test_what_is_cheap_to_compute_again_is_read_from_its_sources_instead():
    # A wide copy (300) of a narrow tensor (100), which a kernel after the product takes: the narrow one is read again.
    wide = Operator(name="aten::to", sort="traffic", fusible=True, reads=((0, 100),), writes=((1, 300),))
    last = Operator(name="aten::mul", sort="traffic", fusible=True, reads=((1, 300), (3, 100)), writes=((4, 100),))
    chain = [wide, product([2], [3]), last]
    found = inlined(merged(chain, len(chain), last_uses(chain))[0], len(chain), last_uses(chain))
    assert [one.name for one in found] == ["aten::mm", "merged"]
    assert sorted(found[1].reads) == [(0, 100), (3, 100)]
    used_later = [*chain, product([1], [5])]
    kept = inlined(merged(chain, len(chain), last_uses(used_later))[0], len(chain), last_uses(used_later))
    assert [one.name for one in kept] == ["merged", "aten::mm", "merged"]


def test_a_host_that_asks_in_no_time_is_the_least_a_step_takes(apart: Callable[..., Any]):
    settings = {"parallel.tp": 2, "model.layers": 4}
    steps_s = apart(lambda: [predicted(2, settings, host=host).step_s for host in (0.0, 1.0, 4.0)])
    assert steps_s[0] < steps_s[1] < steps_s[2]


def test_a_traced_step_has_the_models_products_and_attention(apart: Callable[..., Any]):
    settings = {"model.layers": 2}

    def traced() -> Trace:
        return trace_step(config_of(settings), 1, 0, H100)

    trace: Trace = apart(traced)
    config = config_of(settings)
    counted = sum(operator.flops for operator in trace.operators)
    # The model counts attention's backward as two forwards; the kernel makes one of its five products again.
    attention = sum(operator.flops for operator in trace.operators if operator.sort == "attention" and operator.backward) / 5
    assert counted - attention == pytest.approx(config.model.flops_per_token(1024) * 1024, rel=0.01)


@pytest.mark.parametrize(("travel", "exchange", "itemsize"), [("auto", "all_to_all", 2), ("reduced", "reduce_scatter", 4)])
def test_fsdp_gathers_and_reduces_every_parameter_as_it_really_does(travel: str, exchange: str, itemsize: int, apart: Callable[..., Any]):
    def traced() -> Trace:
        return trace_step(config_of({"parallel.fsdp": 4, "parallel.travel": travel, "model.layers": 3}), 4, 1, H100)

    trace: Trace = apart(traced)
    with torch.device("meta"):
        model = config_of({"model.layers": 3}).model.build()
    parameters = sum(p.numel() for p in model.parameters())
    blocks = sum(p.numel() for block in model.blocks() for p in block.parameters())
    kinds = {"all_gather": "all_gather", "reduce_scatter": exchange}
    moved = dict.fromkeys(kinds, 0)
    for operator in trace.operators:
        if operator.lane in kinds and operator.exchange == kinds[operator.lane]:
            assert operator.group == (0, 1, 2, 3)
            moved[operator.lane] += operator.bytes
    assert moved["all_gather"] == pytest.approx(2 * (parameters + blocks), rel=0.01)  # bf16; blocks forward and backward
    copied = sum(bytes for operator in trace.operators if operator.name == GATHERED for _, bytes in operator.writes)
    assert copied == pytest.approx(moved["all_gather"] / 4, rel=0.01)  # each rank's own part into its place
    assert moved["reduce_scatter"] == pytest.approx(itemsize * parameters, rel=0.01)
    begun = [operator.lane for operator in trace.operators if operator.sort == "begin"]
    assert begun.count("all_gather") == 2 + 2 * 3  # what is beside the blocks, and the head, once
    assert begun.count("reduce_scatter") == 2 + 3


def test_weights_that_travel_in_float8_are_half_the_bytes_and_are_cast_once_a_step(apart: Callable[..., Any]):
    settings = {"parallel.fsdp": 4, "model.layers": 3, "model.width": 1024, "precision": "float8_tensorwise"}

    def exchanged(gather: str, kind: str) -> list[int]:
        trace = trace_step(config_of({**settings, "float8.gather": gather}), 4, 1, H100)
        return [one.bytes for one in trace.operators if one.exchange == kind]

    whole, half = (sum(apart(exchanged, gather, "all_gather")) for gather in ("bf16", "float8"))
    with torch.device("meta"):
        blocks = config_of(settings).model.build().blocks()
    weights = sum(p.numel() for block in blocks for p in block.parameters() if p.dim() == 2)
    assert whole - half == pytest.approx(2 * weights, rel=0.01)  # a byte less for each, forward and backward
    scales = 4 * 3 * 4  # an fp32 number for each of four products of three blocks
    assert [apart(exchanged, gather, "all_reduce").count(scales) for gather in ("bf16", "float8")] == [0, 1]


RUNS: dict[str, tuple[int, dict[str, object]]] = {
    "sharded": (8, {"parallel.fsdp": 8, "model.layers": 7}),
    "pipeline": (4, {"parallel.pp": 2, "parallel.fsdp": 2, "parallel.microbatches": 6, "model.layers": 10}),
    "tensors": (4, {"parallel.tp": 2, "parallel.fsdp": 2, "model.layers": 6, "parallel.microbatches": 4, "remat.mode": "full"}),
}


@pytest.mark.parametrize("name", RUNS)
def test_a_prediction_from_few_blocks_takes_as_long_as_the_whole_step(name: str, apart: Callable[..., Any]):
    ranks, settings = RUNS[name]
    few, whole = apart(lambda: (predicted(ranks, settings), predicted(ranks, settings, exact=True)))
    assert few.step_s == pytest.approx(whole.step_s, rel=0.005)
    assert few.exposed_s == pytest.approx(whole.exposed_s, rel=0.01, abs=1e-6)
    assert few.bubble == pytest.approx(whole.bubble, abs=0.005)
    assert few.allocated == pytest.approx(whole.allocated, rel=0.005)
    assert few.reserved == pytest.approx(whole.reserved, rel=0.05)


def test_a_pipeline_of_equal_stages_has_the_bubble_of_its_schedule(apart: Callable[..., Any]):
    common = {"parallel.pp": 2, "model.layers": 8, "parallel.cuts": "4,4"}
    waits = apart(lambda: [predicted(2, {**common, "parallel.microbatches": number}).bubble for number in (2, 8)])
    # The last stage has the vocabulary's product besides, for which the other waits: more than (p - 1) / m, and less with more to do.
    assert waits[0] > waits[1] > 1 / 8


def test_what_is_reduced_to_one_number_is_known_only_to_the_next_kernel():
    # largest = x.abs().amax(); y = x * scale(largest): x is read twice, whatever is done with the number between.
    largest = replace(elementwise([0], []), writes=((1, 4),))
    scale = replace(elementwise([], []), reads=((1, 4),), writes=((2, 4),))
    cast = replace(elementwise([], [3]), reads=((0, 100), (2, 4)))
    chain = [largest, scale, cast]
    found, _ = merged(chain, len(chain), last_uses(chain))
    assert [[place for place, _ in one.reads] for one in found] == [[0], [1, 0]]
    assert sum(bytes for one in inlined(found, len(chain), last_uses(chain)) for _, bytes in one.reads) > 200


def test_more_work_takes_longer_and_compiling_less(apart: Callable[..., Any]):
    def steps() -> dict[str, Prediction]:
        changes: dict[str, dict[str, object]] = {
            "plain": {},
            "deeper": {"model.layers": 8},
            "longer": {"data.seq_len": 2048},
            "recomputed": {"remat.mode": "full"},
            "compiled": {"compile": "inductor"},
            "more": {"parallel.microbatches": 4},
        }
        return {name: predicted(2, {"parallel.fsdp": 2, "model.layers": 6} | change, host=0.0) for name, change in changes.items()}

    found = apart(steps)
    plain = found["plain"]
    for name in ("deeper", "longer", "recomputed", "more"):
        assert found[name].step_s > plain.step_s, name
    assert found["compiled"].step_s < plain.step_s
    assert found["longer"].mfu > plain.mfu
    assert plain.tokens_per_s == pytest.approx(1024 / plain.step_s)


def test_large_products_are_foretold_faster_in_float8(apart: Callable[..., Any]):
    settings = {"model.width": 4096, "model.mlp_width": 14336, "model.heads": 32, "model.kv_heads": 8, "compile": "inductor"}

    def steps(length: int, host: float) -> list[float]:
        rows = {**settings, "data.seq_len": length}
        return [predicted(2, {**rows, "precision": p}, host=host).step_s for p in ("bf16", "float8_tensorwise")]

    # Casts are kernels to ask for, which takes a host that is never fast enough longer than short rows' products save.
    for length, host in ((4096, 0.0), (16384, 1.0)):
        bf16, float8 = apart(lambda length=length, host=host: steps(length, host))
        assert float8 < bf16


def test_a_backward_that_is_split_is_timed_as_it_runs_which_is_not_compiled(apart: Callable[..., Any]):
    settings = {"parallel.pp": 2, "parallel.schedule": "zbh1", "parallel.microbatches": 4, "model.layers": 4}
    auto, none = apart(lambda: [predicted(2, {**settings, "compile": mode}).step_s for mode in ("auto", "none")])
    assert auto == none


def test_ranks_that_are_placed_across_hosts_wait_for_the_slower_link(apart: Callable[..., Any]):
    settings = {"parallel.tp": 2, "model.layers": 4, "data.seq_len": 4096}

    def both() -> list[Prediction]:
        cluster = read_cluster("dgx_h100").with_devices(16)
        return [predict(config_of(settings), cluster, 2, placement=devices) for devices in ((0, 1), (0, 8))]

    near, far = apart(both)
    assert far.exposed_s > near.exposed_s
    assert far.step_s > near.step_s
    assert far.allocated == near.allocated


def test_a_cluster_without_enough_devices_is_refused():
    from paraxis.base.errors import ConfigError

    with pytest.raises(ConfigError, match="which has 8"):
        predict(config_of({"parallel.fsdp": 16}), read_cluster("dgx_h100"), 16)
