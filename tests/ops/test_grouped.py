"""Grouped products: the kernel against a loop, in every dtype, with experts that get nothing."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from paraxis.ops.grouped import grouped_linear, grouped_problem, reference_grouped_linear

COUNTS = [[5, 0, 9, 2], [0, 0, 16, 0], [16, 0, 0, 0], [0, 7, 0, 9]]
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float64: 1e-14}


def operands(dtype, inside=16, out=24, experts=4):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(16, inside, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(experts, inside, out, generator=g, dtype=torch.float64).to(dtype).requires_grad_()
    return x, weight


def outcome(function, x, weight, counts, gradient=None):
    y = function(x, weight, torch.tensor(counts))
    y.backward(torch.ones_like(y) if gradient is None else gradient)
    found = y.detach(), x.grad, weight.grad
    x.grad = weight.grad = None
    return found


def assert_alike(ours, theirs, tolerance):
    for a, b in zip(ours, theirs, strict=True):
        assert a.dtype == b.dtype
        assert a.shape == b.shape
        assert (a - b).abs().max() <= tolerance * b.abs().max()


@pytest.mark.parametrize("counts", COUNTS, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_output_and_gradients_are_the_loops_also_where_experts_are_empty(dtype, counts):
    x, weight = operands(dtype)
    assert (grouped_problem(x, weight) is None) == (dtype == torch.bfloat16)
    gradient = torch.randn(16, 24, generator=torch.Generator().manual_seed(1)).to(dtype)
    ours = outcome(grouped_linear, x, weight, counts, gradient)
    assert_alike(ours, outcome(reference_grouped_linear, x, weight, counts, gradient), TOLERANCE[dtype])
    idle = [expert for expert, count in enumerate(counts) if count == 0]
    assert not ours[2][idle].any()


def test_the_loop_is_one_product_a_row():
    x, weight = operands(torch.float64)
    expected = torch.stack([row @ weight[e] for row, e in zip(x, torch.arange(4).repeat_interleave(torch.tensor(COUNTS[0])), strict=True)])
    torch.testing.assert_close(reference_grouped_linear(x, weight, torch.tensor(COUNTS[0])), expected, rtol=0, atol=1e-13)


def test_an_expanded_gradient_and_a_strided_input_are_taken():
    x, weight = operands(torch.bfloat16)
    expected = outcome(reference_grouped_linear, x, weight, COUNTS[0])
    strided = x.detach().T.contiguous().T.requires_grad_()
    y = grouped_linear(strided, weight, torch.tensor(COUNTS[0]))
    y.sum().backward()  # its gradient has strides of 0
    assert_alike((y.detach(), strided.grad, weight.grad), expected, 1e-2)


@pytest.mark.parametrize(("inside", "out"), [(17, 24), (16, 23)])
def test_shapes_that_the_kernel_refuses_run_as_a_loop_and_the_reason_is_known(inside, out):
    x, weight = operands(torch.bfloat16, inside, out)
    assert "16 bytes" in grouped_problem(x, weight)
    ours = outcome(grouped_linear, x, weight, COUNTS[0])
    assert_alike(ours, outcome(reference_grouped_linear, x, weight, COUNTS[0]), 1e-2)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_no_rows_give_no_rows_and_zero_gradients(dtype):
    x, weight = operands(dtype)
    y = grouped_linear(x[:0], weight, torch.zeros(4, dtype=torch.int64))
    y.sum().backward()
    assert y.shape == (0, 24)
    assert not weight.grad.any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_either_way_can_be_compiled_whole_and_traced_without_values(dtype):
    x, weight = operands(dtype)
    expected = outcome(grouped_linear, x, weight, COUNTS[0])
    compiled = torch.compile(grouped_linear, backend="aot_eager", fullgraph=True)
    assert_alike(outcome(compiled, x, weight, COUNTS[0]), expected, TOLERANCE[dtype])
    with FakeTensorMode():
        x, weight = torch.empty(16, 16, dtype=dtype, requires_grad=True), torch.empty(4, 16, 24, dtype=dtype, requires_grad=True)
        y = grouped_linear(x, weight, torch.empty(4, dtype=torch.int64))
        y.sum().backward()
        assert (y.shape, x.grad.shape, weight.grad.shape) == ((16, 24), (16, 16), (4, 16, 24))
