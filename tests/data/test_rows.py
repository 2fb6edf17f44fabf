"""Rows are a pure function of their index; every token is predicted once a pass."""

from itertools import chain

import numpy as np
import pytest

from paraxis.base.errors import DataError
from paraxis.base.seams import IGNORE, Rows
from paraxis.data.rows import HeldOutRows, TrainingRows, shuffled
from tests.data.corpus import documents, prepared, sentences

SEQ = 16


@pytest.fixture
def data(tmp_path):
    return prepared(tmp_path, sentences(40))


def training(data, *, seed=1, mask=False, shuffle=True, seq_len=SEQ, repeat=0) -> TrainingRows:
    return TrainingRows(data, seq_len=seq_len, document_mask=mask, shuffle=shuffle, seed=seed, repeat=repeat)


def stream_of(rows, indices) -> list[int]:
    return list(chain.from_iterable(rows.row(index)["targets_bt"].tolist() for index in indices))


def test_unshuffled_rows_are_the_documents_end_to_end(data):
    stream, rows = list(chain.from_iterable(documents(data))), training(data, shuffle=False)
    assert rows.length == (len(stream) - 1) // SEQ
    for index in range(rows.length):
        row = rows.row(index)
        assert row["tokens_bt"].tolist() == stream[index * SEQ : (index + 1) * SEQ]
        assert row["targets_bt"].tolist() == stream[index * SEQ + 1 : (index + 1) * SEQ + 1]
        assert row["positions_bt"].tolist() == list(range(SEQ))
        assert all(array.dtype == np.int64 for array in row.values())
        assert "documents_bt" not in row
    assert rows.row(rows.length)["tokens_bt"].tolist() == rows.row(0)["tokens_bt"].tolist()


def test_a_shuffled_pass_holds_every_document_once_and_predicts_every_token_once(data):
    rows = training(data, mask=True)
    order = shuffled(data.documents, 1, 0, 0)
    stream = list(chain.from_iterable(documents(data)[number] for number in order))
    in_order = np.argsort(shuffled(rows.length, 1, 0, 1))
    tokens = list(chain.from_iterable(rows.row(int(index))["tokens_bt"].tolist() for index in in_order))
    assert tokens == stream[: rows.length * SEQ]
    plain = stream_of(training(data), map(int, in_order))
    assert plain == stream[1 : rows.length * SEQ + 1]


def test_a_row_does_not_depend_on_what_was_read_before(data):
    rows, again = training(data, mask=True), training(data, mask=True)
    indices = list(range(0, 3 * rows.length, 7))
    expected = {index: rows.row(index) for index in indices}
    for index in reversed(indices):
        for name, array in again.row(index).items():
            assert array.tolist() == expected[index][name].tolist()


def test_seeds_and_passes_give_different_orders(data):
    rows = training(data)
    first, second = stream_of(rows, range(rows.length)), stream_of(rows, range(rows.length, 2 * rows.length))
    assert first != second
    assert first != stream_of(training(data, seed=2), range(rows.length))


def test_neighbouring_rows_of_a_long_document_are_spread(tmp_path):
    data = prepared(tmp_path, [" ".join(sentences(200))])
    rows = training(data)
    plain = [training(data, shuffle=False).row(index)["tokens_bt"].tolist() for index in range(rows.length)]
    spread = [rows.row(index)["tokens_bt"].tolist() for index in range(rows.length)]
    assert sorted(spread) == sorted(plain)
    assert spread != plain


def test_the_order_is_the_published_splitmix64_and_a_permutation():
    # The first outputs of SplitMix64 started at 0, as its authors list them, sort the numbers 0 to 3 so.
    outputs = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F, 0xF88BB8A8724C81EC]
    assert shuffled(4).tolist() == sorted(range(4), key=outputs.__getitem__)
    for count in (1, 2, 1000):
        assert sorted(shuffled(count, -5, 3).tolist()) == list(range(count))
    assert shuffled(1000, 0, 1).tolist() != shuffled(1000, 1, 0).tolist()


def test_the_mask_restarts_positions_and_ignores_targets_across_documents(data):
    bounds = set(data.ends.tolist())
    rows, plain = training(data, mask=True, shuffle=False), training(data, shuffle=False)
    for index in range(rows.length):
        row, unmasked = rows.row(index), plain.row(index)
        document, position = 0, 0
        for place in range(SEQ):
            at = index * SEQ + place
            if place and at in bounds:
                document, position = document + 1, 0
            assert row["documents_bt"][place] == document
            assert row["positions_bt"][place] == position
            assert row["targets_bt"][place] == (IGNORE if at + 1 in bounds else unmasked["targets_bt"][place])
            position += 1


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("seq_len", [5, 16, 10_000])
def test_held_out_rows_predict_every_token_once_and_fill_up_the_last_row(data, mask, seq_len):
    rows = HeldOutRows(data, seq_len=seq_len, document_mask=mask)
    stream = list(chain.from_iterable(documents(data)))
    expected = [IGNORE if mask and at in set(data.ends.tolist()) else stream[at] for at in range(1, len(stream))]
    found = stream_of(rows, range(rows.length))
    assert found == expected + [IGNORE] * (rows.length * seq_len - len(expected))
    last = rows.row(rows.length - 1)
    assert {len(array) for array in last.values()} == {seq_len}
    assert set(last["tokens_bt"][last["targets_bt"] == IGNORE].tolist()) <= {0}  # padding, and the end token, which is 0


def test_held_out_rows_may_end_exactly_full(tmp_path):
    data = prepared(tmp_path, ["a b c d"])
    rows = HeldOutRows(data, seq_len=data.tokens - 1, document_mask=True)
    assert rows.length == 1
    assert IGNORE not in rows.row(0)["targets_bt"]


def test_too_little_text_for_one_row_is_refused_with_what_to_lower(tmp_path):
    data = prepared(tmp_path, ["a b"])
    assert training(data, seq_len=data.tokens - 1).length == 1
    with pytest.raises(DataError, match=rf"hold {data.tokens} tokens.*data\.seq_len={data.tokens}.*to {data.tokens - 1} or less"):
        training(data, seq_len=data.tokens)


def test_a_pass_more_than_allowed_is_refused(data):
    rows = training(data, repeat=2)
    assert rows.row(2 * rows.length - 1)["tokens_bt"].tolist() == training(data).row(2 * rows.length - 1)["tokens_bt"].tolist()
    with pytest.raises(DataError, match=rf"row {2 * rows.length} is of pass 3 .* data\.repeat=2 allows 2 of {rows.length} rows"):
        rows.row(2 * rows.length)


def test_rows_carry_what_the_seam_promises(data):
    held_out = HeldOutRows(data, seq_len=SEQ, document_mask=False)
    assert held_out.fingerprint == data.fingerprint
    assert training(data).fingerprint == training(data, seed=2).fingerprint != training(data, shuffle=False).fingerprint
    for rows in (training(data), held_out):
        seam: Rows = rows
        assert seam.vocab_size == 300
        assert rows.eos_id == data.tokenizer.eos_id
