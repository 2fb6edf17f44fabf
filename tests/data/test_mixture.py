"""A mixture keeps its weights over every stretch of rows, and its sources go on through whatever is changed."""

import json
from collections import Counter
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest

from paraxis.base.errors import ConfigError, DataError
from paraxis.base.seams import IGNORE
from paraxis.data.config import DataConfig
from paraxis.data.mixture import MixtureRows, pattern, read_mixture
from paraxis.data.open import open_training, refuse_repeats
from paraxis.data.record import continue_data, data_record, problem_with_data
from paraxis.data.rows import TrainingRows
from tests.data.corpus import sentences

ROWS_PER_STEP = 4
MIXTURES = [(1, 1), (7, 2, 1), (1, 1, 1, 1, 1), (50, 30, 15, 4, 1), (997, 3), (33, 33, 34), (600, 111, 88, 77, 66, 55, 3)]


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
def test_no_prefix_is_a_row_and_no_window_two_rows_away_from_the_weights(weights):
    chosen = np.tile(pattern(weights), 3)
    prefix = np.cumsum(chosen[:, None] == np.arange(len(weights)), axis=0)
    off = prefix - np.arange(1, len(chosen) + 1)[:, None] * np.array(weights) / sum(weights)
    bound = 1 - 1 / max(2, 2 * len(weights) - 2)
    assert np.abs(off).max() <= bound + 1e-9
    assert (off.max(axis=0) - off.min(axis=0)).max() < 2  # a window is the difference of two prefixes
    assert prefix[sum(weights) - 1].tolist() == list(weights)


class Numbered:
    """Rows that say whose and which they are."""

    def __init__(self, name: str, length: int = 10) -> None:
        self.fingerprint, self.length, self.vocab_size, self.repeat, self.name = name, length, 9, 0, name

    def row(self, index: int) -> dict[str, object]:
        return {"tokens_bt": (self.name, index)}


def mixture(*texts: str, names: str = "abc", rows_per_step: int = ROWS_PER_STEP) -> MixtureRows:
    return MixtureRows({name: Numbered(name) for name in names}, read_mixture(texts), rows_per_step)


def drawn(rows: MixtureRows, indices: range) -> list[tuple[str, int]]:
    return [rows.row(index)["tokens_bt"] for index in indices]


def source_of(rows: MixtureRows, index: int) -> str:
    """The source of a row in a mixture of rows."""
    before = rows.read(index)
    return next(name for name, count in rows.read(index + 1).items() if count > before.get(name, 0))


def test_each_source_is_read_in_its_own_order_without_gaps_through_every_change():
    rows = mixture("a=0.7 b=0.3", "5: a=1 b=1 c=2", "9: c=1", "14: a=2 b=1")
    stream = drawn(rows, range(200))
    for name in "abc":
        own = [number for source, number in stream if source == name]
        assert own == list(range(len(own)))
    counts = [Counter(source for source, _ in stream[start : start + 20]) for start in (0, 36, 56)]
    assert counts[0] == {"a": 14, "b": 6}
    assert counts[1] == {"c": 20}
    assert {source for source, _ in stream[:20]} == {"a", "b"}
    assert rows.read(200) == Counter(source for source, _ in stream)
    assert drawn(rows, range(150, 50, -7)) == stream[150:50:-7]


def test_a_run_goes_on_with_the_same_rows_after_a_change_it_did_not_know_of():
    started, planned = mixture("a=0.7 b=0.3", names="ab"), mixture("a=0.7 b=0.3", "6: a=0.5 b=0.3 c=0.2")
    record = data_record(started, 6 * ROWS_PER_STEP)
    assert problem_with_data(record, planned, 6) is None
    whole = drawn(planned, range(100))
    continue_data(record, planned, 6, 6 * ROWS_PER_STEP)
    assert drawn(planned, range(100)) == whole
    assert drawn(started, range(24)) == whole[:24]


def test_changes_keep_their_rows_when_a_run_goes_on_with_other_rows_to_a_step():
    texts = ("a=1", "2: a=1 b=1", "10: b=1")
    before, after = mixture(*texts, rows_per_step=4), mixture(*texts, rows_per_step=2)
    record = data_record(before, 20)  # step 5
    assert problem_with_data(record, after, 5) is None
    continue_data(record, after, 5, 20)
    assert drawn(after, range(20)) == drawn(before, range(20))
    assert [entry["row"] for entry in after.log(1000)] == [0, 8, 30]  # 5 steps of 2 rows from row 20 on
    again = mixture(*texts, rows_per_step=8)
    continue_data(data_record(after, 40), again, 15, 40)
    assert drawn(again, range(60)) == drawn(after, range(60))


def test_what_a_run_has_read_cannot_be_changed_afterwards():
    record = data_record(mixture("a=0.7 b=0.3", "6: a=1"), 40)  # step 10
    assert "0: a=7/10 b=3/10, 6: a=1" in (problem_with_data(record, mixture("a=0.5 b=0.5", "6: a=1"), 10) or "")
    assert "only later steps may change" in (problem_with_data(record, mixture("a=0.7 b=0.3"), 10) or "")
    assert "no data.mixture" in (problem_with_data({"sources": {}}, mixture("a=1"), 0) or "")
    other = mixture("a=0.7 b=0.3", "6: a=1")
    other.sources = {**other.sources, "b": Numbered("changed")}
    assert "source b: the data's fingerprint" in (problem_with_data(record, other, 10) or "")
    other.sources = {**other.sources, "b": Numbered("b"), "c": Numbered("never read")}
    assert problem_with_data(record, other, 10) is None


def test_weights_are_read_exactly():
    (first, second) = read_mixture(["web=0.1 code=0.2", " 1000 : web=1/3 code=2/3 maths=0"])
    assert first.shares == second.shares == {"web": Fraction(1, 3), "code": Fraction(2, 3)}
    assert (first.step, second.step) == (0, 1000)


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (("a",), "'a' is no weight"),
        (("a=x",), "'a=x' is no weight"),
        (("a=-1 b=2",), "'a=-1' is no weight"),
        (("a=1 a=2",), "'a=2' is no weight"),
        (("a=1/0",), "no weight"),
        (("",), "must be weights"),
        (("a=0",), "must be weights"),
        (("x: a=1",), "must be weights"),
        (("5: a=1",), "must begin at step 0"),
        (("a=1", "5: a=1", "5: a=2"), "put them in order"),
        (("a=0.123456789 b=1",), "round the weights"),
    ],
)
def test_a_mixture_that_cannot_be_read_is_refused(texts, words):
    with pytest.raises(ConfigError, match=words):
        read_mixture(texts)


@pytest.mark.parametrize(
    ("paths", "mixture", "words"),
    [
        (("x.txt",), ("a=1",), "needs its source's name"),
        (("a=",), ("a=1",), "needs its source's name"),
        (("a=x.txt",), ("a=1 b=1",), "draws from b, which data.paths do not have"),
        (("a=x.txt", "b=y.txt"), ("a=1",), "a source b that data.mixture never draws from"),
        (("a=stdlib:all",), ("a=1",), "is not a built-in corpus"),
    ],
)
def test_sources_and_weights_have_to_agree(paths, mixture, words):
    with pytest.raises(ConfigError, match=words):
        DataConfig(paths=paths, mixture=mixture)


@pytest.fixture
def config(tmp_path) -> DataConfig:
    for name, count in (("web", 90), ("code", 30), ("maths", 20)):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {text}" for text in sentences(count)))
    return DataConfig(
        paths=(f"web={tmp_path}/web.txt", f"code={tmp_path}/code.txt"), mixture=("web=3 code=1",), tokenizer="train:300", seq_len=16
    )


def opened(config: DataConfig, cache: Path) -> MixtureRows:
    rows = open_training(config, cache, seed=3, rows_per_step=lambda: 1).rows
    assert isinstance(rows, MixtureRows)
    return rows


@pytest.mark.parametrize("packing", ["concatenate", "best_fit"])
def test_tokens_read_of_a_source_are_within_a_row_of_its_share_over_any_rows_and_within_two_over_any_stretch(config, tmp_path, packing):
    config = replace(config, packing=packing, mixture=("web=7 code=3",))
    rows, shares = opened(config, tmp_path / "cache"), np.array([0.7, 0.3])
    read, empty = np.zeros((301, 2)), np.zeros(301)
    for index in range(300):
        count = int((rows.row(index)["targets_bt"] != IGNORE).sum())
        read[index + 1, ["web", "code"].index(source_of(rows, index))] = count
        empty[index + 1] = config.seq_len - count
    read, empty = read.cumsum(axis=0), empty.cumsum()
    off = np.abs(read - shares * read.sum(axis=1, keepdims=True)).max(axis=1)
    assert (off < config.seq_len + empty).all()
    if packing == "concatenate":  # where a row has no empty places
        assert empty[-1] == 0
        over = read - shares * read.sum(axis=1, keepdims=True)
        assert (over.max(axis=0) - over.min(axis=0)).max() < 2 * config.seq_len  # a stretch is the difference of two beginnings


@pytest.mark.parametrize("words", [40, 2])
def test_mixed_by_rows_tokens_are_within_the_longer_of_a_document_and_a_row_of_their_share(config, tmp_path, words):
    """And within two over any stretch. Of the longest document of each source; a row of short ones has several of one source."""
    for name, more in (("web", words), ("code", words // 2)):
        texts = [" ".join(sentences(n + 30)[n:]).split()[: words + n % more] for n in range(90)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": " ".join(text)}) + "\n" for text in texts))
    paths = (f"web={tmp_path}/web.jsonl", f"code={tmp_path}/code.jsonl")
    rows = opened(replace(config, paths=paths, mixture=("web=5 code=3",), mixture_of="rows"), tmp_path / "cache")
    assert isinstance(rows.sources["web"], TrainingRows)
    longest = {name: int(np.diff(source.data.ends, prepend=0).max()) for name, source in rows.sources.items()}
    assert (min(longest.values()) > config.seq_len) == (max(longest.values()) > config.seq_len) == (words == 40)
    names, shares, read = list(longest), np.array([5 / 8, 3 / 8]), np.zeros((401, 2))
    for index in range(400):
        read[index + 1, names.index(source_of(rows, index))] = (rows.row(index)["targets_bt"] != IGNORE).sum()
    read = read.cumsum(axis=0)
    over = read - shares * read.sum(axis=1, keepdims=True)
    most = np.maximum([longest[name] for name in names], config.seq_len)
    assert (np.abs(over) < most).all()
    assert (over.max(axis=0) - over.min(axis=0) < 2 * most).all()


def with_finished_tokenizer(config: DataConfig, cache: Path) -> DataConfig:
    """`config` with the tokenizer that it would train, so that other paths do not train another."""
    opened(config, cache)
    return replace(config, tokenizer=str(next(path for path in cache.glob("tokenizer-*") if path.is_dir())))


def test_a_source_has_the_same_rows_whatever_it_is_mixed_with(config, tmp_path):
    config = with_finished_tokenizer(config, tmp_path / "cache")
    three = replace(config, paths=(*config.paths, f"maths={tmp_path}/maths.txt"), mixture=("web=1 code=2 maths=1",))
    found = []
    for rows in (opened(config, tmp_path / "cache"), opened(three, tmp_path / "cache")):
        length = rows.sources["code"].length
        own = [rows.row(index)["tokens_bt"].tolist() for index in range(8 * length) if source_of(rows, index) == "code"]
        found.append(own[: 2 * length])
        assert sorted(own[:length]) != own[:length]
    assert found[0] == found[1]


def test_a_changed_missing_or_added_file_of_a_source_is_named(config, tmp_path):
    same = with_finished_tokenizer(config, tmp_path / "cache")
    record = data_record(opened(same, tmp_path / "cache"), 100)

    def problem(**changes) -> str:
        return problem_with_data(record, opened(replace(same, **changes), tmp_path / "cache"), 100) or ""

    assert not problem()
    assert "packing" in problem(packing="best_fit")
    maths = f"code={tmp_path}/maths.txt"
    assert "maths.txt was not there" in problem(paths=(*same.paths, maths))
    assert "code.txt is missing" in problem(paths=(same.paths[0], maths))
    assert "tokenizer is another" in problem(tokenizer="train:280")
    (tmp_path / "code.txt").write_text("now something else, and enough of it to make at least one row of tokens")
    assert "source code: " in problem()
    assert "code.txt has changed" in problem()


def test_a_source_is_not_read_more_often_than_allowed(config, tmp_path):
    once = replace(config, mixture=("web=2 code=1",), repeat=1)
    opened = open_training(once, tmp_path / "cache", seed=3, rows_per_step=lambda: 1)
    assert isinstance(opened.rows, MixtureRows)
    length = opened.rows.sources["code"].length
    refuse_repeats(opened, 3 * length)
    with pytest.raises(ConfigError, match=rf"the source code, but data\.repeat=1 allows {length}"):
        refuse_repeats(opened, 3 * length + 3)
    with pytest.raises(DataError, match=r"pass 2 .* data\.repeat=1"):
        opened.rows.sources["code"].row(length)
