"""Parts in half precision added up in fp32: every number read once and written once. For CUDA alone, behind a front in `sum.py`."""

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILE = 4096


@triton.jit
def _add_tile(parts, out, n, PARTS: tl.constexpr, TILE: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * TILE + tl.arange(0, TILE)  # 64 bits: parts of 2^31 entries are not far
    mask = at < n
    total = tl.load(parts + at, mask=mask).to(out.dtype.element_ty)
    for part in tl.static_range(1, PARTS):
        total += tl.load(parts + part * tl.cast(n, tl.int64) + at, mask=mask).to(out.dtype.element_ty)
    tl.store(out + at, total, mask=mask)


def add_parts(parts_rn: Tensor, out_n: Tensor) -> None:
    """Writes the sum of the r parts of `parts_rn`, contiguous, into `out_n`, in its dtype."""
    parts, n = parts_rn.shape
    kernel: Any = _add_tile
    kernel[(triton.cdiv(n, TILE),)](parts_rn, out_n, n, PARTS=parts, TILE=TILE, num_warps=8)
