"""A run ends by saying where its checkpoint is, how good it is, what it writes, and three commands that work as they are printed."""

import json
import shlex
from pathlib import Path

import pytest

from paraxis.cli.end_of_run import last_score
from paraxis.recipes import RECIPES
from tests.cli.folders import OWN_RECIPE, TEXT
from tests.runs import events, paraxis, refusal, succeeded


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PARAXIS_CACHE", str(tmp_path / "cache"))


def run(folder: Path, *more: str, recipe: str = "debug") -> str:
    """What a short run in `folder` prints after its last step."""
    (folder / "text.txt").write_text(TEXT)
    quick = ("--data.paths=text.txt", "--data.tokenizer=train:300", "--data.seq_len=16", "--train.steps=2")
    out = succeeded(paraxis("train", recipe, *quick, "--run-dir", "runs/my run", *more, folder=folder)).out
    return out[out.index("\ncheckpoint: ") :]


def follow(folder: Path, said: str) -> list[str]:
    """What each of the three printed commands prints."""
    commands = [shlex.split(line) for line in said[said.index("next:") :].splitlines()[1:]]
    assert [words[:2] for words in commands] == [["paraxis", "generate"], ["paraxis", "eval"], ["paraxis", "convert"]]
    return [succeeded(paraxis(*words[1:], folder=folder)).out for words in commands]


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_ends_with_its_checkpoint_score_sample_and_commands_that_work(tmp_path: Path, ranks: int):
    evaluated = ("--eval.every=1", "--eval.paths=text.txt", "--train.sample=the lazy ")
    said = run(tmp_path, *evaluated, f"--parallel.fsdp={ranks}")
    last = events(tmp_path / "runs/my run", "evaluation")[-1]
    assert f"checkpoint: {Path('runs/my run/checkpoints/step-2')}\n" in said
    assert f"held-out loss: {last['loss']:.4f} nats per token over {last['targets']} tokens, after step 2\n" in said
    assert "sample:\n\nthe lazy " in said
    generated, scored, wrote = follow(tmp_path, said)
    assert generated.startswith("the lazy ")
    assert scored.startswith("loss ")
    assert wrote == "wrote runs/my run/hugging_face\n"
    assert (tmp_path / "runs/my run/hugging_face/config.json").is_file()


def test_a_recipe_s_own_model_ends_with_commands_that_name_its_settings(tmp_path: Path):
    (tmp_path / "my.py").write_text(OWN_RECIPE)
    said = run(tmp_path, "--model.vocab_size=310", recipe="my.py:bigrams")
    assert said.count("--recipe 'runs/my run/config.toml'") == 3
    assert "sample:\n\nthe " in said
    follow(tmp_path, said)


def test_a_sample_that_cannot_be_made_fails_nothing(tmp_path: Path):
    (tmp_path / "my.py").write_text(OWN_RECIPE.replace("logits", "scores"))
    assert "none could be made: Bigrams cannot be generated from" in run(tmp_path, recipe="my.py:bigrams")


def test_without_a_checkpoint_or_a_sample_nothing_is_made_up(tmp_path: Path):
    said = run(tmp_path, "--checkpoint.at_end=false")
    assert said == "\ncheckpoint: none was saved\n"


def test_a_run_that_fails_says_nothing_of_this(tmp_path: Path):
    ended = paraxis("train", "debug", "--data.paths=none.txt", folder=tmp_path)
    refusal(ended, 65)
    assert "checkpoint:" not in ended.out


def test_the_last_score_is_found_among_broken_lines(tmp_path: Path):
    events = [{"kind": "evaluation", "loss": 5.0, "targets": 9, "step": 1}, {"kind": "stop"}, {"kind": "evaluation", "loss": None}]
    (tmp_path / "events.jsonl").write_text("\n".join(map(json.dumps, events)) + '\n{"kind": "eval')
    assert last_score(tmp_path / "events.jsonl") == "held-out loss: 5.0000 nats per token over 9 tokens, after step 1"
    assert last_score(tmp_path / "none.jsonl") == ""


def test_the_demo_ends_with_a_sample():
    assert RECIPES["demo"]().train.sample
