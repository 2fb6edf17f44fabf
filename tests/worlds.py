"""Distributed tests in milliseconds: worlds of gloo ranks on CPU, forked from a test process that has already imported torch.

A forked rank starts with every module loaded and every lazy import done, so a world of two costs about a tenth of a second
where launching it afresh costs several. Each call is a new world: a hang, a crash or a half-built process group cannot reach
the next test. Any callable may be a rank's body, closures too; what it returns must be picklable.
"""

import os
import pickle
import sys
from collections.abc import Callable
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from paraxis.resilience.fork import WorldError, fork_world

__all__ = ["WorldError", "run_world", "warm_up"]


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

    def body(rank: int, store_path: Path) -> bytes:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks))
        os.environ.update(GLOO_SOCKET_IFNAME="lo", CUDA_VISIBLE_DEVICES="")
        torch.set_num_threads(1)
        torch.manual_seed(0)
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # what earlier tests compiled is inherited, and shapes that differ would count as recompilations
        store = dist.FileStore(str(store_path), ranks)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=ranks, timeout=timedelta(seconds=2 * timeout))
        value = fn(*args)
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still needs its connection
            dist.destroy_process_group()
        return pickle.dumps(value)

    return [pickle.loads(value) for value in fork_world(body, ranks, timeout_s=timeout)]
