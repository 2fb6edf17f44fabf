"""A tied embedding in a pipeline: the first stage looks tokens up in it, the last multiplies with it, so both keep a copy.

Each copy's gradient is half of the truth. They are summed before anything reads them, after which both copies take the same step.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from paraxis.base.schedule import Schedule
from paraxis.parallel.grads import Shard
from paraxis.parallel.pipeline import Lines


@dataclass(frozen=True)
class TiedCopies:
    """Parameters that the first and last stage of a pipeline share, as one rank of either holds them.

    Where one rank has both stages, `mirrors` are its second copies: they take part in no norm and no optimizer, and follow `own`.
    Else the last stage's rank is `peer` of the first's, and the other way round.
    """

    own: Sequence[Shard]
    mirrors: Sequence[Shard] = ()
    lines: Lines | None = None
    peer: int = 0

    def sum_gradients(self) -> None:
        """Gives every copy the gradients of both, summed. Both sides add the same two numbers, so both get the same bits."""
        grads = [grad for shard in self.own if (grad := shard.local.grad) is not None]
        if self.lines is None:
            for shard, mirror in zip(self.own, self.mirrors, strict=True):
                mirror.take_gradient()
                assert shard.local.grad is not None
                assert mirror.local.grad is not None
                shard.local.grad += mirror.local.grad
        elif grads:
            flat = torch.cat([grad.flatten() for grad in grads])
            both = flat + self._exchanged(flat)
            for grad, part in zip(grads, both.split([grad.numel() for grad in grads]), strict=True):
                grad.copy_(part.view_as(grad))

    def follow(self) -> None:
        """Copies what the optimizer, or a checkpoint, has made of the first copies to the second ones."""
        for shard, mirror in zip(self.own, self.mirrors, strict=bool(self.mirrors)):
            mirror.local.detach().copy_(shard.local.detach())
            mirror.drop_gradient()

    def _exchanged(self, flat: Tensor) -> Tensor:
        """The peer's tensor of the same shape."""
        assert self.lines is not None
        theirs = torch.empty_like(flat)
        for work in (self.lines.sending(flat, self.peer), self.lines.receiving(theirs, self.peer)):
            work.wait()
        return theirs


def tie(by_stage: Mapping[int, list[Shard]], shared: set[str], schedule: Schedule, lines: Lines) -> tuple[list[Shard], TiedCopies | None]:
    """This rank's parameters, each once, and what keeps the `shared` ones equal in the first and the last stage; None without any here."""
    first, last = schedule.rank_of[0], schedule.rank_of[-1]
    shards = [shard for own in by_stage.values() for shard in own]
    if not shared or lines.rank not in (first, last):
        return shards, None
    if first == last:
        mirrors = [shard for shard in by_stage[schedule.stages - 1] if shard.placed.name in shared]
        shards = [shard for shard in shards if not any(shard is mirror for mirror in mirrors)]
        by_name = {shard.placed.name: shard for shard in shards}
        return shards, TiedCopies([by_name[mirror.placed.name] for mirror in mirrors], mirrors)
    shards = [_as_replica(shard, lines.rank == last) if shard.placed.name in shared else shard for shard in shards]
    own = [shard for shard in shards if shard.placed.name in shared]
    return shards, TiedCopies(own, lines=lines, peer=last if lines.rank == first else first)


def _as_replica(shard: Shard, second: bool) -> Shard:
    """The same, numbered among twice as many replicas, so that norms count it and checkpoints write it once."""
    placed = shard.placed
    return replace(shard, placed=replace(placed, replica=placed.replica + second * placed.replicas, replicas=2 * placed.replicas))
