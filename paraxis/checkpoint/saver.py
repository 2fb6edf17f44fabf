"""The process beside a rank that saves what the rank has copied into shared memory: `python -m paraxis.checkpoint.saver ...`.

The savers of all ranks write, agree and commit by the same lines as a save in the foreground (save.py); only what they agree through
is their own, so that the ranks' collectives are not in the way, and neither are the threads of one in the other's interpreter lock.
A saver is told of a job by two numbers, where in the shared memory it is described; it answers with a line of JSON. It ends when its
rank does.
"""

import json
import os
import socket
import struct
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.base.errors import StorageError
from paraxis.base.layout import Box
from paraxis.base.processes import die_with
from paraxis.checkpoint.ranks import OneProcess, Ranks
from paraxis.checkpoint.retain import Keep
from paraxis.checkpoint.save import Part, save_parts
from paraxis.checkpoint.staging import at, mapped
from paraxis.parallel.meeting import Meeting

ORDER = struct.Struct("<QQ")  # where a job's description begins in the shared memory, and its length

_GIVEN_UP = "given up"
_FIRST_LOOK_S, _LONGEST_PAUSE_S = 0.002, 0.1


@dataclass(frozen=True)
class Staged:
    """A part that lies in the shared memory at `offset`; `box` is None where this rank writes nothing of the tensor."""

    name: str
    shape: Sequence[int]
    dtype: str
    box: tuple[Sequence[int], Sequence[int]] | None
    offset: int

    def part(self, block: Tensor) -> Part:
        """The part as `save_parts` takes it."""
        box = Box(tuple(self.box[0]), tuple(self.box[1])) if self.box is not None else None
        dtype = getattr(torch, self.dtype)
        load = partial(at, block, self.offset, dtype, box.sizes if box is not None else ())
        return Part(self.name, tuple(self.shape), dtype, box, load)


@dataclass(frozen=True)
class Job:
    """A save, as a rank describes it to its saver: the arguments of `save_parts`. `files` are where they lie, and their lengths."""

    number: int
    folder: str
    step: int
    layout: str
    keep: Mapping[str, Any]
    meta: Mapping[str, Any]
    files: Mapping[str, Sequence[int]]
    parts: Sequence[Staged]

    def to_bytes(self) -> bytes:
        return json.dumps(asdict(self)).encode()

    @staticmethod
    def from_bytes(data: bytes) -> "Job":
        value = json.loads(data)
        return Job(**{**value, "parts": [Staged(**part) for part in value["parts"]]})


class StoreRanks:
    """The `Ranks` of one save among savers, through keys of a store that no other save uses. Waiting ends when one of them gives up."""

    def __init__(self, rank: int, size: int, store: dist.Store) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._rounds = 0

    def gather_json(self, value: Any) -> list[Any] | None:
        key = self._key()
        self._store.set(f"{key}/{self.rank}", json.dumps(value))
        return [self._wait_for(f"{key}/{rank}") for rank in range(self.size)] if self.rank == 0 else None

    def broadcast_json(self, value: Any) -> Any:
        key = self._key()
        if self.rank == 0:
            self._store.set(key, json.dumps(value))
            return value
        return self._wait_for(key)

    def _key(self) -> str:
        self._rounds += 1
        return f"round/{self._rounds}"

    def _wait_for(self, key: str) -> Any:
        # Not by the store's own wait: that one cannot be interrupted, and a saver that was killed says nothing.
        pause_s = _FIRST_LOOK_S
        while not self._store.check([key]):
            if self._store.check([_GIVEN_UP]):
                raise StorageError(self._store.get(_GIVEN_UP).decode())
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        return json.loads(self._store.get(key))


def store_of(meeting: Meeting, store: dist.Store, number: int) -> dist.Store:
    """What the savers have for save `number` alone."""
    return dist.PrefixStore(f"save/{number}", store)


def give_up(store: dist.Store, why: str) -> None:
    """Ends the waiting of all savers in the save that `store` is for, for the reason `why`."""
    store.set(_GIVEN_UP, why)


def carry_out(job: Job, block: Tensor, ranks: Ranks) -> str:
    """Saves what lies in the shared memory `block`, and returns where. Raises StorageError."""
    files = {name: at(block, begin, torch.uint8, (length,)).numpy().tobytes() for name, (begin, length) in job.files.items()}
    parts = [staged.part(block) for staged in job.parts]
    # Once all are here none is still at a save that failed, the draft of which this one clears away.
    ranks.gather_json(None)
    return str(save_parts(job.folder, job.step, parts, job.meta, files, ranks, layout=job.layout, keep=Keep(**job.keep)))


def _answer(job: Job, block: Tensor, meeting: Meeting, store: dist.Store) -> dict[str, Any]:
    """What the rank is told of a job: that it is saved and what that took, or why it is not."""
    started_s = time.perf_counter()
    own = store_of(meeting, store, job.number)
    ranks = StoreRanks(meeting.rank, meeting.size, own) if meeting.size > 1 else OneProcess()
    try:
        return {"saved": carry_out(job, block, ranks), "seconds": time.perf_counter() - started_s}
    except Exception as error:
        why = str(error) if isinstance(error, StorageError) else f"rank {meeting.rank}: {type(error).__name__}: {error}"
        give_up(own, why)
        return {"failed": why}


def main(control: int, memory: int, rank_process: int, meeting: Meeting) -> None:
    """Carries out jobs until the rank, the process `rank_process`, closes its end of `control`."""
    ask_to_die = die_with(rank_process)
    if ask_to_die is not None:
        ask_to_die()
    torch.set_num_threads(1)
    connection = socket.socket(fileno=control)
    store = meeting.store()
    block = torch.empty(0, dtype=torch.uint8)
    while order := connection.recv(ORDER.size, socket.MSG_WAITALL):
        if block.numel() != (size := os.fstat(memory).st_size):
            block = torch.frombuffer(mapped(memory, size), dtype=torch.uint8)
        begin, length = ORDER.unpack(order)
        job = Job.from_bytes(at(block, begin, torch.uint8, (length,)).numpy().tobytes())
        connection.sendall(json.dumps(_answer(job, block, meeting, store)).encode() + b"\n")
    os._exit(0)  # what the store does on its way out would disturb those that are still there


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Meeting(**json.loads(sys.argv[4])))
