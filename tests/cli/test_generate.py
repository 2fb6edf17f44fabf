"""`paraxis generate` continues as transformers does, shows text as soon as it is whole, and refuses what it cannot continue."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paraxis.base.config import describe
from paraxis.cli.generate import FLAGS, OPTIONS, SAMPLING, spelled
from paraxis.generate.sample import SamplingConfig
from tests.cli.folders import OWN_RECIPE, SENTENCES, TEXT, checkpoint, help_of, hugging_face, refused, said, said_json, tokenizer

ROOT = Path(__file__).parents[2]


def test_greedy_text_is_that_of_transformers_start_token_and_end_tokens_included(tmp_path: Path, capsys):
    transformers = pytest.importorskip("transformers")
    folder = hugging_face(tmp_path / "hf")
    made = said_json(capsys, "generate", folder, "--prompt", "the quick", "--temperature", 0, "--max-tokens", 40)
    encode = transformers.AutoTokenizer.from_pretrained(folder)
    prompt = encode("the quick", return_tensors="pt").input_ids
    assert prompt[0, 0] == 1
    theirs = transformers.AutoModelForCausalLM.from_pretrained(folder).generate(prompt, do_sample=False, max_new_tokens=40, pad_token_id=0)
    new = theirs[0, prompt.shape[1] :]
    assert made["tokens"] == len(new)
    assert made["prompt"] + made["text"] == encode.decode(theirs[0], skip_special_tokens=True)


def test_what_is_streamed_is_what_json_holds_and_the_seed_decides_it(tmp_path: Path, capsys):
    words = ("generate", hugging_face(tmp_path / "hf"), "--prompt", "the quick", "--temperature", 1.5, "--max-tokens", 30, "--seed", 3)
    made = said_json(capsys, *words)
    assert said(capsys, *words) == made["prompt"] + made["text"] + "\n"
    assert said_json(capsys, *words[:-1], 4)["text"] != made["text"]


@pytest.mark.parametrize("text", [TEXT, "🙂日本", "a\N{REPLACEMENT CHARACTER}b", ""])
def test_text_comes_in_whole_characters_and_adds_up_to_all_of_it(text: str):
    ours = tokenizer(257)
    before, ids = ours.encode(SENTENCES[0]), ours.encode(text)
    pieces = list(spelled(ids, ours.decode, before))
    assert "".join(pieces) == text
    assert len(pieces) == sum(character != "\N{REPLACEMENT CHARACTER}" for character in text)


def test_half_a_character_at_the_end_is_shown_as_such():
    ours = tokenizer(257)
    assert "".join(spelled(ours.encode("a🙂")[:-1], ours.decode, [])) == "a\N{REPLACEMENT CHARACTER}"


def test_a_recipe_s_own_model_is_continued_where_the_recipe_is_named(tmp_path: Path, capsys):
    (tmp_path / "my.py").write_text(OWN_RECIPE)
    table = torch.eye(300).roll(1, dims=1) * 100  # after token n comes n + 1
    files = {f"tokenizer/{name}": data for name, data in tokenizer().files.items()}
    path = checkpoint(tmp_path / "run/checkpoints", {"table.weight": table}, {"model": None}, files)
    recipe = ("--recipe", f"{tmp_path / 'my.py'}:bigrams")
    letters = said_json(capsys, "generate", path, "--prompt", "a", "--max-tokens", 3, *recipe)
    assert letters == {"prompt": "a", "text": "bcd", "tokens": 3}
    message = refused(capsys, 78, "generate", tmp_path / "run", "--prompt", "a")
    assert "a checkpoint never names code to run" in message
    assert "--recipe=my.py:function" in message
    assert "embed.weight is not there" in refused(capsys, 77, "generate", path, "--prompt", "a", "--recipe", "debug")
    (tmp_path / "my.py").write_text(OWN_RECIPE.replace("logits", "scores"))
    assert "give it a method logits" in refused(capsys, 78, "generate", path, "--prompt", "a", *recipe)
    bare = checkpoint(tmp_path / "bare", {"table.weight": table}, {"model": None}, {})
    assert "--tokenizer=FOLDER" in refused(capsys, 65, "generate", bare, "--prompt", "a", *recipe)


def test_help_has_examples_and_the_defaults_and_needs_no_torch():
    printed = help_of("generate")
    assert "examples:\n  paraxis generate runs/demo" in printed
    assert all(f"--{option} " in printed for option in (*OPTIONS, *FLAGS) if option != "help")
    settings = {setting.path.replace("_", "-"): setting for setting in describe(SamplingConfig())}
    assert settings.keys() == set(SAMPLING)
    for name, setting in settings.items():
        line = next(line for line in printed.splitlines() if line.startswith(f"  --{name} "))
        if name != "seed":
            assert f"(default: {setting.value})" in line


def test_nonsense_is_refused_in_one_line(tmp_path: Path, capsys):
    assert "generate needs a text to continue" in refused(capsys, 78, "generate", tmp_path)
    assert "--prompt needs a value" in refused(capsys, 78, "generate", tmp_path, "--prompt", "")
    assert "temperature=-1.0 must be" in refused(capsys, 78, "generate", tmp_path, "--prompt", "a", "--temperature=-1")
    assert "max_tokens expects int" in refused(capsys, 78, "generate", tmp_path, "--prompt", "a", "--max-tokens=ten")
    assert "takes one checkpoint, not 2" in refused(capsys, 78, "generate", "a", "b", "--prompt", "a")


def test_a_reader_that_stops_early_is_no_error(tmp_path: Path):
    folder = hugging_face(tmp_path / "hf")
    command = [sys.executable, "-m", "paraxis", "generate", str(folder), "--prompt", "the", "--max-tokens", "2000", "--temperature", "5"]
    with subprocess.Popen(command, cwd=ROOT, env=os.environ, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.read(3) == b"the"
        process.stdout.close()
        assert (process.wait(60), process.stderr.read()) == (0, b"")
