"""A step whose loss or gradient is not finite is skipped by all ranks alike; too many in a row end the run."""

from pathlib import Path

import pytest
import torch

from paraxis.checkpoint.load import open_checkpoint
from tests.runs import RECIPES, events, metrics, paraxis, saved, succeeded

# On two data ranks with a row each, row 2 * (step - 1) + rank is what a rank trains on at a step.
STEP_3_RANK_1 = 5


def losses(run: Path) -> list[float | None]:
    return [step["loss"] for step in metrics(run)]


@pytest.mark.parametrize("poison", ["inf", "-inf"])
@pytest.mark.parametrize("layout", ["fsdp2", "dp2", pytest.param("fsdp2 x tp2", marks=pytest.mark.full)])
def test_a_step_with_a_bad_row_changes_nothing_and_training_goes_on(layout: str, poison: str, tmp_path: Path):
    axes = [f"--parallel.{axis[:-1]}={axis[-1]}" for axis in layout.split(" x ")]
    run = [
        "train",
        f"{RECIPES}:run",
        *axes,
        "--train.steps=5",
        "--checkpoint.every=1",
        "--checkpoint.keep_last=5",
        f"--model.poison={poison}",
    ]
    ended = succeeded(paraxis(*run, "--run-dir=run", f"--data.bad_rows={STEP_3_RANK_1}", folder=tmp_path))
    assert [step["skipped"] for step in metrics(tmp_path / "run")] == [0, 0, 1, 0, 0]
    assert [loss is None for loss in losses(tmp_path / "run")] == [False, False, True, False, False]
    [warning] = events(tmp_path / "run", "warning")
    bad_ranks = [1] if "tp2" not in layout else [2, 3]
    assert (warning["step"], warning["ranks"]) == (3, bad_ranks)
    assert f"first seen on rank {', '.join(map(str, bad_ranks))}" in ended.out
    before, after = (tensors_at(tmp_path / "run", step) for step in (2, 3))
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert saved(tmp_path / "run")[0]["optimizer"]["counters"]["updates"] == 4


def tensors_at(run: Path, step: int) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(run / "checkpoints" / f"step-{step}")
    return {name: checkpoint.read(name) for name in checkpoint.tensors}


def test_an_infinite_gradient_behind_a_finite_loss_is_skipped_too(tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", "--train.steps=4", "--model.poison=1e37"]
    succeeded(paraxis(*run, "--run-dir=run", f"--data.bad_rows={STEP_3_RANK_1}", folder=tmp_path))
    assert [step["skipped"] for step in metrics(tmp_path / "run")] == [0, 0, 1, 0]
    assert metrics(tmp_path / "run")[2]["loss"] is not None
    assert metrics(tmp_path / "run")[2]["nonfinite"] == {"grad_norm": "inf"}


def test_too_many_bad_steps_in_a_row_end_the_run_and_keep_the_last_good_checkpoint(tmp_path: Path):
    bad = ",".join(map(str, range(8, 40)))
    run = [
        "train",
        f"{RECIPES}:run",
        "--parallel.fsdp=2",
        "--train.steps=20",
        "--train.bad_steps=3",
        "--checkpoint.every=2",
        "--run-dir=run",
    ]
    ended = paraxis(*run, f"--data.bad_rows={bad}", folder=tmp_path)
    assert ended.code == 70
    [words] = [line for line in ended.err.splitlines() if line.startswith("paraxis: error")]
    assert "3 steps in a row, up to step 7, had a loss or gradient that is not finite (rank 0, 1)" in words
    assert "from row 8 on" in words
    assert "train.bad_steps" in words
    assert "Traceback" not in ended.err
    assert [event["step"] for event in events(tmp_path / "run", "warning")] == [5, 6, 7]
    assert len(events(tmp_path / "run", "failure")) == 1
    meta, tensors = saved(tmp_path / "run")
    assert meta["optimizer"]["counters"]["updates"] == 4
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_bad_steps_that_are_not_in_a_row_do_not_end_the_run(tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--train.steps=6", "--train.bad_steps=2", "--data.bad_rows=0,2,4", "--run-dir=run"]
    succeeded(paraxis(*run, folder=tmp_path))
    assert [step["skipped"] for step in metrics(tmp_path / "run")] == [1, 0, 1, 0, 1, 0]
