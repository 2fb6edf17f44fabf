"""Ranks as threads of one process, and a small state spread over them."""

import json
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch

from paraxis.base.layout import whole_box
from paraxis.checkpoint.save import Piece


@dataclass
class Board:
    """What the ranks of one group share."""

    size: int
    barrier: threading.Barrier = field(init=False)
    values: list[str] = field(init=False)

    def __post_init__(self):
        self.barrier = threading.Barrier(self.size, timeout=20)
        self.values = [""] * self.size


@dataclass
class ThreadRank:
    """`Ranks` among threads; values travel as JSON text, as they do between processes."""

    board: Board
    rank: int

    @property
    def size(self) -> int:
        return self.board.size

    def _exchange(self, value: Any) -> list[Any]:
        self.board.values[self.rank] = json.dumps(value)
        self.board.barrier.wait()
        values = [json.loads(text) for text in self.board.values]
        self.board.barrier.wait()
        return values

    def gather_json(self, value: Any) -> list[Any] | None:
        values = self._exchange(value)
        return values if self.rank == 0 else None

    def broadcast_json(self, value: Any) -> Any:
        return self._exchange(value)[0]


@pytest.fixture
def on_ranks() -> Callable:
    """`on_ranks(n, f)` runs `f(ranks)` on n ranks at once and returns, in rank order, what each returned or raised."""

    def run(size: int, function: Callable[[ThreadRank], Any]) -> list[Any]:
        board = Board(size)

        def one(rank: int) -> Any:
            try:
                return function(ThreadRank(board, rank))
            except Exception as error:
                return error

        with ThreadPoolExecutor(size) as pool:
            return list(pool.map(one, range(size)))

    return run


@pytest.fixture
def state() -> dict[str, torch.Tensor]:
    """Tensors of many dtypes and shapes, an uneven one, a scalar and an empty one among them."""
    g = torch.Generator().manual_seed(0)
    return {
        "model/embed.weight": torch.randn(37, 8, generator=g).bfloat16(),
        "model/up.weight": torch.randn(12, 10, generator=g),
        "model/cube": torch.randn(4, 6, 5, generator=g, dtype=torch.float64),
        "model/norm.weight": torch.randn(7, generator=g, dtype=torch.float64),
        "optim/step/up.weight": torch.tensor(3.0),
        "optim/mask": torch.arange(9) % 2 == 0,
        "optim/bytes": torch.arange(11, dtype=torch.uint8),
        "random/cpu": torch.arange(5, dtype=torch.int64) * 2**40,
        "none": torch.empty(0, 3),
    }


@pytest.fixture
def whole() -> Callable:
    """The pieces of a process that holds all of a state."""
    return lambda state: [Piece(name, tuple(t.shape), whole_box(tuple(t.shape)), t) for name, t in state.items()]
