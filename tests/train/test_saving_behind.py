"""Runs that save behind their steps: the same run, the same checkpoints, and nothing lost by whatever ends it."""

import ctypes
import errno
import os
import resource
import signal
import struct
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from paraxis.checkpoint import objects
from paraxis.checkpoint import save as saving
from paraxis.checkpoint.background import BackgroundSaver
from paraxis.checkpoint.load import committed, newest, open_checkpoint
from paraxis.checkpoint.local_store import LocalStore
from paraxis.checkpoint.tensor_file import DiskFile
from paraxis.checkpoint.verify import verify
from tests.checkpoint.forked_savers import copy_savers
from tests.objects import Fault, served
from tests.runs import RECIPES, Command, assert_same_curves, assert_same_state, events, metrics, paraxis, refusal, saved, succeeded

BEHIND = ["--checkpoint.mode=async", "--checkpoint.keep_last=9"]
LAYOUTS = {
    "one process": [],
    "fsdp2": ["--parallel.fsdp=2"],
    "tp2": ["--parallel.tp=2"],
    "dp2": ["--parallel.dp=2"],
    "fsdp2 x tp2": ["--parallel.fsdp=2", "--parallel.tp=2"],
}
COVERING = ("fsdp2", "tp2")


def run(*more: str, recipe: str = "run") -> list[str]:
    return ["train", f"{RECIPES}:{recipe}", *more]


def with_savers(act: Callable[[int], None]) -> Callable[[], None]:
    """Has `act` called, in each rank, with the process number of each saver that it starts."""

    def before() -> None:
        start = BackgroundSaver._start

        def started(saver: BackgroundSaver):
            process, control = start(saver)
            act(process.pid)
            Path(f"unfinished.{process.pid}").write_text(str(process.pid))
            Path(f"unfinished.{process.pid}").rename(f"saver-{saver._meeting.rank}")
            return process, control

        BackgroundSaver._start = started

    return before


def held(pid: int) -> None:
    os.kill(pid, signal.SIGSTOP)


def left_alone(pid: int) -> None:
    pass


def without_space(pid: int) -> None:
    """The size limit of a process stands for a full disk: small files are written, shards are not."""
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (8192, 8192))


def until(true: Callable[[], object], command: Command) -> None:
    while not true():
        assert command.process.poll() is None, command.wait()
        time.sleep(0.01)


def savers(folder: Path) -> list[int]:
    return [int(path.read_text()) for path in sorted(folder.glob("saver-*"))]


def reasons(folder: Path) -> list[tuple[str, int]]:
    path = folder / "events.jsonl"
    return [(event["reason"], event["step"]) for event in events(folder, "checkpoint")] if path.exists() else []


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("layout", [name if name in COVERING else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS])
def test_checkpoints_are_those_of_a_run_that_saves_in_the_foreground(layout: str, tmp_path: Path):
    steps = [*LAYOUTS[layout], "--train.steps=6", "--checkpoint.every=2", "--checkpoint.keep_last=9"]
    succeeded(paraxis(*run(*steps, "--run-dir=front"), folder=tmp_path))
    succeeded(paraxis(*run(*steps, "--run-dir=back", "--checkpoint.mode=async"), folder=tmp_path, before=with_savers(left_alone)))
    for step in (2, 4, 6):
        front, back = (open_checkpoint(tmp_path / name / "checkpoints" / f"step-{step}") for name in ("front", "back"))
        assert front.manifest.tensors == back.manifest.tensors
        assert front.meta == back.meta
        shards = {piece.file for tensor in front.tensors.values() for piece in tensor.pieces}
        assert {name: front.manifest.files[name] for name in shards} == {name: back.manifest.files[name] for name in shards}
        assert back.file("config.toml") == front.file("config.toml").replace(b'mode = "sync"', b'mode = "async"')
    assert_same_curves(tmp_path / "front", tmp_path / "back")
    assert reasons(tmp_path / "back") == [("saving", 2), ("saved", 2), ("saving", 4), ("saved", 4), ("saved", 6)]
    saving = [event for event in events(tmp_path / "back", "checkpoint") if event["reason"] == "saving"]
    assert all(event["stall_s"] >= event["waited_s"] >= 0 for event in saving)
    assert not any(alive(pid) for pid in savers(tmp_path))


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, id="SIGTERM"), pytest.param(signal.SIGUSR1, marks=pytest.mark.full, id="SIGUSR1")]
)
def test_a_signal_during_a_save_lets_it_finish_and_saves_the_step_that_was_reached(number: signal.Signals, tmp_path: Path):
    steps = ["--parallel.fsdp=2", "--train.steps=40"]
    succeeded(paraxis(*run(*steps, "--run-dir=whole"), folder=tmp_path))
    behind = [*steps, *BEHIND, "--checkpoint.every=3", "--run-dir=parts"]
    command = Command(run(*behind), tmp_path, before=with_savers(held))
    until(lambda: reasons(tmp_path / "parts") == [("saving", 3)], command)
    command.send(number)
    time.sleep(0.5)  # so that it has arrived when the steps, which wait at the next save, go on
    for pid in savers(tmp_path):
        os.kill(pid, signal.SIGCONT)
    ended = command.wait()
    assert ended.code == 75, ended.err
    assert [event["reason"] for event in events(tmp_path / "parts", "stop")] == [number.name]
    reached = len(metrics(tmp_path / "parts"))
    assert ("saved", 3) in reasons(tmp_path / "parts")
    assert reasons(tmp_path / "parts")[-1] == ("saved", reached)
    assert saved(tmp_path / "parts")[0]["step"] == reached < 40
    succeeded(paraxis(*run(*behind), folder=tmp_path))
    assert_same_curves(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_a_run_that_is_killed_during_a_save_continues_from_the_save_before_bitwise(tmp_path: Path):
    layout = ["--parallel.fsdp=2", "--checkpoint.every=4", "--optim.schedule=constant"]
    succeeded(paraxis(*run(*layout, "--train.steps=12", "--run-dir=whole"), folder=tmp_path))
    succeeded(paraxis(*run(*layout, "--train.steps=2", "--run-dir=parts"), folder=tmp_path))
    behind = run(*layout, *BEHIND, "--train.steps=12", "--run-dir=parts")
    command = Command(behind, tmp_path, before=with_savers(held))
    until(lambda: reasons(tmp_path / "parts")[-1:] == [("saving", 4)], command)
    os.kill(command.process.pid, signal.SIGKILL)
    assert command.wait().code == -signal.SIGKILL
    deadline_s = time.monotonic() + 20
    while any(map(alive, savers(tmp_path))) and time.monotonic() < deadline_s:
        time.sleep(0.01)
    assert not any(map(alive, savers(tmp_path)))
    succeeded(paraxis(*behind, folder=tmp_path))
    assert [event["step"] for event in events(tmp_path / "parts", "resume")] == [2, 2]
    assert not [path for path in (tmp_path / "parts" / "checkpoints").iterdir() if ".tmp-" in path.name]
    assert_same_curves(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_saver_costs_a_warning_and_that_checkpoint(rank: int, tmp_path: Path):
    command = Command(
        run("--parallel.fsdp=2", "--train.steps=9", *BEHIND, "--checkpoint.every=3", "--run-dir=run"), tmp_path, before=with_savers(held)
    )
    until(lambda: reasons(tmp_path / "run") == [("saving", 3)], command)
    killed, other = (savers(tmp_path)[number] for number in (rank, 1 - rank))
    os.kill(killed, signal.SIGKILL)
    os.kill(other, signal.SIGCONT)
    until(lambda: savers(tmp_path)[rank] != killed, command)
    os.kill(savers(tmp_path)[rank], signal.SIGCONT)
    ended = succeeded(command.wait())
    [warning] = events(tmp_path / "run", "warning")
    assert warning["step"] == 3
    assert "the checkpoint of step 3 could not be saved, training goes on: " in warning["reason"]
    assert f"rank {rank}: the process that saves in the background was killed by SIGKILL" in warning["reason"]
    assert "could not be saved" in ended.err + ended.out
    assert reasons(tmp_path / "run") == [("saving", 3), ("saving", 6), ("saved", 6), ("saved", 9)]
    assert not (tmp_path / "run" / "checkpoints" / "step-3").exists()


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_full_disk_behind_the_training_is_a_warning_and_the_next_save_is_tried(ranks: int, tmp_path: Path):
    steps = [f"--parallel.fsdp={ranks}", "--train.steps=5", *BEHIND, "--checkpoint.every=2", "--run-dir=run"]
    succeeded(paraxis(*run(*steps), folder=tmp_path, before=with_savers(without_space)))
    warnings = events(tmp_path / "run", "warning")
    assert [warning["step"] for warning in warnings] == [2, 4]
    assert all("File too large" in warning["reason"] for warning in warnings)
    assert reasons(tmp_path / "run") == [("saving", 2), ("saving", 4), ("saved", 5)]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-5", "latest"}


def test_a_run_that_ends_for_its_numbers_still_finishes_the_save_that_was_under_way(tmp_path: Path):
    bad = ["--data.bad_rows=4,5,6", "--train.bad_steps=3", "--train.steps=20"]
    command = Command(run(*bad, *BEHIND, "--checkpoint.every=4", "--run-dir=run"), tmp_path, before=with_savers(held))
    until(lambda: events(tmp_path / "run", "warning") if (tmp_path / "run" / "events.jsonl").exists() else [], command)
    os.kill(savers(tmp_path)[0], signal.SIGCONT)
    assert "3 steps in a row" in refusal(command.wait(), 70)
    assert reasons(tmp_path / "run") == [("saving", 4), ("saved", 4)]
    assert saved(tmp_path / "run")[0]["step"] == 4


def at_a_slow_disk() -> None:
    """Nothing of step 4 is written before the run has told of step 6."""
    write = DiskFile.write

    def slow(file: DiskFile, data: memoryview) -> None:
        deadline_s = time.monotonic() + 40
        while "step-4." in file._file.name and len(metrics(Path("run"))) < 6:
            if time.monotonic() > deadline_s:
                raise OSError(errno.ETIMEDOUT, "no step was taken meanwhile", file._file.name)
            time.sleep(0.01)
        write(file, data)

    DiskFile.write = slow
    copy_savers()


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_steps_go_on_while_a_slow_disk_takes_a_checkpoint(ranks: int, tmp_path: Path):
    steps = [f"--parallel.fsdp={ranks}", "--train.steps=8"]
    succeeded(paraxis(*run(*steps, "--run-dir=whole"), folder=tmp_path))
    succeeded(paraxis(*run(*steps, *BEHIND, "--checkpoint.every=4", "--run-dir=run"), folder=tmp_path, before=at_a_slow_disk))
    assert events(tmp_path / "run", "warning") == []
    assert reasons(tmp_path / "run") == [("saving", 4), ("saved", 4), ("saved", 8)]
    assert_same_curves(tmp_path / "whole", tmp_path / "run")
    assert_same_state(tmp_path / "whole", tmp_path / "run")


def heed_permissions() -> None:
    """Has this process, though it be root's, held to what folders permit."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, sets = struct.pack("Ii", 0x20080522, 0), ctypes.create_string_buffer(24)  # version 3, this thread
    assert libc.capget(header, sets) == 0
    effective, *rest = struct.unpack("6I", sets.raw)
    overrides = 1 << 1 | 1 << 2  # CAP_DAC_OVERRIDE, CAP_DAC_READ_SEARCH
    assert libc.capset(header, struct.pack("6I", effective & ~overrides, *rest)) == 0


def in_a_folder_that_turns_read_only(moment: str) -> Callable[[], None]:
    """The folder of the checkpoints cannot be written before, or in the middle of, the save of step 4; from step 6 on it can again."""
    place = Path("run/checkpoints")

    def before() -> None:
        heed_permissions()
        begin, opened = saving._begin, DiskFile.__init__

        def turned(store: LocalStore, step: int) -> dict[str, Any]:
            if step != 2:
                place.chmod(0o555 if step == 4 and moment == "before" else 0o755)
            return begin(store, step)

        def turning(file: DiskFile, path: Path) -> None:
            if moment == "during" and "step-4." in str(path):
                place.chmod(0o555)
            opened(file, path)

        saving._begin, DiskFile.__init__ = turned, turning
        copy_savers()

    return before


@pytest.mark.parametrize("moment", ["before", "during"])
@pytest.mark.parametrize("mode", ["sync", pytest.param("async", marks=pytest.mark.full)])
def test_a_folder_that_turns_read_only_costs_a_warning_and_that_checkpoint(mode: str, moment: str, tmp_path: Path):
    steps = ["--parallel.fsdp=2", "--train.steps=7", "--checkpoint.every=2", "--checkpoint.keep_last=9", f"--checkpoint.mode={mode}"]
    ended = succeeded(paraxis(*run(*steps, "--run-dir=run"), folder=tmp_path, before=in_a_folder_that_turns_read_only(moment)))
    [warning] = events(tmp_path / "run", "warning")
    assert "the checkpoint of step 4 could not be saved, training goes on: " in warning["reason"]
    assert "Permission denied" in warning["reason"]
    assert "could not be saved" in ended.err + ended.out
    assert [step for reason, step in reasons(tmp_path / "run") if reason == "saved"] == [2, 6, 7]
    assert {path.name for path in (tmp_path / "run" / "checkpoints").iterdir()} == {"step-2", "step-6", "step-7", "latest"}
    assert all(verify(tmp_path / "run" / "checkpoints" / f"step-{step}").whole for step in (2, 6, 7))


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_a_store_that_fails_in_the_middle_of_a_save_behind_the_steps_costs_a_warning_and_that_checkpoint(
    ranks: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """What passes is tried again; what lasts, the upload of a later part of step 4, leaves nothing of it to be seen."""
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(objects, "PART_BYTES", 4096)
    place = "faulty://bucket/run"
    steps = run(f"--parallel.fsdp={ranks}", "--checkpoint.every=2", "--optim.schedule=constant")
    succeeded(paraxis(*steps, "--train.steps=9", "--run-dir=front", folder=tmp_path))
    with served(tmp_path / "bench") as bench:
        bench.expect(Fault("part", "step-2", times=1), Fault("part", "step-4", skip=1), late_listings=2)
        behind = [*steps, *BEHIND, f"--checkpoint.folder={place}", "--run-dir=run"]
        ended = succeeded(paraxis(*behind, "--train.steps=7", folder=tmp_path, before=copy_savers))
        [warning] = events(tmp_path / "run", "warning")
        assert (
            "the checkpoint of step 4 could not be saved, training goes on: faulty://bucket/run/step-4 was not saved" in warning["reason"]
        )
        assert "could not be saved" in ended.err + ended.out
        assert reasons(tmp_path / "run") == [("saving", 2), ("saved", 2), ("saving", 4), ("saving", 6), ("saved", 6), ("saved", 7)]
        bench.expect()
        assert [one.manifest.step for one in committed(place)] == [7, 6, 2]
        assert all(verify(one.path).whole for one in committed(place))
        assert not [key for key in bench.there() if "step-4" in key]
        assert list((bench.folder / "uploads").iterdir()) == []
        succeeded(paraxis(*behind, "--train.steps=9", folder=tmp_path, before=copy_savers))
        assert [event["step"] for event in events(tmp_path / "run", "resume")] == [7]
        here, there = open_checkpoint(newest(tmp_path / "front" / "checkpoints")), open_checkpoint(newest(place))
        assert here.meta == there.meta
        assert here.tensors == there.tensors
        assert [name for name in here.tensors if not torch.equal(here.read(name), there.read(name))] == []
    assert_same_curves(tmp_path / "front", tmp_path / "run")
