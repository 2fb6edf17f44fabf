"""`paraxis data prepare` and a mixture in training, as a person meets them."""

import json
from pathlib import Path

import pytest

from paraxis.cli import main
from tests.data.corpus import sentences
from tests.runs import SMALL, metrics, paraxis, refusal, succeeded


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARAXIS_CACHE", str(tmp_path / "cache"))
    for name in ("web", "code"):
        (tmp_path / f"{name}.txt").write_text("\n".join(f"{name} {text}" for text in sentences(80)))
    return tmp_path


SETTINGS = ["--data.tokenizer=train:300", "--data.seq_len=16"]


def prepared(*arguments: str, capsys) -> dict[str, dict]:
    assert main(["data", "prepare", "debug", *SETTINGS, *arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_what_is_prepared_is_what_training_finds(capsys):
    made = prepared("--data.paths=web.txt", "--processes=1", capsys=capsys)[""]
    again = prepared("--data.paths=web.txt", "--data.packing=best_fit", capsys=capsys)[""]
    assert made["folder"] == again["folder"]
    assert made["fingerprint"] == again["fingerprint"]
    assert (made["documents"], made["skipped"], made["waste"]) == (1, 0, 0)
    assert made["rows"] == (made["tokens"] - 1) // 16
    assert main(["data", "prepare", "debug", *SETTINGS, "--data.paths=web.txt"]) == 0
    assert f"{made['tokens']:,} tokens in 1 documents; {made['rows']} rows of 16; " in capsys.readouterr().out


def test_a_folder_of_shards_needs_neither_the_text_nor_the_cache(folder, capsys):
    made = prepared("--data.paths=web.txt", "--out=shards", capsys=capsys)[""]
    (folder / "web.txt").unlink()
    again = prepared("--data.paths=shards", "--data.tokenizer=shards", capsys=capsys)[""]
    assert again == made


def test_each_source_of_a_mixture_is_prepared(capsys):
    made = prepared("--data.paths=web=web.txt,code=code.txt", "--data.mixture=web=3 code=1", capsys=capsys)
    assert set(made) == {"web", "code"}
    assert made["web"]["folder"] != made["code"]["folder"]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["prepair", "debug"], "there is no command data 'prepair'; did you mean prepare?"),
        (["prepare"], "data prepare takes one recipe"),
        (["prepare", "debug", "--train.steps=3"], "--train.steps is neither an option of data prepare nor one of the recipe's data"),
        (["prepare", "debug", "--proceses=3"], "did you mean --processes?"),
        (
            ["prepare", "debug", "--data.paths=web=a.txt,code=b.txt", "--data.mixture=web=1 code=1", "--out=x"],
            "--out takes the data of one source",
        ),
        (["prepare", "debug", "--data.paths=web.txt", "--out=cache.txt"], "--out=cache.txt exists"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_message(folder, capsys, arguments, words):
    (folder / "cache.txt").write_text("")
    assert main(["data", *arguments]) == 78
    assert words in capsys.readouterr().err


def test_help_has_examples(capsys):
    assert main(["data", "--help"]) == 0
    assert "paraxis data prepare demo" in capsys.readouterr().out


@pytest.mark.parametrize("how", ["--data.packing=best_fit", "--data.mixture_of=documents"])
def test_the_mixture_of_a_run_may_change_where_it_stopped_but_not_before(folder, how):
    for name in ("web", "code"):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": f"{name} {text}"}) + "\n" for text in sentences(80)))

    def train(steps: int, *mixture: str, run: str) -> list[str]:
        paths = "--data.paths=" + ",".join(f"{name}={name}.jsonl" for name in ("web", "code")[: 1 if mixture == ("web=1",) else 2])
        mixed = [paths, f"--data.mixture={','.join(mixture)}", how, "--data.document_mask=true"]
        return ["train", "debug", *SETTINGS, *mixed, *SMALL, f"--train.steps={steps}", "--metrics.tensorboard=false", f"--run-dir={run}"]

    def losses(run: str) -> dict[int, float]:
        return {line["step"]: line["loss"] for line in metrics(folder / run)}

    succeeded(paraxis("data", "prepare", "debug", *SETTINGS, "--data.paths=web.txt", "--out=shards", folder=folder))
    own = "--data.tokenizer=shards"  # or the second source would change the tokenizer that is trained
    succeeded(paraxis(*train(2, "web=1", run="changed"), own, folder=folder))
    succeeded(paraxis(*train(4, "web=1", "2: web=1 code=1", run="changed"), own, folder=folder))
    succeeded(paraxis(*train(4, "web=1", "2: web=1 code=1", run="planned"), own, folder=folder))
    assert losses("changed") == losses("planned")
    assert len(losses("planned")) == 4
    words = refusal(paraxis(*train(5, "web=1", "1: web=1 code=1", run="changed"), own, folder=folder), 77)
    assert "was saved with the mixture [0: web=1, 2: web=1/2 code=1/2]" in words
    other = "--data.mixture_of=rows" if "documents" in how else "--data.packing=concatenate"
    words = refusal(paraxis(*train(5, "web=1", "2: web=1 code=1", run="changed"), own, other, folder=folder), 77)
    assert ("was saved with a mixture of documents, but now it is one of rows" if "documents" in how else "it is data.packing") in words


def test_a_run_on_live_tokens_goes_on_on_another_layout_as_if_nothing_had_been(folder):
    lines = [json.dumps({"text": text}) for text in sentences(300)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    (folder / "b.jsonl").write_text("\n".join(reversed(lines)))
    succeeded(paraxis("data", "prepare", "debug", *SETTINGS, "--data.paths=a.jsonl", "--out=shards", folder=folder))
    mixed = ["--data.paths=a=a.jsonl,b=hf:json?files=b.jsonl&stream=true", "--data.mixture=a=1 b=1", "--data.document_mask=true"]
    live = [*mixed, "--data.tokenizer=shards", "--data.seq_len=16", "--data.tokenize=live", "--data.workers=1"]
    own = ["--metrics.tensorboard=false", "--train.global_tokens=128", "--optim.schedule=constant", *SMALL]

    def train(steps: int, run: str, *more: str) -> None:
        ended = paraxis("train", "debug", *live, *own, f"--train.steps={steps}", f"--run-dir={run}", *more, folder=folder, timeout=100)
        assert "whether its content is the same cannot be checked" in succeeded(ended).err

    train(6, "whole")
    train(2, "parts", "--parallel.fsdp=2")
    train(4, "parts", "--train.micro_batch=4")
    train(6, "parts", "--parallel.tp=2")
    losses = [[line["loss"] for line in metrics(folder / run)] for run in ("whole", "parts")]
    assert len(losses[0]) == 6
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    assert not list((folder / "cache").glob("live-*"))
    words = refusal(paraxis("data", "prepare", "debug", "--data.tokenize=live", folder=folder), 78)
    assert "data.tokenize=live leaves nothing to prepare" in words


def test_a_record_that_breaks_while_training_ends_the_run_with_its_file_and_line(folder):
    lines = [json.dumps({"text": text}) for text in sentences(90)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    succeeded(paraxis("data", "prepare", "debug", *SETTINGS, "--data.paths=a.jsonl", "--out=shards", folder=folder))
    (folder / "a.jsonl").write_text("\n".join([*lines[:50], "{", *lines[50:]]))
    live = ["--data.paths=a.jsonl", "--data.tokenizer=shards", "--data.seq_len=16", "--data.tokenize=live", "--data.workers=1"]
    run = ["train", "debug", *live, *SMALL, "--run-dir=run", "--parallel.fsdp=2"]
    words = refusal(paraxis(*run, folder=folder), 65)
    assert "a.jsonl, line 51: not valid JSON" in words
    succeeded(paraxis(*run, "--data.on_bad_record=skip", "--train.steps=2", folder=folder))
    assert [line["skipped_records"] for line in metrics(folder / "run")] == [1, 1]
