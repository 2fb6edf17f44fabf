"""Ranks forked from this process: local workers in a tenth of a second, where starting each afresh takes several.

A forked rank starts with every module loaded, so any callable may be its body, closures too. This process must have no threads
and must not have initialised CUDA. What a rank returns travels as bytes through a pipe. A rank that raises, dies or hangs ends
its own world only, and is named.
"""

import faulthandler
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

from paraxis.base.errors import TrainingError
from paraxis.base.processes import die_with

# After the first failure the other ranks get this long to say what they saw, before they are killed.
GRACE_S = 0.3
_DIED_S = -1.0  # a death is what the others then complain of, whenever they noticed: it comes first

Body = Callable[[int, Path], bytes]


class WorldError(TrainingError):
    """A rank failed, died or hung: `rank`, the first to do so, of `ranks`. `reason` says it in a line, the message in full."""

    def __init__(self, rank: int, ranks: int, account: str, stacks: str, others: list[str]) -> None:
        also = "".join(f"\n  {line}" for line in others)
        told = f"{account.rstrip()}\n{stacks}".rstrip()
        super().__init__(f"rank {rank} of {ranks} {told}" + (f"\nthe other ranks:{also}" if also else ""))
        self.rank, self.ranks = rank, ranks
        self.reason = f"rank {rank} of {ranks} {_in_a_line(account)}"


@dataclass(frozen=True)
class Outcome:
    """What became of one rank: its `value`, or an `account` of its failure, at `when_s` on the clock all processes share."""

    value: bytes = b""
    account: str = ""
    when_s: float = 0.0


def fork_world(body: Body, ranks: int, *, timeout_s: float) -> list[bytes]:
    """Calls `body(rank, store_path)` in `ranks` forked processes and returns their results in rank order.

    `store_path` is a file that does not exist yet, in a private folder, for the ranks to meet through. Raises WorldError naming the
    first rank that raised or died, with its traceback, or those that had not ended after `timeout_s`, with their stacks. No process
    outlives the call.
    """
    context = multiprocessing.get_context("fork")
    ask_to_die = die_with(os.getpid())
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="paraxis-") as private:
        folder = Path(private)
        try:
            for rank in range(ranks):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_rank, args=(body, rank, folder, writer, ask_to_die), name=f"rank {rank}")
                process.start()
                writer.close()  # the rank's death then ends the pipe
                processes.append(process)
                pipes.append(reader)
            outcomes = _collect(processes, pipes, timeout_s)
            _write_stacks(processes, outcomes)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()
        _raise_first_failure(outcomes, ranks, timeout_s, folder)
    return [outcomes[rank].value for rank in range(ranks)]


def _rank(body: Body, rank: int, folder: Path, pipe: Connection, ask_to_die: Callable[[], None] | None) -> None:
    """The life of one rank. It leaves through os._exit: the parent's exit handlers are not its own to run."""
    if ask_to_die is not None:
        ask_to_die()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent, which gets the terminal's Ctrl-C too, ends its ranks
    stacks = _stacks(folder, rank).open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    try:
        message = b"\0" + body(rank, folder / "store")
    except BaseException:
        message = b"\1" + f"{time.monotonic()}\nraised\n{traceback.format_exc()}".encode()
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(message)
    os._exit(0)


def _stacks(folder: Path, rank: int) -> Path:
    return folder / f"stacks-{rank}"


def _collect(processes: list[BaseProcess], pipes: list[Connection], timeout_s: float) -> dict[int, Outcome]:
    """What each rank reported, until all did, `timeout_s` passed, or GRACE_S passed after a failure."""
    outcomes: dict[int, Outcome] = {}
    deadline_s = time.monotonic() + timeout_s
    while len(outcomes) < len(pipes) and (left_s := deadline_s - time.monotonic()) > 0:
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in outcomes], timeout=left_s)
        for rank in [rank for rank, pipe in enumerate(pipes) if pipe in ready]:
            outcomes[rank] = _outcome(processes[rank], pipes[rank])
            if outcomes[rank].account:
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
    return outcomes


def _outcome(process: BaseProcess, pipe: Connection) -> Outcome:
    try:
        message = pipe.recv_bytes()
    except EOFError:
        process.join()
        return Outcome(account=f"died: {_ending(process)}", when_s=_DIED_S)
    if message[:1] == b"\0":
        return Outcome(value=message[1:])
    when_s, _, account = message[1:].decode().partition("\n")
    return Outcome(account=account, when_s=float(when_s))


def _ending(process: BaseProcess) -> str:
    """How a process ended, in words."""
    code = process.exitcode
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _in_a_line(account: str) -> str:
    """`raised` and the exception, without the traceback between them."""
    lines = account.strip().splitlines()
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1].strip()}"


def _write_stacks(processes: list[BaseProcess], outcomes: dict[int, Outcome]) -> None:
    """Has every rank that has not reported write its stacks to its file."""
    silent = [process for rank, process in enumerate(processes) if rank not in outcomes and process.is_alive()]
    for process in silent:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    if silent:
        time.sleep(0.2)


def _raise_first_failure(outcomes: dict[int, Outcome], ranks: int, timeout_s: float, folder: Path) -> None:
    """Raises WorldError for the rank whose failure came first, and says in a line each what the others did."""
    accounts = {rank: outcome.account for rank, outcome in outcomes.items() if outcome.account}
    stacks = {rank: path.read_text() if (path := _stacks(folder, rank)).exists() else "" for rank in range(ranks)}
    if accounts:
        first = min(accounts, key=lambda rank: outcomes[rank].when_s)
        others = [f"rank {rank} {account.strip().splitlines()[-1]}" for rank, account in accounts.items() if rank != first]
        raise WorldError(first, ranks, accounts[first], stacks[first], others)
    if hung := [rank for rank in range(ranks) if rank not in outcomes]:
        others = [f"rank {rank} had not ended either\n{stacks[rank]}" for rank in hung[1:]]
        raise WorldError(hung[0], ranks, f"had not ended after {timeout_s:g} s", stacks[hung[0]], others)
