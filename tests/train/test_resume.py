"""A run that was interrupted and continued is, bit for bit, the run that never was."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.runs import RECIPES, SMALL, Command, assert_same_curves, assert_same_state, events, metrics, paraxis, refusal, saved, succeeded

QUIET = "--metrics.tensorboard=false"
LAYOUTS = {
    "one process": [],
    "fsdp2": ["--parallel.fsdp=2"],
    "fsdp2 x tp2": ["--parallel.fsdp=2", "--parallel.tp=2"],
    "dp2": ["--parallel.dp=2"],
    "tp2, bf16": ["--parallel.tp=2", "--precision=bf16"],
    "pp2": ["--parallel.pp=2", "--model.layers=2"],
    "pp2.zbv, tied": ["--parallel.pp=2", "--parallel.schedule=zbv", "--model.layers=4", "--model.tied=true"],
    "pp2 x fsdp2, tied": ["--parallel.pp=2", "--parallel.fsdp=2", "--model.layers=2", "--model.tied=true"],
    "cp2": ["--parallel.cp=2", "--parallel.cp_kind=ring"],
    "cp2 x tp2": ["--parallel.cp=2", "--parallel.tp=2"],
}
COVERING = ("one process", "fsdp2", "fsdp2 x tp2", "pp2.zbv, tied")
WITH_EXPERTS = {
    "one process": [],
    "fsdp2 x ep2": ["--parallel.fsdp=2", "--parallel.ep=2"],
    "cp2 x ep2": ["--parallel.cp=2", "--parallel.ep=2"],
    "pp2.zbh1 x fsdp2 x ep2": ["--parallel.pp=2", "--parallel.schedule=zbh1", "--parallel.fsdp=2", "--parallel.ep=2"],
}

Train = Callable[..., list[str]]


@pytest.fixture
def train(text: Path) -> Train:
    """The arguments of a run on real text; the schedule of the learning rate depends on the step alone."""

    def arguments(run_dir: str, *more: str) -> list[str]:
        data = [f"--data.paths={text}", "--data.tokenizer=train:300", "--data.seq_len=16", "--data.document_mask=true"]
        return ["train", "debug", *data, *SMALL, QUIET, "--optim.schedule=constant", f"--run-dir={run_dir}", *more]

    return arguments


def assert_interrupted_is_whole(arguments: Callable[..., list[str]], folder: Path) -> None:
    """`arguments(run_dir, *more)` trained for six steps, and for two, one more and three more."""
    succeeded(paraxis(*arguments("whole", "--train.steps=6"), folder=folder))
    for steps in (2, 3, 6):
        succeeded(paraxis(*arguments("parts", f"--train.steps={steps}"), folder=folder))
    assert [event["step"] for event in events(folder / "parts", "resume")] == [2, 3]
    assert_same_curves(folder / "whole", folder / "parts")
    assert_same_state(folder / "whole", folder / "parts")
    assert saved(folder / "whole")[0]["step"] == 6


@pytest.mark.parametrize("layout", [name if name in COVERING else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS])
def test_three_steps_and_three_more_are_six_steps_bitwise(layout: str, train: Train, tmp_path: Path):
    more = [*LAYOUTS[layout], "--train.global_tokens=128", "--train.micro_batch=1"]
    assert_interrupted_is_whole(lambda run_dir, *steps: train(run_dir, *more, *steps), tmp_path)


@pytest.mark.parametrize("layout", [name if name == "fsdp2 x ep2" else pytest.param(name, marks=pytest.mark.full) for name in WITH_EXPERTS])
def test_balanced_experts_continue_bitwise(layout: str, tmp_path: Path):
    run = ["train", f"{RECIPES}:experts", "--train.global_tokens=64", "--optim.schedule=constant", *WITH_EXPERTS[layout]]
    assert_interrupted_is_whole(lambda run_dir, *steps: [*run, f"--run-dir={run_dir}", *steps], tmp_path)
    _, tensors = saved(tmp_path / "whole")
    biases = [tensor for name, tensor in tensors.items() if name.endswith(".mlp.bias")]
    assert len(biases) == 4
    assert torch.stack(biases).abs().max() > 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1], ids=lambda number: number.name)
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_signal_saves_and_the_same_command_continues_bitwise(number: signal.Signals, ranks: int, tmp_path: Path):
    layout = ["train", f"{RECIPES}:run", f"--parallel.fsdp={ranks}", "--train.steps=40"]
    succeeded(paraxis(*layout, "--run-dir=whole", folder=tmp_path))
    planted = [f"--data.signal={int(number)}", f"--data.signal_row={8 * ranks}", f"--data.one_process={ranks == 1}"]
    stopping = [*layout, "--run-dir=parts", *planted]
    stopped = paraxis(*stopping, folder=tmp_path)
    assert stopped.code == 75, stopped.err
    assert stopped.err.splitlines()[-1].startswith("paraxis: stopped on request after step")
    steps = len(metrics(tmp_path / "parts"))
    assert 7 <= steps < 40
    assert [event["reason"] for event in events(tmp_path / "parts", "stop")] == [number.name]
    assert not events(tmp_path / "parts", "failure")
    assert saved(tmp_path / "parts")[0]["step"] == steps
    succeeded(paraxis(*stopping, folder=tmp_path))
    assert_same_curves(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_was_killed_continues_from_its_last_checkpoint_bitwise(tmp_path: Path):
    layout = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", "--train.steps=12", "--checkpoint.every=2"]
    succeeded(paraxis(*layout, "--run-dir=whole", folder=tmp_path))
    killed = paraxis(*layout, "--run-dir=parts", "--data.killing_rows=17", folder=tmp_path)
    assert killed.code == 128 + signal.SIGKILL
    assert metrics(tmp_path / "parts")
    succeeded(paraxis(*layout, "--run-dir=parts", folder=tmp_path))
    assert events(tmp_path / "parts", "resume")
    assert_same_curves(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_a_run_continues_on_another_layout(train: Train, tmp_path: Path):
    batch = ["--train.global_tokens=128", "--train.micro_batch=1"]
    succeeded(paraxis(*train("run", *batch, "--train.steps=2", "--parallel.fsdp=2"), folder=tmp_path))
    succeeded(paraxis(*train("run", *batch, "--train.steps=4", "--parallel.tp=2"), folder=tmp_path))
    succeeded(paraxis(*train("whole", *batch, "--train.steps=4"), folder=tmp_path))
    parts, whole = ([m["loss"] for m in metrics(tmp_path / run)] for run in ("run", "whole"))
    assert parts == pytest.approx(whole, rel=1e-5)


def test_a_model_that_lacks_what_was_saved_is_refused_and_settings_that_shapes_do_not_show_are_told_of(tmp_path: Path):
    run = ["train", f"{RECIPES}:layers", "--run-dir=run"]
    succeeded(paraxis(*run, "--train.steps=2", folder=tmp_path))
    words = refusal(paraxis(*run, "--model.layers=3", folder=tmp_path), 77)
    assert "run/checkpoints/step-2 has 9 tensors that this model has not, model/layers.3." in words
    told = succeeded(paraxis(*run, "--train.steps=3", "--model.rope.theta=5e5", folder=tmp_path)).err
    assert "the model in run/checkpoints/step-2 is not quite this one: rope.theta 10000.0 (here 500000.0)" in told


def test_resume_must_never_and_auto_do_what_they_say(tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--run-dir=run"]
    nothing = paraxis(*run, "--resume=must", folder=tmp_path)
    assert nothing.code == 78
    assert "--resume=must, but run/checkpoints holds no checkpoint" in nothing.err
    succeeded(paraxis(*run, "--train.steps=2", "--resume=never", folder=tmp_path))
    again = paraxis(*run, "--resume=never", folder=tmp_path)
    assert again.code == 78
    assert "--resume=never, but run/checkpoints already holds step-2" in again.err
    succeeded(paraxis(*run, "--train.steps=3", "--resume=must", folder=tmp_path))
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3]


def test_a_finished_run_started_again_has_nothing_to_do(tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--run-dir=run", "--train.steps=2"]
    succeeded(paraxis(*run, folder=tmp_path))
    before = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    succeeded(paraxis(*run, folder=tmp_path))
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == before
    assert saved(tmp_path / "run")[0]["step"] == 2


def test_the_saved_configuration_replays_the_run(tmp_path: Path):
    succeeded(paraxis("train", f"{RECIPES}:run", "--train.steps=3", "--train.seed=7", "--run-dir=first", folder=tmp_path))
    shutil.copy(tmp_path / "first" / "config.toml", tmp_path / "again.toml")
    succeeded(paraxis("train", "again.toml", "--run-dir=second", folder=tmp_path))
    assert_same_curves(tmp_path / "first", tmp_path / "second")
    assert_same_state(tmp_path / "first", tmp_path / "second")


def test_two_runs_never_share_a_folder(tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--run-dir=run", "--train.steps=100000"]
    first = Command(run, tmp_path)
    first.until_written(tmp_path / "run" / "metrics.jsonl")
    second = paraxis(*run, folder=tmp_path)
    first.send(signal.SIGTERM)
    assert first.wait().code == 75
    assert second.code == 74
    assert f"run folder run is in use by process {first.process.pid}" in second.err
