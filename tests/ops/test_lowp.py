"""LowPrecision products: held to dequantised products in fp32, forward and backward, for each way of scaling."""

import os
import subprocess
import sys
from collections.abc import Iterable
from importlib.util import find_spec
from itertools import product as product_of
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from torch import Tensor

from paraxis.base.device import CPU, Device
from paraxis.base.dtypes import PRECISIONS, Float8Config, LowPrecision, Scaling, low_precision
from paraxis.ops import lowp
from paraxis.ops.float8 import (
    BLOCKS,
    ROW,
    SHORT,
    SQUARE,
    VECTOR,
    WHOLE,
    Operand,
    both_ways,
    dequantise,
    in_tiles,
    product,
    quantise,
    reference_product,
)
from paraxis.ops.lowp import MOST_OFF, error_of_kernel, kernel_problem, scaled_linears, scaling_problem
from paraxis.parallel.world import this_device

E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
TOKENS, WIDTH = 128, 256
SIZES = (256, 128, 128)  # output features of three layers with one input

scalings = pytest.mark.parametrize("scaling", get_args(Scaling))
in_float8 = pytest.mark.parametrize("scaling", BLOCKS)
blocks = pytest.mark.parametrize("block", [WHOLE, ROW, VECTOR, SQUARE, SHORT], ids=["whole", "row", "vector", "square", "short"])
OFF = {"nvfp4": 0.2}  # of a product of cast factors, from one of the factors themselves; in eight bits 0.08


def recipe(scaling: str) -> LowPrecision:
    found = low_precision(next(one for one in PRECISIONS.values() if one.scaling == scaling), Float8Config())
    assert found is not None
    return found


def made(dtype: torch.dtype = torch.bfloat16, device: str = "cpu") -> tuple[Tensor, list[Tensor], list[Tensor]]:
    """An input whose rows and columns differ in size, three weights, and gradients of what these make of it."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    x = normal(TOKENS, WIDTH) * normal(TOKENS, 1).exp() * normal(WIDTH).exp()
    weights = [normal(size, WIDTH) * 2.0**number / 16 for number, size in enumerate(SIZES)]
    gradients = [normal(TOKENS, size) * 1e-6 for size in SIZES]
    x, *rest = (tensor.to(device, dtype) for tensor in (x, *weights, *gradients))
    return x.requires_grad_(), [weight.requires_grad_() for weight in rest[:3]], rest[3:]


def error(found: Tensor, expected: Tensor) -> float:
    """The size of the difference over the size of what is expected."""
    return float(((found.double() - expected.double()).norm() / expected.double().norm()).detach())


@blocks
@pytest.mark.parametrize(("dtype", "rounding"), [(E4M3, 2.0**-4), (E5M2, 2.0**-3)], ids=["e4m3", "e5m2"])
def test_no_entry_of_normal_size_is_off_by_more_than_half_a_step_of_the_format(block, dtype, rounding):
    x, _, _ = made()
    x = x.detach()
    operand = quantise([x], dtype, block)
    off = (dequantise(operand) - x.float()).abs()
    underflow = operand.inverse.max() * torch.finfo(dtype).smallest_normal
    assert bool((off <= (x.float().abs() * rounding).clamp(min=float(underflow))).all())


@blocks
def test_scales_are_powers_of_two_and_fill_the_range(block):
    x, _, _ = made()
    operand = quantise([x.detach()], E4M3, block)
    exponents = operand.inverse.log2()
    assert exponents.equal(exponents.round())
    rows, columns = (size // n for size, n in zip(x.shape, operand.inverse.shape, strict=True))
    largest = operand.values.float().unflatten(0, (-1, rows)).unflatten(2, (-1, columns)).abs().amax((1, 3))
    assert bool((largest <= 448).all())
    assert bool((largest >= 448 / 2 * (1 - 2.0**-4)).all())


def test_a_part_scaled_by_itself_is_rounded_as_it_is_within_the_whole():
    x = made()[0].detach()
    x[:32] *= 1e-4
    whole = dequantise(quantise([x], E4M3, WHOLE))
    parts = torch.cat([dequantise(quantise([part], E4M3, WHOLE)) for part in x.split(32)])
    normal = x.float().abs() > x.float().abs().max() * 2.0**-13
    assert whole[normal].equal(parts[normal])
    assert not whole.equal(parts), "small entries gain by a scale of their own"


@blocks
def test_zeros_stay_zeros_and_what_is_not_finite_stays_so(block):
    x = torch.zeros(128, 128)
    assert dequantise(quantise([x], E4M3, block)).equal(x)
    for bad in (torch.inf, torch.nan):
        x[3, 5] = bad
        assert not bool(dequantise(quantise([x], E4M3, block)).isfinite().all())


@blocks
@pytest.mark.parametrize("dim", [0, 1])
def test_parts_are_cast_as_if_they_were_one(block, dim):
    x = made()[0].detach()
    joined = quantise(list(x.split(128, dim)), E4M3, block, dim)
    whole = quantise([x], E4M3, block)
    assert joined.values.float().equal(whole.values.float())
    assert joined.inverse.equal(whole.inverse)


@blocks
def test_the_transpose_is_that_of_the_tensor(block):
    x = made()[0].detach()
    along, across = both_ways([x], E4M3, block)
    assert across.values.is_contiguous()
    assert error(dequantise(along), x) < 0.04
    assert error(dequantise(across), x.t()) < 0.04


def pairs(device: str) -> dict[str, tuple[Operand, Operand]]:
    """The factors of each kind of product that a recipe makes: of tokens by weights, and of tokens by tokens."""
    x, weights, gradients = made(device=device)
    found = {}
    for scaling, (of_tokens, of_weights) in BLOCKS.items():
        left, left_t = both_ways([gradients[0]], recipe(scaling).gradient, of_tokens)
        _, right_t = both_ways([x.detach()], E4M3, of_tokens)
        found[f"{scaling}, by weights"] = left, quantise([weights[0].detach().t()], E4M3, of_weights)
        found[f"{scaling}, by tokens"] = left_t, right_t
    return found


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_fast_product_is_the_product_of_what_its_factors_stand_for(dtype):
    for name, (left, right) in pairs("cpu").items():
        assert error(product(left, right, dtype), reference_product(left, right, dtype)) < (1e-2 if dtype == torch.bfloat16 else 1e-5), name


@in_float8
def test_outputs_and_gradients_are_products_of_cast_factors(scaling):
    """The three products of each layer written out, from operands made one by one."""
    x, weights, gradients = made()
    own, (of_tokens, of_weights) = recipe(scaling), BLOCKS[scaling]
    found = scaled_linears(x, weights, own)
    found_gradients = torch.autograd.grad(found, [x, *weights], gradients)
    x_n, all_weights, all_gradients = x.detach(), torch.cat(weights).detach(), torch.cat(gradients, 1)

    def expected(left: Tensor, right: Tensor, formats: tuple[torch.dtype, torch.dtype], block: tuple[int, int]) -> Tensor:
        factors = quantise([left], formats[0], of_tokens), quantise([right], formats[1], block)
        return reference_product(*factors, torch.float32)

    y = expected(x_n, all_weights, (E4M3, E4M3), of_weights)
    grad_x = expected(all_gradients, all_weights.t(), (own.gradient, E4M3), of_weights)
    grad_weight = expected(all_gradients.t(), x_n.t(), (own.gradient, E4M3), of_tokens)
    assert error(torch.cat(found, 1), y) < 5e-3
    assert error(found_gradients[0], grad_x) < 5e-3
    assert error(torch.cat(found_gradients[1:]), grad_weight) < 5e-3


@scalings
def test_outputs_and_gradients_are_close_to_those_of_a_linear_layer(scaling):
    x, weights, gradients = made()
    found = scaled_linears(x, weights, recipe(scaling))
    expected = [x @ weight.t() for weight in weights]
    for a, b in zip(found, expected, strict=True):
        assert error(a, b) < OFF.get(scaling, 0.06)
    pairs_of = zip(
        torch.autograd.grad(found, [x, *weights], gradients), torch.autograd.grad(expected, [x, *weights], gradients), strict=True
    )
    for a, b in pairs_of:
        assert error(a, b) < OFF.get(scaling, 0.08)


@scalings
def test_an_input_of_several_dimensions_is_rows_of_tokens(scaling):
    x, weights, _ = made()
    flat, shaped = (scaled_linears(made, weights[:1], recipe(scaling))[0] for made in (x, x.view(2, 64, WIDTH)))
    assert shaped.shape == (2, 64, SIZES[0])
    assert shaped.flatten(0, 1).equal(flat)


@scalings
def test_without_gradients_the_outputs_are_the_same(scaling):
    x, weights, _ = made()
    with torch.no_grad():
        scored = scaled_linears(x, weights, recipe(scaling))
    assert all(a.equal(b) for a, b in zip(scored, scaled_linears(x, weights, recipe(scaling)), strict=True))


@scalings
def test_a_compiler_sees_one_graph_and_gives_the_same_numbers(scaling):
    x, weights, gradients = made()
    compiled = torch.compile(scaled_linears, backend="aot_eager", fullgraph=True, dynamic=False)
    found, expected = compiled(x, weights, recipe(scaling)), scaled_linears(x, weights, recipe(scaling))
    made_of = (torch.autograd.grad(y, [x, *weights], gradients) for y in (found, expected))
    for a, b in zip((*found, *next(made_of)), (*expected, *next(made_of)), strict=True):
        assert error(a, b) < 1e-6


def test_a_cpu_multiplies_and_a_gpu_says_what_it_lacks():
    assert all(scaling_problem(recipe(scaling), CPU) is None for scaling in get_args(Scaling))
    for capability, able in (
        ((8, 0), ()),
        ((8, 9), ("tensorwise",)),
        ((9, 0), ("tensorwise", "rowwise", "blockwise")),
        ((10, 0), ("tensorwise", "rowwise", "mxfp8", "nvfp4")),
    ):
        gpu = Pretended("cuda", 0, "some GPU", 0, capability)
        problems = {scaling: scaling_problem(recipe(scaling), gpu) for scaling in get_args(Scaling)}
        assert {scaling for scaling, why in problems.items() if why is None} == set(able), capability
        assert all("some GPU" in why for why in problems.values() if why)


class Pretended(Device):
    """A GPU whose tensors are the host's, so that its kernels are those of the CPU."""

    @property
    def torch(self) -> torch.device:
        return torch.device("cpu")


@scalings
def test_a_kernel_that_multiplies_wrongly_is_refused_before_a_run_trusts_it(scaling, monkeypatch):
    """Here the device's products are wrong by an order of scales; whose they are the check tells by what it is called for first."""
    own = torch.device("cpu")
    assert error_of_kernel(recipe(scaling), own) == 0
    right, calls = scaled_linears, 0

    def wrong(x, weights, recipe):
        nonlocal calls
        calls += 1
        return right(x, [weight.flip(0) if calls == 1 else weight for weight in weights], recipe)

    monkeypatch.setattr(lowp, "scaled_linears", wrong)
    assert error_of_kernel(recipe(scaling), own) > 10 * MOST_OFF


def test_a_kernel_that_fails_or_is_off_is_told_with_the_device(monkeypatch):
    gpu = Pretended("cuda", 0, "some GPU", 0, (9, 0))
    own = recipe("blockwise")
    assert kernel_problem(own, gpu) is None
    monkeypatch.setattr(lowp, "error_of_kernel", lambda *_: 0.5)
    assert "some GPU are off by 50%" in str(kernel_problem(own, gpu))
    monkeypatch.setattr(lowp, "error_of_kernel", lambda *_: float("nan"))
    assert "some GPU are off by nan%" in str(kernel_problem(own, gpu))

    def failing(*_: Any) -> float:
        raise RuntimeError("Invalid scaling configuration\nand more")

    monkeypatch.setattr(lowp, "error_of_kernel", failing)
    assert str(kernel_problem(own, gpu)).endswith("some GPU fail: Invalid scaling configuration")


@pytest.mark.parametrize(("rows", "columns"), [(128, 4), (128, 5), (3, 1), (300, 9)])
def test_scales_in_tiles_stand_where_cublas_documents_them(rows, columns):
    scales = torch.randint(1, 255, (rows, columns), dtype=torch.uint8)
    found, across = in_tiles(scales), -(columns // -4)
    assert found.numel() == -(rows // -128) * across * 512
    for i, j in product_of(range(rows), range(columns)):
        tile = i // 128 * across + j // 4
        assert found[tile * 512 + i % 32 * 16 + i % 128 // 32 * 4 + j % 4] == scales[i, j]
    assert found.count_nonzero() == rows * columns


@pytest.mark.gpu
@pytest.mark.parametrize("fast", [False, True], ids=["exact sums", "fast sums"])
def test_on_a_gpu_the_product_is_the_product_of_what_its_factors_stand_for(fast):
    for name, (left, right) in pairs("cuda").items():
        if "mxfp8" in name:  # needs Blackwell: scaling_problem
            continue
        found = product(left, right, torch.bfloat16, fast=fast)
        assert error(found, reference_product(left, right, torch.bfloat16)) < 1e-2, name


@pytest.mark.gpu
@scalings
def test_on_a_gpu_small_layers_are_right_or_refused(scaling):
    gpu = this_device(0)
    problem = scaling_problem(recipe(scaling), gpu)
    assert problem is None or "compute capability" in problem, problem


@pytest.mark.gpu
@pytest.mark.parametrize("scaling", ["tensorwise", "rowwise", "blockwise"])
def test_on_a_gpu_outputs_and_gradients_are_those_of_the_cpu(scaling):
    found, expected = (
        (ys, torch.autograd.grad(ys, [x, *weights], gradients))
        for x, weights, gradients in (made(device=device) for device in ("cuda", "cpu"))
        for ys in [torch.compile(scaled_linears, fullgraph=True)(x, weights, recipe(scaling))]
    )
    for a, b in zip((*found[0], *found[1]), (*expected[0], *expected[1]), strict=True):
        assert error(a.cpu(), b) < 1e-2


def hold_of_tiles(device: str, shapes: Iterable[tuple[int, int]], *, rounds: bool) -> None:
    """The kernels write the bytes that the readable casts and transposes do, into parts of wider matrices, for rows that lie apart."""
    from paraxis.ops.triton_cast import cast_tiles, transpose_bytes

    for (rows, columns), dtype, by_row in product_of(shapes, (E4M3, E5M2), (False, True)):
        wide = torch.randn(rows, columns + 32, device=device).bfloat16()
        wide = wide if rounds else (wide.abs().clamp(0.5, 1.5).log2().round().exp2() * 1.25).copysign(wide)
        part = wide[:, 16:-16]
        scales = torch.randint(-4, 4, (rows + columns, 1), device=device).float().exp2()
        scale_r, scale_k = (scales[:rows], scales[rows:]) if by_row else (scales[:1], scales[:1])
        along, across = (torch.zeros(size, device=device, dtype=dtype) for size in ((rows, columns + 16), (columns, rows + 16)))
        cast_tiles(part, scale_r, scale_k, along[:, 16:], across[:, :-16])
        assert along[:, 16:].float().equal((part.float() * scale_r).to(dtype).float())
        assert across[:, :-16].float().equal((part.t().float() * scale_k).to(dtype).float())
        assert not along[:, :16].float().any()
        assert not across[:, -16:].float().any()
        values = along[:, 16:].contiguous().view(torch.uint8)
        turned = torch.zeros(columns, rows + 16, device=device, dtype=torch.uint8)
        transpose_bytes(values, turned[:, 16:])
        assert turned[:, 16:].equal(values.t())
        assert not turned[:, :16].any()


def hold_in_tritons_interpreter() -> None:
    """It rounds float8 in a way of its own."""
    hold_of_tiles("cpu", [(16, 144), (272, 128)], rounds=False)


@pytest.mark.skipif(find_spec("triton") is None, reason="needs Triton, whose interpreter runs the kernels")
def test_casts_by_tiles_are_those_of_the_reference_in_tritons_interpreter():
    code = "from tests.ops.test_lowp import hold_in_tritons_interpreter; hold_in_tritons_interpreter()"
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], env=environment, check=True, timeout=300)


@pytest.mark.gpu
def test_on_a_gpu_casts_by_tiles_are_those_of_the_reference():
    hold_of_tiles("cuda", [(16, 16), (128, 4096), (4096, 1040), (272, 144)], rounds=True)
