"""Distributed tests in milliseconds: worlds of gloo ranks on CPU, forked from a test process that has already imported torch.

A forked rank starts with every module loaded and every lazy import done, so a world of two costs about a tenth of a second
where launching it afresh costs several. Each call is a new world: a hang, a crash or a half-built process group cannot reach
the next test. Any callable may be a rank's body, closures too; what it returns must be picklable.
"""

import ctypes
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

# After the first failure the other ranks get this long to say what they saw, before they are killed.
GRACE_S = 0.3
PR_SET_PDEATHSIG = 1


class WorldError(AssertionError):
    """A rank failed, died or hung. `rank` is the one that did so first, `ranks` how many there were."""

    def __init__(self, rank: int, ranks: int, account: str, others: list[str]):
        also = "".join(f"\n  {line}" for line in others)
        super().__init__(f"rank {rank} of {ranks} {account.rstrip()}" + (f"\nthe other ranks:{also}" if also else ""))
        self.rank, self.ranks = rank, ranks


@dataclass
class Outcome:
    """What became of one rank: its `value`, or an `account` of its failure, at `when_s` on the clock all processes share."""

    value: Any = None
    account: str = ""
    when_s: float = 0.0


@cache
def warm_up() -> None:
    """Does in this process, once, every lazy import and first-use cost that forked ranks would otherwise each pay.

    The fake backend starts no thread and opens no socket, so that forking afterwards stays safe.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
    from torch.testing._internal.distributed.fake_pg import FakeStore

    torch.set_num_threads(1)
    if torch.backends.cuda.is_built():
        return  # sharding a module makes a CUDA build start autograd's device threads at the next backward: then no rank could be forked
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1, 1), mesh_dim_names=("fsdp", "tp"))
        model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.ReLU())
        parallelize_module(model, mesh["tp"], {"0": ColwiseParallel(), "1": RowwiseParallel()})
        fully_shard(model, mesh=mesh["fsdp"])
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(2, 8)).sum().backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    finally:
        dist.destroy_process_group()


def run_world(fn: Callable[..., Any], ranks: int, *args: Any, timeout: float = 60.0) -> list[Any]:
    """Calls `fn(*args)` on every rank of a new gloo world and returns the results in rank order.

    A rank finds torch.distributed initialised, one thread, seed 0, no GPU, and RANK, LOCAL_RANK, WORLD_SIZE and
    LOCAL_WORLD_SIZE in its environment. Raises WorldError naming the first rank that raised or died, with its traceback, or
    the ranks that had not ended after `timeout` seconds, with their stacks. No process outlives the call.
    """
    if torch.cuda.is_initialized():
        raise RuntimeError("this test process has initialised CUDA, so forking ranks is not safe: run GPU work in a child process")
    warm_up()
    context = multiprocessing.get_context("fork")
    processes: list[BaseProcess] = []
    pipes: list[Connection] = []
    with tempfile.TemporaryDirectory(prefix="world-") as folder:
        try:
            for rank in range(ranks):
                reader, writer = context.Pipe(duplex=False)
                process = context.Process(target=_rank, args=(fn, args, rank, ranks, Path(folder), writer, timeout), name=f"rank {rank}")
                process.start()
                writer.close()  # the rank's death then ends the pipe
                processes.append(process)
                pipes.append(reader)
            outcomes = _collect(processes, pipes, timeout)
            _print_stacks(processes, outcomes)
        finally:
            for process in processes:
                process.kill()
                process.join()
            for pipe in pipes:
                pipe.close()
        _raise_first_failure(processes, outcomes, ranks, timeout, Path(folder))
    return [outcomes[rank].value for rank in range(ranks)]


def _rank(fn: Callable[..., Any], args: tuple[Any, ...], rank: int, ranks: int, folder: Path, pipe: Connection, timeout: float) -> None:
    """The life of one rank. It leaves through os._exit: the parent's exit handlers and pytest are not its own to run."""
    _die_with_parent()
    stacks = (folder / f"stacks-{rank}").open("w")
    faulthandler.enable(stacks)
    faulthandler.register(signal.SIGUSR1, stacks)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
    os.environ.update(GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if "torch._dynamo" in sys.modules:
        torch._dynamo.reset()  # what earlier tests compiled is inherited, and shapes that differ from theirs would count as recompilations
    try:
        store = dist.FileStore(str(folder / "store"), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=2 * timeout))
        outcome = Outcome(value=fn(*args))
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still needs its connection
            dist.destroy_process_group()
        message = pickle.dumps(outcome)
    except BaseException:
        message = pickle.dumps(Outcome(account="raised\n" + traceback.format_exc(), when_s=time.monotonic()))
    sys.stdout.flush()
    sys.stderr.flush()
    pipe.send_bytes(message)
    os._exit(0)


def _die_with_parent() -> None:
    """Asks Linux to kill this process when the test process goes, however that goes."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _collect(processes: list[BaseProcess], pipes: list[Connection], timeout: float) -> dict[int, Outcome]:
    """What each rank reported, until all did, `timeout` passed, or GRACE_S passed after a failure."""
    outcomes: dict[int, Outcome] = {}
    deadline_s = time.monotonic() + timeout
    while len(outcomes) < len(pipes) and (left_s := deadline_s - time.monotonic()) > 0:
        ready = wait([pipe for rank, pipe in enumerate(pipes) if rank not in outcomes], timeout=left_s)
        for rank in [rank for rank, pipe in enumerate(pipes) if pipe in ready]:
            try:
                outcomes[rank] = pickle.loads(pipes[rank].recv_bytes())
            except EOFError:
                processes[rank].join()
                # A death is what the others then complain of, whenever they noticed: it comes first.
                outcomes[rank] = Outcome(account=f"died: {_ending(processes[rank])}", when_s=-1.0)
            if outcomes[rank].account:
                deadline_s = min(deadline_s, time.monotonic() + GRACE_S)
    return outcomes


def _ending(process: BaseProcess) -> str:
    """How a process ended, in words."""
    code = process.exitcode
    return f"killed by {signal.Signals(-code).name}" if code is not None and code < 0 else f"exit code {code}"


def _print_stacks(processes: list[BaseProcess], outcomes: dict[int, Outcome]) -> None:
    """Has every rank that has not reported write its stacks to its file."""
    silent = [process for rank, process in enumerate(processes) if rank not in outcomes and process.is_alive()]
    for process in silent:
        if process.pid is not None:
            os.kill(process.pid, signal.SIGUSR1)
    if silent:
        time.sleep(0.2)


def _raise_first_failure(processes: list[BaseProcess], outcomes: dict[int, Outcome], ranks: int, timeout: float, folder: Path) -> None:
    """Raises WorldError for the rank whose failure came first, and says in a line each what the others did."""
    accounts = {rank: outcome.account for rank, outcome in outcomes.items() if outcome.account}
    stacks = {rank: (folder / f"stacks-{rank}").read_text() for rank in range(ranks) if (folder / f"stacks-{rank}").exists()}
    if accounts:
        first = min(accounts, key=lambda rank: outcomes[rank].when_s)
        last_lines = [f"rank {rank} {account.strip().splitlines()[-1]}" for rank, account in accounts.items() if rank != first]
        raise WorldError(first, ranks, f"{accounts[first]}\n{stacks.get(first, '')}", last_lines)
    if hung := [rank for rank in range(ranks) if rank not in outcomes]:
        others = [f"rank {rank} had not ended either\n{stacks.get(rank, '')}" for rank in hung[1:]]
        raise WorldError(hung[0], ranks, f"had not ended after {timeout:g} s\n{stacks.get(hung[0], '')}", others)
