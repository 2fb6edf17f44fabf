"""NVFP4: numbers, scales and rounding against the format written out, and layers against products of cast factors."""

import pytest
import torch
from torch import Tensor

from paraxis.ops.fp4 import GROUP, Operand, _hadamard, _turned, dequantise, fp4_linears, product, quantise, reference_product
from tests.ops.test_lowp import error, made, recipe

NUMBERS = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])


def nearest(x: Tensor) -> Tensor:
    """By trying all; of two as near, the one whose code is even."""
    apart = (x.abs()[..., None] - NUMBERS).abs()
    tied = apart + torch.arange(8) % 2 * 1e-6
    return NUMBERS[tied.argmin(-1)].copysign(x)


def test_numbers_are_the_nearest_of_the_format():
    """Largest entries of 6 have a scale of one, so that what is cast is what is given."""
    x = torch.linspace(-6, 6, 16 * 241).view(-1, GROUP)
    x[:, 0] = 6.0
    operand = quantise(x)
    assert (operand.scales.float() * operand.whole == 1).all()
    assert dequantise(operand).equal(nearest(x))


@pytest.mark.parametrize("square", [False, True])
def test_no_entry_is_off_by_more_than_the_format_and_its_scale_round(square):
    x = made()[0].detach().float()
    found = dequantise(quantise(x, square=square))
    rows = GROUP if square else 1
    largest = x.abs().view(-1, rows, x.shape[1] // GROUP, GROUP).amax((1, 3)).repeat_interleave(rows, 0).repeat_interleave(GROUP, 1)
    # Half a step is a sixth of the largest number, or a quarter of the number; a scale is off by a sixteenth.
    assert ((found - x).abs() <= 0.25 * x.abs().clamp(min=largest / 12) + largest / 16 + 1e-6 * x.abs().max()).all()
    assert error(found, x) < (0.2 if square else 0.13)


def test_a_square_is_scaled_alike_either_way():
    x = made()[1][0].detach()
    assert dequantise(quantise(x, square=True)).t().equal(dequantise(quantise(x.t(), square=True)))


def test_rounding_is_right_on_average_where_it_is_stochastic():
    x = torch.full((4096, GROUP), 0.3)
    x += torch.linspace(0, 1e-3, 4096)[:, None]  # what is random is a hash of the number itself, too
    x[:, 0] = 6.0
    found = dequantise(quantise(x, stochastic=True))
    assert set(found.unique().tolist()) == {0.0, 0.5, 6.0}
    assert found[:, 1:].mean().item() == pytest.approx(x[:, 1:].mean().item(), abs=0.005)
    assert dequantise(quantise(x, stochastic=True)).equal(found), "the same tensor is cast alike"


@pytest.mark.parametrize("stochastic", [False, True])
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(stochastic):
    x = torch.zeros(32, 32)
    assert dequantise(quantise(x, stochastic=stochastic)).equal(x)
    for bad in (torch.inf, torch.nan):
        x[3, 5] = bad
        assert not bool(dequantise(quantise(x, stochastic=stochastic)).isfinite().all())


def test_a_part_scaled_by_itself_is_rounded_as_it_is_within_the_whole():
    x = made()[0].detach()
    x[:32] *= 0.1
    whole, parts = quantise(x), torch.cat([dequantise(quantise(part)) for part in x.split(32)])
    normal = (whole.scales.float() >= 2**-6).repeat_interleave(GROUP, 1)  # smaller ones are rounded more coarsely
    assert normal.double().mean() > 0.8
    assert dequantise(whole)[normal].equal(parts[normal])


def test_a_product_of_two_that_are_turned_is_theirs():
    turn = _hadamard(torch.device("cpu")).double()
    torch.testing.assert_close(turn @ turn.t(), torch.eye(GROUP, dtype=torch.float64))
    a, b = torch.randn(8, 64, dtype=torch.float64), torch.randn(5, 64, dtype=torch.float64)
    torch.testing.assert_close(_turned(a) @ _turned(b).t(), a @ b.t())
    one = torch.zeros(1, GROUP, dtype=torch.float64)
    one[0, 3] = 1.0
    assert _turned(one).abs().unique().numel() == 1, "an outlier is spread evenly"


def test_outputs_and_gradients_are_products_of_cast_factors():
    x, weights, gradients = made()
    found = fp4_linears(x, weights, recipe("nvfp4"))
    found_gradients = torch.autograd.grad(found, [x, *weights], gradients)
    x_n, all_weights, all_gradients = x.detach(), torch.cat(weights).detach(), torch.cat(gradients, 1)

    def expected(left: Operand, right: Operand) -> Tensor:
        return dequantise(left) @ dequantise(right).t()

    y = expected(quantise(x_n), quantise(all_weights, square=True))
    grad_x = expected(quantise(all_gradients, stochastic=True), quantise(all_weights.t(), square=True))
    grad_weight = expected(quantise(_turned(all_gradients.t()), stochastic=True), quantise(_turned(x_n.t())))
    assert error(torch.cat(found, 1), y) < 5e-3
    assert error(found_gradients[0], grad_x) < 5e-3
    assert error(torch.cat(found_gradients[1:]), grad_weight) < 5e-3


def test_two_numbers_lie_in_a_byte_the_first_in_its_low_half():
    x = torch.zeros(16, 16)
    x[:, 0], x[:, 1] = 6.0, -0.5
    assert quantise(x).codes[:, 0].unique().tolist() == [0b1001_0111]


@pytest.mark.gpu
def test_on_a_gpu_that_can_the_product_is_the_product_of_what_its_factors_stand_for():
    if torch.cuda.get_device_capability() < (10, 0):
        pytest.skip("needs Blackwell")
    left, right = (quantise(torch.randn(rows, 512, device="cuda")) for rows in (256, 384))
    assert error(product(left, right, torch.bfloat16), reference_product(left, right, torch.bfloat16)) < 1e-2
