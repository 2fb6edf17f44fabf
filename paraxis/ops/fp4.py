"""Linear layers whose matrix products are made in NVFP4, which Blackwell multiplies: e2m1 numbers, sixteen to a scale.

An e2m1 number is one of 0, 0.5, 1, 1.5, 2, 3, 4 and 6, with a sign. Sixteen of them share a scale in e4m3, and all of a tensor one in fp32,
here a power of two, so that ranks that scale a part of a tensor agree with one that scales all. What makes such numbers train is NVIDIA's
recipe (arXiv:2509.25149, section 4):

    weights are scaled by 16 x 16, so that forward and backward multiply by the same numbers; activations and gradients by 1 x 16
    gradients are rounded stochastically
    both factors of a weight's gradient are turned first, sixteen tokens at a time, by one random Hadamard matrix, which spreads outliers

Its last advice, to leave the last layers (a sixth of all) in bf16, is for float8.skip to take.

n tokens, i input features, o output features; r rows and k summed entries of an operand.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import ScalingType, SwizzleType, scaled_mm

from paraxis.base.dtypes import LowPrecision
from paraxis.ops.float8 import SMALLEST, in_tiles, joined, power_of_two
from paraxis.ops.rounding import hashed

GROUP = 16
LARGEST, LARGEST_SCALE = 6.0, 448.0


class Operand(NamedTuple):
    """One factor of a product, the summed dimension last: `codes` are uint8 [r, k / 2], two e2m1 numbers a byte, the first in the low half.
    A number stands for itself times its scale (`scales`, e4m3 [r, k / 16]) times `whole` (fp32, one).
    """

    codes: Tensor
    scales: Tensor
    whole: Tensor


def quantise(x_rk: Tensor, *, square: bool = False, stochastic: bool = False) -> Operand:
    """`x_rk` as an operand; `square` has sixteen rows share their scales too. r (if square) and k are multiples of sixteen."""
    grouped = x_rk.float().unflatten(1, (-1, GROUP))
    largest = grouped.abs().amax(2)
    if square:
        largest = largest.unflatten(0, (-1, GROUP)).amax(1).repeat_interleave(GROUP, 0)
    whole = power_of_two(LARGEST * LARGEST_SCALE / largest.amax().clamp(min=SMALLEST)).reciprocal()
    scales = (largest / (LARGEST * whole)).to(torch.float8_e4m3fn)
    decoded = scales.float() * whole
    scaled = grouped / torch.where(decoded == 0, 1.0, decoded)[..., None]
    return Operand(_packed(_codes(scaled.flatten(1), x_rk if stochastic else None)), scales, whole)


def _codes(x_rk: Tensor, source: Tensor | None) -> Tensor:
    """The nearest e2m1 numbers as codes of four bits, uint8 [r, k]; of the two neighbours one at random where `source` is given: what is
    random is a hash of an entry of it and of where it stands, so that there is nothing to remember.
    """
    size = x_rk.abs().clamp(max=LARGEST)
    step = torch.where(size < 2, 0.5, torch.where(size < 4, 1.0, 2.0))
    if source is None:
        rounded = (size / step).round() * step
    else:
        words = source.float().view(torch.int32).long() & 0xFFFFFFFF
        at = torch.arange(x_rk.numel(), device=x_rk.device).view_as(x_rk)
        rounded = (size / step + hashed(words ^ hashed(at & 0xFFFFFFFF)) / 2**32).floor() * step
    code = torch.where(rounded < 2, rounded * 2, torch.where(rounded < 4, rounded + 2, rounded / 2 + 4))
    return code.to(torch.uint8) | (x_rk < 0).to(torch.uint8) << 3


def _packed(codes_rk: Tensor) -> Tensor:
    return codes_rk[:, ::2] | codes_rk[:, 1::2] << 4


def dequantise(operand: Operand) -> Tensor:
    """The numbers that an operand stands for: fp32 [r, k]."""
    codes = torch.stack([operand.codes & 0xF, operand.codes >> 4], 2).flatten(1)
    size = (codes & 7).float()
    size = torch.where(size < 4, size / 2, torch.where(size < 6, size - 2, 2 * size - 8))
    signed = torch.where(codes > 7, -size, size)
    return signed * (operand.scales.float() * operand.whole).repeat_interleave(GROUP, 1)


def reference_product(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    """left [r, k] times right [c, k] transposed, in fp32: what the kernel's product is held to."""
    return (dequantise(left) @ dequantise(right).t()).to(dtype)


def product(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    """left [r, k] times right [c, k] transposed: [r, c] in `dtype`, added up in fp32."""
    return fp4_product(*left, *right, dtype)


# An operator of its own, so that a planner sees one product whatever multiplies.
@torch.library.custom_op("paraxis::fp4_product", mutates_args=())
def fp4_product(
    left_rk: Tensor,
    left_scales: Tensor,
    left_whole: Tensor,
    right_ck: Tensor,
    right_scales: Tensor,
    right_whole: Tensor,
    dtype: torch.dtype,
) -> Tensor:
    """`product` of operands, part by part. A CPU has no kernel for it."""
    left, right = Operand(left_rk, left_scales, left_whole), Operand(right_ck, right_scales, right_whole)
    if not left_rk.is_cuda:
        return reference_product(left, right, dtype)
    kinds, orders = [ScalingType.BlockWise1x16, ScalingType.TensorWise], [SwizzleType.SWIZZLE_32_4_4, SwizzleType.NO_SWIZZLE]
    scales = [[in_tiles(operand.scales).view(torch.float8_e4m3fn), operand.whole] for operand in (left, right)]
    values = [operand.codes.contiguous().view(torch.float4_e2m1fn_x2) for operand in (left, right)]
    return scaled_mm(values[0], values[1].t(), scales[0], kinds, scales[1], kinds, orders, orders, output_dtype=dtype)


@fp4_product.register_fake
def _(*parts: Any) -> Tensor:
    left_rk, _, _, right_ck, _, _, dtype = parts
    return left_rk.new_empty((left_rk.shape[0], right_ck.shape[0]), dtype=dtype)


def _hadamard(device: torch.device) -> Tensor:
    """An orthogonal matrix [16, 16] in fp32: Hadamard's, whose rows change sign at random, always the same ones."""
    i = torch.arange(GROUP, device=device)
    both = i[:, None] & i
    odd = (both ^ both >> 1 ^ both >> 2 ^ both >> 3 ^ hashed(i)[:, None]) & 1
    return (1 - 2 * odd) / GROUP**0.5


def _turned(x_rk: Tensor) -> Tensor:
    """Sixteen summed entries at a time times one orthogonal matrix, which a product of two that are both turned does not see."""
    return (x_rk.unflatten(1, (-1, GROUP)) @ _hadamard(x_rk.device).to(x_rk.dtype)).flatten(1)


class _Linears(torch.autograd.Function):
    """x [n, i] times the transpose of each weight [o, i]. What backward needs of x is kept in four bits."""

    @staticmethod
    def forward(ctx: Any, x_ni: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        weight = quantise(joined(weights, 0), square=True)
        ctx.save_for_backward(*quantise(_turned(x_ni.t())), *weights)
        return product(quantise(x_ni), weight, x_ni.dtype).split([weight.shape[0] for weight in weights], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        codes, scales, whole, *weights = ctx.saved_tensors
        grad_no = joined(gradients, 1)
        weight_t = quantise(joined(weights, 0).t(), square=True)
        grad_x_ni = product(quantise(grad_no, stochastic=True), weight_t, grad_no.dtype)
        grad_t = quantise(_turned(grad_no.t()), stochastic=True)
        grad_weight_oi = product(grad_t, Operand(codes, scales, whole), grad_no.dtype)
        return grad_x_ni, *grad_weight_oi.split([weight.shape[0] for weight in weights])


def fp4_linears(x_ni: Tensor, weights: Sequence[Tensor], recipe: LowPrecision) -> tuple[Tensor, ...]:
    """What each weight [o, i] makes of x [n, i]: [n, o] in x's dtype. x is cast once for all, and they share one product."""
    if torch.is_grad_enabled():
        return _Linears.apply(x_ni, *weights)
    weight = quantise(joined(weights, 0), square=True)
    return product(quantise(x_ni), weight, x_ni.dtype).split([weight.shape[0] for weight in weights], dim=1)
