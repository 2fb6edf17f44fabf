"""AdamW on one tensor: every number read once, those that change written once. For CUDA alone, behind a front in `adamw.py`."""

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILE, WARPS = 1024, 8


@triton.jit
def _step_tile(p, g, m, v, n, scale, found_inf, correction_1, root_correction_2, lr, beta_1, beta_2, eps, weight_decay, TILE: tl.constexpr):
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
    mask = at < tl.where(tl.load(found_inf) == 1, 0, n)  # for the writes alone: no read waits for it
    tl.store(p + at, parameter, mask=mask)
    tl.store(m + at, mean, mask=mask)
    tl.store(v + at, mean_square, mask=mask)


def step_tensor(p: Tensor, g: Tensor, m: Tensor, v: Tensor, scalars: tuple[Tensor, ...], numbers: tuple[float, ...]) -> None:
    """Steps parameter `p` by gradient `g` times a scale, with the running means `m` of that and `v` of its square.

    All four are contiguous and of one size, in fp32 or bf16; each entry is computed in fp32. `scalars`, fp32 on the device: the scale, 1
    where the step is skipped, 1 - beta_1^n and the root of 1 - beta_2^n. `numbers`: lr, beta_1, beta_2, eps, weight_decay.
    """
    n = p.numel()
    kernel: Any = _step_tile
    kernel[(triton.cdiv(n, TILE),)](p, g, m, v, n, *scalars, *numbers, TILE=TILE, num_warps=WARPS)
