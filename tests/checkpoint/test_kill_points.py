"""Two hundred points at which a save is killed: whatever was on its way, what was committed before is what a run goes on from.

Each time new processes save one step whole and are killed in the save of the next: at a byte of what they write, or after some time.
"""

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from paraxis.base.device import CPU
from paraxis.base.layout import whole_box
from paraxis.checkpoint import saver
from paraxis.checkpoint.background import BackgroundSaver
from paraxis.checkpoint.load import newest, open_checkpoint
from paraxis.checkpoint.manifest import MANIFEST
from paraxis.checkpoint.ranks import OneProcess
from paraxis.checkpoint.save import Piece, save
from paraxis.checkpoint.saver import StoreRanks
from paraxis.checkpoint.store import open_store
from paraxis.checkpoint.verify import verify
from paraxis.parallel.meeting import Meeting
from paraxis.resilience.fork import WorldError, fork_world
from tests.checkpoint.forked_savers import copy_savers, die_at_byte

FILES = {"config.toml": b"a = 1\n", "tokenizer/tokenizer.json": bytes(range(256)) * 40}
KILLED_AFTER = 1.3  # of the time that a save takes: some come too late

Plan = Callable[[Callable[[], None], float], None]  # is told how to end the process, and how long a save takes


def tensors(step: int) -> dict[str, torch.Tensor]:
    """About 120 kB, no two steps alike."""
    g = torch.Generator().manual_seed(step)
    return {f"t{n}": torch.randn(60, 40 + n, generator=g, dtype=torch.float64) for n in range(6)} | {"step": torch.tensor(step)}


def pieces(step: int, rank: int, ranks: int) -> list[Piece]:
    """Halves of what can be halved; all ranks have the rest."""
    found = []
    for name, tensor in tensors(step).items():
        box = whole_box(tuple(tensor.shape))
        own = box.cut(0, ranks, rank) if tensor.ndim else box
        part = tensor[own.slices_within(box)]
        found.append(Piece(name, tuple(tensor.shape), own, part, *((rank, ranks) if not tensor.ndim else ())))
    return found


def at_byte(offset: int) -> Plan:
    """The process ends when it has written so many bytes more."""

    return lambda end, seconds: die_at_byte(offset, end)


def after(share: float) -> Plan:
    """The process ends after this share of the time that a save takes."""

    def plan(end: Callable[[], None], seconds: float) -> None:
        def wait() -> None:
            time.sleep(share * seconds)
            end()

        threading.Thread(target=wait, daemon=True).start()

    return plan


def end_rank() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def end_rank_and_saver() -> None:
    os.kill(os.getppid(), signal.SIGKILL)
    os.kill(os.getpid(), signal.SIGKILL)


def in_front(folder: Path, step: int, ranks: int, victim: int, plan: Plan, rank: int, meeting: Path) -> bytes:
    """A rank that saves `step`, and then `step + 1`, in which it is killed."""
    group = StoreRanks(rank, ranks, dist.FileStore(str(meeting), ranks)) if ranks > 1 else OneProcess()
    started_s = time.monotonic()
    save(folder, step, pieces(step, rank, ranks), {"step": step}, FILES, group)
    if rank == victim:
        plan(end_rank, time.monotonic() - started_s)
    save(folder, step + 1, pieces(step + 1, rank, ranks), {"step": step + 1}, FILES, group)
    time.sleep(60)  # an end by time may come after the save
    return b""


def behind(folder: Path, step: int, ranks: int, victim: int, plan: Plan, rank: int, meeting: Path) -> bytes:
    """The same in the background: the rank and its saver are killed together."""
    carry_out, seconds = saver.carry_out, [0.0]

    def carried_out(job: saver.Job, *rest: object) -> str:
        started_s = time.monotonic()
        if job.number == 2 and rank == victim:
            plan(end_rank_and_saver, seconds[0])
        path = carry_out(job, *rest)
        seconds[0] = time.monotonic() - started_s
        return path

    saver.carry_out = carried_out
    copy_savers()
    one = BackgroundSaver(Meeting(rank, ranks, "savers", file=str(meeting)) if ranks > 1 else Meeting(rank, ranks), CPU)
    for number in (step, step + 1):
        one.save(folder, number, pieces(number, rank, ranks), {"step": number}, FILES)
        outcome = one.outcome(wait=True)
        assert outcome is not None
        assert not outcome.failed, outcome
    time.sleep(60)
    return b""


def written_by(path: Path, rank: int) -> int:
    """How many bytes a rank has written of a checkpoint."""
    files = open_checkpoint(path).manifest.files
    mine = [file.size_bytes for name, file in files.items() if name.startswith(f"rank-{rank}-") or (rank == 0 and "rank-" not in name)]
    return sum(mine) + ((path / MANIFEST).stat().st_size if rank == 0 else 0)


def assert_holds(path: Path | None, step: int) -> None:
    assert path is not None
    checkpoint = open_checkpoint(path)
    assert (checkpoint.manifest.step, checkpoint.meta) == (step, {"step": step})
    assert {name: checkpoint.read(name).tolist() for name in checkpoint.tensors} == {n: t.tolist() for n, t in tensors(step).items()}
    assert {name: checkpoint.file(name) for name in FILES} == FILES


COVERING = [(mode, ranks, how, 2) for mode in ("sync", "async") for ranks in (1, 2) for how in ("byte", "time")]
ALL = [(mode, ranks, how, points) for mode in ("sync", "async") for ranks in (1, 2) for how, points in (("byte", 38), ("time", 12))]
assert sum(points for *_, points in ALL) == 200


@pytest.mark.timeout(300)
@pytest.mark.parametrize(("mode", "ranks", "how", "points"), [*COVERING, *(pytest.param(*one, marks=pytest.mark.full) for one in ALL)])
def test_a_save_that_is_killed_leaves_the_last_committed_state(mode: str, ranks: int, how: str, points: int, tmp_path: Path):
    dice = random.Random(f"{mode} {ranks} {how}")
    body, step = {"sync": in_front, "async": behind}[mode], 0
    place = tmp_path / "checkpoints"
    save(place, step, pieces(step, 0, 1), {"step": step}, FILES)
    sizes = [written_by(place / "step-0", 0) // 4] * ranks  # surely no more than each writes, until it is known
    came_through, latest = 0, KILLED_AFTER
    for _ in range(points):
        victim = dice.randrange(ranks)
        plan = at_byte(dice.randrange(sizes[victim])) if how == "byte" else after(dice.uniform(0.0, latest))
        with pytest.raises(WorldError, match="SIGKILL"):
            fork_world(partial(body, place, step + 1, ranks, victim, plan), ranks, timeout_s=30)
        said: list[str] = []
        found = newest(place, said.append)
        assert said == []
        there = open_checkpoint(found).manifest.step
        assert there == step + 1 or (how == "time" and there == step + 2)
        assert_holds(found, there)
        store = open_store(place)
        assert all(verify(place / name).whole for name in store.complete())
        assert store.latest() in store.complete()
        came_through += there == step + 2
        latest = min(KILLED_AFTER, latest * (0.6 if there == step + 2 else 1.4))  # a machine may have other work
        step, sizes = there, [written_by(place / f"step-{there}", rank) for rank in range(ranks)]
    assert points < 10 or came_through < points
    save(place, step + 1, pieces(step + 1, 0, 1), {"step": step + 1}, FILES)
    assert_holds(newest(place), step + 1)
    assert sorted(path.name for path in place.iterdir()) == sorted(["latest", f"step-{step}", f"step-{step + 1}"])
