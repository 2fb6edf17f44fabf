"""Mixtures of whole documents: close to the weights, every document once a pass, whatever is changed on the way."""

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from paraxis.base.errors import ConfigError, DataError
from paraxis.base.seams import IGNORE
from paraxis.data import mixed_documents
from paraxis.data.config import DataConfig
from paraxis.data.mixture import MixtureRows, RowMixing, read_mixture
from paraxis.data.open import TrainingData, open_training, refuse_repeats
from paraxis.data.record import continue_data, data_record, problem_with_data
from paraxis.data.rows import shuffled
from tests.data.corpus import documents, sentences, tokenizer_folder

ROWS_PER_STEP = 4
SEQ = 64
SEED = 3
COUNTS = {"code": 31, "maths": 9, "web": 90}
CHANGES = ("web=7 code=3", "5: web=2 code=1 maths=1", "9: maths=1", "10: web=5 maths=2", "17: code=1 web=1")


@pytest.fixture
def config(tmp_path, monkeypatch) -> DataConfig:
    monkeypatch.setattr(mixed_documents, "WINDOW_TOKENS", 200)  # so that rows lie in two
    for name, count in COUNTS.items():
        lines = [json.dumps({"text": f"{name} {text}"}) for text in sentences(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    paths = tuple(f"{name}={tmp_path}/{name}.jsonl" for name in COUNTS)
    return DataConfig(paths=paths, mixture=CHANGES, tokenizer=tokenizer_folder(tmp_path), seq_len=SEQ)


def mixture(config: DataConfig, folder: Path, *texts: str, rows_per_step: int = ROWS_PER_STEP) -> MixtureRows:
    texts = texts or config.mixture
    drawn = {name for change in read_mixture(texts) for name in change.shares}
    config = replace(config, mixture=texts, paths=tuple(path for path in config.paths if path.partition("=")[0] in drawn))
    rows = open_training(config, folder / "cache", seed=SEED, rows_per_step=lambda: rows_per_step).rows
    assert isinstance(rows, MixtureRows)
    return rows


def stream(rows: MixtureRows, count: int) -> list[int]:
    return [token for index in range(count) for token in rows.row(index)["tokens_bt"].tolist()]


def read_in(tokens: list[int], rows: MixtureRows) -> list[tuple[str, int]]:
    """The source and the number of each document that ends in these tokens, told by the tokens alone."""
    known = {tuple(tokens): (name, n) for name, source in rows.sources.items() for n, tokens in enumerate(documents(source.data))}
    found, begin = [], 0
    for place, token in enumerate(tokens):
        if token == rows.sources["web"].eos_id:
            found.append(known[tuple(tokens[begin : place + 1])])
            begin = place + 1
    return found


def test_every_document_of_a_source_is_read_once_a_pass_in_its_own_order_through_every_change(config, tmp_path):
    rows = mixture(config, tmp_path)
    found = read_in(stream(rows, 400), rows)
    for name, source in rows.sources.items():
        own = [number for where, number in found if where == name]
        assert len(own) > 2 * COUNTS[name]
        passes = np.concatenate([shuffled(COUNTS[name], source._seed, number, 0) for number in range(len(own) // COUNTS[name] + 1)])
        assert own == passes[: len(own)].tolist()


def test_shares_are_those_of_the_change_that_a_document_begins_under(config, tmp_path):
    rows = mixture(config, tmp_path)
    tokens = stream(rows, 40 * ROWS_PER_STEP)
    lengths = [len(tokens) for tokens in np.split(tokens, np.flatnonzero(np.array(tokens) == rows.sources["web"].eos_id) + 1)]
    begun: dict[int, Counter[str]] = {}
    at = 0
    for (name, _), length in zip(read_in(tokens, rows), lengths, strict=False):
        step = max(step for step in (0, 5, 9, 10, 17) if step == 0 or at > step * ROWS_PER_STEP * SEQ)
        begun.setdefault(step, Counter())[name] += length
        at += length
    assert set(begun[9]) == {"maths"}
    for step, shares in ((0, {"web": 0.7, "code": 0.3}), (5, {"web": 0.5, "code": 0.25, "maths": 0.25}), (17, {"web": 0.5, "code": 0.5})):
        assert begun[step] == pytest.approx({name: share * begun[step].total() for name, share in shares.items()}, abs=SEQ)
    assert rows.read(40 * ROWS_PER_STEP).keys() == COUNTS.keys()
    assert sum(rows.read(40 * ROWS_PER_STEP).values()) == len(tokens) + 1


def test_a_row_does_not_depend_on_what_was_read_before(config, tmp_path):
    rows, again = mixture(config, tmp_path), mixture(config, tmp_path)
    expected = [rows.row(index) for index in range(120)]
    for index in range(119, 0, -3):
        for name, array in again.row(index).items():
            assert array.tolist() == expected[index][name].tolist()
    for before, after in pairwise(expected):
        assert before["targets_bt"][:-1].tolist() == before["tokens_bt"][1:].tolist()
        assert before["targets_bt"][-1] == after["tokens_bt"][0]
    for index in (10**6, 10**12):
        assert again.row(index)["tokens_bt"].tolist() == rows.row(index)["tokens_bt"].tolist()


def test_the_mask_restarts_positions_and_ignores_targets_across_documents(config, tmp_path):
    rows, masked = mixture(config, tmp_path), mixture(replace(config, document_mask=True), tmp_path)
    end = rows.sources["web"].eos_id
    for index in range(100):
        plain, row = rows.row(index), masked.row(index)
        document, position = 0, 0
        for place, token in enumerate(plain["tokens_bt"].tolist()):
            assert (row["documents_bt"][place], row["positions_bt"][place]) == (document, position)
            assert row["targets_bt"][place] == (IGNORE if token == end else plain["targets_bt"][place])
            document, position = (document + 1, 0) if token == end else (document, position + 1)


@pytest.mark.parametrize("texts", [("web=7 code=3",), ("web=0.9 code=0.06 maths=0.04",), ("web=1 code=1 maths=1",)], ids=str)
def test_no_source_is_a_longest_document_off_its_share_after_any_number_of_tokens_nor_two_over_any_stretch(config, tmp_path, texts):
    rows = mixture(config, tmp_path, *texts)
    tokens = stream(rows, 300)
    names, found = list(rows.sources), read_in(tokens, rows)
    shares = read_mixture(texts)[0].shares
    own = np.concatenate([np.full(len(documents(rows.sources[name].data)[number]), names.index(name)) for name, number in found])
    read = np.cumsum(own[:, None] == np.arange(len(names)), axis=0)
    over = read - np.arange(1, len(own) + 1)[:, None] * np.array([float(shares[name]) for name in names])
    longest = max(len(tokens) for source in rows.sources.values() for tokens in documents(source.data))
    assert longest < SEQ
    assert np.abs(over).max() <= longest
    assert (over.max(axis=0) - over.min(axis=0)).max() <= 2 * longest


def test_a_run_goes_on_with_the_same_rows_after_a_change_it_did_not_know_of(config, tmp_path):
    started, planned = mixture(config, tmp_path, "web=7 code=3"), mixture(config, tmp_path, "web=7 code=3", "6: web=1 code=1 maths=1")
    record = json.loads(json.dumps(data_record(started, 6 * ROWS_PER_STEP)))
    assert record["mixture_of"] == "documents"
    assert set(record["sources"]) == {"web", "code"}
    assert problem_with_data(record, planned, 6) is None
    whole = stream(planned, 100)
    continue_data(record, planned, 6, 6 * ROWS_PER_STEP)
    assert stream(planned, 100) == whole
    assert started.row(23)["targets_bt"].tolist() == planned.row(23)["targets_bt"].tolist()
    assert stream(started, 24) == whole[: 24 * SEQ]
    assert stream(started, 40) != whole[: 40 * SEQ]


def test_changes_keep_their_rows_when_a_run_goes_on_with_other_rows_to_a_step(config, tmp_path):
    texts = ("web=1", "2: web=1 code=1", "10: code=1")
    before, after, again = (mixture(config, tmp_path, *texts, rows_per_step=rows) for rows in (4, 2, 8))
    continue_data(data_record(before, 20), after, 5, 20)  # step 5
    assert stream(after, 30) == stream(before, 30)
    assert stream(after, 60) != stream(before, 60)
    assert [entry["row"] for entry in after.log(1000)] == [0, 8, 30]  # 5 steps of 2 rows from row 20 on
    continue_data(data_record(after, 40), again, 15, 40)
    assert stream(again, 60) == stream(after, 60)


def test_what_a_run_has_read_cannot_be_changed_afterwards(config, tmp_path):
    record = data_record(mixture(config, tmp_path, "web=7 code=3"), 40)
    assert "only later steps may change" in (problem_with_data(record, mixture(config, tmp_path, "web=1 code=1"), 10) or "")
    of_rows = mixture(replace(config, mixture_of="rows"), tmp_path, "web=7 code=3")
    words = "a mixture of documents, but now it is one of rows: set data.mixture_of=documents"
    assert problem_with_data(record, of_rows, 10) == words
    words = "a mixture of rows, but now it is one of documents: set data.mixture_of=rows"
    older = {name: value for name, value in data_record(of_rows, 40).items() if name != "mixture_of"}
    for held in (older, data_record(of_rows, 40)):
        assert problem_with_data(held, mixture(config, tmp_path, "web=7 code=3"), 10) == words
    assert of_rows.fingerprint != mixture(config, tmp_path, "web=7 code=3").fingerprint


@pytest.mark.parametrize(
    ("changed", "of"),
    [
        ({}, "documents"),
        ({"seq_len": 12}, "rows"),
        ({"seq_len": 12, "mixture_of": "documents"}, "documents"),
        ({"mixture_of": "rows"}, "rows"),
        ({"packing": "best_fit"}, "rows"),
    ],
    ids=str,
)
def test_documents_are_mixed_where_they_are_shorter_than_rows_or_where_asked(config, tmp_path, changed, of):
    rows = mixture(replace(config, **changed), tmp_path)
    assert rows.mixing.of == of
    assert isinstance(rows.mixing, RowMixing) == (of == "rows")


def test_documents_longer_than_rows_can_be_mixed_whole_through_changes_within_one_of_them(config, tmp_path):
    rows = mixture(replace(config, seq_len=8, mixture_of="documents"), tmp_path, *CHANGES, rows_per_step=1)
    found = read_in(stream(rows, 2000), rows)
    for name, source in rows.sources.items():
        own = [number for where, number in found if where == name]
        assert own[: COUNTS[name]] == shuffled(COUNTS[name], source._seed, 0, 0)[: len(own)].tolist()
        assert own
    assert rows.row(11)["tokens_bt"].tolist() == stream(rows, 12)[-8:]


def test_without_shuffling_documents_come_as_they_lie(config, tmp_path):
    rows = mixture(replace(config, shuffle=False), tmp_path)
    for name in COUNTS:
        own = [number for where, number in read_in(stream(rows, 200), rows) if where == name]
        assert own == [number % COUNTS[name] for number in range(len(own))]


def test_what_says_nothing_or_cannot_be_done_is_refused(config, tmp_path):
    with pytest.raises(ConfigError, match=r"data\.mixture_of=documents says nothing without data\.mixture"):
        DataConfig(mixture_of="documents")
    with pytest.raises(ConfigError, match=r"data\.mixture_of=documents lays documents end to end, and data\.packing=best_fit does not"):
        replace(config, mixture_of="documents", packing="best_fit")
    with pytest.raises(ConfigError, match=r"data\.mixture_of='files' is unknown; choose auto or rows or documents"):
        replace(config, mixture_of="files")
    with pytest.raises(ConfigError, match=r"the source code is tokenised while training; set data\.tokenize=ahead or"):
        mixture(replace(config, mixture_of="documents", tokenize="live"), tmp_path)


def test_a_source_is_not_read_more_often_than_allowed(config, tmp_path):
    rows = mixture(replace(config, repeat=2), tmp_path, "web=2 code=1")
    whole = rows.sources["code"].data.tokens
    opened, last = TrainingData(rows, rows.sources["web"].data.tokenizer), 0
    while rows.read(last + 1)["code"] <= 2 * whole:
        last += 1
    refuse_repeats(opened, last)
    with pytest.raises(ConfigError, match=rf"tokens of the source code, but data\.repeat=2 allows {2 * whole} \({whole} a pass\)"):
        refuse_repeats(opened, last + 1)
    assert len(read_in(stream(rows, last), rows)) > 2 * COUNTS["code"]
    with pytest.raises(DataError, match=rf"row {last} is of pass 3 over the source code, .*allows 2 of {whole} tokens"):
        rows.row(last)
