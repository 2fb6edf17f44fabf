"""Workers that are copies of the launcher: as ones started afresh, without their start."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from paraxis.base.env import read_environment, worker_threads
from paraxis.base.forked import Forked
from paraxis.parallel import world
from paraxis.resilience.launch import launch, leave_words

NEVER = [sys.executable, "-c", "raise SystemExit('a copy was wanted')"]


def work(folder: Path, then) -> int:
    env = read_environment()
    assert env.store_path is not None
    (folder / f"rank{env.rank}").write_text(f"{env.world_size} {os.getpid()} {os.getpgid(0)} {worker_threads()}")
    return then(env) or 0


def test_a_copy_has_its_own_place_group_and_variables(tmp_path: Path):
    assert launch(NEVER, 2, work=lambda: work(tmp_path, lambda env: 0)) == 0
    first, second = ([int(word) for word in (tmp_path / f"rank{rank}").read_text().split()] for rank in range(2))
    assert first[0] == second[0] == 2
    assert first[1] == first[2] != second[2] == second[1]
    assert not read_environment().is_worker  # nothing of it is left here


def test_rank_0_writes_to_stdout_and_every_rank_to_stderr(capfd: pytest.CaptureFixture[str]):
    def speak() -> int:
        rank = read_environment().rank
        os.write(1, b"out %d\n" % rank)
        os.write(2, b"err %d\n" % rank)
        return 0

    assert launch(NEVER, 2, work=speak) == 0
    out, err = capfd.readouterr()
    assert out == "out 0\n"
    assert sorted(err.splitlines()) == ["err 0", "err 1"]


def test_the_words_of_the_copy_that_failed_are_shown_and_the_others_end(tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    def fail(env) -> int:
        if env.rank == 1:
            leave_words(env.store_path, 1, "rank 1 has had enough")
            return 3
        time.sleep(60)
        return 0

    started_s = time.monotonic()
    assert launch(NEVER, 2, work=lambda: work(tmp_path, fail), grace_s=0.2) == 3
    assert time.monotonic() - started_s < 30
    assert capfd.readouterr().err == "rank 1 has had enough\n"


def test_copies_die_with_a_launcher_that_is_killed(tmp_path: Path):
    launcher = Forked(lambda: launch(NEVER, 2, work=lambda: work(tmp_path, lambda env: time.sleep(60))))
    deadline_s = time.monotonic() + 15
    while len([path for path in tmp_path.glob("rank*") if path.read_text()]) < 2 and time.monotonic() < deadline_s:
        time.sleep(0.01)
    pids = [int((tmp_path / f"rank{rank}").read_text().split()[1]) for rank in range(2)]
    os.kill(launcher.pid, signal.SIGKILL)
    assert launcher.wait(15) == -signal.SIGKILL
    while any(Path(f"/proc/{pid}").exists() and "Z" not in Path(f"/proc/{pid}/stat").read_text().split()[2] for pid in pids):
        assert time.monotonic() < deadline_s
        time.sleep(0.01)


def test_a_process_that_has_initialised_cuda_is_not_copied(monkeypatch: pytest.MonkeyPatch):
    assert world.can_be_copied()
    monkeypatch.setattr("torch.cuda._is_in_bad_fork", lambda: True)  # what torch then says in the copy
    assert not world.can_be_copied()


@pytest.mark.gpu
def test_a_copy_uses_the_gpus_that_were_counted_before(tmp_path: Path):
    code = """
from paraxis.base.env import count_gpus_without_cuda
count_gpus_without_cuda()
import torch
from paraxis.base.forked import Forked
from paraxis.parallel.world import can_be_copied, visible_devices
assert visible_devices() and can_be_copied()
assert Forked(lambda: int(torch.ones(4, device="cuda").sum())).wait() == 4
torch.ones(4, device="cuda")
assert not can_be_copied()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr
