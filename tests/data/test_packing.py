"""Best-fit packing: every input once a pass, next to nothing wasted, no target across documents."""

import re
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from paraxis.base.errors import ConfigError, DataError
from paraxis.base.seams import IGNORE
from paraxis.data.config import DataConfig
from paraxis.data.packing import PackedRows, best_fit, kept_plan, make_plan
from paraxis.data.prepare import prepare
from paraxis.data.shards import Prepared
from tests.data.corpus import documents, prepared, sentences

SEQ = 24


def packed(data: Prepared, *, mask: bool = True, seq_len: int = SEQ, long: str = "split", shuffle: bool = True, **settings) -> PackedRows:
    plan = make_plan(data, seq_len, "drop" if long == "drop" else "split")
    return PackedRows(data, plan, seq_len=seq_len, document_mask=mask, shuffle=shuffle, seed=1, long_documents=long, **settings)


@pytest.fixture
def data(tmp_path) -> Prepared:
    return prepared(tmp_path, [*sentences(60), " ".join(sentences(9)), "a"])


def pairs_of(rows: PackedRows, indices: range) -> Counter[tuple[int, int]]:
    found: Counter[tuple[int, int]] = Counter()
    for index in indices:
        row = rows.row(index)
        real = row["targets_bt"] != IGNORE
        found.update(zip(row["tokens_bt"][real].tolist(), row["targets_bt"][real].tolist(), strict=True))
    return found


def all_pairs(data: Prepared, longest: int = 10**9) -> Counter[tuple[int, int]]:
    kept = (tokens for tokens in documents(data) if len(tokens) - 1 <= longest)
    return Counter(pair for tokens in kept for pair in pairwise(tokens))


@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("shuffle", [True, False])
def test_every_token_of_a_document_is_predicted_once_a_pass_from_the_one_before(data, mask, shuffle):
    rows = packed(data, mask=mask, shuffle=shuffle)
    for number in range(2):
        assert pairs_of(rows, range(number * rows.length, (number + 1) * rows.length)) == all_pairs(data)


def test_long_documents_are_dropped_where_asked(data, tmp_path):
    rows = packed(data, long="drop")
    assert pairs_of(rows, range(rows.length)) == all_pairs(data, SEQ)
    (tmp_path / "long").mkdir()
    long = prepared(tmp_path / "long", [" ".join(sentences(9))])
    with pytest.raises(DataError, match=r"long_documents=drop leaves no document"):
        packed(long, long="drop")
    with pytest.raises(ConfigError, match=r"long_documents=drop says nothing"):
        DataConfig(long_documents="drop")


def test_passes_have_the_same_rows_in_orders_of_their_own(data):
    rows = packed(data)
    passes = [[rows.row(number * rows.length + place)["tokens_bt"].tolist() for place in range(rows.length)] for number in range(2)]
    assert passes[0] != passes[1]
    assert sorted(passes[0]) == sorted(passes[1])


def test_documents_in_a_row_are_numbered_and_their_positions_count_from_their_start(data):
    whole = {tuple(tokens[:-1]) for tokens in documents(data) if len(tokens) - 1 <= SEQ}
    seen = 0
    for index in range((rows := packed(data)).length):
        row = rows.row(index)
        assert {name: len(array) for name, array in row.items()} == dict.fromkeys(row, SEQ)
        assert {array.dtype for array in row.values()} == {np.dtype(np.int64)}
        for number in range(int(row["documents_bt"].max()) + 1):
            here = row["documents_bt"] == number
            assert row["positions_bt"][here].tolist() == list(range(int(here.sum())))
            seen += tuple(row["tokens_bt"][here].tolist()) in whole
        assert row["tokens_bt"][row["targets_bt"] == IGNORE].tolist() == [0] * int((row["targets_bt"] == IGNORE).sum())
    assert seen >= len(whole)  # none of them is cut


@pytest.mark.parametrize("room", [1, 7, 64])
def test_bins_are_never_overfull_and_are_those_of_best_fit_item_by_item(room):
    sizes = np.random.default_rng(room).integers(1, room + 1, 500)
    bins = best_fit(sizes, room)
    assert np.bincount(bins, weights=sizes).max() <= room
    left: list[int] = []  # what still goes into each bin
    for size in sorted(sizes.tolist(), reverse=True):
        fits = [place for place, room_left in enumerate(left) if room_left >= size]
        if fits:
            left[min(fits, key=left.__getitem__)] -= size
        else:
            left.append(room - size)
    assert bins.max() + 1 == len(left)
    assert sorted(np.bincount(bins, weights=sizes).astype(int).tolist()) == sorted(room - room_left for room_left in left)


@pytest.fixture(scope="module")
def stdlib(tmp_path_factory) -> Prepared:
    return prepare(DataConfig(tokenizer="train:512"), tmp_path_factory.mktemp("stdlib"))


@pytest.mark.parametrize("seq_len", [256, 512, 2048, 8192])
def test_less_than_one_percent_of_the_standard_library_is_wasted(stdlib, seq_len):
    assert packed(stdlib, seq_len=seq_len).waste < 0.01


def test_a_plan_is_made_once_and_kept(data, tmp_path):
    first = kept_plan(data, SEQ, "split", tmp_path / "plans")
    again = kept_plan(data, SEQ, "split", tmp_path / "plans")
    assert len([path for path in (tmp_path / "plans").iterdir() if path.is_dir()]) == 1
    assert first.counts[:].tolist() == again.counts[:].tolist() == make_plan(data, SEQ, "split").counts[:].tolist()
    (tmp_path / "plans" / next(path.name for path in (tmp_path / "plans").iterdir() if path.is_dir()) / "counts.bin").unlink()
    with pytest.raises(DataError, match="the data cache is damaged"):
        kept_plan(data, SEQ, "split", tmp_path / "plans")


@pytest.mark.parametrize("name", ["row_ends", "documents", "starts", "counts"])
@pytest.mark.parametrize("kind", ["bin", "sha256"])
def test_a_flipped_bit_in_a_kept_plan_is_refused_by_the_files_name(data, tmp_path, monkeypatch, name, kind):
    monkeypatch.setattr("paraxis.data.mapped.PART_BYTES", 64)

    def read(flipped: int | None) -> str:
        """What is refused of a new plan with this byte flipped, in opening it or in reading its first row."""
        cache = tmp_path / f"flipped-{flipped}"
        kept_plan(data, SEQ, "split", cache)
        (path,) = cache.glob(f"*/{name}.{kind}")
        content = bytearray(path.read_bytes())
        if flipped is not None:
            content[flipped] ^= 1
        path.write_bytes(content)
        try:
            plan = kept_plan(data, SEQ, "split", cache)
        except DataError as error:
            return f"opening: {error}"
        try:
            PackedRows(data, plan, seq_len=SEQ, document_mask=True, shuffle=False, seed=1).row(0)
        except DataError as error:
            return f"reading: {error}"
        return ""

    assert read(None) == ""
    for place, when in ((0, "reading"), (-1, "opening")):
        assert re.match(rf"{when}: the data are damaged: bytes \d+ to .*{name}\.bin do not match their SHA-256", read(place))


@pytest.mark.parametrize("name", ["row_ends", "documents", "starts", "counts"])
def test_a_kept_plan_that_has_become_shorter_is_refused(data, tmp_path, name):
    kept_plan(data, SEQ, "split", tmp_path / "plans")
    (path,) = (tmp_path / "plans").glob(f"*/{name}.bin")
    for less in (1, 8):
        path.write_bytes(path.read_bytes()[:-less])
        with pytest.raises(DataError, match=rf"the data are damaged: .*{name}\.bin"):
            kept_plan(data, SEQ, "split", tmp_path / "plans")


def test_packing_is_part_of_the_fingerprint(data):
    prints = {packed(data).fingerprint, packed(data, long="drop").fingerprint, packed(data, shuffle=False).fingerprint}
    assert len(prints) == 3
