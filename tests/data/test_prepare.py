"""The cache of tokenised data: made once, whole or not at all, and the same wherever the files are."""

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest

from paraxis.base.errors import DataError, StorageError
from paraxis.data import mapped, shards
from paraxis.data import prepare as prepare_module
from paraxis.data.config import DataConfig
from paraxis.data.prepare import load_tokenizer, prepare
from paraxis.data.shards import Prepared, ShardWriter, token_dtype
from paraxis.data.tokens import Tokenizer
from tests.data.corpus import documents, prepared, sentences, tokenizer


def folders(cache: Path) -> list[str]:
    return [path.name for path in cache.iterdir() if path.is_dir()]


def test_documents_are_the_tokenizers_tokens_and_an_end(tmp_path):
    texts = [*sentences(30), "", "<|endoftext|>"]
    data, ours = prepared(tmp_path, texts), tokenizer()
    assert documents(data) == [[*ours.encode(text), ours.eos_id] for text in texts if text]
    assert data.tokens == sum(map(len, documents(data)))
    meta = json.loads((data.folder / "meta.json").read_text())
    assert sum(record["empty"] for record in meta["files"]) == 1


def test_no_end_is_added_where_none_is_wanted_or_known(tmp_path, caplog):
    assert documents(prepared(tmp_path, ["a b"], append_eos=False)) == [tokenizer().encode("a b")]
    endless = Tokenizer.from_files({**tokenizer().files, "tokenizer_config.json": b'{"eos_token": null}'}, "endless")
    data = prepare(DataConfig(paths=(str(tmp_path / "text"),)), tmp_path / "cache", tokenizer=endless)
    assert documents(data) == [tokenizer().encode("a b")]
    assert "names no end token" in caplog.text


def test_documents_survive_many_shards_batches_and_pieces(tmp_path, monkeypatch):
    whole = prepared(tmp_path, sentences(60))
    monkeypatch.setattr(shards, "SHARD_TOKENS", 50)
    monkeypatch.setattr(shards, "ENDS_BUFFER", 7)
    monkeypatch.setattr("paraxis.data.part.BATCH_CHARACTERS", 100)
    monkeypatch.setattr("paraxis.data.documents.PIECE_BYTES", 8)
    cut = prepare(DataConfig(paths=(str(tmp_path / "text"),)), tmp_path / "other", tokenizer=tokenizer())
    assert len(list(cut.folder.glob("tokens-*.bin"))) > 5
    assert documents(cut) == documents(whole)
    assert cut.fingerprint == whole.fingerprint


def test_a_text_file_read_in_pieces_has_the_tokens_of_the_whole(tmp_path, monkeypatch):
    source = Path(prepare_module.__file__).read_text() + "\n\n   \n\u3000日本\r\n\r\nend"
    whole = tokenizer().encode(source)
    monkeypatch.setattr("paraxis.data.documents.PIECE_BYTES", 100)
    assert documents(prepared(tmp_path, [source], append_eos=False)) == [whole]


def test_a_second_call_only_maps(tmp_path, monkeypatch):
    first = prepared(tmp_path, sentences(5))
    monkeypatch.setattr(prepare_module, "make_part", None)
    second = prepare(DataConfig(paths=(str(tmp_path / "text"),)), tmp_path / "cache", tokenizer=tokenizer())
    assert second.fingerprint == first.fingerprint
    assert documents(second) == documents(first)


def test_the_fingerprint_is_of_content_not_of_place(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "there").mkdir()
    here, there = prepared(tmp_path / "here", sentences(5)), prepared(tmp_path / "there", sentences(5))
    assert here.folder.name != there.folder.name
    assert here.fingerprint == there.fingerprint


def test_a_changed_file_is_tokenised_again(tmp_path):
    first = prepared(tmp_path, sentences(5))
    file = tmp_path / "text" / "0002.txt"
    file.write_text(file.read_text().upper())
    os.utime(file, (1, 1))
    second = prepare(DataConfig(paths=(str(tmp_path / "text"),)), tmp_path / "cache", tokenizer=tokenizer())
    assert second.fingerprint != first.fingerprint
    assert documents(second)[2] != documents(first)[2]


def test_other_order_and_other_tokenizer_are_other_data(tmp_path):
    first = prepared(tmp_path, sentences(2))
    paths = tuple(str(tmp_path / "text" / f"{number:04}.txt") for number in (1, 0))
    assert prepare(DataConfig(paths=paths), tmp_path / "cache", tokenizer=tokenizer()).fingerprint != first.fingerprint
    config = DataConfig(paths=(str(tmp_path / "text"),), tokenizer="train:260")
    assert prepare(config, tmp_path / "cache").fingerprint != first.fingerprint


def test_a_tokenizer_is_trained_once_and_serves_held_out_data(tmp_path, monkeypatch):
    prepared(tmp_path, sentences(40))
    config = DataConfig(paths=(str(tmp_path / "text"),), tokenizer="train:280")
    data = prepare(config, tmp_path / "cache")
    assert data.tokenizer.vocab_size == 280
    monkeypatch.setattr(prepare_module, "train_tokenizer", None)
    assert load_tokenizer(config, tmp_path / "cache").sha256 == data.tokenizer.sha256
    (tmp_path / "other.txt").write_text("held out")
    held_out = prepare(DataConfig(paths=(str(tmp_path / "other.txt"),)), tmp_path / "cache", tokenizer=data.tokenizer)
    assert documents(held_out) == [[*data.tokenizer.encode("held out"), data.tokenizer.eos_id]]


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    assert token_dtype(65536) == np.dtype("<u2")
    assert token_dtype(65537) == np.dtype("<u4")
    writer = ShardWriter(tmp_path, ["one"], 128_256, 128_001)
    writer.add(0, np.array([7, 128_255], np.uint32), last=True)
    writer.finish({}, skipped=0)
    assert documents(shards.Prepared(tmp_path, tokenizer())) == [[7, 128_255, 128_001]]


def test_skipped_records_are_counted_and_broken_ones_leave_nothing(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n{"text": \n{"text": "b"}\n')
    config = DataConfig(paths=(str(tmp_path / "a.jsonl"),), on_bad_record="skip")
    data = prepare(config, tmp_path / "cache", tokenizer=tokenizer())
    assert (data.documents, data.skipped) == (2, 1)
    with pytest.raises(DataError, match=r"a\.jsonl, line 2"):
        prepare(DataConfig(paths=config.paths), tmp_path / "cache", tokenizer=tokenizer())
    assert folders(tmp_path / "cache") == [data.folder.name]


def test_data_without_text_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("")
    with pytest.raises(DataError, match=r"no text in .*a\.txt"):
        prepare(DataConfig(paths=(str(tmp_path / "a.txt"),)), tmp_path / "cache", tokenizer=tokenizer())
    (tmp_path / "b.jsonl").write_text("{\n{\n")
    with pytest.raises(DataError, match="2 broken records left out"):
        prepare(DataConfig(paths=(str(tmp_path / "b.jsonl"),), on_bad_record="skip"), tmp_path / "cache", tokenizer=tokenizer())


def test_a_cache_that_cannot_be_written_or_is_damaged_is_named(tmp_path):
    data = prepared(tmp_path, sentences(3))
    (tmp_path / "file").write_text("")
    config = DataConfig(paths=(str(tmp_path / "text"),))
    with pytest.raises(StorageError, match=r"cannot write the data cache .*file.*PARAXIS_CACHE"):
        prepare(config, tmp_path / "file" / "cache", tokenizer=tokenizer())
    shard = data.folder / "tokens-00000.bin"
    shard.write_bytes(shard.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"tokens-00000\.bin .*delete the folder"):
        prepare(config, tmp_path / "cache", tokenizer=tokenizer())


@pytest.mark.parametrize("chat", ["none", "chatml"])
def test_a_flipped_bit_anywhere_is_refused_by_the_files_name_before_it_is_trained_on(tmp_path, chat, monkeypatch):
    """But for names and counts in meta.json by which nothing is read. A wrong length there looks like one of the file that has it."""
    monkeypatch.setattr(mapped, "PART_BYTES", 512)
    field = {"none": lambda text: {"text": text}, "chatml": lambda text: {"messages": [{"role": "assistant", "content": text}]}}[chat]
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(field(text)) for text in sentences(60)))
    config = DataConfig(paths=(str(tmp_path / "a.jsonl"),), tokenizer="train:300", chat=chat)
    data = prepare(config, tmp_path / "cache")
    files = sorted(path for path in data.folder.iterdir() if path.suffix in (".bin", ".sha256") or path.name == "meta.json")
    assert len(files) == (5 if chat == "none" else 7)

    def read() -> list[list[int]]:
        again = Prepared(data.folder, data.tokenizer)
        targets = [again.targets(n, 0, len(text)).tolist() for n, text in enumerate(documents(again))]
        return [*documents(again), *targets, [*again.fingerprint.encode()]]

    dice, whole, said = random.Random(chat), read(), []
    for path in [*files, *dice.choices(files, k=150)]:
        content = path.read_bytes()
        broken = bytearray(content)
        bit = dice.randrange(8 * len(content))
        broken[bit // 8] ^= 1 << bit % 8
        path.write_bytes(broken)
        try:
            said.append((path, "the same" if read() == whole else "something else"))
        except DataError as error:
            said.append((path, str(error)))
        path.write_bytes(content)
    assert read() == whole
    assert all(path.stem in words for path, words in said if path.name != "meta.json")
    of_meta = [words for path, words in said if path.name == "meta.json"]
    assert "something else" not in of_meta
    assert of_meta.count("the same") < len(of_meta) / 2


def test_progress_ends_at_all_bytes_read(tmp_path):
    seen = []
    prepared(tmp_path, sentences(3))
    total = sum(file.stat().st_size for file in (tmp_path / "text").iterdir())
    config = DataConfig(paths=(str(tmp_path / "text"),), tokenizer="train:280")
    prepare(config, tmp_path / "cache", progress=lambda *step: seen.append(step))
    assert seen == [("training the tokenizer", total, total), ("tokenising", total, total)]


def _prepare_slowly(text: Path, cache: Path, mark: Path) -> None:
    real = prepare_module.make_part

    def slow(*args):
        with mark.open("a") as file:
            file.write("started\n")
        time.sleep(0.5)
        real(*args)

    prepare_module.make_part = slow
    prepare(DataConfig(paths=(str(text),)), cache, tokenizer=tokenizer())


def _start(tmp_path: Path) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(
        target=_prepare_slowly, args=(tmp_path / "text", tmp_path / "new", tmp_path / "mark"), daemon=True
    )
    process.start()
    return process


def test_processes_that_start_together_do_the_work_once(tmp_path):
    prepared(tmp_path, sentences(3))
    processes = [_start(tmp_path) for _ in range(3)]
    for process in processes:
        process.join(30)
        assert process.exitcode == 0
    assert (tmp_path / "mark").read_text() == "started\n"


def test_a_killed_prepare_leaves_nothing_visible_and_the_next_one_cleans_up(tmp_path):
    done = prepared(tmp_path, sentences(3))
    process = _start(tmp_path)
    while not (tmp_path / "mark").exists():
        time.sleep(0.01)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join(30)
    assert all(".partial-" in name for name in folders(tmp_path / "new"))
    data = prepare(DataConfig(paths=(str(tmp_path / "text"),)), tmp_path / "new", tokenizer=tokenizer())
    assert folders(tmp_path / "new") == [data.folder.name]
    assert data.fingerprint == done.fingerprint
