"""Processes beside the one that trains: they are given jobs, and what they make is asked for later.

They are started afresh, not forked, so they hold neither CUDA nor threads of this process, and they end with it, however it ends:
a pipe that nobody holds any more reads as ended. What a lost one was doing is done by whoever asks for it.
"""

import logging
import queue
import signal
import threading
from collections.abc import Callable, Hashable
from concurrent.futures import Future
from multiprocessing import get_context
from multiprocessing.connection import Connection
from typing import Any

from paraxis.base.env import tokenise_with
from paraxis.base.errors import DataError, ParaxisError

log = logging.getLogger(__name__)

CLOSE_S = 2.0
_context = get_context("spawn")

Maker = Callable[[Any], Any]


class Crew:
    """`count` processes that call `make(job)`, each tokenising with `threads` threads; with none, this process does it when asked.

    They are started by the first job. `make`, jobs and results travel between processes, so they must be picklable.
    """

    def __init__(self, make: Maker, count: int, threads: int = 1) -> None:
        self._make, self._count, self._threads = make, count, threads
        self._asked: dict[Hashable, Future[Any]] = {}
        self._jobs: queue.SimpleQueue[tuple[Hashable, Future[Any]] | None] = queue.SimpleQueue()
        self._members: list[threading.Thread] = []
        self._processes: list[Any] = []
        self._closed = False

    def ask(self, job: Hashable) -> None:
        """Has the job done in the background, unless it is already."""
        if self._count and not self._closed and job not in self._asked:
            self._start()
            self._asked[job] = Future()
            self._jobs.put((job, self._asked[job]))

    def get(self, job: Hashable) -> Any:
        """What `make(job)` returns, or raises. Waits for it where it was asked for, and forgets it."""
        self.ask(job)
        future = self._asked.pop(job, None)
        if future is None:
            return self._make(job)
        try:
            return future.result()
        except _Lost:
            if self._closed:
                raise DataError("the data were closed while they were read") from None
            return self._make(job)

    def close(self) -> None:
        """Ends the processes, whatever they are doing."""
        self._closed = True
        for process in self._processes:
            process.terminate()
        for _ in self._members:
            self._jobs.put(None)
        for member in self._members:
            member.join(CLOSE_S)

    def _start(self) -> None:
        while len(self._members) < self._count:
            member = threading.Thread(target=self._lead, name=f"tokenising-{len(self._members)}", daemon=True)
            self._members.append(member)
            member.start()

    def _lead(self) -> None:
        """The life of a thread here that hands jobs to a process of its own."""
        ours, theirs = _context.Pipe()
        process = _context.Process(target=_work, args=(theirs, self._make, self._threads), daemon=True)
        lost = False
        try:
            process.start()
            self._processes.append(process)
        except (OSError, AssertionError) as error:  # no memory for it, or this process may have no children
            log.warning("no process that tokenises could be started (%s); the one that trains does it", error)
            lost = True
        theirs.close()
        while (item := self._jobs.get()) is not None:
            job, future = item
            try:
                if lost or self._closed:
                    raise EOFError
                ours.send(job)
                result, error = ours.recv()
            except (EOFError, OSError):
                if not lost and not self._closed:
                    log.warning("a process that tokenises has ended, perhaps for want of memory; its work is done by the one that trains")
                lost = True
                future.set_exception(_Lost())
                continue
            future.set_exception(error) if error is not None else future.set_result(result)
        ours.close()


class _Lost(Exception):
    """The process that had the job has ended."""


def _work(pipe: Connection, make: Maker, threads: int) -> None:
    """The life of a process of the crew."""
    # Ctrl-C reaches every process of the terminal; the one that trains decides what becomes of it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    tokenise_with(threads)
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            answer: tuple[Any, BaseException | None] = (make(job), None)
        except ParaxisError as error:
            answer = (None, error)
        except Exception as error:
            answer = (None, DataError(f"tokenising failed: {type(error).__name__}: {error}"))
        try:
            pipe.send(answer)
        except OSError:
            return
