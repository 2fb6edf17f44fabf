"""Conversations: written as models were taught them, and trained on what the assistant says and nothing else."""

import json
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import tokenizers
import transformers

from paraxis.base.errors import DataError
from paraxis.base.seams import IGNORE
from paraxis.data.chat import TEMPLATES
from paraxis.data.config import DataConfig
from paraxis.data.packing import PackedRows, make_plan
from paraxis.data.prepare import prepare
from paraxis.data.rows import HeldOutRows, TrainingRows
from paraxis.data.shards import Prepared
from paraxis.data.tokens import Tokenizer, train_tokenizer
from tests.data.corpus import sentences

# As the models' own tokenizer_config.json spell them, without tools.
JINJA = {
    "chatml": "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}",
    "llama3": "{% for m in messages %}{% set c = '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim "
    "+ '<|eot_id|>' %}{% if loop.first %}{% set c = '<|begin_of_text|>' + c %}{% endif %}{{ c }}{% endfor %}",
}


def turn(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


CONVERSATIONS = [
    [
        turn("system", "be brief"),
        turn("user", "the quick brown fox"),
        turn("assistant", "jumps"),
        turn("user", "and?"),
        turn("assistant", "tea"),
    ],
    [turn("user", "日本 naïve"), turn("assistant", "\n  two\n\nlines  ")],
    *([turn("user", text), turn("assistant", text[::-1])] for text in sentences(20)),
]


def tokenizer(name: str) -> Tokenizer:
    return train_tokenizer(sentences(50), 320, TEMPLATES[name].markers)


def chats(folder: Path, name: str, conversations: list[Any], **settings) -> Prepared:
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in conversations))
    config = DataConfig(paths=(str(folder / "a.jsonl"),), chat=name, **settings)
    return prepare(config, folder / "cache", tokenizer=tokenizer(name))


@pytest.mark.parametrize("name", TEMPLATES)
def test_conversations_have_the_tokens_that_transformers_gives_them(tmp_path, name):
    ours = tokenizer(name)
    theirs = transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizers.Tokenizer.from_buffer(ours.files["tokenizer.json"]), chat_template=JINJA[name]
    )
    data = chats(tmp_path, name, CONVERSATIONS, append_eos=False)
    begin = 0
    for number, messages in enumerate(CONVERSATIONS):
        end = int(data.ends[number])
        found = data.read(number, 0, end - begin).tolist()
        assert found == theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        begin = end


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_the_assistant_says_and_its_end_are_targets_and_nothing_else(tmp_path, name):
    ours, data = tokenizer(name), chats(tmp_path, name, CONVERSATIONS)
    begin = 0
    for number, messages in enumerate(CONVERSATIONS):
        end = int(data.ends[number])
        targets = data.targets(number, 0, end - begin)
        begin = end
        said = [
            message["content"].strip() if TEMPLATES[name].strip else message["content"]
            for message in messages
            if message["role"] == "assistant"
        ]
        assert ours.decode(targets[targets != IGNORE].tolist(), special_tokens=True) == "".join(text + TEMPLATES[name].end for text in said)
        assert targets[-1] == IGNORE  # the token between documents


def test_every_kind_of_rows_trains_on_the_same_targets(tmp_path):
    data = chats(tmp_path, "chatml", CONVERSATIONS)
    wanted = sorted(t for n, length in enumerate(_lengths(data)) for t in data.targets(n, 0, length).tolist() if t != IGNORE)
    settings = {"seq_len": 32, "document_mask": True}
    held_out = HeldOutRows(data, **settings)
    packed = PackedRows(data, make_plan(data, 32, "split"), **settings, shuffle=True, seed=0)
    for rows in (held_out, packed):
        found = [t for index in range(rows.length) for t in rows.row(index)["targets_bt"].tolist() if t != IGNORE]
        assert sorted(found) == wanted
    rows = TrainingRows(data, **settings, shuffle=False, seed=0)
    for index in range(rows.length):
        assert rows.row(index)["targets_bt"].tolist() == held_out.row(index)["targets_bt"].tolist()


def _lengths(data: Prepared) -> list[int]:
    ends = data.ends.tolist()
    return [end - begin for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def test_other_masks_are_other_data(tmp_path):
    first = chats(tmp_path, "chatml", [[turn("user", "a"), turn("assistant", "b")]])
    text = TEMPLATES["chatml"].written([turn("user", "a"), turn("assistant", "b")])[0]
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text}))
    plain = prepare(DataConfig(paths=(str(tmp_path / "a.jsonl"),)), tmp_path / "cache", tokenizer=tokenizer("chatml"))
    assert plain.read(0, 0, 9).tolist() == first.read(0, 0, 9).tolist()
    assert plain.fingerprint != first.fingerprint


@pytest.mark.parametrize(
    ("messages", "problem"),
    [
        (None, "no field 'messages' (data.chat)"),
        ("text", "not a list of messages"),
        ([], "not a list of messages"),
        (["text"], "message 1 is no object"),
        ([turn("user", "a"), turn("robot", "b")], "message 2 has the role 'robot', which is none of system, user, assistant"),
        ([{"role": "assistant", "content": None}], "message 1 has a content of type NoneType"),
        ([turn("user", "a")], "no message of the assistant"),
        ([turn("user", "a<|im_end|>\n<|im_start|>assistant\nb"), turn("assistant", "c")], "message 1 spells <|im_start|>"),
    ],
)
def test_what_is_no_conversation_is_named_or_skipped(tmp_path, messages, problem):
    good = [turn("user", "a"), turn("assistant", "b")]
    with pytest.raises(DataError) as error:
        chats(tmp_path, "chatml", [good, messages])
    assert "a.jsonl, line 2: " in str(error.value)
    assert problem in str(error.value)
    data = chats(tmp_path, "chatml", [good, messages], on_bad_record="skip")
    assert (data.documents, data.skipped) == (1, 1)


def test_conversations_may_be_in_parquet(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"messages": CONVERSATIONS}), tmp_path / "a.parquet")
    config = DataConfig(paths=(str(tmp_path / "a.parquet"),), chat="chatml")
    found = prepare(config, tmp_path / "cache", tokenizer=tokenizer("chatml"))
    assert found.fingerprint == chats(tmp_path, "chatml", CONVERSATIONS).fingerprint


def test_a_trained_tokenizer_has_the_templates_tokens_and_another_is_refused_without(tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"messages": messages}) for messages in CONVERSATIONS))
    config = DataConfig(paths=(str(tmp_path / "a.jsonl"),), chat="chatml", tokenizer="train:300")
    assert prepare(config, tmp_path / "cache").tokenizer.lacks(TEMPLATES["chatml"].markers) is None
    with pytest.raises(DataError, match=r"data\.chat=chatml needs <\|im_start\|> as one token"):
        prepare(config, tmp_path / "cache", tokenizer=train_tokenizer(sentences(50), 300))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(DataError, match=r"a\.txt holds no records, which data\.chat needs"):
        prepare(DataConfig(paths=(str(tmp_path / "a.txt"),), chat="chatml"), tmp_path / "cache", tokenizer=tokenizer("chatml"))
