"""Tokenizers: trained, loaded from what Hugging Face writes, refused when they do not fit."""

import json

import pytest
import tokenizers
import transformers

from paraxis.base.errors import ConfigError, DataError
from paraxis.data.tokens import Tokenizer, check_vocabulary
from tests.data.corpus import sentences, tokenizer


def test_a_trained_tokenizer_encodes_any_text_and_gives_it_back():
    trained = tokenizer()
    assert trained.vocab_size == 300
    for text in ("the quick", "naïve 日本 🜁\n\t\x00", "  spaces   stay  "):
        assert trained.decode(trained.encode(text)) == text
    assert trained.eos_id is not None
    assert trained.encode("<|endoftext|>") == [trained.eos_id]
    assert trained.decode([trained.eos_id]) == ""
    assert trained.decode([trained.eos_id], special_tokens=True) == "<|endoftext|>"


def test_training_twice_gives_the_same_tokenizer():
    assert tokenizer().sha256 == tokenizer().sha256


def test_a_tokenizer_is_made_again_from_its_files(tmp_path):
    trained = tokenizer()
    again = Tokenizer.from_files(trained.files, "checkpoint")
    assert (again.sha256, again.eos_id, again.vocab_size) == (trained.sha256, trained.eos_id, trained.vocab_size)
    for name, data in trained.files.items():
        (tmp_path / name).write_bytes(data)
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        assert Tokenizer.load(path).encode("lazy dog") == trained.encode("lazy dog")


def test_a_hugging_face_folder_gives_transformers_ids_and_special_tokens(tmp_path):
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_buffer(tokenizer().files["tokenizer.json"]),
        eos_token="<|end|>",
        bos_token="<|begin|>",
    )
    theirs.save_pretrained(tmp_path)
    ours = Tokenizer.load(tmp_path)
    assert (ours.eos_id, ours.bos_id) == (theirs.eos_token_id, theirs.bos_token_id)
    assert ours.vocab_size == len(theirs) == 302
    assert [ours.encode(text) for text in sentences(20)] == [theirs.encode(text, add_special_tokens=False) for text in sentences(20)]


@pytest.mark.parametrize(
    ("files", "eos"),
    [
        ({"tokenizer_config.json": {"eos_token": {"content": "<|endoftext|>"}}}, 0),
        ({"tokenizer_config.json": {}, "special_tokens_map.json": {"eos_token": "<|endoftext|>"}}, 0),
        ({"config.json": {"eos_token_id": [0, 5]}}, 0),
        ({}, 0),
        ({"tokenizer_config.json": {"eos_token": None}}, None),
    ],
)
def test_the_end_token_is_found_wherever_it_is_named(tmp_path, files, eos):
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().files["tokenizer.json"])
    for name, content in files.items():
        (tmp_path / name).write_text(json.dumps(content))
    assert Tokenizer.load(tmp_path).eos_id == eos


def test_truncation_left_in_the_file_does_not_shorten_documents():
    data = json.loads(tokenizer().files["tokenizer.json"])
    data["truncation"] = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
    cut = Tokenizer.from_files({"tokenizer.json": json.dumps(data).encode()}, "cut")
    assert cut.encode(sentences(9)[-1]) == tokenizer().encode(sentences(9)[-1])


def test_a_missing_or_broken_tokenizer_is_refused_by_what_was_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no tokenizer at .*nowhere.*train:4096"):
        Tokenizer.load(tmp_path / "nowhere")
    with pytest.raises(DataError, match=r"tokenizer\.json.*Hugging Face folder"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(DataError, match="is not a tokenizer"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes(tokenizer().files["tokenizer.json"])
    (tmp_path / "tokenizer_config.json").write_text('{"eos_token": "<absent>"}')
    with pytest.raises(DataError, match=r"'<absent>'.* not in the vocabulary"):
        Tokenizer.load(tmp_path)


def test_a_tokenizer_larger_than_the_models_vocabulary_is_refused_with_both_sizes():
    check_vocabulary(300, 300)
    with pytest.raises(ConfigError, match=r"301 entries .* only 300.*model\.vocab_size"):
        check_vocabulary(301, 300)
