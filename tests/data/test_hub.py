"""Datasets of the `datasets` library, whole and as streams: read like files, and gone on with from any row."""

import json
import logging
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import datasets
import pytest

from paraxis.base.errors import ConfigError, DataError
from paraxis.base.seams import IGNORE
from paraxis.data import pools
from paraxis.data.config import DataConfig
from paraxis.data.hub import open_whole, read_name
from paraxis.data.live import LiveRows
from paraxis.data.open import Live, open_held_out, open_training
from paraxis.data.prepare import prepare
from paraxis.data.record import close_rows, continue_data, data_record, problem_with_data, skipped_records
from tests.data.corpus import documents, sentences, tokenizer, tokenizer_folder

TEXTS = sentences(120)


@pytest.fixture(autouse=True)
def small(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "of the library")
    monkeypatch.setattr(pools, "CHUNK_BYTES", 1500)
    monkeypatch.setattr(pools, "POOL_CHUNKS", 3)
    monkeypatch.setattr(pools, "POOL_CHARACTERS", 1200)
    open_whole.cache_clear()
    for number, part in enumerate((TEXTS[:50], TEXTS[50:])):
        (tmp_path / f"{number}.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in part))
    tokenizer_folder(tmp_path)


@pytest.fixture
def paths(tmp_path) -> dict[str, str]:
    """The same texts, named in every way."""
    whole = datasets.Dataset.from_dict({"text": TEXTS, "n": list(range(len(TEXTS)))})
    whole.save_to_disk(tmp_path / "saved", num_shards=2)
    datasets.DatasetDict(train=whole, test=whole.select(range(3))).save_to_disk(tmp_path / "splits")
    files = f"json?files={tmp_path}/*.jsonl"
    named = {"saved": f"{tmp_path}/saved", "split": f"{tmp_path}/splits?split=train", "files": files}
    streams = {f"{name}, stream": f"{path}{'&' if '?' in path else '?'}stream=true" for name, path in named.items()}
    return {name: f"hf:{path}" for name, path in {**named, **streams}.items()}


def live(tmp_path: Path, path: str, **settings) -> DataConfig:
    own = {"tokenizer": str(tmp_path / "tokenizer"), "tokenize": "live", "seq_len": 16, "document_mask": True}
    return DataConfig(paths=(path,), **{**own, **settings})


@contextmanager
def opened(config: DataConfig, cache: Path, leads: Live = Live(leads=False)):  # noqa: B008
    rows = open_training(config, cache, seed=3, rows_per_step=lambda: 1, live=leads).rows
    assert isinstance(rows, LiveRows)
    try:
        yield rows
    finally:
        close_rows(rows)


def tokens(rows: LiveRows, indices: range) -> list[list[int]]:
    return [rows.row(index)["tokens_bt"].tolist() for index in indices]


@pytest.mark.parametrize("name", ["saved", "split", "files"])
def test_a_dataset_has_the_documents_of_its_rows(tmp_path, paths, name):
    data = prepare(DataConfig(paths=(paths[name],)), tmp_path / "cache", tokenizer=tokenizer())
    assert documents(data) == [[*tokenizer().encode(text), tokenizer().eos_id] for text in TEXTS]
    again = prepare(DataConfig(paths=(paths[name],)), tmp_path / "cache", tokenizer=tokenizer())
    assert again.folder == data.folder


def test_the_splits_of_a_dataset_are_not_read_as_one(tmp_path, paths):
    test = prepare(DataConfig(paths=(f"hf:{tmp_path}/splits?split=test",)), tmp_path / "cache", tokenizer=tokenizer())
    assert test.documents == 3
    with pytest.raises(DataError, match=r"holds the splits of a dataset .* name one of them"):
        prepare(DataConfig(paths=(f"{tmp_path}/splits",)), tmp_path / "cache", tokenizer=tokenizer())


def test_broken_rows_and_missing_columns_are_named(tmp_path):
    datasets.Dataset.from_dict({"text": ["a", None, "b"]}).save_to_disk(tmp_path / "broken")
    path = f"hf:{tmp_path}/broken"
    with pytest.raises(DataError, match=r"broken, row 2: no value in column 'text'"):
        prepare(DataConfig(paths=(path,)), tmp_path / "cache", tokenizer=tokenizer())
    assert prepare(DataConfig(paths=(path,), on_bad_record="skip"), tmp_path / "cache", tokenizer=tokenizer()).skipped == 1
    with pytest.raises(DataError, match=r"no column 'body'; set data\.text_field to one of text"):
        prepare(DataConfig(paths=(path,), text_field="body"), tmp_path / "cache", tokenizer=tokenizer())
    with (
        opened(live(tmp_path, f"{path}?stream=true"), tmp_path / "cache") as rows,
        pytest.raises(DataError, match=r"stream=true, record 2: "),
    ):
        rows.row(0)
    skipping = live(tmp_path, f"{path}?stream=true", on_bad_record="skip")
    with opened(skipping, tmp_path / "cache") as rows:
        rows.row(0)
        assert skipped_records(rows) == 1
    with (
        opened(replace(skipping, most_skipped=0.3), tmp_path / "cache") as rows,
        pytest.raises(DataError, match=r"1 of 3 records .*record 2"),
    ):
        rows.row(0)


@pytest.mark.parametrize("name", ["saved", "files", "saved, stream", "files, stream"])
def test_a_pass_over_a_dataset_predicts_every_token_once_and_goes_on_from_any_row(tmp_path, paths, name):
    config = live(tmp_path, paths[name])
    with opened(config, tmp_path / "cache") as rows:
        stream = tokens(rows, range(330))
        records = {at: json.loads(json.dumps(data_record(rows, at))) for at in (0, 1, 100, 199, 300)}
        ends = [index for index in range(1, 330) if _pass(rows, index) > _pass(rows, index - 1)]
        found = sorted(t for index in range(ends[0]) for t in rows.row(index)["targets_bt"].tolist() if t != IGNORE)
    wanted = sorted(t for text in TEXTS for t in [*tokenizer().encode(text), tokenizer().eos_id][1:])
    assert found == wanted
    for at, record in records.items():
        with opened(config, tmp_path / f"from {at}") as rows:
            assert problem_with_data(record, rows, 1) is None
            continue_data(record, rows, 1, at)
            assert tokens(rows, range(at, min(330, at + 60))) == stream[at : at + 60]
            again = json.loads(json.dumps(data_record(rows, at + 25)))
        with opened(config, tmp_path / f"again from {at}") as rows:
            continue_data(again, rows, 2, at + 25)
            assert tokens(rows, range(at + 25, 330)) == stream[at + 25 :]


def _pass(rows: LiveRows, index: int) -> int:
    """The pass of the row before `index`, told by the pool it is in."""
    place = rows.position(index)["place"]
    return place["repetition"] if "repetition" in place else place["pool"] // rows._pools._pools


def test_a_process_in_the_background_reads_the_same_stream_for_all_ranks_of_a_host(tmp_path, paths):
    config = live(tmp_path, paths["files, stream"])
    with opened(config, tmp_path / "alone") as rows:
        stream = tokens(rows, range(200))
    with opened(replace(config, workers=2), tmp_path / "cache", Live()) as rows, opened(config, tmp_path / "cache") as follower:
        for index in range(0, 200, 20):
            assert tokens(rows, range(index, index + 20)) == stream[index : index + 20]
            assert tokens(follower, range(index, index + 20)) == stream[index : index + 20]
        assert 0 < len(list((tmp_path / "cache").glob("live-*/pool-*"))) <= pools.BEHIND + 2
    assert not list((tmp_path / "cache").glob("live-*"))


def test_a_stream_says_that_its_content_cannot_be_checked_and_another_is_refused(tmp_path, paths, caplog):
    caplog.set_level(logging.WARNING)
    with opened(live(tmp_path, paths["files, stream"]), tmp_path / "cache") as rows:
        record = data_record(rows, 10)
    assert caplog.text.count("whether its content is the same cannot be checked") == 1
    with opened(live(tmp_path, paths["saved, stream"]), tmp_path / "cache") as rows:
        assert "the data's fingerprint" in (problem_with_data(record, rows, 1) or "")


def test_what_a_stream_cannot_do_is_refused(tmp_path, paths):
    stream = paths["files, stream"]
    with pytest.raises(ConfigError, match=r"is a stream, which is read while training: set data\.tokenize=live"):
        DataConfig(paths=(stream,))
    with pytest.raises(ConfigError, match=r"cannot be trained on the stream"):
        DataConfig(paths=(stream,), tokenize="live")
    with pytest.raises(ConfigError, match=r"is a source by itself"):
        replace(live(tmp_path, stream), paths=(stream, "a.txt"))
    with pytest.raises(ConfigError, match=r"eval\.paths: .* is a stream, and held-out data are read again"):
        open_held_out(live(tmp_path, stream), (stream,), tmp_path / "cache", tokenizer())


@pytest.mark.parametrize("path", ["hf:", "hf:a?name=b", "hf:a?split", "hf:a?split=", "hf:a?stream=yes", "hf:a?split=b&split=c"])
def test_a_name_that_cannot_be_read_is_refused(path):
    with pytest.raises(ConfigError, match=r"write hf:NAME"):
        read_name(path)


def test_a_dataset_that_cannot_be_opened_is_named_and_so_is_a_missing_package(tmp_path, monkeypatch):
    with pytest.raises(DataError, match=r"hf:json\?files=.*none\.jsonl cannot be opened: .*check the name"):
        open_whole(f"hf:json?files={tmp_path}/none.jsonl")
    with pytest.raises(DataError, match=r'cannot be opened: .*Unknown split "dev"'):
        open_whole(f"hf:json?files={tmp_path}/0.jsonl&split=dev")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(DataError, match=r"needs datasets 4 or later, not 3\.6\.0"):
        open_whole("hf:some")
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(DataError, match=r"needs the package datasets, which is not installed; pip install 'datasets>=4'"):
        open_whole("hf:some")
