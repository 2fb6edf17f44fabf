"""Savers that are copies of their rank instead of a Python of their own, there in no time and with whatever a test has interposed.

And what ends a process at a byte of what it writes.
"""

import os
import signal
import socket
from collections.abc import Callable

from paraxis.base.forked import Forked
from paraxis.checkpoint import background, saver
from paraxis.checkpoint.background import BackgroundSaver
from paraxis.checkpoint.tensor_file import DiskFile


class Copied(Forked):
    """A forked process that can be ended as a `subprocess.Popen` can."""

    def kill(self) -> None:
        if self.poll() is None:
            os.kill(self.pid, signal.SIGKILL)


def nothing(rank: int) -> None:
    pass


def die_at_byte(offset: int, end: Callable[[], None]) -> None:
    """From now on `end` is called when this process has written so many bytes more of checkpoints, which are then in their file."""
    write, left = DiskFile.write, [offset]

    def counted(file: DiskFile, data: memoryview) -> None:
        if 0 <= left[0] < len(data):
            write(file, data[: left[0]])
            file._file.flush()
            end()
            data = data[left[0] :]
            left[0] = -1
        left[0] -= len(data) if left[0] >= 0 else 0
        write(file, data)

    DiskFile.write = counted


def copy_savers(before: Callable[[int], None] = nothing) -> None:
    """From now on every saver of this process, and of those forked from it, is a copy that first calls `before` with its rank."""

    def start(of: BackgroundSaver) -> tuple[Copied, socket.socket]:
        ours, theirs = socket.socketpair()
        parent = os.getpid()

        def body() -> int:
            signal.pthread_sigmask(signal.SIG_BLOCK, background._NOT_FOR_SAVERS)
            ours.close()
            before(of._meeting.rank)
            saver.main(theirs.fileno(), of._staging.descriptor, parent, of._meeting)
            return 0

        with theirs:
            return Copied(body), ours

    BackgroundSaver._start = start
