"""A run that goes on with other ranks and micro-batches reads the same rows in the same global order, of every kind of data."""

import json
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from paraxis.base.seams import IGNORE, Rows
from paraxis.data import pools
from paraxis.data.config import DataConfig
from paraxis.data.loader import Loader, evaluation_batches
from paraxis.data.open import Live, open_held_out, open_training
from paraxis.data.prepare import prepare
from paraxis.data.record import close_rows, continue_data, data_record, problem_with_data
from tests.data.corpus import sentences, tokenizer, tokenizer_folder

TEXTS = sentences(70)


@dataclass(frozen=True)
class Stretch:
    """Some steps of a run between two resumes."""

    ranks: int
    micro_batch: int
    rows_per_step: int
    steps: int


# The third goes on at row 76, in the middle of what would be a step of the first; a pass of most kinds ends in the fourth.
RUN = (Stretch(2, 3, 12, 3), Stretch(4, 1, 8, 5), Stretch(3, 2, 18, 1), Stretch(1, 5, 10, 6), Stretch(2, 2, 4, 3))
KINDS = ("jsonl", "best fit", "shards", "ids", "live", "live, best fit", "dataset", "dataset, live", "stream", "mixture")


@pytest.fixture
def config(request, tmp_path, monkeypatch) -> DataConfig:
    """The same texts as data of one kind."""
    monkeypatch.setattr(pools, "CHUNK_BYTES", 600)
    monkeypatch.setattr(pools, "POOL_CHUNKS", 2)
    monkeypatch.setattr(pools, "POOL_CHARACTERS", 1000)
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in TEXTS))
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS}), tmp_path / "a.parquet", row_group_size=10, compression="none")
    np.save(tmp_path / "a.npy", np.concatenate([[*tokenizer().encode(text), tokenizer().eos_id] for text in TEXTS]))
    datasets.Dataset.from_dict({"text": TEXTS}).save_to_disk(tmp_path / "saved")
    base = DataConfig(paths=(f"{tmp_path}/a.jsonl",), tokenizer=tokenizer_folder(tmp_path), seq_len=16, document_mask=True)
    prepare(base, tmp_path / "made", out=tmp_path / "shards")
    live = replace(base, tokenize="live")
    saved, stream = f"hf:{tmp_path}/saved", f"hf:{tmp_path}/saved?stream=true"
    return {
        "jsonl": base,
        "best fit": replace(base, packing="best_fit"),
        "shards": replace(base, paths=(f"{tmp_path}/shards",)),
        "ids": replace(base, paths=(f"{tmp_path}/a.npy",)),
        "live": replace(live, paths=(f"{tmp_path}/a.parquet",)),
        "live, best fit": replace(live, packing="best_fit"),
        "dataset": replace(base, paths=(saved,)),
        "dataset, live": replace(live, paths=(saved,)),
        "stream": replace(live, paths=(stream,)),
        "mixture": replace(live, paths=(f"a={stream}", f"b={tmp_path}/a.jsonl", f"c={tmp_path}/shards"), mixture=("a=2 b=2 c=1",)),
    }[request.param]


def opened(config: DataConfig, cache: Path, stack: ExitStack) -> Rows:
    rows = open_training(config, cache, seed=5, rows_per_step=lambda: 1, live=Live(leads=False)).rows
    stack.callback(close_rows, rows)
    return rows


def read(stretch: Stretch, of_ranks: list[Rows], start: int) -> tuple[dict[int, list[int]], int]:
    """The rows that the ranks read, by their place in the global order, and the cursor after them."""
    found: dict[int, list[int]] = {}
    cursors = set()
    for rank, rows in enumerate(of_ranks):
        shape = {"micro_batch": stretch.micro_batch, "data_rank": rank, "data_ranks": stretch.ranks, "rows_per_step": stretch.rows_per_step}
        with closing(Loader(rows, **shape, start_row=start, pin=False)) as loader:
            for step in range(stretch.steps):
                for number, batch in enumerate(next(loader)):
                    first = start + step * stretch.rows_per_step + (number * stretch.ranks + rank) * stretch.micro_batch
                    found |= {first + place: row for place, row in enumerate(batch.tokens_bt.tolist())}
            cursors.add(loader.cursor)
    [cursor] = cursors
    return found, cursor


@pytest.mark.parametrize("config", KINDS, indirect=True)
def test_the_global_order_outlives_four_resumes_with_other_ranks_and_micro_batches(config, tmp_path):
    total = sum(stretch.rows_per_step * stretch.steps for stretch in RUN)
    with ExitStack() as stack:
        rows = opened(config, tmp_path / "uninterrupted", stack)
        wanted = {index: rows.row(index)["tokens_bt"].tolist() for index in range(total)}
    assert len({tuple(row) for row in wanted.values()}) > 60
    found, cursor, record = {}, 0, None
    for number, stretch in enumerate(RUN):
        with ExitStack() as stack:
            of_ranks = [opened(config, tmp_path / f"{number}", stack) for _ in range(stretch.ranks)]
            for rows in of_ranks if record is not None else ():
                assert problem_with_data(record, rows, number) is None
                continue_data(record, rows, number, cursor)
            more, cursor = read(stretch, of_ranks, cursor)
            assert not more.keys() & found.keys()
            found |= more
            records = [json.loads(json.dumps(data_record(rows, cursor))) for rows in of_ranks]
            assert all(other == records[0] for other in records)  # any rank may write it
            record = records[0]
    assert found == wanted


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch", [1, 3])
@pytest.mark.parametrize("config", ["jsonl"], indirect=True)
def test_a_held_out_token_is_predicted_once_whatever_the_number_of_ranks(config, tmp_path, ranks, micro_batch):
    rows = open_held_out(replace(config, tokenize="live"), config.paths, tmp_path / "cache", tokenizer())
    assert rows.length % 12  # neither ranks nor micro-batches divide it
    shares = [list(evaluation_batches(rows, micro_batch, rank, ranks)) for rank in range(ranks)]
    assert len({len(share) for share in shares}) == 1
    found = sorted(t for share in shares for batch in share for t in batch.targets_bt.flatten().tolist() if t != IGNORE)
    assert found == sorted(t for text in TEXTS for t in [*tokenizer().encode(text), tokenizer().eos_id][1:])
