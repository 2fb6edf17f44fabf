"""Workers that others start: torchrun on two nodes, and Slurm's srun. Both on this machine, over loopback."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runs import RECIPES, Command, Ended, assert_same_state, events, fresh_environment, metrics, paraxis, succeeded

TRAIN = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", "--run-dir=run"]
AGENT_S = 100.0


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def two_agents(*arguments: str, folder: Path) -> list[tuple[int, str]]:
    """Exit code and stderr of two torchrun agents of one worker each, as on two nodes."""
    rendezvous = ["--rdzv-backend=c10d", f"--rdzv-endpoint=127.0.0.1:{free_port()}", "--local-addr=127.0.0.1"]
    agent = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", *rendezvous, "-m", "paraxis", *arguments]
    pipes = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE, "text": True}
    agents = [subprocess.Popen(agent, cwd=folder, env=fresh_environment(), **pipes) for _ in range(2)]
    try:
        said = [process.communicate(timeout=AGENT_S)[1] for process in agents]
    finally:
        for process in agents:
            process.kill()
    return [(process.returncode, words) for process, words in zip(agents, said, strict=True)]


def test_two_torchrun_agents_train_together_and_write_metrics_once(tmp_path: Path):
    for code, words in two_agents(*TRAIN, folder=tmp_path):
        assert code == 0, words
    assert [step["step"] for step in metrics(tmp_path / "run")] == list(range(1, 9))
    [start] = events(tmp_path / "run", "start")
    assert (start["layout"], start["ranks"]) == ("fsdp2", 2)
    succeeded(paraxis(*TRAIN[:-1], "--run-dir=local", folder=tmp_path))
    assert_same_state(tmp_path / "run", tmp_path / "local")


def test_a_rank_that_dies_under_torchrun_ends_both_agents_and_is_not_blamed_on_the_other(tmp_path: Path):
    ended = two_agents(*TRAIN, "--train.steps=1000", "--data.killing_rows=21", folder=tmp_path)
    assert all(code != 0 for code, _ in ended)
    words = [line for _, err in ended for line in err.splitlines() if "paraxis: error" in line]
    assert len(words) <= 1
    assert all("another rank has ended" in line for line in words)
    assert any("SIGKILL" in err for _, err in ended)  # from torchrun, who saw it
    assert not any("gloo" in err for _, err in ended)


def test_what_every_rank_meets_under_torchrun_is_said_once(tmp_path: Path):
    """Ranks of one agent: each meets the same missing file."""
    ended = workers(tmp_path, ["train", "debug", "--parallel.fsdp=2", "--data.paths=nowhere.txt", "--run-dir=run"], torchrun(free_port()))
    assert [rank.code for rank in ended] == [65, 65]
    assert sum(rank.err.count("no file at nowhere.txt") for rank in ended) == 1


def workers(folder: Path, arguments: list[str], places: list[dict[str, str]]) -> list[Ended]:
    commands = [Command(arguments, folder, place) for place in places]
    return [command.wait() for command in commands]


def torchrun(port: int) -> list[dict[str, str]]:
    """What torchrun would tell two workers of one node, whose first serves the store."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(2)]


def slurm(port: int | None = None) -> list[dict[str, str]]:
    """What srun would tell two tasks of one node. Without `port`, the tasks have to agree on one themselves."""
    shared = {
        "SLURM_JOB_ID": str(free_port()),  # so that two test runs on one machine do not choose the same port
        "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "2",
        "SLURM_NTASKS": "4",
        "SLURM_STEP_TASKS_PER_NODE": "2",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_JOB_NODELIST": "localhost,elsewhere",
        "SLURM_NODEID": "0",
    }
    given = {"MASTER_PORT": str(port)} if port else {}
    return [{**shared, **given, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]


@pytest.mark.parametrize("given", ["a port", "no port"])
def test_two_slurm_tasks_train_together_and_write_metrics_once(given: str, tmp_path: Path):
    for ended in workers(tmp_path, TRAIN, slurm(free_port() if given == "a port" else None)):
        succeeded(ended)
    assert [step["step"] for step in metrics(tmp_path / "run")] == list(range(1, 9))
    assert [(event["layout"], event["ranks"]) for event in events(tmp_path / "run", "start")] == [("fsdp2", 2)]


def test_slurm_tasks_that_are_asked_to_stop_save_and_continue(tmp_path: Path):
    """As before a time limit: scancel --signal=TERM reaches every task."""
    run = [*TRAIN, "--train.steps=100000"]
    tasks = [Command(run, tmp_path, place) for place in slurm()]
    tasks[0].until_written(tmp_path / "run" / "metrics.jsonl")
    for task in tasks:
        task.send(signal.SIGTERM)
    ended = [task.wait() for task in tasks]
    assert [task.code for task in ended] == [75, 75]
    assert sum(task.err.count("stopped on request") for task in ended) == 1
    steps = len(metrics(tmp_path / "run"))
    for task in workers(tmp_path, [*TRAIN, f"--train.steps={steps + 2}"], slurm()):
        succeeded(task)
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [steps]


@pytest.mark.parametrize("lost", [0, 1])
def test_a_slurm_task_that_dies_ends_the_other(lost: int, tmp_path: Path):
    """Rank 0 serves the store, so with it goes what the other could ask."""
    run = [*TRAIN, "--train.steps=1000", f"--data.killing_rows={20 + lost}"]
    ended = workers(tmp_path, run, slurm())
    assert ended[lost].code == -signal.SIGKILL
    survivor = ended[1 - lost]
    assert survivor.code == 70
    assert survivor.err.splitlines()[-1].startswith(f"paraxis: error: rank {1 - lost}: another rank has ended")
    assert "Traceback" not in survivor.err


def test_a_setting_that_cannot_be_met_is_said_once_a_node(tmp_path: Path):
    ended = workers(tmp_path, [*TRAIN, "--parallel.tp=2"], slurm())
    assert [task.code for task in ended] == [78, 78]
    assert sum(task.err.count("fsdp2 x tp2 needs 4 ranks but 2 were started") for task in ended) == 1
