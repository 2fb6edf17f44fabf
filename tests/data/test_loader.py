"""A step's rows do not depend on how many ranks share them, and a loader's troubles surface in its reader."""

import threading
from contextlib import closing
from dataclasses import dataclass
from itertools import chain

import numpy as np
import pytest
import torch

from paraxis.base.seams import IGNORE, Batch
from paraxis.data.loader import Loader, evaluation_batches


@dataclass
class Numbered:
    """Rows that say which they are."""

    length: int = 10
    fingerprint: str = "numbered"
    vocab_size: int = 1000
    breaks_at: int = -1

    def row(self, index: int) -> dict[str, np.ndarray]:
        if index == self.breaks_at:
            raise OSError(f"row {index} is gone")
        row = np.full(4, index, np.int64)
        return {"tokens_bt": row, "targets_bt": row + 1, "positions_bt": np.arange(4)}


def loader(rows=None, *, rank=0, ranks=1, micro_batch=2, per_step=12, start=0, **options) -> closing[Loader]:
    return closing(
        Loader(
            rows or Numbered(),
            micro_batch=micro_batch,
            data_rank=rank,
            data_ranks=ranks,
            rows_per_step=per_step,
            start_row=start,
            pin=False,
            **options,
        )
    )


def numbers(batches: list[Batch]) -> list[list[int]]:
    return [batch.tokens_bt[:, 0].tolist() for batch in batches]


def test_micro_batches_take_turns_over_the_data_ranks():
    with loader(rank=1, ranks=3, start=100) as batches:
        assert numbers(next(batches)) == [[102, 103], [108, 109]]
        assert numbers(next(batches)) == [[114, 115], [120, 121]]


@pytest.mark.parametrize(("ranks", "micro_batch"), [(1, 12), (1, 1), (2, 3), (3, 2), (6, 2)])
def test_a_step_trains_on_the_same_rows_however_they_are_spread(ranks, micro_batch):
    found = []
    for rank in range(ranks):
        with loader(rank=rank, ranks=ranks, micro_batch=micro_batch, start=24) as batches:
            found += chain.from_iterable(numbers(next(batches)))
    assert sorted(found) == list(range(24, 36))


def test_the_cursor_counts_what_was_handed_out_not_what_was_prefetched():
    with loader(prefetch=4) as batches:
        assert batches.cursor == 0
        first, second = next(batches), next(batches)
        assert batches.cursor == 24
        third = next(batches)
    with loader(start=24) as resumed:
        assert numbers(next(resumed)) == numbers(third)
    assert numbers(first) != numbers(second)


def test_batches_are_int64_tensors_by_field():
    with loader() as batches:
        batch = next(batches)[0]
    assert type(batch) is Batch
    assert batch.tokens_bt.shape == (2, 4)
    assert batch.targets_bt.dtype == torch.int64
    assert batch.documents_bt is None
    assert batch.target_count == 8


def test_a_recipes_own_fields_reach_its_own_batch():
    @dataclass(frozen=True)
    class Weighted(Batch):
        weight_b: torch.Tensor | None = None

    class WeightedRows(Numbered):
        def row(self, index):
            return {**super().row(index), "weight_b": np.float32(index)}

    with loader(WeightedRows(), batch_type=Weighted) as batches:
        batch = next(batches)[1]
    assert isinstance(batch, Weighted)
    assert batch.weight_b is not None
    assert batch.weight_b.tolist() == [2.0, 3.0]
    padded = list(evaluation_batches(WeightedRows(), 4, 1, 2, batch_type=Weighted))[-1]
    assert isinstance(padded, Weighted)


def test_an_error_while_prefetching_is_raised_at_its_own_step_and_again():
    with loader(Numbered(breaks_at=30), prefetch=3) as batches:
        assert [numbers(next(batches))[0][0] for _ in range(2)] == [0, 12]
        for _ in range(2):
            with pytest.raises(OSError, match="row 30 is gone"):
                next(batches)
        assert batches.cursor == 24


def test_closing_ends_the_thread_with_and_without_waiting_steps():
    before = threading.active_count()
    for taken in (0, 1, 3):
        with loader() as batches:
            for _ in range(taken):
                next(batches)
        batches.close()
    assert threading.active_count() == before


@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("length", [1, 7, 12])
def test_held_out_rows_are_scored_once_in_equally_many_batches_on_every_rank(ranks, length):
    rows = Numbered(length=length)
    shares = [list(evaluation_batches(rows, 2, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    scored = [row[0] - 1 for share in shares for batch in share for row in batch.targets_bt.tolist() if row[0] != IGNORE]
    assert sorted(scored) == list(range(length))
    assert all(batch.tokens_bt.shape == (2, 4) for share in shares for batch in share)
    assert sum(int(batch.target_count) for share in shares for batch in share) == 4 * length
