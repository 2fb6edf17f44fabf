"""AdamW on one tensor: every number read once, those that change written once. For CUDA alone, behind a front in `adamw.py`."""

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

from paraxis.ops import rounding
from paraxis.ops.rounding import Place

TILE, WARPS = 1024, 8
FACTOR_1, FACTOR_2 = (tl.constexpr(factor) for factor in rounding.FACTORS)
HIGH, AGAIN = tl.constexpr(rounding.HIGH), tl.constexpr(rounding.AGAIN)


@triton.jit
def _hashed(x):
    x = (x ^ (x >> 16)) * tl.full((), FACTOR_1, tl.uint32)
    x = (x ^ (x >> 15)) * tl.full((), FACTOR_2, tl.uint32)
    return x ^ (x >> 16)


@triton.jit
def _number(at, offset, inner, middle, middle_stride, outer_stride, DEPTH: tl.constexpr):
    # Where entries stand in the whole tensor. Division of 64 bits is slow, and seldom needed.
    if DEPTH == 1:
        number = offset + at
    elif DEPTH == 2:
        number = offset + at % inner + at // inner * middle_stride
    else:
        number = offset + at % inner + at // inner % middle * middle_stride + at // (inner * middle) * outer_stride
    return number


@triton.jit
def _bits(number, key):
    low, high = number.to(tl.uint32), (number >> 32).to(tl.uint32)
    return _hashed(low ^ (high * tl.full((), HIGH, tl.uint32)) ^ key)


@triton.jit
def _rounded(x, bits):
    raw = x.to(tl.uint32, bitcast=True)
    raised = (raw + (bits & 0xFFFF)) & tl.full((), 0xFFFF0000, tl.uint32)
    finite = (raw & 0x7F800000) != 0x7F800000
    return tl.where(finite, raised.to(tl.float32, bitcast=True), x)


@triton.jit(do_not_specialize=["salt", "offset", "inner", "middle", "middle_stride", "outer_stride"])
def _step_tile(
    p, g, m, v, n, scale, found_inf, correction_1, root_correction_2, updates,
    lr, beta_1, beta_2, eps, weight_decay,
    salt, offset, inner, middle, middle_stride, outer_stride,
    DEPTH: tl.constexpr, ROUNDS: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    # What rounds is in the order of torch's own kernel (fused_adam_utils.cuh), and fused where a compiler fuses that one.
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # 64 bits: tensors of 2^31 entries are not far
    mask = at < n
    parameter = tl.load(p + at, mask=mask).to(tl.float32)
    gradient = tl.load(g + at, mask=mask).to(tl.float32) * tl.load(scale)
    mean = tl.load(m + at, mask=mask).to(tl.float32)
    mean_square = tl.load(v + at, mask=mask).to(tl.float32)
    square = gradient * gradient
    parameter = tl.fma(-lr * weight_decay, parameter, parameter)
    mean = tl.fma(beta_1, mean, tl.fma(-beta_1, gradient, gradient))
    mean_square = tl.fma(beta_2, mean_square, tl.fma(-beta_2, square, square))
    denominator = tl.div_rn(tl.sqrt_rn(mean_square), tl.load(root_correction_2)) + eps
    parameter -= tl.div_rn(tl.div_rn(lr, tl.load(correction_1)) * mean, denominator)
    if ROUNDS:
        key = _hashed(_hashed(tl.load(updates).to(tl.uint32)) ^ salt.to(tl.uint32))
        bits = _bits(_number(at, offset, inner, middle, middle_stride, outer_stride, DEPTH), key)
        if m.dtype.element_ty == tl.bfloat16:
            mean, mean_square = _rounded(mean, bits), _rounded(mean_square, bits >> 16)
        if p.dtype.element_ty == tl.bfloat16:
            parameter = _rounded(parameter, _hashed(bits ^ tl.full((), AGAIN, tl.uint32)))
    mask = at < tl.where(tl.load(found_inf) == 1, 0, n)  # for the writes alone: no read waits for it
    tl.store(p + at, parameter, mask=mask)
    tl.store(m + at, mean, mask=mask)
    tl.store(v + at, mean_square, mask=mask)


def step_tensor(p: Tensor, g: Tensor, m: Tensor, v: Tensor, place: Place, scalars: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
    """Steps parameter `p` by gradient `g` times a scale, with the running means `m` of that and `v` of its square, alike in dtype.

    All four are of one size, in fp32 or bf16, and contiguous, or `g` is made so; each entry is computed in fp32, and rounded stochastically
    where it is stored in bf16, by the bits of its place. `scalars`, fp32 on the device: the scale, 1 where the step is skipped,
    1 - beta_1^n, the root of 1 - beta_2^n, and n. `numbers`: lr, beta_1, beta_2, eps, weight_decay.
    """
    n, rounds = p.numel(), 2 in (p.element_size(), m.element_size())
    kernel: Any = _step_tile
    kernel[(triton.cdiv(n, TILE),)](
        p, g.contiguous(), m, v, n, *scalars, *numbers, *place, DEPTH=place.depth, ROUNDS=rounds, TILE=TILE, num_warps=WARPS
    )
