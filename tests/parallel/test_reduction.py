"""Gradients that travel as they were computed, and are summed where they arrive, are those that are summed on their way."""

from dataclasses import replace

import pytest
import torch

from paraxis.base.errors import ConfigError
from paraxis.data.config import DataConfig
from paraxis.models.llama import LlamaConfig
from paraxis.ops.sum import reference_sum_parts, sum_parts
from paraxis.optim.config import OptimConfig
from paraxis.train.check import check
from paraxis.train.config import RunConfig, TrainConfig
from tests.measure import MadeRows, Measured, measure, worst_difference

LENGTH, VOCABULARY = 32, 64
BASE = RunConfig(
    model=LlamaConfig(vocab_size=VOCABULARY, width=32, layers=2, heads=4, kv_heads=4, mlp_width=64),
    data=DataConfig(seq_len=LENGTH),
    train=TrainConfig(micro_batch=1, global_tokens=8 * LENGTH),
    optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.05),
    precision="bf16",
)


def measured(layout: str, travel: str, reduce: str, micro_batch: int = 1) -> Measured:
    parallel = replace(BASE.parallel, travel=travel, reduce=reduce)
    config = replace(BASE, parallel=parallel, train=replace(BASE.train, micro_batch=micro_batch))
    return measure(config=config, layout=layout, rows=MadeRows(VOCABULARY, LENGTH, documents=False))


@pytest.mark.parametrize(
    ("layout", "reduce", "micro_batch"),
    [
        ("fsdp2", "step", 4),  # one micro-batch
        ("fsdp2", "step", 1),  # four, added before anything travels
        ("fsdp2", "micro_batch", 1),  # four that travel by themselves
        pytest.param("fsdp2 x tp2", "micro_batch", 1, marks=pytest.mark.full),
        pytest.param("cp2", "micro_batch", 1, marks=pytest.mark.full),
        pytest.param("dp2 x fsdp2", "step", 2, marks=pytest.mark.full),
        ("dp2 x fsdp2", "micro_batch", 1),
        ("pp2 x fsdp2", "micro_batch", 1),
        pytest.param("pp2 x fsdp2", "step", 1, marks=pytest.mark.full),
    ],
)
def test_between_two_ranks_it_changes_no_bit(layout: str, reduce: str, micro_batch: int):
    found, expected = (measured(layout, travel, reduce, micro_batch) for travel in ("computed", "reduced"))
    assert found.losses == expected.losses
    assert found.norms == expected.norms
    for name, gradient in expected.grads.items():
        assert torch.equal(found.grads[name], gradient), name
    for name, weight in expected.weights.items():
        assert torch.equal(found.weights[name], weight), name


def test_among_four_ranks_it_changes_the_order_of_a_sum_in_fp32():
    found, expected = (measured("fsdp4", travel, "step", 2) for travel in ("computed", "reduced"))
    assert worst_difference(found.grads, expected.grads) < (1e-6, "")


@pytest.mark.parametrize(("layout", "precision", "why"), [("dp2", "bf16", "fsdp x cp is 1"), ("fsdp2", "fp32", "precision=fp32 also")])
def test_it_is_refused_where_it_would_say_nothing(layout: str, precision: str, why: str):
    degrees = {layout[:-1]: 2}
    config = replace(BASE, precision=precision, parallel=replace(BASE.parallel, travel="computed", **degrees))
    with pytest.raises(ConfigError, match=why):
        check(config, 2)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("parts", "entries"), [(1, 5), (2, 4096), (3, 70_001), (8, 12_345)])
def test_parts_are_summed_in_the_dtype_of_the_sum(device: str, parts: int, entries: int):
    parts_rn = torch.randn(parts, entries, dtype=torch.bfloat16, device=device)
    out_n, expected_n = (torch.empty(entries, device=device) for _ in range(2))
    sum_parts(parts_rn, out_n)
    reference_sum_parts(parts_rn, expected_n)
    assert torch.equal(out_n, expected_n)
    assert torch.allclose(out_n.double(), parts_rn.double().sum(0), rtol=0, atol=1e-5)
