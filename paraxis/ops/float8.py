"""Linear layers whose matrix products are made in float8: scales, casts, the products, and their gradients.

A float8 number has four (e4m3) or three (e5m2) significant bits and little range, so each block of a tensor is scaled to the format's
largest number first, by a scale found from the block's own largest entry (dynamic scaling). The product undoes both scales as it adds up
in fp32. What a block is names the recipe:

    tensorwise  one scale a tensor; gradients of outputs in e5m2 (Micikevicius et al. 2022, arXiv:2209.05433, section 3)
    rowwise     one scale a row of either factor, so for every token and every feature; all in e4m3
    blockwise   activations by 1 x 128, weights by 128 x 128; all in e4m3 (DeepSeek-V3, arXiv:2412.19437, section 3.3)
    mxfp8       both by 1 x 32; all in e4m3 (OCP Microscaling Formats 1.0; Mishra et al. 2025, arXiv:2506.08027)

The choice of formats and of fast accumulation follows torchao's recipes of the first two names. Scales are powers of two: a cast then
rounds an entry as it would under any other scale, underflow aside, so ranks that scale a part of a tensor agree with one that scales all.

GPUs multiply float8 in one form alone: both factors are stored with the dimension that is summed last. Every operand is therefore kept so,
and what backward needs the other way round is written transposed when it is cast.

n tokens, i input features, o output features; r rows and k summed entries of an operand.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from paraxis.base.dtypes import LowPrecision
from paraxis.ops.float8_weight import Float8Weight, float8_parts

Block = tuple[int, int]  # how many rows and columns share a scale; 0 stands for all of them
WHOLE: Block = (0, 0)
ROW: Block = (1, 0)
VECTOR: Block = (1, 128)
SQUARE: Block = (128, 128)
SHORT: Block = (1, 32)

# Of what tokens bring (activations, gradients) and of weights.
BLOCKS: dict[str, tuple[Block, Block]] = {
    "tensorwise": (WHOLE, WHOLE),
    "rowwise": (ROW, ROW),
    "blockwise": (VECTOR, SQUARE),
    "mxfp8": (SHORT, SHORT),
}

# A block of zeros needs some scale: from this largest entry on, scale and inverse are normal fp32 numbers.
SMALLEST = 2.0**-100
_EXPONENT = -0x800000  # sign and exponent of an fp32 number, as a mask of its bits


# Operators of their own: as steps that a compiler fuses with others, what they write the other way round is scattered by the byte.
@torch.library.custom_op("paraxis::cast_both_ways", mutates_args=())
def _cast_both_ways(parts: Sequence[Tensor], scale_r: Tensor, scale_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Parts [r, k] beside one another in float8, every row times its scale [r, 1]; and [all k, r], every column times its own [k, 1].
    One scale [1, 1] stands for all."""
    if not scale_r.is_cuda:
        x_rk = joined(parts, 1)
        return _scaled(x_rk, scale_r, dtype), _scaled(x_rk.t(), scale_k, dtype)
    from paraxis.ops.triton_cast import cast_tiles  # only a CUDA build of torch brings Triton

    columns = [part.shape[1] for part in parts]
    along, across = _empty_both_ways(parts, dtype)
    own_k = scale_k.split(columns) if scale_k.numel() > 1 else [scale_k] * len(parts)
    for part, scale, along_rk, across_kr in zip(parts, own_k, along.split(columns, 1), across.split(columns), strict=True):
        cast_tiles(part, scale_r, scale, along_rk, across_kr)
    return along, across


@_cast_both_ways.register_fake
def _(parts: Sequence[Tensor], scale_r: Tensor, scale_k: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return _empty_both_ways(parts, dtype)


def _empty_both_ways(parts: Sequence[Tensor], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    shape = parts[0].shape[0], sum(part.shape[1] for part in parts)
    return parts[0].new_empty(shape, dtype=dtype), parts[0].new_empty(shape[::-1], dtype=dtype)


@torch.library.custom_op("paraxis::transposed_float8", mutates_args=())
def _transposed(parts: Sequence[Tensor]) -> Tensor:
    """Parts [r, k] of float8 below one another, the other way round: [k, all r]."""
    if not parts[0].is_cuda:
        return joined([part.t() for part in parts], 1).contiguous()
    from paraxis.ops.triton_cast import transpose_bytes

    y_kr = parts[0].new_empty(parts[0].shape[1], sum(part.shape[0] for part in parts))
    own = y_kr.view(torch.uint8).split([part.shape[0] for part in parts], 1)
    for part, y in zip(parts, own, strict=True):
        transpose_bytes(part.contiguous().view(torch.uint8), y)
    return y_kr


@_transposed.register_fake
def _(parts: Sequence[Tensor]) -> Tensor:
    return parts[0].new_empty(parts[0].shape[1], sum(part.shape[0] for part in parts))


def _scaled(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Nothing is clamped: no scaled entry exceeds the format's range, and an infinite one shall not look finite."""
    return (x.float() * scale).to(dtype).contiguous()


class Operand(NamedTuple):
    """One factor of a product, the summed dimension last: `values` are float8 [r, k], row-major. `inverse` is fp32, one a block of
    values: what they are multiplied by to get the tensor back.
    """

    values: Tensor
    inverse: Tensor


def _blocks(x_rk: Tensor, block: Block) -> Tensor:
    """[blocks of rows, rows of a block, blocks of columns, columns of a block]"""
    r, k = x_rk.shape
    return x_rk.unflatten(0, (-1, block[0] or r)).unflatten(2, (-1, block[1] or k))


def _largest(x_rk: Tensor, block: Block) -> Tensor:
    """The largest magnitude in each block. Row by row first: a compiler can do that in the kernel that makes the rows."""
    return _blocks(x_rk, block).abs().amax(3).amax(1)


def inverse_scale(largest: Tensor, dtype: torch.dtype) -> Tensor:
    """What float8 values are multiplied by to be a block again whose largest magnitude is given: fp32, powers of two.

    The largest power of two that keeps the block within the format's range is its scale. Not finite where `largest` is not.
    """
    return power_of_two(torch.finfo(dtype).max / largest.float().clamp(min=SMALLEST)).reciprocal()


def power_of_two(x: Tensor) -> Tensor:
    """The largest that fp32 `x`, above zero, has in it."""
    return (x.view(torch.int32) & _EXPONENT).view(torch.float32)


def quantise(parts: Sequence[Tensor], dtype: torch.dtype, block: Block, dim: int = 0, inverse: Tensor | None = None) -> Operand:
    """Parts [r, k] joined along `dim`, as an operand; `inverse` where the scales are known already."""
    if inverse is None:
        inverse = _inverse_of(parts, dtype, block, dim)
    own = inverse.split([part.shape[dim] // block[dim] for part in parts], dim) if block[dim] else [inverse] * len(parts)
    values = [_cast(part, block, scale.reciprocal(), dtype) for part, scale in zip(parts, own, strict=True)]
    return Operand(joined(values, dim).contiguous(), inverse)


def _inverse_of(parts: Sequence[Tensor], dtype: torch.dtype, block: Block, dim: int) -> Tensor:
    """What undoes the scales of parts [r, k] joined along `dim`."""
    largest = [_largest(part, block) for part in parts]
    return inverse_scale(joined(largest, dim) if block[dim] else torch.stack(largest).amax(0), dtype)


def _cast(x_rk: Tensor, block: Block, scale: Tensor, dtype: torch.dtype) -> Tensor:
    return _scaled(_blocks(x_rk, block), scale[:, None, :, None], dtype).flatten(2, 3).flatten(0, 1)


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """Parts one behind another along `dim`; one alone is not copied."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), dim)


def both_ways(parts: Sequence[Tensor], dtype: torch.dtype, block: Block) -> tuple[Operand, Operand]:
    """Parts [r, k] beside one another, and the transpose of that; each with scales of its own where blocks are not square."""
    turned = [part.t() for part in parts]
    if block not in (WHOLE, ROW):
        return quantise(parts, dtype, block, 1), quantise(turned, dtype, block, 0)
    inverse_r = _inverse_of(parts, dtype, block, 1)
    inverse_k = inverse_r if block == WHOLE else _inverse_of(turned, dtype, block, 0)
    along_rk, across_kr = _cast_both_ways(parts, inverse_r.reciprocal(), inverse_k.reciprocal(), dtype)
    return Operand(along_rk, inverse_r), Operand(across_kr, inverse_k)


def dequantise(operand: Operand) -> Tensor:
    """The numbers that an operand stands for: fp32 [r, k]."""
    rows, columns = (n // blocks for n, blocks in zip(operand.values.shape, operand.inverse.shape, strict=True))
    scaled = _blocks(operand.values.float(), (rows, columns)) * operand.inverse[:, None, :, None]
    return scaled.flatten(2, 3).flatten(0, 1)


def reference_product(left: Operand, right: Operand, dtype: torch.dtype) -> Tensor:
    """left [r, k] times right [c, k] transposed, in fp32: what the fast product is held to."""
    return (dequantise(left) @ dequantise(right).t()).to(dtype)


def _cpu_scales_rows() -> bool:
    """Whether this torch's CPU kernel takes a scale for each row: 2.13's does, 2.11's takes one for the whole tensor only."""
    one = torch.ones(16, 16).to(torch.float8_e4m3fn)
    try:
        torch._scaled_mm(one, one.t(), torch.ones(16, 1), torch.ones(1, 16), out_dtype=torch.float32)
    except RuntimeError:
        return False
    return True


CPU_SCALES_ROWS = _cpu_scales_rows()  # asked at once: a compiler that follows `product` could not


def product(left: Operand, right: Operand, dtype: torch.dtype, *, fast: bool = False) -> Tensor:
    """left [r, k] times right [c, k] transposed: [r, c] in `dtype`, added up in fp32; `fast` keeps fewer bits of partial sums (Hopper)."""
    whole, by_row = _is_whole(left) and _is_whole(right), _is_by_row(left) and _is_by_row(right)
    has_kernel = left.values.is_cuda or whole or CPU_SCALES_ROWS
    if not (whole or by_row) or not has_kernel:
        return block_product(*left, *right, dtype)
    return torch._scaled_mm(left.values, right.values.t(), left.inverse, right.inverse.t(), out_dtype=dtype, use_fast_accum=fast)


# An operator of its own, so that a planner sees one product whatever multiplies.
@torch.library.custom_op("paraxis::block_product", mutates_args=())
def block_product(left_rk: Tensor, left_inverse: Tensor, right_ck: Tensor, right_inverse: Tensor, dtype: torch.dtype) -> Tensor:
    """`product` of operands that are scaled in blocks. The CPU has no kernel for these, and torch 2.11's none for rows."""
    left, right = Operand(left_rk, left_inverse), Operand(right_ck, right_inverse)
    if not left_rk.is_cuda:
        return reference_product(left, right, dtype)
    left, right = _whole_tiles(left), _whole_tiles(right)
    left_scale, right_scale = _as_the_kernel_reads(left), _as_the_kernel_reads(right)
    return torch._scaled_mm(left.values, right.values.t(), left_scale, right_scale.t(), out_dtype=dtype)


@block_product.register_fake
def _(left_rk: Tensor, left_inverse: Tensor, right_ck: Tensor, right_inverse: Tensor, dtype: torch.dtype) -> Tensor:
    return left_rk.new_empty((left_rk.shape[0], right_ck.shape[0]), dtype=dtype)


def _is_whole(operand: Operand) -> bool:
    return operand.inverse.numel() == 1


def _is_by_row(operand: Operand) -> bool:
    return operand.inverse.shape == (operand.values.shape[0], 1)


def _width(operand: Operand) -> int:
    """Columns of a block."""
    return operand.values.shape[1] // operand.inverse.shape[1]


def _whole_tiles(operand: Operand) -> Operand:
    """With zeros behind, so that blocks of 128 columns come in fours: cuBLAS reads scales of 128 x 128 so, which not every torch checks."""
    missing = -operand.inverse.shape[1] % 4
    if _width(operand) != 128 or not missing:
        return operand
    values = pad(operand.values.view(torch.uint8), (0, 128 * missing)).view(operand.values.dtype)
    return Operand(values, pad(operand.inverse, (0, missing), value=1.0))


def _as_the_kernel_reads(operand: Operand) -> Tensor:
    """Scales of 1 x 32 blocks are exponents, in tiles; those of 1 x 128 go down the columns in memory, of 128 x 128 along the rows."""
    if _width(operand) == 32:
        exponents = (operand.inverse.view(torch.int32) >> 23 & 0xFF).to(torch.uint8)
        return in_tiles(exponents).view(torch.float8_e8m0fnu)
    vectors = operand.inverse.shape[0] == operand.values.shape[0]
    return operand.inverse.t().contiguous().t() if vectors else operand.inverse.contiguous()


def in_tiles(scales_rk: Tensor) -> Tensor:
    """Scales of eight bits each in the order in which Blackwell reads them, flat: tiles of 128 x 4, in which (i, j) is number
    i % 32 * 16 + i // 32 * 4 + j (cuBLAS documentation, "1D block scaling factors layout"). There are zeros where no scale is.
    """
    r, k = scales_rk.shape
    whole = pad(scales_rk.view(torch.uint8), (0, -k % 4, 0, -r % 128))
    return whole.view(-(r // -128), 4, 32, -(k // -4), 4).permute(0, 3, 2, 1, 4).flatten()


def _cast_weights(weights: Sequence[Tensor], block: Block) -> Operand:
    """Weights [o, i] below one another. Those that were gathered in float8 have one scale already."""
    if isinstance(weights[0], Float8Weight):
        values, inverses = zip(*map(float8_parts, weights), strict=True)
        return Operand(joined(values, 0), inverses[0])
    return quantise(weights, torch.float8_e4m3fn, block)


def _cast_weights_transposed(weights: Sequence[Tensor], block: Block, inverse: Tensor) -> Operand:
    """Weights [o, i] as [i, all o]; `inverse` is of their scales the other way round."""
    if isinstance(weights[0], Float8Weight):
        return Operand(_transposed([float8_parts(weight)[0] for weight in weights]), inverse)
    known = inverse.t() if block[0] == block[1] else None
    return quantise([weight.t() for weight in weights], torch.float8_e4m3fn, block, 1, known)


class _Linears(torch.autograd.Function):
    """x [n, i] times the transpose of each weight [o, i]. Three products a step, each of two freshly cast operands.

    Weights are kept as they are and cast again in backward: they belong to FSDP, which frees them in between.
    """

    @staticmethod
    def forward(ctx: Any, x_ni: Tensor, recipe: LowPrecision, *weights: Tensor) -> tuple[Tensor, ...]:
        of_tokens, of_weights = BLOCKS[recipe.scaling]
        x, x_t = both_ways([x_ni], torch.float8_e4m3fn, of_tokens)
        weight = _cast_weights(weights, of_weights)
        ctx.save_for_backward(*x_t, weight.inverse, *weights)
        ctx.recipe = recipe
        y_no = product(x, weight, x_ni.dtype, fast=recipe.fast_output)
        return y_no.split([weight.shape[0] for weight in weights], dim=1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x_values, x_inverse, inverse, *weights = ctx.saved_tensors
        recipe, sizes = ctx.recipe, [weight.shape[0] for weight in weights]
        of_tokens, of_weights = BLOCKS[recipe.scaling]
        grad, grad_t = both_ways(gradients, recipe.gradient, of_tokens)
        weight_t = _cast_weights_transposed(weights, of_weights, inverse)
        grad_x_ni = product(grad, weight_t, weights[0].dtype, fast=recipe.fast_gradients)
        grad_weight_oi = product(grad_t, Operand(x_values, x_inverse), weights[0].dtype, fast=recipe.fast_gradients)
        return grad_x_ni, None, *grad_weight_oi.split(sizes)


def float8_linears(x_ni: Tensor, weights: Sequence[Tensor], recipe: LowPrecision) -> tuple[Tensor, ...]:
    """What each weight [o, i] makes of x [n, i]: [n, o] in x's dtype. x is cast once for all, and they share one product."""
    if torch.is_grad_enabled():
        return _Linears.apply(x_ni, recipe, *weights)
    of_tokens, of_weights = BLOCKS[recipe.scaling]
    left, right = quantise([x_ni], torch.float8_e4m3fn, of_tokens), _cast_weights(weights, of_weights)
    return product(left, right, x_ni.dtype, fast=recipe.fast_output).split([weight.shape[0] for weight in weights], dim=1)
