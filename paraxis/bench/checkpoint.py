"""What saving and loading cost: `python -m paraxis.bench.checkpoint PLAN OUT` on each rank, beside the bare disk and torch's own (DCP).

Every subject writes the same state, cut by rows over the ranks as FSDP cuts it, into the same folder; they take turns. What is read was
dropped from the page cache first. Times are those of rank 0, from a barrier to the end of its part of the work.
"""

import hashlib
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard

from paraxis.base.env import read_environment
from paraxis.base.layout import whole_box
from paraxis.checkpoint import hashing
from paraxis.checkpoint.background import BackgroundSaver
from paraxis.checkpoint.load import open_checkpoint
from paraxis.checkpoint.manifest import CHUNK_BYTES
from paraxis.checkpoint.save import Piece, save
from paraxis.parallel.meeting import helpers_meeting
from paraxis.parallel.world import World, join, leave

WIDTH = 4096  # of a square matrix: 64 MiB in fp32
GIB = 2**30

SYNC = ("paraxis", "sync")  # what the others are held against
DCP = "torch DCP"


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is measured: a state of `size_bytes` in all, in `folder`, `runs` times; torch's own checkpoints too where `dcp`."""

    size_bytes: int
    runs: int
    folder: str
    dcp: bool = True


@dataclass(frozen=True, kw_only=True)
class Times:
    """One run of a subject, in seconds: until the state was on the disk, for how long training would have stood still, and reading it."""

    save_s: float | None = None
    stall_s: float | None = None
    load_s: float | None = None


class State:
    """This rank's rows of every tensor: fp32, as master weights and AdamW's state are."""

    def __init__(self, world: World, size_bytes: int) -> None:
        rows = max(1, size_bytes // (4 * WIDTH))
        generator = torch.Generator().manual_seed(0)
        self._kind = world.device.kind
        self.shapes = {f"model/layers.{at // WIDTH}.weight": (min(WIDTH, rows - at), WIDTH) for at in range(0, rows, WIDTH)}
        self.size_bytes = rows * 4 * WIDTH
        self.boxes = {name: whole_box(shape).cut(0, world.size, world.rank) for name, shape in self.shapes.items()}
        self.tensors = {name: torch.empty(box.sizes, device=world.device.torch) for name, box in self.boxes.items()}
        for tensor in self.tensors.values():
            tensor.copy_(torch.rand(tensor.shape[1], generator=generator) + torch.arange(tensor.shape[0])[:, None])
        self._sample = self._some()

    def pieces(self) -> list[Piece]:
        return [Piece(name, self.shapes[name], self.boxes[name], tensor) for name, tensor in self.tensors.items()]

    def as_dtensors(self) -> dict[str, DTensor]:
        """The same memory as torch's own checkpoints want it."""
        mesh = init_device_mesh(self._kind, (dist.get_world_size(),))
        return {
            name: DTensor.from_local(tensor, mesh, [Shard(0)], shape=torch.Size(self.shapes[name]), stride=(WIDTH, 1))
            for name, tensor in self.tensors.items()
        }

    def forget(self) -> None:
        for tensor in self.tensors.values():
            tensor.zero_()

    def check(self) -> None:
        """That what was read is what was written."""
        assert all(map(torch.equal, self._some(), self._sample))

    def _some(self) -> list[Tensor]:
        return [tensor[:: max(1, len(tensor) // 8)].cpu().clone() for tensor in self.tensors.values()]


@dataclass(frozen=True)
class Bench:
    """What every subject is given."""

    world: World
    state: State
    saver: BackgroundSaver

    def timed(self, action: Callable[[], object]) -> float:
        dist.barrier()
        started_s = time.perf_counter()
        action()
        self._synchronize()
        return time.perf_counter() - started_s

    def timed_load(self, folder: Path, action: Callable[[], object]) -> float:
        """`action` reads the state from files in `folder`, off the disk."""
        self.state.forget()
        self._synchronize()
        dist.barrier()
        drop_from_cache(folder)
        seconds = self.timed(action)
        self.state.check()
        return seconds

    def _synchronize(self) -> None:
        if self.world.device.is_cuda:
            torch.cuda.synchronize()


def drop_from_cache(folder: Path) -> None:
    """Lets go of the file contents that the kernel keeps in memory; they are on the disk already."""
    for path in folder.rglob("*"):
        if path.is_file():
            descriptor = os.open(path, os.O_RDONLY)
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)


def bare_disk(bench: Bench, folder: Path) -> Times:
    """As many bytes as the state has, written, made durable and read, without a thought for what they are."""
    path = folder / f"bytes-{bench.world.rank}"
    block = memoryview(bytearray(os.urandom(CHUNK_BYTES)))
    sizes = [
        min(CHUNK_BYTES, bench.state.size_bytes // bench.world.size - at)
        for at in range(0, bench.state.size_bytes // bench.world.size, CHUNK_BYTES)
    ]

    def write() -> None:
        with open(path, "wb", buffering=0) as file:
            for size in sizes:
                file.write(block[:size])
            os.fsync(file.fileno())
        dist.barrier()

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass
        dist.barrier()

    save_s = bench.timed(write)
    drop_from_cache(folder)
    return Times(save_s=save_s, load_s=bench.timed(read))


def hashed(bench: Bench, folder: Path) -> Times:
    """As many bytes as the state has, from memory, hashed by one thread of each rank: what has to keep up with the writing."""
    size = bench.state.size_bytes // bench.world.size
    block = memoryview(bytearray(os.urandom(min(size, CHUNK_BYTES))))

    def hash_all() -> None:
        for at in range(0, size, CHUNK_BYTES):
            hashlib.sha256(block[: size - at])
        dist.barrier()

    return Times(load_s=bench.timed(hash_all))


def sync(bench: Bench, folder: Path) -> Times:
    """Ours, with everybody waiting."""
    save_s = bench.timed(lambda: save(folder, 1, bench.state.pieces(), {}, {}, bench.world))

    def load() -> None:
        checkpoint = open_checkpoint(folder / "step-1")
        for name, tensor in bench.state.tensors.items():
            checkpoint.read(name, bench.state.boxes[name], out=tensor)
        dist.barrier()

    return Times(save_s=save_s, stall_s=save_s, load_s=bench.timed_load(folder, load))


def unhashed(bench: Bench, folder: Path) -> Times:
    """The same save with nothing hashed; it could not be read."""
    with without_hashing():
        save_s = bench.timed(lambda: save(folder, 1, bench.state.pieces(), {}, {}, bench.world))
    return Times(save_s=save_s, stall_s=save_s)


def behind(bench: Bench, folder: Path) -> Times:
    """Ours, in the background."""
    started_s = time.perf_counter()
    stall_s = bench.timed(lambda: bench.saver.save(folder, 1, bench.state.pieces(), {}, {}, bench.world))
    outcome = bench.saver.outcome(wait=True)
    assert outcome is not None
    assert not outcome.failed, outcome.failed
    return Times(save_s=time.perf_counter() - started_s, stall_s=stall_s)


def torch_sync(bench: Bench, folder: Path) -> Times:
    """torch's own checkpoint, with everybody waiting."""
    state = bench.state.as_dtensors()
    save_s = bench.timed(lambda: dcp.save(state, checkpoint_id=folder / "dcp"))
    return Times(save_s=save_s, stall_s=save_s, load_s=bench.timed_load(folder, lambda: dcp.load(state, checkpoint_id=folder / "dcp")))


def torch_async(bench: Bench, folder: Path) -> Times:
    """torch's own checkpoint, in its background thread."""
    state = bench.state.as_dtensors()
    started_s = time.perf_counter()
    futures: list[Any] = []
    stall_s = bench.timed(lambda: futures.append(dcp.async_save(state, checkpoint_id=folder / "dcp")))
    futures[0].result()
    return Times(save_s=time.perf_counter() - started_s, stall_s=stall_s)


SUBJECTS: dict[tuple[str, str], Callable[[Bench, Path], Times]] = {
    ("disk", "bytes"): bare_disk,
    ("SHA-256", "bytes in memory, one thread a rank"): hashed,
    SYNC: sync,
    ("paraxis", "sync, nothing hashed"): unhashed,
    ("paraxis", "async"): behind,
    (DCP, "save"): torch_sync,
    (DCP, "async_save"): torch_async,
}


@contextmanager
def without_hashing() -> Iterator[None]:
    """No setting turns hashing off; what it costs is still worth knowing."""
    nothing = SimpleNamespace(update=lambda data: None, hexdigest=lambda: "0" * 64)
    module: Any = hashing
    module.hashlib = SimpleNamespace(sha256=lambda *data: nothing)
    try:
        yield
    finally:
        module.hashlib = hashlib


def measure(world: World, plan: Plan) -> list[dict[str, Any]]:
    """The times of every subject on this rank, after a round that is not counted."""
    logging.getLogger("torch.distributed").setLevel(logging.ERROR)
    saver = BackgroundSaver(helpers_meeting(world), world.device)
    try:
        bench = Bench(world, State(world, plan.size_bytes), saver)
        saver.prepare(bench.state.pieces(), {})
        small = Bench(world, State(world, WIDTH * 4 * world.size), saver)
        subjects = {key: subject for key, subject in SUBJECTS.items() if plan.dcp or key[0] != DCP}
        for subject in subjects.values():  # first uses take their time
            _in_folder(small, plan, subject)
        found: dict[tuple[str, str], list[Times]] = {key: [] for key in subjects}
        for _ in range(plan.runs):
            for key, subject in subjects.items():
                found[key].append(_in_folder(bench, plan, subject))
                if world.first:  # a run that is cut off has then said something
                    print(f"{', '.join(key)}: {found[key][-1]}", file=sys.stderr, flush=True)
    finally:
        saver.close()
    sizes = {"size_bytes": bench.state.size_bytes, "ranks": world.size, "device": world.device.kind}
    return [{"system": system, "name": name, **sizes, "runs": list(map(asdict, runs))} for (system, name), runs in found.items()]


def _in_folder(bench: Bench, plan: Plan, subject: Callable[[Bench, Path], Times]) -> Times:
    """One run, in a folder that holds nothing else and is gone afterwards."""
    folder = Path(plan.folder) / "checkpoint"
    if bench.world.first:
        folder.mkdir()
        os.sync()
    dist.barrier()
    times = subject(bench, folder)
    dist.barrier()
    if bench.world.first:
        shutil.rmtree(folder)
    return times


def record(row: Mapping[str, Any], sync_s: float | None) -> dict[str, Any]:
    """A row of the results, with medians over its runs; `stall_share` is of the synchronous save of as many ranks."""
    gib = row["size_bytes"] / GIB
    save_s, stall_s, load_s = (middle(row, name) for name in ("save_s", "stall_s", "load_s"))
    saves = [run["save_s"] for run in row["runs"] if run["save_s"] is not None]
    values = {
        "state_gib": gib,
        "save_s": save_s,
        "save_s_min": min(saves, default=None),
        "save_s_max": max(saves, default=None),
        "save_gib_per_s": gib / save_s if save_s else None,
        "stall_s": stall_s,
        "stall_share": stall_s / sync_s if stall_s is not None and sync_s else None,
        "load_s": load_s,
        "load_gib_per_s": gib / load_s if load_s else None,
    }
    rounded = {name: None if value is None else round(value, 4) for name, value in values.items()}
    named = {name: row[name] for name in ("system", "name", "ranks", "device")}
    return {**named, **rounded, "runs": len(row["runs"])}


def middle(row: Mapping[str, Any], name: str) -> float | None:
    """The median of what the runs of a row say under `name`, None where none does."""
    known = [run[name] for run in row["runs"] if run[name] is not None]
    return median(known) if known else None


def main(plan: Plan, out: Path) -> None:
    """Measures as the rank that the environment says this process is; the first one leaves the times in `out`."""
    world = join(read_environment())
    try:
        rows = measure(world, plan)
        if world.first:
            out.write_text(json.dumps(rows))
    finally:
        leave()


if __name__ == "__main__":
    main(Plan(**json.loads(sys.argv[1])), Path(sys.argv[2]))
