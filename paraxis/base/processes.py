"""What a process that we start owes its parent: it does not outlive it."""

import ctypes
import os
import signal
import sys
from collections.abc import Callable

_PR_SET_PDEATHSIG = 1


def die_with(parent: int) -> Callable[[], None] | None:
    """What a new process does first on Linux: ask the kernel for SIGKILL once its parent, the process `parent`, is gone."""
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)  # before a fork, after which little is safe

    def ask() -> None:
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before we asked
            os._exit(1)

    return ask
