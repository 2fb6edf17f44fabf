"""Large data: made in parts, by several processes, going on after an interruption; and data that come tokenised."""

import json
from pathlib import Path

import numpy as np
import pyarrow
import pyarrow.ipc
import pytest

from paraxis.base.errors import DataError
from paraxis.data import prepare as prepare_module
from paraxis.data.config import DataConfig
from paraxis.data.prepare import prepare
from paraxis.data.rows import HeldOutRows
from tests.data.corpus import documents, prepared, sentences, tokenizer


@pytest.fixture
def text(tmp_path) -> Path:
    (tmp_path / "text").mkdir()
    for number in range(6):
        lines = [json.dumps({"text": text}) for text in sentences(60)[number * 10 : number * 10 + 10]]
        (tmp_path / "text" / f"{number}.jsonl").write_text("\n".join(lines))
    return tmp_path / "text"


@pytest.fixture
def small_parts(monkeypatch) -> None:
    monkeypatch.setattr(prepare_module, "LEAST_PART_BYTES", 1000)
    monkeypatch.setattr("paraxis.data.shards.SHARD_TOKENS", 100)


def folders(cache: Path) -> list[str]:
    return sorted(path.name for path in cache.iterdir() if path.is_dir())


@pytest.mark.parametrize("processes", [1, 2])
def test_parts_join_to_the_same_data_whoever_makes_them(tmp_path, text, monkeypatch, processes):
    config, seen = DataConfig(paths=(str(text),)), []
    whole = prepare(config, tmp_path / "whole", tokenizer=tokenizer())
    monkeypatch.setattr(prepare_module, "LEAST_PART_BYTES", 1000)
    joined = prepare(config, tmp_path / "parts", tokenizer=tokenizer(), processes=processes, progress=lambda *step: seen.append(step))
    assert documents(joined) == documents(whole)
    assert joined.fingerprint == whole.fingerprint
    assert folders(tmp_path / "parts") == [joined.folder.name]
    total = sum(file.stat().st_size for file in text.iterdir())
    assert len(seen) >= 1
    assert seen[-1] == ("tokenising", total, total)


def test_what_is_interrupted_goes_on_with_the_next_part_once_the_broken_file_is_mended(tmp_path, text, small_parts, monkeypatch):
    good = (text / "4.jsonl").read_text()
    (text / "4.jsonl").write_text("{")
    config = DataConfig(paths=(str(text),))
    with pytest.raises(DataError, match=r"4\.jsonl, line 1"):
        prepare(config, tmp_path / "cache", tokenizer=tokenizer())
    (unfinished,) = folders(tmp_path / "cache")
    assert len(folders(tmp_path / "cache" / unfinished)) == 2  # of two files each

    (text / "4.jsonl").write_text(good)
    made, real = [], prepare_module.make_part

    def counted(part, folder, told):
        made.append([Path(source.name).name for source in part.sources])
        real(part, folder, told)

    monkeypatch.setattr(prepare_module, "make_part", counted)
    data = prepare(config, tmp_path / "cache", tokenizer=tokenizer())
    assert made == [["4.jsonl", "5.jsonl"]]
    assert folders(tmp_path / "cache") == [data.folder.name]
    assert documents(data) == documents(prepare(config, tmp_path / "whole", tokenizer=tokenizer()))


def test_an_error_in_another_process_is_the_readers_own(tmp_path, text, small_parts):
    (text / "5.jsonl").write_text("{")
    with pytest.raises(DataError, match=r"5\.jsonl, line 1: not valid JSON"):
        prepare(DataConfig(paths=(str(text),)), tmp_path / "cache", tokenizer=tokenizer(), processes=2)


def test_too_many_skipped_records_are_refused_and_the_first_is_named(tmp_path, text, small_parts):
    (text / "0.jsonl").write_text((text / "0.jsonl").read_text() + "\n{\n{\n")
    (text / "3.jsonl").write_text((text / "3.jsonl").read_text() + "\n{")

    def skipping(most: float):
        return prepare(DataConfig(paths=(str(text),), on_bad_record="skip", most_skipped=most), tmp_path / "cache", tokenizer=tokenizer())

    assert skipping(0.05).skipped == 3  # of 63
    with pytest.raises(DataError, match=r"3 of 63 records were skipped.*most_skipped=0\.04.*0\.jsonl, line 11: not valid JSON"):
        skipping(0.04)


def test_a_prepared_folder_is_mapped_where_it_is(tmp_path, text):
    config = DataConfig(paths=(str(text),), tokenizer="train:300")
    made = prepare(config, tmp_path / "cache", out=tmp_path / "shards")
    assert made.folder == tmp_path / "shards"
    shipped = DataConfig(paths=(str(made.folder),), tokenizer=str(made.folder))
    data = prepare(shipped, tmp_path / "other")
    assert not (tmp_path / "other").exists()
    assert (data.folder, data.fingerprint, documents(data)) == (made.folder, made.fingerprint, documents(made))
    with pytest.raises(DataError, match=r"prepared with a tokenizer = .* prepare the data again"):
        prepare(DataConfig(paths=shipped.paths), tmp_path / "other", tokenizer=tokenizer())
    with pytest.raises(DataError, match=r"prepared with an end token = 0, but this run has None"):
        prepare(DataConfig(paths=shipped.paths, tokenizer=shipped.tokenizer, append_eos=False), tmp_path / "other")
    with pytest.raises(DataError, match="is a source by itself"):
        prepare(DataConfig(paths=(*shipped.paths, str(text)), tokenizer=shipped.tokenizer), tmp_path / "other")
    (made.folder / "meta.json").write_text('{"format": 1}')
    with pytest.raises(DataError, match="not of format"):
        prepare(shipped, tmp_path / "other")


@pytest.mark.parametrize(("name", "dtype"), [("a.npy", np.int64), ("a.npy", np.uint16), ("a.bin", np.uint16)])
def test_token_ids_are_documents_up_to_the_end_token(tmp_path, monkeypatch, name, dtype):
    monkeypatch.setattr("paraxis.data.ids.CHUNK_BYTES", 64)
    text, ours = prepared(tmp_path, sentences(30)), tokenizer()
    ids = np.concatenate([[*ours.encode(text), ours.eos_id] for text in sentences(30)]).astype(dtype)
    np.save(tmp_path / name, ids) if name.endswith(".npy") else ids.tofile(tmp_path / name)
    data = prepare(DataConfig(paths=(str(tmp_path / name),)), tmp_path / "cache", tokenizer=ours)
    assert documents(data) == documents(text)
    assert json.loads((data.folder / "meta.json").read_text())["files"][0]["empty"] == 0
    unfinished = ids[:-1]
    np.save(tmp_path / name, unfinished) if name.endswith(".npy") else unfinished.tofile(tmp_path / name)
    assert documents(prepare(DataConfig(paths=(str(tmp_path / name),)), tmp_path / "more", tokenizer=ours)) == documents(text)


def test_ids_of_another_tokenizer_and_arrays_of_other_things_are_refused(tmp_path):
    def problem(array: np.ndarray, **settings) -> str:
        np.save(tmp_path / "a.npy", array)
        with pytest.raises(DataError) as error:
            prepare(
                DataConfig(paths=(str(tmp_path / "a.npy"),), **settings), tmp_path / "cache", tokenizer=None if settings else tokenizer()
            )
        return str(error.value)

    assert "a.npy, token 3: id 300 is none of the 300" in problem(np.array([1, 2, 300]))
    assert "token 1: id -1" in problem(np.array([-1]))
    assert "where one row of integers is needed" in problem(np.zeros((2, 2), np.int64))
    assert "where one row of integers is needed" in problem(np.zeros(4))
    assert "no tokenizer can be trained" in problem(np.array([1, 2]), tokenizer="train:300")
    (tmp_path / "b.bin").write_bytes(b"odd")
    with pytest.raises(DataError, match=r"b\.bin cannot be read as token ids"):
        prepare(DataConfig(paths=(str(tmp_path / "b.bin"),)), tmp_path / "cache", tokenizer=tokenizer())


@pytest.mark.parametrize("kind", ["stream", "file"])
def test_arrow_is_a_document_a_row_and_a_saved_dataset_is_its_arrow_files(tmp_path, kind):
    table = pyarrow.table({"text": [*sentences(9), None], "n": list(range(10))})
    folder = tmp_path / "dataset"
    folder.mkdir()
    new = pyarrow.ipc.new_stream if kind == "stream" else pyarrow.ipc.new_file
    with pyarrow.OSFile(str(folder / "data-00000-of-00001.arrow"), "wb") as sink, new(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=4)
    for name in ("dataset_info.json", "state.json"):  # as `datasets` leaves them beside
        (folder / name).write_text("{}")
    data = prepare(DataConfig(paths=(str(folder),), on_bad_record="skip"), tmp_path / "cache", tokenizer=tokenizer())
    assert documents(data) == [[*tokenizer().encode(text), tokenizer().eos_id] for text in sentences(9)]
    with pytest.raises(DataError, match=r"arrow, row 10: no value in column 'text'"):
        prepare(DataConfig(paths=(str(folder),)), tmp_path / "cache", tokenizer=tokenizer())
    with pytest.raises(DataError, match=r"no column 'body'; set data\.text_field to one of text, n"):
        prepare(DataConfig(paths=(str(folder),), text_field="body"), tmp_path / "cache", tokenizer=tokenizer())


def test_held_out_data_may_be_prepared_too(tmp_path, text):
    made = prepare(DataConfig(paths=(str(text),)), tmp_path / "cache", tokenizer=tokenizer(), out=tmp_path / "shards")
    rows = HeldOutRows(prepare(DataConfig(paths=(str(made.folder),)), tmp_path, tokenizer=tokenizer()), seq_len=8, document_mask=True)
    assert rows.length == -(-(made.tokens - 1) // 8)
