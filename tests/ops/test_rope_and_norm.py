"""RoPE depends on distances alone and keeps precision; RMSNorm is its formula."""

import math

import pytest
import torch

from paraxis.base.errors import ConfigError
from paraxis.ops.norm import LayerNorm, RMSNorm
from paraxis.ops.rope import RopeConfig, YarnConfig, frequencies, rope_tables, rotate, rotate_neighbours

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


def test_neighbours_turn_as_halves_do_once_put_in_their_order():
    x = torch.randn(1, 5, 3, 16, dtype=torch.bfloat16)
    tables = rope_tables(torch.arange(5)[None], RopeConfig(), 16, dtype=x.dtype)
    in_halves = rotate(torch.cat((x[..., 0::2], x[..., 1::2]), -1), *tables)
    turned = rotate_neighbours(x, *tables)
    assert turned.dtype == x.dtype
    assert torch.equal(turned, torch.stack(in_halves.chunk(2, -1), -1).flatten(-2))


def test_yarn_leaves_the_first_pairs_slows_the_last_and_blends_between_by_number():
    """With DeepSeek-V3's numbers: 64 (ln 4096 - ln 2 pi 32) / (2 ln 10000) = 10.5, and 22.5 for one turn."""
    plain = frequencies(YarnConfig(), 64, dtype=torch.float64, device=CPU)
    scaled = frequencies(YarnConfig(factor=40.0), 64, dtype=torch.float64, device=CPU)
    torch.testing.assert_close(plain, 10_000.0 ** -(torch.arange(32, dtype=torch.float64) / 32))
    assert torch.equal(scaled[:11], plain[:11])
    torch.testing.assert_close(scaled[23:], plain[23:] / 40, rtol=1e-14, atol=0)
    slowed = 1 - scaled[10:24] / plain[10:24]
    torch.testing.assert_close(slowed, torch.arange(14, dtype=torch.float64) / 13 * (1 - 1 / 40))


def test_yarn_sharpens_by_the_logarithm_of_the_factor():
    assert YarnConfig(factor=40.0).score_scale == pytest.approx((1 + 0.1 * math.log(40)) ** 2)
    assert YarnConfig(factor=40.0).table_scale == 1
    assert YarnConfig(factor=40.0, mscale_all_dim=0.0).score_scale == 1
    cos, sin = rope_tables(torch.arange(4)[None], YarnConfig(factor=40.0, mscale_all_dim=0.0), 8, dtype=torch.float64)
    torch.testing.assert_close(cos.square() + sin.square(), torch.full_like(cos, (1 + 0.1 * math.log(40)) ** 2))


def test_without_a_factor_yarn_is_plain_rope():
    config = YarnConfig(theta=500_000.0, mscale=0.5)
    assert config.table_scale == config.score_scale == 1
    ours, plain = (rope_tables(torch.arange(9)[None], c, 8, dtype=torch.float64) for c in (config, RopeConfig()))
    torch.testing.assert_close(ours, plain)


@pytest.mark.parametrize("length", [1, 64, 200])
def test_yarn_on_any_original_context_stays_between_plain_and_slowed(length):
    plain = frequencies(YarnConfig(), 8, dtype=torch.float64, device=CPU)
    scaled = frequencies(YarnConfig(factor=8.0, original_context=length), 8, dtype=torch.float64, device=CPU)
    assert ((scaled <= plain) & (scaled >= plain / 8 * (1 - 1e-12))).all()


@pytest.mark.parametrize(
    "wrong", [{"theta": 1.0}, {"factor": 0.5}, {"beta_slow": 32.0}, {"mscale": -1.0}, {"mscale_all_dim": -1.0}, {"original_context": 0}]
)
def test_nonsense_yarn_is_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=f"rope.{next(iter(wrong))}"):
        YarnConfig(**wrong)


PRECISE_TO = [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 8e-3)]


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE_TO)
def test_layer_norm_is_its_formula(dtype, tolerance):
    norm = LayerNorm(64, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 5, 64, dtype=dtype) * 3 + 1
    centred = x.double() - x.double().mean(-1, keepdim=True)
    exact = centred * (centred.square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double() + norm.bias.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), exact, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(("dtype", "tolerance"), PRECISE_TO)
def test_rms_norm_is_its_formula(dtype, tolerance):
    norm = RMSNorm(64, 1e-5).to(dtype)
    torch.nn.init.normal_(norm.weight)
    x = torch.randn(3, 5, 64, dtype=dtype) * 3
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-5).rsqrt() * norm.weight.double()
    assert norm(x).dtype == dtype
    torch.testing.assert_close(norm(x).double(), exact, rtol=tolerance, atol=tolerance)
