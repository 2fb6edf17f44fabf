"""The ranks of a run and the device each holds: joining, leaving, and the only place that asks what the hardware is."""

import json
import os
import platform
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from paraxis.base.device import Device
from paraxis.base.env import Environment
from paraxis.base.forked import Forked

FIRST_STEP_TIMEOUT = timedelta(minutes=10)  # compilation and the first collectives of large worlds take their time
STEP_TIMEOUT = timedelta(minutes=5)  # afterwards a silent peer is a dead one
LOST_PEER = (  # how gloo and NCCL say that a connection has ended
    "Connection closed by peer",
    "Connection reset by peer",
    "Broken pipe",
    "ncclRemoteError",
    "NCCL communicator was aborted",
)
EXCHANGE_TIMEOUT = timedelta(hours=12)  # one rank may tokenise a corpus while the others wait


def visible_devices() -> int:
    """How many accelerators this process could use: 0 on a machine without any."""
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


def can_be_copied() -> bool:
    """Whether forked copies of this process can use GPUs, asked of one: not once CUDA was initialised here, which counting GPUs may do."""
    if sys.platform != "linux":
        return False
    copy = Forked(lambda: int(torch.cuda._is_in_bad_fork()))
    return copy.wait() == 0


def this_device(local_rank: int) -> Device:
    """Binds this process to its device and describes it: CUDA device `local_rank` where there are any, else the CPU."""
    if not visible_devices():
        return Device("cpu", 0, platform.processor() or platform.machine(), os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    torch.cuda.set_device(local_rank)
    properties = torch.cuda.get_device_properties(local_rank)
    return Device("cuda", local_rank, properties.name, properties.total_memory, (properties.major, properties.minor))


@dataclass
class World:
    """This rank among all: its number, its device, and small JSON exchanges that need no pickle and no device memory."""

    rank: int
    size: int
    local_rank: int
    device: Device
    store: dist.Store
    _round: dict[str, int] = field(default_factory=dict)

    @property
    def first(self) -> bool:
        """Whether this is the rank that speaks for all."""
        return self.rank == 0

    def _key(self, purpose: str) -> str:
        self._round[purpose] = self._round.get(purpose, -1) + 1
        return f"paraxis/{purpose}/{self._round[purpose]}"

    def broadcast_json(self, value: Any) -> Any:
        """Rank 0's `value`, on every rank."""
        key = self._key("broadcast")
        if self.first:
            self.store.set(key, json.dumps(value))
        self.store.wait([key], EXCHANGE_TIMEOUT)
        return json.loads(self.store.get(key))

    def gather_json(self, value: Any) -> list[Any] | None:
        """Every rank's `value` in rank order on rank 0; None on the others."""
        key = self._key("gather")
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        if not self.first:
            return None
        keys = [f"{key}/{rank}" for rank in range(self.size)]
        self.store.wait(keys, EXCHANGE_TIMEOUT)
        values = [json.loads(self.store.get(k)) for k in keys]
        for k in keys:
            self.store.delete_key(k)
        return values

    def wait_for_all(self) -> None:
        """Waits until all ranks are here. Joining a group does not: one that goes on, and ends, breaks connections others still make."""
        self.gather_json(None)
        self.broadcast_json(None)

    def agree_json(self, value: Any, ranks: Sequence[int], choose: Callable[[list[Any]], Any]) -> Any:
        """What `choose`, which the first of `ranks` is asked, makes of the values of all of them in their order: on each of them, and all
        of them call this equally often."""
        key = f"{self._key('agree')}/{ranks[0]}"
        self.store.set(f"{key}/{self.rank}", json.dumps(value))
        if self.rank == ranks[0]:
            keys = [f"{key}/{rank}" for rank in ranks]
            self.store.wait(keys, EXCHANGE_TIMEOUT)
            self.store.set(key, json.dumps(choose([json.loads(self.store.get(k)) for k in keys])))
        self.store.wait([key], EXCHANGE_TIMEOUT)
        return json.loads(self.store.get(key))

    def claim(self, what: str, *, unanswered: bool = True) -> bool:
        """True on exactly one of the ranks that ask, the one that may speak; `unanswered` once the store, a rank's own, is gone with it."""
        try:
            return self.store.add(f"paraxis/claim/{what}", 1) == 1
        except dist.DistNetworkError:
            return unanswered

    def expect_quick_steps(self) -> None:
        """Shortens the collectives' timeout once the first step is over."""
        set_timeout(STEP_TIMEOUT)


def set_timeout(timeout: timedelta) -> None:
    """Sets how long a collective of any group may wait. torch has no public call for it; this is the one front."""
    from torch.distributed import distributed_c10d as c10d

    for group in list(c10d._world.pg_map):
        c10d._set_pg_timeout(timeout, group)


def join(env: Environment) -> World:
    """Joins the run that `env` describes: NCCL where there are accelerators, gloo on CPU. One rank alone needs no launcher."""
    device = this_device(env.local_rank)
    if env.launcher == "none":
        store: dist.Store = dist.HashStore()
    elif env.store_path is not None:
        store = dist.FileStore(str(env.store_path), env.world_size)
    elif env.launcher == "torchrun":
        store = next(iter(dist.rendezvous("env://")))[0]
    else:
        store = dist.TCPStore(env.master_addr, env.master_port, env.world_size, env.rank == 0, FIRST_STEP_TIMEOUT)
    backend = "cpu:gloo,cuda:nccl" if device.is_cuda else "gloo"
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("groups", store),
        rank=env.rank,
        world_size=env.world_size,
        timeout=FIRST_STEP_TIMEOUT,
        device_id=device.torch if device.is_cuda else None,
    )
    world = World(env.rank, env.world_size, env.local_rank, device, dist.PrefixStore("exchange", store))
    world.wait_for_all()
    return world


def peer_is_lost(error: BaseException) -> bool:
    """Whether `error` says that another rank has gone, rather than that this one is at fault. torch has one type for the store alone."""
    return isinstance(error, dist.DistNetworkError) or (isinstance(error, RuntimeError) and any(sign in str(error) for sign in LOST_PEER))


def leave() -> None:
    """Leaves the run in good order; does nothing in a process that never joined."""
    if dist.is_initialized():
        dist.destroy_process_group()
