"""RoPE depends on distances alone and keeps precision; RMSNorm is its formula."""

import pytest
import torch

from paraxis.base.errors import ConfigError
from paraxis.ops.norm import RMSNorm
from paraxis.ops.rope import RopeConfig, frequencies, rope_tables, rotate

CPU = torch.device("cpu")


def rotated(x, positions, dtype=torch.float64):
    return rotate(x, *rope_tables(positions, RopeConfig(), x.shape[-1], dtype=dtype))


def test_scores_depend_on_the_distance_alone():
    q, k = torch.randn(2, 1, 1, 1, 32, dtype=torch.float64)
    scores = [(rotated(q, torch.tensor([[i + 7]])) * rotated(k, torch.tensor([[i]]))).sum() for i in (0, 5, 1000)]
    torch.testing.assert_close(scores[0], scores[1])
    torch.testing.assert_close(scores[0], scores[2])


def test_position_zero_changes_nothing():
    x = torch.randn(1, 1, 2, 8, dtype=torch.bfloat16)
    assert torch.equal(rotated(x, torch.zeros(1, 1, dtype=torch.int64), torch.bfloat16), x)


def test_tables_are_fp32_for_bf16_and_fp64_for_fp64():
    positions = torch.arange(4)[None]
    assert rope_tables(positions, RopeConfig(), 8, dtype=torch.bfloat16)[0].dtype == torch.float32
    assert rope_tables(positions, RopeConfig(), 8, dtype=torch.float64)[0].dtype == torch.float64


def test_tables_that_something_cast_down_are_noticed():
    cos, sin = rope_tables(torch.arange(4)[None], RopeConfig(), 8, dtype=torch.float32)
    with pytest.raises(AssertionError, match="cast the rope tables"):
        rotate(torch.randn(1, 4, 1, 8), cos.bfloat16(), sin.bfloat16())


def test_scaling_slows_the_slow_pairs_and_leaves_the_fast_ones():
    plain = frequencies(RopeConfig(), 128, dtype=torch.float64, device=CPU)
    scaled = frequencies(RopeConfig(factor=8.0), 128, dtype=torch.float64, device=CPU)
    assert torch.equal(scaled[:8], plain[:8])
    torch.testing.assert_close(scaled[-8:], plain[-8:] / 8)
    assert (scaled <= plain).all()


@pytest.mark.parametrize("wrong", [{"theta": 0.5}, {"factor": 0.5}, {"low_frequency_factor": 4.0}, {"original_context": 0}])
def test_nonsense_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"rope.{next(iter(wrong))}"):
        RopeConfig(**wrong)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)])
def test_rms_norm_is_its_formula(dtype, tolerance):
    norm = RMSNorm(64, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 64, dtype=dtype) * 3
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), exact, rtol=tolerance, atol=tolerance)
