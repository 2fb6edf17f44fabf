"""What a run leaves behind to look at: held-out loss, metrics, TensorBoard curves, profiles."""

import gc
import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from paraxis.cli import main
from paraxis.train import loop
from tests.runs import RECIPES, SMALL, events, lines, metrics, paraxis, succeeded

LAYOUTS = {
    "one process": [],
    "fsdp2": ["--parallel.fsdp=2"],
    "tp2": ["--parallel.tp=2"],
    "fsdp2 x tp2": ["--parallel.fsdp=2", "--parallel.tp=2"],
    "dp2 x fsdp2": ["--parallel.dp=2", "--parallel.fsdp=2"],
}
PLAIN = ["train", f"{RECIPES}:run", "--run-dir=run"]

Train = Callable[..., list[str]]


@pytest.fixture
def train(text: Path) -> Train:
    def arguments(*more: str) -> list[str]:
        data = [f"--data.paths={text}", "--data.tokenizer=train:300", "--data.seq_len=16"]
        return ["train", "debug", *data, *SMALL, "--metrics.tensorboard=false", *more]

    return arguments


def held_out_loss(train: Train, text: Path, folder: Path, name: str, *more: str) -> tuple[float, int]:
    """Held-out loss and targets of untrained weights, on a text whose rows divide among no number of ranks but one."""
    run = train(f"--run-dir={name}", "--train.steps=1", "--optim.lr=0", "--eval.every=1", "--checkpoint.at_end=false", *more)
    held_out = folder / "heldout.jsonl"
    held_out.write_text("".join(text.read_text().splitlines(keepends=True)[:5]))
    succeeded(paraxis(*run, f"--eval.paths={held_out}", folder=folder))
    [evaluation] = events(folder / name, "evaluation")
    return evaluation["loss"], evaluation["targets"]


@pytest.mark.parametrize("mask", ["false", "true"])
def test_held_out_loss_scores_each_target_once_on_every_layout(mask: str, train: Train, text: Path, tmp_path: Path):
    scored = {
        f"{layout}, micro-batch {rows}": held_out_loss(
            train, text, tmp_path, f"run{number}-{rows}", *LAYOUTS[layout], f"--train.micro_batch={rows}", f"--data.document_mask={mask}"
        )
        for number, layout in enumerate(LAYOUTS if mask == "false" else ["one process", "fsdp2", "tp2"])
        for rows in (1, 3)
    }
    loss, targets = scored["one process, micro-batch 1"]
    assert targets > 16
    assert {name: count for name, (_, count) in scored.items() if count != targets} == {}
    assert {name: other for name, (other, _) in scored.items() if other != pytest.approx(loss, rel=1e-6)} == {}


def test_held_out_loss_comes_every_so_many_steps_and_at_the_end_and_changes_no_training_step(train: Train, text: Path, tmp_path: Path):
    run = train("--train.steps=5", "--parallel.fsdp=2")
    succeeded(paraxis(*run, "--run-dir=with", "--eval.every=2", f"--eval.paths={text}", folder=tmp_path))
    succeeded(paraxis(*run, "--run-dir=without", folder=tmp_path))
    assert [event["step"] for event in events(tmp_path / "with", "evaluation")] == [2, 4, 5]
    with_, without = ([step["loss"] for step in metrics(tmp_path / run)] for run in ("with", "without"))
    assert with_ == without


def test_each_step_has_one_line_of_every_metric(train: Train, tmp_path: Path):
    for steps in (2, 4):
        batch = ["--parallel.fsdp=2", "--train.global_tokens=128", "--train.micro_batch=1"]
        succeeded(paraxis(*train(f"--train.steps={steps}", "--run-dir=run", *batch), folder=tmp_path))
    steps = metrics(tmp_path / "run")
    assert [step["step"] for step in steps] == [1, 2, 3, 4]
    assert [step["tokens"] for step in steps] == [128, 256, 384, 512]
    wanted = {
        "loss",
        "grad_norm",
        "lr",
        "tokens",
        "targets",
        "tokens_per_s",
        "mfu",
        "memory_gib",
        "step_s",
        "data_s",
        "skipped",
        "skipped_records",
    }
    assert all(wanted <= step.keys() for step in steps)
    assert all(step["targets"] == 128 and step["step_s"] > 0 and step["data_s"] >= 0 and step["memory_gib"] > 0 for step in steps)
    assert all(step["tokens_per_s"] == pytest.approx(128 / 2 / step["step_s"]) for step in steps)


def test_metrics_every_thins_the_file_out(tmp_path: Path):
    succeeded(paraxis(*PLAIN, "--train.steps=7", "--metrics.every=3", folder=tmp_path))
    assert [step["step"] for step in metrics(tmp_path / "run")] == [3, 6]


def test_a_run_leaves_a_line_for_each_thing_that_happened(tmp_path: Path):
    succeeded(paraxis(*PLAIN, "--train.steps=4", "--checkpoint.every=2", folder=tmp_path))
    happened = lines(tmp_path / "run" / "events.jsonl")
    assert [(event["kind"], event["step"]) for event in happened] == [("start", 0), ("checkpoint", 2), ("checkpoint", 4), ("stop", 4)]
    assert all(event["rank"] == 0 and event["reason"] for event in happened)


@pytest.mark.parametrize("wanted", ["true", "false"])
def test_tensorboard_curves_are_written_where_wanted(wanted: str, tmp_path: Path):
    succeeded(paraxis(*PLAIN, "--train.steps=2", f"--metrics.tensorboard={wanted}", "--parallel.fsdp=2", folder=tmp_path))
    assert len(list((tmp_path / "run").glob("tensorboard/events.*"))) == (1 if wanted == "true" else 0)


def test_a_profile_of_chosen_steps_is_written_by_the_chosen_ranks(tmp_path: Path):
    profile = ["--profile.steps=2:3", "--profile.memory=true", "--profile.ranks=0,1"]
    succeeded(paraxis(*PLAIN, "--train.steps=4", *profile, "--parallel.fsdp=2", folder=tmp_path))
    written = sorted(path.name for path in (tmp_path / "run" / "trace").iterdir())
    assert written == [f"rank{rank}-steps2-3{kind}.json.gz" for rank in range(2) for kind in ("-memory", "")]
    with gzip.open(tmp_path / "run" / "trace" / "rank1-steps2-3.json.gz", "rt") as file:
        names = {event.get("name") for event in json.load(file)["traceEvents"]}
    assert {"step 2", "step 3"} <= names
    assert "step 1" not in names


def test_without_a_profile_no_trace_is_written(tmp_path: Path):
    succeeded(paraxis(*PLAIN, "--train.steps=2", folder=tmp_path))
    assert not (tmp_path / "run" / "trace").exists()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"lock", "config.toml", "metrics.jsonl", "events.jsonl", "checkpoints"}


def test_the_garbage_collector_waits_for_the_first_step_and_then_looks_at_new_objects_only(train: Train, tmp_path: Path):
    def watch() -> None:
        def watched(*args: Any, **kwargs: Any) -> Any:
            with (tmp_path / "seen").open("a") as seen:
                print(gc.isenabled(), gc.get_freeze_count() > 0, file=seen)
            return step(*args, **kwargs)

        step, loop.train_step = loop.train_step, watched

    succeeded(paraxis(*train("--run-dir=run", "--train.steps=3"), folder=tmp_path, before=watch))
    assert (tmp_path / "seen").read_text().splitlines() == ["False False", "True True", "True True"]


def test_a_command_leaves_the_garbage_collector_on(capsys: pytest.CaptureFixture[str]):
    assert main(["train", "debug", "--print-config"]) == 0
    assert gc.isenabled()
    assert "[train]" in capsys.readouterr().out
