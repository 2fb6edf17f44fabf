"""Text tokenised while training: the same rows in the same order for whoever reads them, from any row on, each document once a pass."""

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import fsspec
import pyarrow
import pyarrow.ipc
import pyarrow.parquet
import pytest

from paraxis.base.errors import ConfigError, DataError
from paraxis.base.seams import IGNORE
from paraxis.data import live as live_module
from paraxis.data import pools
from paraxis.data.chat import TEMPLATES
from paraxis.data.config import DataConfig
from paraxis.data.documents import BadRecords, Reading, divisible, pieces
from paraxis.data.live import LiveRows
from paraxis.data.open import Live, open_held_out, open_training
from paraxis.data.record import close_rows, continue_data, data_record, problem_with_data, skipped_records
from paraxis.data.sources import expand
from paraxis.data.tokens import train_tokenizer
from tests.data.corpus import sentences, tokenizer, tokenizer_folder

KINDS = ("jsonl", "parquet", "arrow", "text")
ALONE = Live(leads=False)  # without processes of its own: what is asked for is made at once


@pytest.fixture(autouse=True)
def small_pools(monkeypatch) -> None:
    monkeypatch.setattr(pools, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(pools, "POOL_CHUNKS", 3)


def write(folder: Path, kind: str, texts: list[str]) -> str:
    """`texts` in files of a kind, the second of which is large enough to be cut; the path that names them."""
    folder.mkdir(exist_ok=True)
    if kind == "text":
        for number, text in enumerate(texts):
            (folder / f"{number:04}.txt").write_text(text)
        return str(folder)
    for number, part in enumerate((texts[:10], texts[10:-5], texts[-5:])):
        table = pyarrow.table({"text": part})
        if kind == "jsonl":
            (folder / f"{number}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
        elif kind == "parquet":
            pyarrow.parquet.write_table(table, folder / f"{number}.parquet", row_group_size=9, compression="none")
        else:
            with pyarrow.OSFile(str(folder / f"{number}.arrow"), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
                writer.write_table(table, max_chunksize=9)
    return str(folder)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    path = write(tmp_path / "text", "jsonl", sentences(120))
    return DataConfig(paths=(path,), tokenizer=tokenizer_folder(tmp_path), tokenize="live", seq_len=16, document_mask=True)


@contextmanager
def opened(config: DataConfig, cache: Path, live: Live = ALONE, seed: int = 3) -> Iterator[LiveRows]:
    rows = open_training(config, cache, seed=seed, rows_per_step=lambda: 1, live=live).rows
    assert isinstance(rows, LiveRows)
    try:
        yield rows
    finally:
        close_rows(rows)


def fields(rows: Any, indices) -> list[dict[str, list[int]]]:
    return [{name: array.tolist() for name, array in rows.row(index).items()} for index in indices]


def rows_of_a_pass(rows: LiveRows, number: int = 0) -> range:
    """The rows of pass `number`, which is known once the pool after it has been reached."""
    begins: dict[int, int] = {}
    for index in range(3000):
        mark = rows.position(index)
        repetition = mark["place"]["pool"] // rows._pools._pools
        begins.setdefault(repetition, mark["row"])
        if number + 1 in begins:
            return range(begins[number], begins[number + 1])
    raise AssertionError("the pass does not end")


def targets_in(rows: Any, indices: range) -> Counter[int]:
    """How often each token is to be predicted."""
    return Counter(target for row in fields(rows, indices) for target in row["targets_bt"] if target != IGNORE)


def wanted_targets(texts: list[str]) -> Counter[int]:
    """Every token but the first of each document, which with the mask nothing predicts."""
    ours = tokenizer()
    return Counter(chain.from_iterable([*ours.encode(text), ours.eos_id][1:] for text in texts))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_pass_predicts_every_token_of_every_document_once(config, tmp_path, kind, packing):
    config = replace(config, paths=(write(tmp_path / f"of {kind}", kind, sentences(120)),), packing=packing)
    with opened(config, tmp_path / "cache") as rows:
        for number in range(2):
            assert targets_in(rows, rows_of_a_pass(rows, number)) == wanted_targets(sentences(120))


def test_long_documents_are_dropped_where_asked(config, tmp_path):
    config = replace(config, packing="best_fit", long_documents="drop")
    with opened(config, tmp_path / "cache") as rows:
        found = targets_in(rows, rows_of_a_pass(rows))
    ours = tokenizer()
    assert found == wanted_targets([text for text in sentences(120) if len(ours.encode(text)) <= config.seq_len])
    longest = max(len(ours.encode(text)) for text in sentences(120))
    assert longest > config.seq_len
    with opened(replace(config, seq_len=1), tmp_path / "cache") as rows, pytest.raises(DataError, match=r"raise data\.seq_len"):
        rows.row(0)


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_conversations_have_the_targets_that_they_have_when_tokenised_ahead(config, tmp_path, packing):
    messages = [[{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in sentences(60)]
    (tmp_path / "chat.jsonl").write_text("\n".join(json.dumps({"messages": conversation}) for conversation in messages))
    for name, content in train_tokenizer(sentences(50), 320, TEMPLATES["chatml"].markers).files.items():
        (tmp_path / "tokenizer" / name).write_bytes(content)
    config = replace(config, paths=(f"{tmp_path}/chat.jsonl",), chat="chatml", packing=packing)
    with opened(config, tmp_path / "cache") as rows:
        found = targets_in(rows, rows_of_a_pass(rows))
    ahead = open_training(replace(config, tokenize="ahead", packing="best_fit"), tmp_path / "cache", seed=3, rows_per_step=lambda: 1).rows
    assert found == targets_in(ahead, range(ahead.length))
    assert found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "text"])
@pytest.mark.parametrize("shares", [2, 5, 40])
def test_the_shares_of_a_file_are_the_file(tmp_path, kind, shares):
    found = []
    for source in expand([write(tmp_path, kind, sentences(120))]):
        assert divisible(source)
        for share in range(shares):
            found += [piece.text for piece in pieces(replace(source, share=(share, shares)), Reading("text"), BadRecords("stop"))]
    assert found == sentences(120)


def test_a_remote_file_is_cut_in_shares_too():
    memory = fsspec.filesystem("memory")
    memory.pipe("/corpus/a.jsonl", "\n".join(json.dumps({"text": text}) for text in sentences(50)).encode())
    try:
        [source] = expand(["memory://corpus/a.jsonl"])
        shares = [replace(source, share=(share, 7)) for share in range(7)]
        found = [[piece.text for piece in pieces(share, Reading("text"), BadRecords("stop"))] for share in shares]
    finally:
        memory.rm("/corpus", recursive=True)
    assert all(found)
    assert list(chain.from_iterable(found)) == sentences(50)


def test_a_broken_record_in_a_share_is_named_by_its_line_in_the_file(config, tmp_path):
    lines = [json.dumps({"text": text}) for text in sentences(120)]
    lines[77] = "{"
    (tmp_path / "text" / "1.jsonl").write_text("\n".join(lines))
    with opened(config, tmp_path / "cache") as rows, pytest.raises(DataError, match=r"1\.jsonl, line 78: not valid JSON"):
        fields(rows, range(400))
    skipping = replace(config, on_bad_record="skip")
    with opened(skipping, tmp_path / "cache") as rows:
        fields(rows, rows_of_a_pass(rows))
        assert skipped_records(rows) >= 1
    with (
        opened(replace(skipping, most_skipped=0.0001), tmp_path / "cache") as rows,
        pytest.raises(DataError, match=r"line 78.*most_skipped"),
    ):
        fields(rows, range(400))


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_rows_are_the_same_from_whatever_row_a_run_goes_on(config, tmp_path, packing):
    config = replace(config, packing=packing)
    with opened(config, tmp_path / "cache") as rows:
        stream = fields(rows, range(400))
        assert fields(rows, range(399, 360, -5)) == stream[399:360:-5]
        ends = {rows.position(index)["row"] for index in range(400)}
        records = {at: data_record(rows, at) for at in (0, 1, 17, 150, 333, *islice(sorted(ends), 1, 4), rows_of_a_pass(rows).stop)}
    for at, record in records.items():
        record = json.loads(json.dumps(record))
        with opened(config, tmp_path / "elsewhere") as resumed:
            assert problem_with_data(record, resumed, 1) is None
            continue_data(record, resumed, 1, at)
            assert fields(resumed, range(at, min(400, at + 40))) == stream[at : at + 40], at
            assert data_record(resumed, at) == record
            later = min(399, at + 30)  # and once more, within the same pass
            again = data_record(resumed, later)
        with opened(config, tmp_path / "once more") as resumed:
            continue_data(again, resumed, 2, later)
            assert fields(resumed, range(later, 400)) == stream[later:]


def test_what_precedes_the_row_is_not_tokenised_again(config, tmp_path, monkeypatch):
    with opened(config, tmp_path / "cache") as rows:
        record = data_record(rows, rows_of_a_pass(rows).stop - 1)
    made, real = [], pools.make_part
    monkeypatch.setattr(pools, "make_part", lambda part, *rest: (made.append(part), real(part, *rest)))
    with opened(config, tmp_path / "other") as rows:
        continue_data(record, rows, 1, record["sources"][""]["position"]["row"])
        rows.row(record["sources"][""]["position"]["row"])
    assert 1 <= len(made) <= pools.POOL_CHUNKS


def test_processes_in_the_background_make_the_same_rows_and_leave_nothing(config, tmp_path):
    with opened(config, tmp_path / "alone") as rows:
        stream = fields(rows, range(300))
    leading = replace(config, workers=2)
    with opened(leading, tmp_path / "cache", Live()) as rows, opened(config, tmp_path / "cache") as follower:
        for index in range(0, 300, 20):  # two ranks of a host, one of which has the processes
            assert fields(rows, range(index, index + 20)) == stream[index : index + 20]
            assert fields(follower, range(index, index + 20)) == stream[index : index + 20]
        chunks = list((tmp_path / "cache").glob("live-*/chunk-*"))
        assert 0 < len(chunks) <= pools.POOL_CHUNKS * (1 + pools.AHEAD + pools.BEHIND)
    assert not list((tmp_path / "cache").glob("live-*"))


def test_what_was_removed_too_early_is_made_again(config, tmp_path):
    with opened(config, tmp_path / "alone") as rows:
        stream = fields(rows, range(300))
    with opened(config, tmp_path / "cache") as behind:
        assert fields(behind, range(10)) == stream[:10]
        with opened(replace(config, workers=1), tmp_path / "cache", Live()) as ahead:
            assert fields(ahead, range(290, 300)) == stream[290:]
        assert fields(behind, range(300)) == stream


def test_each_chunk_is_tokenised_by_one_rank_only(config, tmp_path, monkeypatch):
    made, real = [], pools.make_part
    monkeypatch.setattr(
        pools, "make_part", lambda part, *rest: (made.append([(source.name, source.share) for source in part.sources]), real(part, *rest))
    )
    with opened(config, tmp_path / "cache") as one, opened(config, tmp_path / "cache") as other:
        assert fields(one, range(150)) == fields(other, range(150))
    assert made
    assert all(made.count(chunk) == 1 for chunk in made)


def test_a_changed_missing_or_added_file_is_named(config, tmp_path):
    with opened(config, tmp_path / "cache") as rows:
        record = data_record(rows, 20)

    def problem(changed: DataConfig = config) -> str:
        with opened(changed, tmp_path / "cache") as rows:
            return problem_with_data(record, rows, 1) or ""

    assert not problem()
    files = sorted((tmp_path / "text").iterdir())
    assert "0.jsonl is missing" in problem(replace(config, paths=tuple(map(str, files[1:]))))
    assert "are in another order" in problem(replace(config, paths=tuple(map(str, (files[1], files[0], files[2])))))
    assert "data.packing" in problem(replace(config, packing="best_fit"))
    ahead = open_training(replace(config, tokenize="ahead"), tmp_path / "cache", seed=3, rows_per_step=lambda: 1).rows
    assert "data.tokenize was live" in (problem_with_data(record, ahead, 1) or "")
    (tmp_path / "text").rename(tmp_path / "moved")  # which keeps the files' times
    assert not problem(replace(config, paths=(str(tmp_path / "moved"),)))
    (tmp_path / "moved").rename(tmp_path / "text")
    (tmp_path / "text" / "9.jsonl").write_text('{"text": "more"}')
    assert "9.jsonl was not there" in problem()
    (tmp_path / "text" / "0.jsonl").write_text('{"text": "something else"}')
    assert "0.jsonl has changed" in problem()


def test_a_pass_more_than_allowed_and_no_text_at_all_are_refused(config, tmp_path):
    with opened(replace(config, repeat=1), tmp_path / "cache") as rows, pytest.raises(DataError, match=r"of pass 2 .* data\.repeat=1"):
        fields(rows, range(1000))
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "a.jsonl").write_text('{"text": ""}\n')
    with (
        opened(replace(config, paths=(str(tmp_path / "empty"),)), tmp_path / "cache") as rows,
        pytest.raises(DataError, match="no text to train on"),
    ):
        rows.row(0)


def test_what_has_been_forgotten_is_not_read_wrongly(config, tmp_path, monkeypatch):
    monkeypatch.setattr(live_module, "KEPT_MARKS", 2)
    with opened(config, tmp_path / "cache") as rows:
        rows.row(300)
        with pytest.raises(AssertionError, match="behind what is remembered"):
            rows.row(0)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"workers": -1}, r"data\.workers=-1 must be 0"),
        ({"workers": 2}, r"data\.workers=2 says nothing while data\.tokenize=ahead"),
        ({"tokenize": "later"}, r"data\.tokenize='later' is unknown; choose ahead or live"),
    ],
)
def test_settings_that_say_nothing_are_refused(settings, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(**settings)


def test_what_is_tokenised_already_and_held_out_data_are_opened_as_ever(config, tmp_path):
    ahead = replace(config, tokenize="ahead")
    rows = open_training(ahead, tmp_path / "cache", seed=3, rows_per_step=lambda: 1).rows
    shards = replace(config, paths=(str(rows.data.folder),))
    again = open_training(shards, tmp_path / "other", seed=3, rows_per_step=lambda: 1).rows
    assert again.fingerprint == rows.fingerprint
    held_out = open_held_out(config, config.paths, tmp_path / "cache", tokenizer())
    assert sum((held_out.row(index)["targets_bt"] != IGNORE).sum() for index in range(held_out.length)) == sum(
        wanted_targets(sentences(120)).values()
    )
