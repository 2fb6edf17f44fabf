"""Which files a path names, which documents a file holds, and what is said when it holds none."""

import gzip
import json
from pathlib import Path

import fsspec
import pyarrow
import pyarrow.parquet
import pytest

from paraxis.base.errors import ConfigError, DataError
from paraxis.data import documents
from paraxis.data.config import DataConfig
from paraxis.data.documents import BadRecords, Reading, pieces
from paraxis.data.sources import expand


def texts(path: str | Path, *, skip: bool = False, field: str = "text") -> tuple[list[str], int]:
    """The documents that `path` names, and how many broken records were left out."""
    bad, found, parts = BadRecords("skip" if skip else "stop"), [], []
    for source in expand([str(path)]):
        for piece in pieces(source, Reading(field), bad):
            parts.append(piece.text)
            if piece.last:
                found.append("".join(parts))
                parts = []
    return found, bad.skipped


def names(*paths: str | Path) -> list[str]:
    return [Path(source.name).name for source in expand([str(path) for path in paths])]


def test_a_text_file_is_one_document_as_it_stands(tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffçà\r\n\n  y".encode())
    assert texts(tmp_path / "a.txt") == (["çà\r\n\n  y"], 0)


def test_a_text_file_larger_than_a_piece_is_still_one_document(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 64)
    text = "".join(f"def f{n}():\n    return {n}\n\n\n" for n in range(50))
    (tmp_path / "a.py").write_text(text)
    assert texts(tmp_path / "a.py") == ([text], 0)
    parts = [piece.text for piece in pieces(expand([str(tmp_path / "a.py")])[0], Reading("text"), BadRecords("stop"))]
    assert len(parts) > 20
    assert all(part.startswith("def") for part in parts[:-1])


def test_json_lines_are_a_document_each_and_blank_lines_are_none(tmp_path):
    lines = [json.dumps({"text": "a", "id": 1}), "", json.dumps({"text": "b\nc"})]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    (tmp_path / "b.json.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    assert texts(tmp_path / "a.jsonl") == texts(tmp_path / "b.json.gz") == (["a", "b\nc"], 0)


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (b'{"text": "cut of', "not valid JSON"),
        (b'{"body": "x"}', "no field 'text' (data.text_field) among 'body'"),
        (b'{"text": 3}', "field 'text' (data.text_field) is of type int"),
        (b'["text"]', "a JSON list where an object is needed"),
        (b'{"text": "\xff"}', "not valid UTF-8"),
        (b'{"text": "\\ud800"}', "half of a surrogate pair"),
    ],
)
def test_a_broken_json_line_is_named_by_file_and_line_or_skipped_and_counted(tmp_path, line, problem):
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'{"text": "good"}\n\n' + line + b'\n{"text": "also good"}\n')
    with pytest.raises(DataError) as error:
        texts(file)
    assert f"{file}, line 3: " in str(error.value)
    assert problem in str(error.value)
    assert "data.on_bad_record=skip" in str(error.value)
    assert texts(file, skip=True) == (["good", "also good"], 1)


def test_text_that_is_not_utf8_is_named_by_file_and_line(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 4)
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\nthr\xffee\nfour\n")
    with pytest.raises(DataError, match=r"a\.txt, line 3: not valid UTF-8"):
        texts(tmp_path / "a.txt")
    assert texts(tmp_path / "a.txt", skip=True)[1] == 1


def test_parquet_is_a_document_a_row_and_names_broken_rows(tmp_path):
    file = tmp_path / "a.parquet"
    rows = [f"row {n}" for n in range(10)]
    pyarrow.parquet.write_table(pyarrow.table({"body": rows, "n": list(range(10))}), file, row_group_size=3)
    assert texts(file, field="body") == (rows, 0)
    with pytest.raises(DataError, match=r"no column 'text'; set data.text_field to one of body, n"):
        texts(file)
    with pytest.raises(DataError, match=r"row 1: value in column 'n' is of type int"):
        texts(file, field="n")
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a", None, "c"]}), file)
    with pytest.raises(DataError, match=r"a\.parquet, row 2: "):
        texts(file)
    assert texts(file, skip=True) == (["a", "c"], 1)


def test_a_damaged_file_is_refused_whatever_the_policy(tmp_path):
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    (tmp_path / "not.parquet").write_text("no parquet")
    for name in ("cut.jsonl.gz", "not.parquet"):
        with pytest.raises(DataError, match=f"{name} cannot be read"):
            texts(tmp_path / name, skip=True)


def test_paths_keep_their_order_and_globs_and_folders_are_sorted(tmp_path):
    for name in ("b.txt", "a.txt", "c.py", "sub/z.txt", "sub/y.txt", ".hidden/x.txt", ".secret.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    assert names(tmp_path / "*.txt") == ["a.txt", "b.txt"]
    assert names(tmp_path / "c.py", tmp_path / "*.txt") == ["c.py", "a.txt", "b.txt"]
    assert names(tmp_path) == ["a.txt", "b.txt", "c.py", "y.txt", "z.txt"]
    assert names(tmp_path / "**" / "*.txt") == ["a.txt", "b.txt", "y.txt", "z.txt"]
    (tmp_path / "[1].txt").write_text("not a pattern")
    assert names(tmp_path / "[1].txt") == ["[1].txt"]


def test_urls_are_read_through_fsspec(tmp_path):
    memory = fsspec.filesystem("memory")
    memory.pipe({"/corpus/b.jsonl": b'{"text": "b"}\n', "/corpus/a.jsonl": b'{"text": "a"}\n'})
    (tmp_path / "c.txt").write_text("c")
    try:
        assert texts("memory://corpus/*.jsonl")[0] == ["a", "b"]
        assert texts("memory://corpus")[0] == ["a", "b"]
        assert texts(f"file://{tmp_path}/c.txt")[0] == ["c"]
    finally:
        memory.rm("/corpus", recursive=True)


@pytest.mark.parametrize("path", ["none.txt", "*.none", "no/such/folder", "memory://nowhere/x", "nosuchprotocol://x/y"])
def test_a_path_without_files_is_refused_by_name(tmp_path, path):
    path = path if "://" in path else str(tmp_path / path)
    with pytest.raises(DataError) as error:
        expand([path])
    assert path in str(error.value)


def test_a_password_in_a_url_is_not_shown():
    with pytest.raises(DataError) as error:
        expand(["memory://someone:sesame@host/x.txt"])
    assert "sesame" not in str(error.value)


def test_the_built_in_corpus_is_pythons_own_source_in_two_parts():
    train, held_out = ({source.name: source.size for source in expand([f"stdlib:{part}"])} for part in ("train", "heldout"))
    assert not train.keys() & held_out.keys()
    assert "stdlib/json/decoder.py" in train.keys() | held_out.keys()
    assert not any("/test/" in name or "site-packages" in name for name in train)
    assert 0.01 < sum(held_out.values()) / sum(train.values()) < 0.1
    assert sum(train.values()) > 4_000_000


@pytest.mark.parametrize(
    "settings",
    [
        {"paths": ()},
        {"paths": ("stdlib:all",)},
        {"tokenizer": ""},
        {"tokenizer": "train:many"},
        {"tokenizer": "train:256"},
        {"seq_len": 0},
        {"text_field": ""},
        {"on_bad_record": "ignore"},
    ],
)
def test_a_setting_that_cannot_be_met_is_refused_by_name(settings):
    with pytest.raises(ConfigError, match=f"data.{next(iter(settings))}"):
        DataConfig(**settings)
