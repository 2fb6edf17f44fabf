"""Saving behind the training: the rank copies its share into shared memory and goes on; a process beside it does the rest.

The copy is the whole stall. The process (saver.py) is started once, afresh: a fork would not survive CUDA and NCCL, and a thread would
hold up the steps. Memory for one copy is held from the start on, so one save is under way at a time.
"""

import json
import os
import select
import signal
import socket
import subprocess
import sys
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch.distributed as dist

from paraxis.base.device import Device
from paraxis.base.env import helper_variables
from paraxis.base.errors import ConfigError
from paraxis.checkpoint.place import Location
from paraxis.checkpoint.ranks import Ranks
from paraxis.checkpoint.retain import KEEP, Keep
from paraxis.checkpoint.save import Part, Piece, share
from paraxis.checkpoint.saver import ORDER, Job, Staged, give_up, store_of
from paraxis.checkpoint.staging import Staging, padded
from paraxis.parallel.meeting import Meeting

ROOM_BESIDE_BYTES = 4 * 2**20  # for a job's description, reserved from the start
GOODBYE_S = 10.0  # what a saver without work has to end in

# A saver sees neither the terminal's Ctrl-C nor a scheduler's signals: whether it is still needed is for its rank to say.
_NOT_FOR_SAVERS = {signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1}


@dataclass(frozen=True)
class Outcome:
    """How the save of `step` ended: as the checkpoint at `path`, after so long; or, where `failed` says why, without one."""

    step: int
    path: str = ""
    seconds: float = 0.0
    failed: str = ""


class BackgroundSaver:
    """One rank's half of saving behind the training; every rank calls `save` alike, and whatever it does goes on alone."""

    def __init__(self, meeting: Meeting, device: Device) -> None:
        self._meeting = meeting
        self._staging = Staging(pinned=device.is_cuda)
        self._store: dist.Store | None = None
        self._number = 0
        self._step: int | None = None  # of the save in flight
        self._lost = ""  # why the save in flight cannot end
        self._process, self._control = self._start()

    def prepare(self, pieces: Iterable[Piece], files: Mapping[str, bytes]) -> None:
        """Takes the memory that saving `pieces` and `files` will need. Raises ConfigError where it is not to be had."""
        beside = ROOM_BESIDE_BYTES + sum(padded(len(data)) for data in files.values())
        size = sum(_size(share(piece)) for piece in pieces) + beside
        try:
            self._staging.reserve(size)
        except (OSError, RuntimeError) as error:
            raise ConfigError(
                f"checkpoint.mode=async holds a copy of what a rank saves in its host's memory, but {size / 2**30:.1f} GiB "
                f"could not be had ({error}); use checkpoint.mode=sync"
            ) from error

    def save(
        self,
        folder: str | Location,
        step: int,
        pieces: Iterable[Piece],
        meta: Mapping[str, Any],
        files: Mapping[str, bytes],
        ranks: Ranks | None = None,
        *,
        layout: str = "",
        keep: Keep = KEEP,
    ) -> None:
        """`save` of save.py, but back as soon as `pieces` are copied; they may then change.

        None may be in flight. What goes wrong, here or later, is told by `outcome`, on every rank.
        """
        assert self._step is None, "the save before this one has not been asked for its outcome"
        self._step = step
        self._number += 1
        try:
            if self._process.poll() is not None:
                self._control.close()
                self._process, self._control = self._start()
            job = Job(self._number, str(folder), step, layout, asdict(keep), meta, {}, ())
            self._control.sendall(self._stage(job, pieces, files if self._meeting.rank == 0 else {}))
        except ConnectionError:  # it ended while the copy was made
            self._give_up(self._ending())
        except (OSError, RuntimeError, MemoryError) as error:
            self._give_up(f"{type(error).__name__}: {error}")

    def outcome(self, *, wait: bool) -> Outcome | None:
        """What has become of the save in flight, once; None where there is none, and without `wait` while it is under way.

        The checkpoint is there, or is not, as rank 0 says.
        """
        if (step := self._step) is None:
            return None
        answer: dict[str, Any] = {}
        if not self._lost:
            answered = select.poll()  # select.select does not take the high descriptors of a process with many files
            answered.register(self._control, select.POLLIN)
            if not answered.poll(None if wait else 0):
                return None
            if line := self._line():
                answer = json.loads(line)
            else:
                self._give_up(self._ending())
        failed = self._lost or answer.get("failed", "")
        self._step, self._lost = None, ""
        return Outcome(step, answer.get("saved", ""), answer.get("seconds", 0.0), failed)

    def close(self) -> None:
        """Ends the process; a save in flight ends with it, without a trace."""
        if self._step is not None or not self._number:  # nor does one have to wake up that was never needed
            self._process.kill()
        self._control.close()
        self._ended()
        self._staging.close()

    def _start(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        ours, theirs = socket.socketpair()
        before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_SAVERS)  # inherited: there is no moment at which it would be hit
        try:
            with theirs:
                numbers = [str(number) for number in (theirs.fileno(), self._staging.descriptor, os.getpid())]
                process = subprocess.Popen(
                    [sys.executable, "-m", "paraxis.checkpoint.saver", *numbers, json.dumps(asdict(self._meeting))],
                    env=helper_variables(),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(theirs.fileno(), self._staging.descriptor),
                )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        return process, ours

    def _stage(self, job: Job, pieces: Iterable[Piece], files: Mapping[str, bytes]) -> bytes:
        """Copies everything that is to be saved into the shared memory, and returns the order to save it."""
        end, staged, tensors = 0, [], []
        for part in map(share, pieces):
            box = (part.box.offsets, part.box.sizes) if part.box is not None else None
            staged.append(Staged(part.name, part.shape, str(part.dtype).removeprefix("torch."), box, end))
            if part.box is not None:
                tensors.append((end, part))
                end += padded(_size(part))
        texts: dict[int, bytes] = {}
        places: dict[str, tuple[int, int]] = {}
        for name, data in files.items():
            texts[end], places[name] = data, (end, len(data))
            end += padded(len(data))
        text = replace(job, files=places, parts=staged).to_bytes()
        texts[end] = text
        self._staging.reserve(end + len(text))
        self._staging.fill((offset, part.load()) for offset, part in tensors)
        for offset, data in texts.items():
            self._staging.write(offset, data)
        return ORDER.pack(end, len(text))

    def _line(self) -> bytes:
        """The saver's answer; empty where it ended without one."""
        line = b""
        with suppress(ConnectionResetError):  # it had not even taken the order
            while not line.endswith(b"\n") and (more := self._control.recv(2**16)):
                line += more
        return line if line.endswith(b"\n") else b""

    def _give_up(self, why: str) -> None:
        """Ends the save on all ranks: without this rank's share there is none."""
        self._lost = f"step-{self._step} was not saved: rank {self._meeting.rank}: {why}. Earlier checkpoints are untouched"
        if self._meeting.size > 1:
            self._store = self._store or self._meeting.store()
            give_up(store_of(self._meeting, self._store, self._number), self._lost)

    def _ending(self) -> str:
        """How the process ended, in words; it is gone after this."""
        code = self._ended()
        how = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
        return f"the process that saves in the background {how}"

    def _ended(self) -> int:
        """Waits for the process to end, which has no reason not to, and returns its exit code."""
        try:
            return self._process.wait(GOODBYE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            return self._process.wait()


def _size(part: Part) -> int:
    return padded(part.box.numel * part.dtype.itemsize) if part.box is not None else 0
