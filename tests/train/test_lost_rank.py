"""A rank that dies or fails takes the others with it in seconds, and one message says which it was."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import RECIPES, Command, events, fresh_environment, metrics, paraxis, refusal


@pytest.mark.parametrize("layout", [["--parallel.fsdp=2"], ["--parallel.fsdp=2", "--parallel.tp=2"]], ids=["fsdp2", "fsdp2 x tp2"])
def test_a_killed_rank_is_named_and_nobody_else_speaks(layout: list[str], tmp_path: Path):
    run = ["train", f"{RECIPES}:run", *layout, "--train.steps=1000", "--run-dir=run", "--data.killing_rows=21"]
    ended = paraxis(*run, folder=tmp_path)
    # With tp=2 two ranks read the row that kills.
    assert re.search(r"rank [123] was killed by SIGKILL", refusal(ended, 128 + signal.SIGKILL))
    assert ended.err.count("paraxis: error") == 1
    assert ended.seconds < 30  # not the minutes after which a silent peer counts as lost
    assert [event["rank"] for event in events(tmp_path / "run", "failure")] == [0]
    assert "another rank has ended" in events(tmp_path / "run", "failure")[0]["reason"]
    assert [step["step"] for step in metrics(tmp_path / "run")] == list(range(1, 1 + len(metrics(tmp_path / "run"))))


@pytest.mark.parametrize("schedule", ["1f1b", "zbv"])
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_rank_of_a_pipeline_ends_its_peer(rank: int, schedule: str, tmp_path: Path):
    layout = ["--parallel.pp=2", f"--parallel.schedule={schedule}", "--train.global_tokens=32", "--train.steps=1000"]
    run = ["train", f"{RECIPES}:layers", *layout, "--run-dir=run", "--data.killing_rows=41", f"--data.killed_rank={rank}"]
    ended = paraxis(*run, folder=tmp_path)
    assert f"rank {rank} was killed by SIGKILL" in refusal(ended, 128 + signal.SIGKILL)
    assert ended.err.count("paraxis: error") == 1
    assert ended.seconds < 30
    assert metrics(tmp_path / "run")


@pytest.mark.parametrize("rank", [0, 1])
def test_an_exception_on_one_rank_is_shown_once_with_its_traceback(rank: int, tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", "--train.steps=1000", "--run-dir=run", f"--data.raising_rows={20 + rank}"]
    ended = paraxis(*run, folder=tmp_path)
    assert ended.code == 1
    assert ended.err.count("Traceback") == 1
    assert ended.err.rstrip().endswith(
        f"ValueError: row {20 + rank} cannot be read\nparaxis: error: rank {rank}: unexpected ValueError; its traceback is above"
    )
    assert "Connection" not in ended.err
    assert [rank, f"ValueError: row {20 + rank} cannot be read"] in [[e["rank"], e["reason"]] for e in events(tmp_path / "run", "failure")]


def test_a_rank_that_is_gone_before_the_first_step_ends_the_others(tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", "--run-dir=run", "--data.killing_rows=1"]
    ended = paraxis(*run, folder=tmp_path)
    assert "rank 1 was killed by SIGKILL" in refusal(ended, 128 + signal.SIGKILL)
    assert ended.seconds < 30


def test_without_a_launcher_s_help_a_survivor_says_that_a_rank_was_lost(tmp_path: Path):
    """As under srun without --kill-on-bad-exit: nobody ends the survivor, and nobody else speaks."""
    place = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "PARAXIS_STORE": str(tmp_path / "gone" / "store")}
    (tmp_path / "gone").mkdir()
    run = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", "--train.steps=1000", "--run-dir=run", "--data.killing_rows=21"]
    survivor, lost = (Command(run, tmp_path, {**place, "RANK": str(rank)}) for rank in range(2))
    assert lost.wait().code == -signal.SIGKILL
    assert survivor.wait().code == 70
    assert (tmp_path / "gone" / "words-0").read_text() == (
        "paraxis: error: rank 0: another rank has ended, so this one cannot go on; what that rank or its launcher says is the cause"
    )


def test_fresh_processes_end_alike(tmp_path: Path):
    """The same through `python -m paraxis` and its workers as a person starts them, not forked ones."""
    command = [sys.executable, "-m", "paraxis", "train", f"{RECIPES}:run", "--parallel.fsdp=2", "--run-dir=run", "--data.killing_rows=5"]
    done = subprocess.run(command, cwd=tmp_path, env=fresh_environment(), capture_output=True, text=True, timeout=100)
    assert done.returncode == 128 + signal.SIGKILL
    assert done.stderr.splitlines()[-1].startswith("paraxis: error: rank 1 was killed by SIGKILL")
    assert "Traceback" not in done.stderr
