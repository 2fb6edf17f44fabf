"""A run that was interrupted and continued is, bit for bit, the run that never was."""

import os
import random
import shutil
import signal
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paraxis.checkpoint.load import open_checkpoint
from paraxis.train import passes
from tests.checkpoint.forked_savers import copy_savers, die_at_byte
from tests.data.corpus import tokenizer, tokenizer_folder
from tests.measure import worst_difference
from tests.runs import RECIPES, SMALL, Command, assert_same_curves, assert_same_state, events, metrics, paraxis, refusal, saved, succeeded

QUIET = "--metrics.tensorboard=false"
LAYOUTS = {
    "one process": [],
    "fsdp2": ["--parallel.fsdp=2"],
    "fsdp2 x tp2": ["--parallel.fsdp=2", "--parallel.tp=2"],
    "dp2": ["--parallel.dp=2"],
    "tp2, bf16": ["--parallel.tp=2", "--precision=bf16"],
    "tp2, bf16 weights": ["--parallel.tp=2", "--precision=bf16_weights"],
    "fsdp2, bf16 state": ["--parallel.fsdp=2", "--precision=bf16", "--optim.state=bf16"],
    "pp2": ["--parallel.pp=2", "--model.layers=2"],
    "pp2.zbv, tied": ["--parallel.pp=2", "--parallel.schedule=zbv", "--model.layers=4", "--model.tied=true"],
    "pp2 x fsdp2, tied": ["--parallel.pp=2", "--parallel.fsdp=2", "--model.layers=2", "--model.tied=true"],
    "cp2": ["--parallel.cp=2", "--parallel.cp_kind=ring"],
    "cp2 x tp2": ["--parallel.cp=2", "--parallel.tp=2"],
}
COVERING = ("one process", "fsdp2", "fsdp2 x tp2", "tp2, bf16 weights", "pp2.zbv, tied")
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


def ended_at_byte(offset: int, mode: str) -> Callable[[], None]:
    """Has the last rank, with its saver if it has one, killed when it has written so many bytes of checkpoints."""

    def end() -> None:
        if mode == "async":
            os.kill(os.getppid(), signal.SIGKILL)
        os.kill(os.getpid(), signal.SIGKILL)

    def before() -> None:
        if mode == "async":
            copy_savers(lambda rank: die_at_byte(offset, end) if rank == 1 else None)
        else:
            die_at_byte(offset, lambda: end() if os.environ["RANK"] == "1" else None)

    return before


@pytest.mark.parametrize(
    ("mode", "kills"), [("sync", 2), pytest.param("sync", 10, marks=pytest.mark.full), pytest.param("async", 10, marks=pytest.mark.full)]
)
def test_a_run_that_is_killed_again_and_again_while_it_saves_is_bitwise_the_run_that_never_was(mode: str, kills: int, tmp_path: Path):
    """Each time at a random byte of what is written of the second or third save after a start."""
    layout = [f"--train.steps={2 * kills + 3}", "--parallel.fsdp=2", "--checkpoint.every=1", f"--checkpoint.mode={mode}"]
    run = ["train", f"{RECIPES}:run", *layout]
    succeeded(paraxis(*run, "--run-dir=whole", folder=tmp_path))
    last = open_checkpoint(tmp_path / "whole" / "checkpoints" / f"step-{2 * kills + 3}")
    size = sum(file.size_bytes for name, file in last.manifest.files.items() if name.startswith("rank-1-"))
    dice = random.Random(mode)
    for _ in range(kills):
        offset = dice.randrange(size, 3 * size)
        killed = paraxis(*run, "--run-dir=parts", folder=tmp_path, before=ended_at_byte(offset, mode))
        assert killed.code == 128 + signal.SIGKILL, killed.err
    succeeded(paraxis(*run, "--run-dir=parts", folder=tmp_path))
    resumed = [event["step"] for event in events(tmp_path / "parts", "resume")]
    assert len(resumed) == kills
    assert sorted(set(resumed)) == resumed  # each start had committed something
    assert_same_curves(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def at_the_second_micro_batch(number: signal.Signals, step: int) -> Callable[[], None]:
    """Sends the signal to this rank between the first and the second of four micro-batches of `step`."""

    def before() -> None:
        reduce_now, calls = passes.reduce_now, [0]

        def counted(*args: Any, **kwargs: Any) -> None:
            calls[0] += 1
            if calls[0] == 4 * (step - 1) + 2 and not Path("signalled").exists():
                Path("signalled").touch()
                os.kill(os.getpid(), number)
            reduce_now(*args, **kwargs)

        passes.reduce_now = counted

    return before


@pytest.mark.parametrize(
    ("layout", "number"),
    [
        pytest.param("fsdp2", signal.SIGTERM, id="fsdp2-SIGTERM"),
        *(
            pytest.param(layout, number, marks=pytest.mark.full, id=f"{layout}-{number.name}")
            for layout, number in (("fsdp2", signal.SIGKILL), ("dp2xtp2", signal.SIGTERM), ("dp2xtp2", signal.SIGKILL))
        ),
    ],
)
def test_what_stops_between_two_micro_batches_continues_bitwise(number: signal.Signals, layout: str, tmp_path: Path):
    """Asked to stop, the step is finished and saved; killed, it begins again: half a sum of gradients is nowhere kept."""
    run = ["train", f"{RECIPES}:layers", f"--layout={layout}", "--train.global_tokens=64", "--train.steps=8", "--checkpoint.every=2"]
    succeeded(paraxis(*run, "--run-dir=whole", folder=tmp_path))
    stopped = paraxis(*run, "--run-dir=parts", folder=tmp_path, before=at_the_second_micro_batch(number, 4))
    assert stopped.code == (75 if number == signal.SIGTERM else 128 + signal.SIGKILL), stopped.err
    reached = saved(tmp_path / "parts")[0]["step"]  # the other ranks are told with the next step, and all agree one later
    assert (reached == len(metrics(tmp_path / "parts")) and 4 <= reached <= 6) if number == signal.SIGTERM else reached == 2
    succeeded(paraxis(*run, "--run-dir=parts", folder=tmp_path))
    assert_same_curves(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("packing", ["concatenate", pytest.param("best_fit", marks=pytest.mark.full)])
def test_resumes_within_a_pass_at_its_end_and_in_the_next_are_bitwise_the_run_that_never_stopped(packing: str, tmp_path: Path):
    """A pass is four steps: stopped after one, two, four and five, and on another layout each time but the last two."""
    eos = tokenizer().eos_id
    # Documents that fill a row, with their ends: of 17 tokens whole, or of 16 end to end and one that is predicted from the last.
    lengths = [16] * 32 if packing == "best_fit" else [16, *[15] * 31]
    dice = np.random.default_rng(0)
    np.save(tmp_path / "ids.npy", np.array([*chain(*([*dice.integers(eos + 1, 300, length), eos] for length in lengths))]))
    data = ["--data.paths=ids.npy", f"--data.tokenizer={tokenizer_folder(tmp_path)}", "--data.seq_len=16", f"--data.packing={packing}"]
    same = [*data, *SMALL, QUIET, "--optim.schedule=constant", "--train.global_tokens=128", "--train.micro_batch=1", "--precision=fp64"]
    run = ["train", "debug", *same]
    words = refusal(paraxis(*run, "--run-dir=once", "--data.repeat=1", "--train.steps=5", folder=tmp_path), 78)
    assert "the run reads 40 rows of its data, but data.repeat=1 allows 32" in words
    succeeded(paraxis(*run, "--run-dir=whole", "--train.steps=7", folder=tmp_path))
    for steps, layout in ((1, "fsdp2"), (2, "tp2"), (4, "fsdp1"), (5, "dp2"), (7, "dp2")):
        succeeded(paraxis(*run, "--run-dir=parts", f"--train.steps={steps}", f"--layout={layout}", folder=tmp_path))
    assert [event["step"] for event in events(tmp_path / "parts", "resume")] == [1, 2, 4, 5]
    whole, parts = ([m["loss"] for m in metrics(tmp_path / name)] for name in ("whole", "parts"))
    assert parts == pytest.approx(whole, rel=1e-10)
    (meta, tensors), (other, others) = saved(tmp_path / "whole"), saved(tmp_path / "parts")
    assert meta == other
    assert worst_difference(others, tensors) < (1e-9, "")


def test_a_run_continues_on_another_layout(train: Train, tmp_path: Path):
    batch = ["--train.global_tokens=128", "--train.micro_batch=1"]
    succeeded(paraxis(*train("run", *batch, "--train.steps=2", "--parallel.fsdp=2"), folder=tmp_path))
    succeeded(paraxis(*train("run", *batch, "--train.steps=4", "--parallel.tp=2"), folder=tmp_path))
    succeeded(paraxis(*train("whole", *batch, "--train.steps=4"), folder=tmp_path))
    parts, whole = ([m["loss"] for m in metrics(tmp_path / run)] for run in ("run", "whole"))
    assert parts == pytest.approx(whole, rel=1e-5)


@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.full)])
def test_a_checkpoint_that_was_found_damaged_takes_no_place_of_those_to_fall_back_to(mode: str, tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--run-dir=run", f"--checkpoint.mode={mode}"]
    place = tmp_path / "run" / "checkpoints"
    for steps in (4, 5):
        succeeded(paraxis(*run, f"--train.steps={steps}", folder=tmp_path))
    shard = place / "step-5" / "rank-0-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    succeeded(paraxis(*run, "--train.steps=7", "--checkpoint.every=6", folder=tmp_path, before=copy_savers))
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [4, 4]
    assert {path.name for path in place.iterdir()} == {"step-5", "step-6", "step-7", "latest"}
    shard = place / "step-7" / "rank-0-0.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1] + b"?")
    succeeded(paraxis(*run, "--train.steps=8", folder=tmp_path))
    assert {path.name for path in place.iterdir()} == {"step-6", "step-7", "step-8", "latest"}  # two of them can be read


def test_a_model_that_lacks_what_was_saved_is_refused_and_settings_that_shapes_do_not_show_are_told_of(tmp_path: Path):
    run = ["train", f"{RECIPES}:layers", "--run-dir=run"]
    succeeded(paraxis(*run, "--train.steps=2", folder=tmp_path))
    words = refusal(paraxis(*run, "--model.layers=3", folder=tmp_path), 77)
    assert "run/checkpoints/step-2 has 9 tensors that this model has not, model/layers.3." in words
    told = succeeded(paraxis(*run, "--train.steps=3", "--model.rope.theta=5000", folder=tmp_path)).err
    assert "the model in run/checkpoints/step-2 is not quite this one: rope.theta 500000.0 (here 5000.0)" in told


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
