"""`paraxis eval` gives the loss that transformers has on the same windows, and refuses what it cannot score."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from paraxis.cli import eval as command
from paraxis.cli.weights import open_weights
from paraxis.models.registry import to_record
from tests.cli.folders import TEXT, WORDS, checkpoint, help_of, hugging_face, refused, said, said_json, tokenizer

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PARAXIS_CACHE", str(tmp_path / "cache"))


def judge(folder: Path, documents: list[str], seq_len: int) -> tuple[float, int]:
    """transformers' mean loss over windows of each document that overlap by one token, and the number of targets."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    encode = transformers.AutoTokenizer.from_pretrained(folder)
    total, targets = 0.0, 0
    for text in documents:
        ids = torch.tensor(encode(text, add_special_tokens=False).input_ids)
        for start in range(0, len(ids) - 1, seq_len):
            window = ids[start : start + seq_len + 1]
            with torch.no_grad():
                logits = model(window[None, :-1]).logits[0]
            total += F.cross_entropy(logits.double(), window[1:], reduction="sum").item()
            targets += len(window) - 1
    return total / targets, targets


@pytest.mark.parametrize("seq_len", [7, 64])
def test_the_loss_on_a_text_file_is_that_of_transformers_on_the_same_windows(tmp_path: Path, capsys, seq_len: int):
    folder = hugging_face(tmp_path / "hf")
    (tmp_path / "text.txt").write_text(TEXT)
    scored = said_json(capsys, "eval", folder, "--data", tmp_path / "text.txt", "--seq-len", seq_len, "--batch", 3)
    loss, tokens = judge(folder, [TEXT], seq_len)
    assert scored.keys() == {"loss", "perplexity", "tokens"}
    assert scored["tokens"] == tokens
    assert scored["loss"] == pytest.approx(loss, rel=1e-5)
    assert scored["perplexity"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_documents_are_scored_each_to_itself(tmp_path: Path, capsys):
    folder = hugging_face(tmp_path / "hf")
    texts = [" ".join(WORDS[n:]) for n in range(8)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"body": text}) + "\n" for text in texts))
    scored = said_json(capsys, "eval", folder, "--data", tmp_path / "texts.jsonl", "--text-field", "body", "--seq-len", 4096)
    loss, tokens = judge(folder, texts, 4096)
    assert (scored["tokens"], scored["loss"]) == (tokens, pytest.approx(loss, rel=1e-5))


def test_an_imported_checkpoint_has_the_loss_of_its_folder_under_any_name(tmp_path: Path, capsys):
    folder = hugging_face(tmp_path / "hf")
    (tmp_path / "text.txt").write_text(TEXT)
    said(capsys, "convert", "import", folder, tmp_path / "run/checkpoints")
    places = (folder, tmp_path / "run", tmp_path / "run/checkpoints", tmp_path / "run/checkpoints/step-0")
    scores = [said_json(capsys, "eval", place, "--data", tmp_path / "text.txt") for place in places]
    assert all(score == scores[0] for score in scores)
    assert f"over {scores[0]['tokens']} tokens" in said(capsys, "eval", folder, "--data", tmp_path / "text.txt")
    rounded = said_json(capsys, "eval", folder, "--data", tmp_path / "text.txt", "--precision", "bf16")
    assert rounded["loss"] != scores[0]["loss"]
    assert rounded["loss"] == pytest.approx(scores[0]["loss"], rel=0.02)


def test_help_has_examples_and_needs_no_torch():
    printed = help_of("eval")
    assert "examples:\n  paraxis eval runs/demo" in printed
    assert all(f"--{option} " in printed for option in (*command.OPTIONS, *command.FLAGS) if option != "help")


def test_what_cannot_be_scored_is_refused_in_one_line(tmp_path: Path, capsys):
    folder, text = hugging_face(tmp_path / "hf"), tmp_path / "text.txt"
    text.write_text(TEXT)
    assert "eval needs the text to score" in refused(capsys, 78, "eval", folder)
    assert "eval takes one checkpoint, but none was given" in refused(capsys, 78, "eval", "--data", text)
    assert "did you mean --seq-len?" in refused(capsys, 78, "eval", folder, "--data", text, "--seqlen", 4)
    assert "precision='fp8' is unknown" in refused(capsys, 78, "eval", folder, "--data", text, "--precision", "fp8")
    assert "--batch=0 is not a whole number" in refused(capsys, 78, "eval", folder, "--data", text, "--batch", 0)
    assert "no file at" in refused(capsys, 65, "eval", folder, "--data", tmp_path / "none.txt")
    assert "does not exist" in refused(capsys, 77, "eval", tmp_path / "none", "--data", text)
    assert "is a file" in refused(capsys, 77, "eval", text, "--data", text)
    (tmp_path / "empty").mkdir()
    assert "holds neither a complete paraxis checkpoint" in refused(capsys, 77, "eval", tmp_path / "empty", "--data", text)
    text.write_text("a")
    assert "nothing to predict" in refused(capsys, 65, "eval", folder, "--data", text)
    (tmp_path / "short.jsonl").write_text('{"text": "a"}\n' * 3)
    assert "no document in" in refused(capsys, 65, "eval", folder, "--data", tmp_path / "short.jsonl")


def test_weights_that_do_not_go_together_are_refused_in_one_line(tmp_path: Path, capsys):
    folder, text = hugging_face(tmp_path / "hf"), tmp_path / "text.txt"
    text.write_text(TEXT)

    def eval_refused(code: int, *more: object) -> str:
        return refused(capsys, code, "eval", folder, "--data", text, *more)

    (tmp_path / "large.json").write_bytes(tokenizer(330).files["tokenizer.json"])
    assert "330 entries, but the model in" in eval_refused(78, "--tokenizer", tmp_path / "large.json")
    (folder / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    assert "holds no tokenizer" in eval_refused(65)
    assert said_json(capsys, "eval", folder, "--data", text, "--tokenizer", tmp_path / "tokenizer.json")["tokens"] > 100
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "hidden_size": 64}))
    assert "other shapes" in eval_refused(77, "--tokenizer", tmp_path)
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "bloom"}))
    assert "model_type='bloom' is not supported" in eval_refused(78)
    (folder / "config.json").write_text("{")
    assert "config.json is not valid JSON" in eval_refused(77)
    (folder / "config.json").unlink()
    assert "holds no config.json" in eval_refused(77)


def test_a_checkpoint_of_ours_that_is_damaged_or_of_another_model_is_refused_in_one_line(tmp_path: Path, capsys):
    (tmp_path / "text.txt").write_text(TEXT)
    config = open_weights(hugging_face(tmp_path / "hf")).config
    tensors = {name: torch.randn(p.shape) for name, p in config.build().named_parameters()}
    files = {f"tokenizer/{name}": data for name, data in tokenizer().files.items()}
    path = checkpoint(tmp_path / "whole", tensors, {"model": to_record(config), "data": {"seq_len": 8}}, files)
    scored = said_json(capsys, "eval", tmp_path / "whole", "--data", tmp_path / "text.txt")
    assert scored == said_json(capsys, "eval", path, "--data", tmp_path / "text.txt", "--seq-len", 8)

    def eval_refused(code: int, place: Path) -> str:
        return refused(capsys, code, "eval", place, "--data", tmp_path / "text.txt")

    spoilt = {**tensors, "norm.weight": torch.full((32,), torch.nan)}
    assert "a loss of nan nats" in eval_refused(77, checkpoint(tmp_path / "nan", spoilt, {"model": to_record(config)}, files))
    fewer = {name: tensor for name, tensor in tensors.items() if name != "norm.weight"}
    assert "norm.weight is not there" in eval_refused(77, checkpoint(tmp_path / "fewer", fewer, {"model": to_record(config)}, files))
    assert "never names code to run" in eval_refused(78, checkpoint(tmp_path / "nameless", tensors, {"model": None}, files))
    (shard,) = path.glob("*.safetensors")
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)
    assert "is damaged" in eval_refused(77, path)
    (path / "manifest.json").unlink()
    assert "holds neither a complete paraxis checkpoint" in eval_refused(77, path)
