"""Casts to float8, along the rows and the other way round, by tiles that are read once and written in whole lines. For CUDA alone, behind
a front in `float8.py`."""

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILE_ROWS, TILE_COLUMNS, WARPS = 128, 128, 8


@triton.jit
def _cast_tile(
    x, x_stride, along, across, scale_r, scale_k, along_stride, across_stride, rows, columns,
    BY_ROW: tl.constexpr, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr,
):  # fmt: skip
    # Columns of tiles go by fastest: neighbours then read on in the same rows. 64-bit offsets: matrices of 2^31 entries are not far.
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    row_64, column_64 = row.to(tl.int64), column.to(tl.int64)
    mask = (row[:, None] < rows) & (column[None, :] < columns)
    tile = tl.load(x + row_64[:, None] * x_stride + column_64[None, :], mask=mask).to(tl.float32)
    if BY_ROW:
        by_row = tile * tl.load(scale_r + row, mask=row < rows)[:, None]
        by_column = tile * tl.load(scale_k + column, mask=column < columns)[None, :]
    else:
        by_row = tile * tl.load(scale_r)
        by_column = by_row
    tl.store(along + row_64[:, None] * along_stride + column_64[None, :], by_row.to(along.dtype.element_ty), mask=mask)
    turned = tl.trans(by_column.to(across.dtype.element_ty))
    mask = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(across + column_64[:, None] * across_stride + row_64[None, :], turned, mask=mask)


@triton.jit
def _transpose_tile(x, y, y_stride, rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    row_64, column_64 = row.to(tl.int64), column.to(tl.int64)
    tile = tl.load(x + row_64[:, None] * columns + column_64[None, :], mask=(row[:, None] < rows) & (column[None, :] < columns))
    mask = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(y + column_64[:, None] * y_stride + row_64[None, :], tl.trans(tile), mask=mask)


def cast_tiles(x_rk: Tensor, scale_r: Tensor, scale_k: Tensor, along_rk: Tensor, across_kr: Tensor) -> None:
    """Writes x, each row times its scale, into `along_rk`, and each column times its own, the other way round, into `across_kr`.

    There is a scale for each row and for each column, or one for all. Rows of all three may lie apart.
    """
    rows, columns = x_rk.shape
    x_rk = x_rk if x_rk.stride(1) == 1 else x_rk.contiguous()
    kernel: Any = _cast_tile
    kernel[_grid(rows, columns)](
        x_rk, x_rk.stride(0), along_rk, across_kr, scale_r, scale_k, along_rk.stride(0), across_kr.stride(0), rows, columns,
        BY_ROW=scale_r.numel() > 1, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, num_warps=WARPS,
    )  # fmt: skip


def transpose_bytes(x_rk: Tensor, y_kr: Tensor) -> None:
    """Writes x, uint8 [r, k] and contiguous, into y, uint8 [k, r], whose rows may lie apart."""
    rows, columns = x_rk.shape
    kernel: Any = _transpose_tile
    kernel[_grid(rows, columns)](
        x_rk, y_kr, y_kr.stride(0), rows, columns, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, num_warps=WARPS
    )


def _grid(rows: int, columns: int) -> tuple[int, int]:
    return triton.cdiv(columns, TILE_COLUMNS), triton.cdiv(rows, TILE_ROWS)
