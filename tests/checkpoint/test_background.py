"""A save in the background is, byte for byte, the save in the foreground of the moment at which it was asked for."""

import os
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paraxis.base.device import CPU
from paraxis.base.errors import ConfigError
from paraxis.base.layout import whole_box
from paraxis.checkpoint.background import BackgroundSaver, Outcome
from paraxis.checkpoint.load import committed, open_checkpoint
from paraxis.checkpoint.save import Piece, save
from paraxis.parallel.meeting import Meeting, helpers_meeting
from tests.measure import this_world
from tests.worlds import run_world

META, FILES = (
    {"step": 1, "nested": {"a": [1.5, None]}},
    {"config.toml": b"text", "tokenizer/empty": b"", "tokenizer/big": bytes(range(256)) * 99},
)

State = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def saver() -> Iterator[BackgroundSaver]:
    """One for all tests of a single process: each takes seconds to start."""
    saver = BackgroundSaver(Meeting(0, 1), CPU)
    yield saver
    saver.close()


def finished(saver: BackgroundSaver) -> Outcome:
    outcome = saver.outcome(wait=True)
    assert outcome is not None
    return outcome


def assert_same_checkpoints(a: Path, b: Path) -> None:
    """The same tensors, meta and files, with the same hashes; only the generations may differ."""
    one, other = open_checkpoint(a).manifest, open_checkpoint(b).manifest
    assert (one.step, one.layout, one.tensors, one.files, one.meta) == (other.step, other.layout, other.tensors, other.files, other.meta)


def test_a_background_save_is_the_foreground_save(saver: BackgroundSaver, tmp_path: Path, state: State, whole: Callable):
    save(tmp_path / "front", 1, whole(state), META, FILES, layout="fsdp2")
    saver.save(tmp_path / "back", 1, whole(state), META, FILES, layout="fsdp2")
    outcome, path = finished(saver), tmp_path / "back" / "step-1"
    assert (outcome.step, outcome.path, outcome.failed) == (1, str(path), "")
    assert outcome.seconds > 0
    assert_same_checkpoints(tmp_path / "front" / "step-1", path)
    assert all(torch.equal(open_checkpoint(path).read(name), tensor) for name, tensor in state.items())
    assert saver.outcome(wait=True) is None


def test_what_changes_after_the_copy_is_not_in_the_checkpoint(saver: BackgroundSaver, tmp_path: Path, state: State, whole: Callable):
    before = {name: tensor.clone() for name, tensor in state.items()}
    os.kill(saver._process.pid, signal.SIGSTOP)  # it sees nothing of the state until all of it has changed
    path = tmp_path / "step-1"
    saver.save(tmp_path, 1, whole(state), META, FILES)
    for tensor in state.values():
        tensor.zero_()
    assert saver.outcome(wait=False) is None
    os.kill(saver._process.pid, signal.SIGCONT)
    assert finished(saver).failed == ""
    assert all(torch.equal(open_checkpoint(path).read(name), tensor) for name, tensor in before.items())


def test_a_larger_state_is_saved_than_memory_was_prepared_for(saver: BackgroundSaver, tmp_path: Path, state: State, whole: Callable):
    saver.prepare(whole(state), FILES)
    larger = {**state, "more": torch.arange(3_000_000, dtype=torch.float32)}
    path = tmp_path / "step-1"
    saver.save(tmp_path, 1, whole(larger), META, FILES)
    assert finished(saver).failed == ""
    assert all(torch.equal(open_checkpoint(path).read(name), tensor) for name, tensor in larger.items())


def test_a_save_that_fails_is_told_and_the_next_one_is_made(saver: BackgroundSaver, tmp_path: Path, state: State, whole: Callable):
    (tmp_path / "file").touch()
    saver.save(tmp_path / "file" / "folder", 1, whole(state), META, FILES)
    assert "step-1 was not saved: " in finished(saver).failed
    saver.save(tmp_path, 2, whole({"a": torch.zeros(2, dtype=torch.complex64)}), META, FILES)
    assert "a is torch.complex64, which safetensors cannot store" in finished(saver).failed
    path = tmp_path / "step-3"
    saver.save(tmp_path, 3, whole(state), META, FILES)
    assert finished(saver).failed == ""
    assert [checkpoint.path for checkpoint in committed(tmp_path)] == [path]


def test_a_killed_saver_is_told_leaves_nothing_and_is_replaced(saver: BackgroundSaver, tmp_path: Path, state: State, whole: Callable):
    os.kill(saver._process.pid, signal.SIGSTOP)
    saver.save(tmp_path, 1, whole(state), META, FILES)
    os.kill(saver._process.pid, signal.SIGKILL)
    assert "step-1 was not saved: rank 0: the process that saves in the background was killed by SIGKILL" in finished(saver).failed
    assert committed(tmp_path) == []
    path = tmp_path / "step-2"
    saver.save(tmp_path, 2, whole(state), META, FILES)
    assert finished(saver).failed == ""
    assert [one.path for one in committed(tmp_path)] == [path]


def test_a_saver_that_is_killed_while_the_copy_is_made_is_told_by_how_it_ended(
    saver: BackgroundSaver, tmp_path: Path, state: State, whole: Callable, monkeypatch: pytest.MonkeyPatch
):
    stage = saver._stage

    def killed_meanwhile(*what) -> bytes:
        os.kill(saver._process.pid, signal.SIGKILL)
        os.waitid(os.P_PID, saver._process.pid, os.WEXITED | os.WNOWAIT)
        return stage(*what)

    with monkeypatch.context() as patch:
        patch.setattr(saver, "_stage", killed_meanwhile)
        saver.save(tmp_path, 1, whole(state), META, FILES)
    assert "rank 0: the process that saves in the background was killed by SIGKILL" in finished(saver).failed
    saver.save(tmp_path, 2, whole(state), META, FILES)
    assert finished(saver).failed == ""


def test_a_saver_does_not_heed_what_is_sent_to_all_processes_of_a_job(
    saver: BackgroundSaver, tmp_path: Path, state: State, whole: Callable
):
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        os.kill(saver._process.pid, number)
    saver.save(tmp_path, 1, whole(state), META, FILES)
    assert finished(saver).failed == ""


def test_memory_that_is_not_to_be_had_is_refused_with_the_setting(saver: BackgroundSaver):
    vast = torch.empty(1, device="meta").expand(2**42)
    with pytest.raises(ConfigError, match=r"checkpoint.mode=async holds a copy .* use checkpoint.mode=sync"):
        saver.prepare([Piece("vast", (2**42,), whole_box((2**42,)), vast)], {})


def cut(tensor: torch.Tensor, rank: int) -> list[Piece]:
    """One tensor of which each of two ranks holds half, and one that both hold."""
    whole = whole_box(tuple(tensor.shape))
    half = whole.cut(0, 2, rank)
    halved = Piece("halved", tuple(tensor.shape), half, tensor[half.slices_within(whole)])
    return [halved, Piece("copied", tuple(tensor.shape), whole, tensor, replica=rank, replicas=2)]


def rounds(folder: Path) -> list[Outcome]:
    """On each of two ranks: a save, one in which rank 1's saver is killed, one that rank 0 cannot copy, and one more."""
    world = this_world()
    saver = BackgroundSaver(helpers_meeting(world), CPU)
    tensor = torch.arange(600_000, dtype=torch.float32).view(1000, 600)
    outcomes = []

    def one(step: int, pieces: list[Piece]) -> None:
        saver.save(folder, step, pieces, {"step": step}, FILES, world, layout="fsdp2")
        if step == 2 and world.rank == 1:
            os.kill(saver._process.pid, signal.SIGKILL)
        outcomes.append(finished(saver))
        world.broadcast_json(None)

    try:
        for step in (1, 2, 3, 4):
            if step == 2 and world.rank == 1:
                os.kill(saver._process.pid, signal.SIGSTOP)  # so that it is in the middle of the save when it is killed
            broken = torch.empty(3, device="meta")  # cannot be copied
            one(
                step,
                [*cut(tensor + step, world.rank), *([Piece("b", (3,), whole_box((3,)), broken)] if step == 3 and world.rank == 0 else [])],
            )
    finally:
        saver.close()
    return outcomes


def test_savers_of_two_ranks_commit_together_or_not_at_all(tmp_path: Path):
    first, second = run_world(rounds, 2, tmp_path / "back", timeout=100)
    assert [bool(outcome.failed) for outcome in first] == [False, True, True, False]
    assert "rank 1: the process that saves in the background was killed by SIGKILL" in first[1].failed
    assert "step-3 was not saved: rank 0: " in first[2].failed
    assert second[2].failed == first[2].failed
    names = [checkpoint.path.name for checkpoint in committed(tmp_path / "back")]
    assert names == ["step-4", "step-1"]
    assert not [path for path in (tmp_path / "back").iterdir() if ".tmp-" in path.name]

    def in_front() -> None:
        world = this_world()
        tensor = torch.arange(600_000, dtype=torch.float32).view(1000, 600)
        save(tmp_path / "front", 4, cut(tensor + 4, world.rank), {"step": 4}, FILES, world, layout="fsdp2")

    run_world(in_front, 2)
    assert_same_checkpoints(tmp_path / "front" / "step-4", tmp_path / "back" / "step-4")


def over_tcp(folder: Path) -> Outcome:
    """One save on each of two ranks that meet at an address, as under torchrun and srun."""
    world = this_world()
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False) if world.rank == 0 else None
    port = world.broadcast_json(server.port if server is not None else None)
    store = server or dist.TCPStore("127.0.0.1", port, wait_for_workers=False)
    world = replace(world, store=dist.PrefixStore("exchange", dist.PrefixStore("attempt 0", store)))
    saver = BackgroundSaver(helpers_meeting(world), CPU)
    try:
        saver.save(folder, 1, cut(torch.arange(600.0).view(20, 30), world.rank), META, FILES, world)
        return finished(saver)
    finally:
        saver.close()
        this_world().gather_json(None)  # the server leaves last


def test_savers_meet_wherever_their_ranks_do(tmp_path: Path):
    outcomes = run_world(over_tcp, 2, tmp_path, timeout=100)
    assert [outcome.failed for outcome in outcomes] == ["", ""]
    checkpoint = open_checkpoint(tmp_path / "step-1")
    assert torch.equal(checkpoint.read("halved"), torch.arange(600.0).view(20, 30))
