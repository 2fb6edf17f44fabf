"""Where helper processes of the ranks, one beside each, find each other: at the ranks' own store, or a file beside it."""

import secrets
from dataclasses import dataclass

import torch.distributed as dist

from paraxis.parallel.world import World


@dataclass(frozen=True)
class Meeting:
    """A place for `size` processes, of which this one is number `rank`. It is plain data, so that a helper can be told of it.

    `file` is where one machine's processes meet; else they meet at `host:port`. Their keys begin with `prefix`.
    """

    rank: int
    size: int
    prefix: str = ""
    file: str = ""
    host: str = ""
    port: int = 0

    def store(self) -> dist.Store:
        """This process's own connection to the place. Raises RuntimeError where there is none."""
        if self.file:
            return dist.PrefixStore(self.prefix, dist.FileStore(self.file, self.size))
        if self.host:
            return dist.PrefixStore(self.prefix, dist.TCPStore(self.host, self.port, None, False, wait_for_workers=False))
        return dist.HashStore()  # alone


def helpers_meeting(world: World) -> Meeting:
    """A new place for the helpers of all ranks; every rank of `world` asks for it at the same time."""
    # A store can outlive the processes of a launch: torchrun's does. What an earlier launch wrote must not be read by this one.
    token = world.broadcast_json(secrets.token_hex(8))
    store = world.store
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    prefix = f"paraxis/helpers/{token}"
    if isinstance(store, dist.FileStore):
        # A file of their own: processes that come and go would upset the count of users by which the ranks' file is deleted.
        return Meeting(world.rank, world.size, prefix, file=f"{store.path}-{token}")  # pyright: ignore[reportAttributeAccessIssue] (torch does not declare it)
    if isinstance(store, dist.TCPStore):
        return Meeting(world.rank, world.size, prefix, host=store.host, port=store.port)
    assert world.size == 1, type(store)  # what only this process can see
    return Meeting(world.rank, world.size)
