"""A matrix of bytes the other way round, by tiles: read and written in whole lines. For CUDA alone, behind a front in `lowp.py`."""

from typing import Any

import triton  # pyright: ignore[reportMissingImports]
import triton.language as tl  # pyright: ignore[reportMissingImports]
from torch import Tensor

TILE_ROWS, TILE_COLUMNS = 128, 128


@triton.jit
def _transpose_tile(x, y, rows, columns, TILE_ROWS: tl.constexpr, TILE_COLUMNS: tl.constexpr):
    # Columns of tiles go by fastest: neighbours then read on in the same rows. 64-bit offsets: matrices of 2^31 bytes are not far.
    row = tl.program_id(1) * TILE_ROWS + tl.arange(0, TILE_ROWS)
    column = tl.program_id(0) * TILE_COLUMNS + tl.arange(0, TILE_COLUMNS)
    row_64, column_64 = row.to(tl.int64), column.to(tl.int64)
    tile = tl.load(x + row_64[:, None] * columns + column_64[None, :], mask=(row[:, None] < rows) & (column[None, :] < columns))
    mask = (column[:, None] < columns) & (row[None, :] < rows)
    tl.store(y + column_64[:, None] * rows + row_64[None, :], tl.trans(tile), mask=mask)


def transpose_bytes(x_rc: Tensor, y_cr: Tensor) -> None:
    """Writes x, uint8 [r, c] and row-major, into y, uint8 [c, r] and row-major."""
    rows, columns = x_rc.shape
    grid = (triton.cdiv(columns, TILE_COLUMNS), triton.cdiv(rows, TILE_ROWS))
    kernel: Any = _transpose_tile
    kernel[grid](x_rc, y_cr, rows, columns, TILE_ROWS=TILE_ROWS, TILE_COLUMNS=TILE_COLUMNS, num_warps=8)
