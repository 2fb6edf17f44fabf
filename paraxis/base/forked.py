"""A worker that is a copy of this process: what was imported once is there at once, which starting Python afresh pays for seconds."""

import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable

STOPS = (signal.SIGINT, signal.SIGTERM)


class Forked:
    """A child process that calls `body` and exits with what it returns. Offers what `launch` needs of `subprocess.Popen`.

    This process must not have used CUDA, and no other thread of it may hold a lock: only the calling one goes on in the child.
    """

    def __init__(self, body: Callable[[], int]) -> None:
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        with warnings.catch_warnings():  # of threads, from Python 3.12 on: those of numerical libraries hold nothing between calls
            warnings.simplefilter("ignore", DeprecationWarning)
            self.pid = os.fork()
        if self.pid == 0:
            _live(body)

    def poll(self) -> int | None:
        """The exit code (negative: killed by that signal) if the process has ended."""
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            self.returncode = os.waitstatus_to_exitcode(status) if pid else None
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """As `poll`, once it has ended. Raises TimeoutError after `timeout` seconds; the process is then killed."""
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while self.poll() is None:
            if deadline_s is not None and time.monotonic() > deadline_s:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise TimeoutError(f"process {self.pid} had not ended after {timeout:g} s")
            time.sleep(0.01)
        assert self.returncode is not None
        return self.returncode


def _live(body: Callable[[], int]) -> None:
    """The life of a forked process. It leaves through os._exit: the exit handlers of its parent are not its own to run."""
    code = 1
    try:
        for number in (*STOPS, signal.SIGUSR1):
            signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
        code = body()
    except SystemExit as exit_:
        code = exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code)
