"""Local workers: start one for each rank, end all of them when one dies, leave none behind.

    worker exits 0                 wait for the others
    worker exits 75 (preempted)    wait for the others, which save and stop too
    worker fails                   SIGTERM to the others, SIGKILL to what is left after a grace; its exit code is ours
    we get SIGINT or SIGTERM       passed on, so that workers save and stop; the second one kills
    we get SIGUSR1                 passed on, so that workers save and stop: a scheduler's notice, before it sends a SIGTERM
    we are killed                  the kernel kills the workers (Linux)

Ranks meet through a file in a private folder: no port is opened for it, and nobody else can join.
"""

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from paraxis.base.env import become_worker, worker_variables
from paraxis.base.errors import Preempted, TrainingError
from paraxis.base.forked import STOPS, Forked
from paraxis.base.processes import die_with

GRACE_S = 5.0  # what workers have to leave in once a peer has failed: without it they cannot finish a save
_POLL_S = 0.05

_Worker = subprocess.Popen[bytes] | Forked


def launch(command: Sequence[str], ranks: int, *, work: Callable[[], int] | None = None, grace_s: float = GRACE_S) -> int:
    """Runs `command` as `ranks` workers and returns an exit code: 0, 75 if they were preempted, else that of the worker that failed.

    `work` does the same as `command` in a copy of this process, which then must not have used CUDA; where there are no such copies
    (this is not Linux), and without it, workers are started afresh.

    A death by signal n counts as 128 + n. Rank 0 writes to our stdout, every rank to our stderr. When one worker fails the rest
    fail too, so they leave their last words with us (`leave_words`) and we show those of the worker that was the cause; for
    one that left none, we say which rank ended, and how.
    """
    with tempfile.TemporaryDirectory(prefix="paraxis-", ignore_cleanup_errors=True) as private, _received_signals() as received:
        store_path = Path(private) / "store"
        workers: list[_Worker] = []
        try:
            for rank in range(ranks):
                workers.append(_start(command, work, rank, ranks, store_path))
            if first_failed := _wait(workers, received):
                _signal(workers, signal.SIGTERM)
                _wait_until(time.monotonic() + grace_s, workers)
                return _explain(_cause(workers, first_failed), workers, store_path, received)
            preempted = [rank for rank, worker in enumerate(workers) if worker.returncode == Preempted.exit_code]
            return _explain(preempted[0], workers, store_path, received) if preempted else 0
        finally:
            _signal(workers, signal.SIGKILL)
            for worker in workers:
                worker.wait()


def leave_words(store_path: Path, rank: int, words: str) -> None:
    """Leaves what a failing worker has to say with its launcher, or on stderr where that is not possible."""
    try:
        _words_path(store_path, rank).write_text(words, encoding="utf-8")
    except OSError:
        print(words, file=sys.stderr)


def _words_path(store_path: Path, rank: int) -> Path:
    return store_path.with_name(f"words-{rank}")


def _start(command: Sequence[str], work: Callable[[], int] | None, rank: int, ranks: int, store_path: Path) -> _Worker:
    ask_to_die = die_with(os.getpid())
    if work is not None and ask_to_die is not None:
        worker = Forked(lambda: _as_worker(work, ask_to_die, rank, ranks, store_path))
        with suppress(OSError):  # it does this itself; whoever comes first, it has its group before we may signal that
            os.setpgid(worker.pid, worker.pid)
        return worker
    return subprocess.Popen(
        list(command),
        env=worker_variables(rank, ranks, store_path),
        stdin=subprocess.DEVNULL,
        stdout=None if rank == 0 else subprocess.DEVNULL,
        # In a group of its own, a worker does not get the terminal's Ctrl-C beside the one we pass on,
        # and can be killed together with what it started.
        process_group=0,
        preexec_fn=ask_to_die,
    )


def _as_worker(work: Callable[[], int], ask_to_die: Callable[[], None], rank: int, ranks: int, store_path: Path) -> int:
    """What a copy of this process does: as one started afresh, with its variables, streams, group and end."""
    os.setpgid(0, 0)
    ask_to_die()
    become_worker(rank, ranks, store_path, gpus=True)
    nowhere = os.open(os.devnull, os.O_RDWR)
    os.dup2(nowhere, 0)
    if rank:
        os.dup2(nowhere, 1)
    return work()


@contextmanager
def _received_signals() -> Iterator[list[int]]:
    """Collects the signals that ask for a stop instead of obeying them."""
    received: list[int] = []
    before = {number: signal.signal(number, lambda n, _: received.append(n)) for number in (*STOPS, signal.SIGUSR1)}
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _wait(workers: list[_Worker], received: list[int]) -> list[int]:
    """Waits until a worker has failed, passing signals on, and returns which; or until all have ended, and returns none."""
    passed_on = 0
    while not (failed := _failed(workers)) and any(worker.returncode is None for worker in workers):
        for number in received[passed_on:]:
            passed_on += 1
            _signal(workers, signal.SIGKILL if number in STOPS and _insisted(received[:passed_on]) else number)
        time.sleep(_POLL_S)
    return failed


def _insisted(received: list[int]) -> bool:
    """Whether a stop was asked for twice; a scheduler's notice does not count, after which the first SIGTERM may come during the save."""
    return sum(number in STOPS for number in received) > 1


def _wait_until(deadline_s: float, workers: list[_Worker]) -> None:
    while time.monotonic() < deadline_s and any(worker.poll() is None for worker in workers):
        time.sleep(_POLL_S)


def _failed(workers: list[_Worker]) -> list[int]:
    """The ranks that have ended neither well nor preempted."""
    return [rank for rank, worker in enumerate(workers) if worker.poll() not in (None, 0, Preempted.exit_code)]


def _signal(workers: list[_Worker], number: int) -> None:
    """Sends a signal to the workers that are still there; SIGKILL also to whatever they started."""
    for worker in workers:
        if worker.poll() is None:  # not reaped, so its process number is still its own
            (os.killpg if number == signal.SIGKILL else os.kill)(worker.pid, number)


def _cause(workers: list[_Worker], first_failed: list[int]) -> int:
    """The rank whose failure brought the others down, judged before any was sent SIGKILL from here.

    Peers can notice a lost rank before its own exit is visible to us, so how a rank ended counts for more than when.
    """

    def doubt(code: int) -> int:
        if code == -signal.SIGKILL:
            return 0  # from outside
        if code in (TrainingError.exit_code, -signal.SIGABRT, -signal.SIGTERM):
            return 3  # how peers of a lost rank end, and those that we stopped
        return 2 if code in (1, -signal.SIGSEGV) else 1  # an accident may be another's; a refusal is a rank's own

    return min(_failed(workers), key=lambda rank: (doubt(_exit_code(workers[rank])), rank not in first_failed))


def _exit_code(worker: _Worker) -> int:
    """Of a worker that has ended."""
    assert worker.returncode is not None
    return worker.returncode


def _explain(cause: int, workers: list[_Worker], store_path: Path, received: list[int]) -> int:
    """Says why the workers ended as `cause` did, and returns the exit code for it."""
    code = _exit_code(workers[cause])
    if received and code in (-received[0], 128 + received[0], -signal.SIGKILL if _insisted(received) else None):
        code = -received[0]
        words = f"paraxis: stopped by {signal.Signals(received[0]).name} before the workers had saved"
    elif code < 0:
        hint = ", as the system does when memory runs out" if -code == signal.SIGKILL else ""
        words = f"paraxis: error: rank {cause} was killed by {signal.Signals(-code).name}{hint}"
    elif (path := _words_path(store_path, cause)).exists():
        words = path.read_text(encoding="utf-8")
    else:
        words = f"paraxis: error: rank {cause} ended with exit code {code}"
    print(words, file=sys.stderr)
    return code if code > 0 else 128 - code
