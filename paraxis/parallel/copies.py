"""Mixed precision on a rank that shares its parameters with no other: masters, and copies in the compute dtype in their places.

FSDP2 on a mesh of one does the same, but packs parameters into buffers and gradients out of them as if they travelled. The numbers are
the same: copies are the rounded masters, and gradients are summed over micro-batches in the masters' dtype.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.parallel.grads import Shard


class Copies:
    """The copies that a model computes with. They follow their masters, and hand them the gradients that they get."""

    def __init__(self, model: nn.Module, shards: Sequence[Shard]) -> None:
        self._masters = {shard.parameter: shard.local for shard in shards if shard.parameter.dtype != shard.local.dtype}  # by copy
        self._seen: list[int] = []
        for copy in self._masters:
            copy.register_post_accumulate_grad_hook(self._take)  # type: ignore[arg-type]
        model.register_forward_pre_hook(self._follow)
        model.copies = self  # type: ignore[assignment]

    def take(self) -> None:
        """Hands on gradients that were made outside a backward, where no hook saw them."""
        for copy in self._masters:
            self._take(copy)

    def _take(self, copy: Tensor) -> None:
        master, grad = self._masters[copy], copy.grad  # type: ignore[index]
        if grad is None:  # a split backward owes it
            return
        copy.grad = None
        if master.grad is None:
            master.grad = torch.empty_like(master, requires_grad=False)
            torch._foreach_copy_([master.grad], [grad])  # grad.to(master.dtype) has a kernel that is not vectorised
        else:
            master.grad.add_(grad)

    @torch.no_grad()
    def _follow(self, module: nn.Module, args: Any) -> None:
        # Whatever writes into masters, an optimizer or a checkpoint, counts up their versions.
        versions = [master._version for master in self._masters.values()]
        if versions != self._seen:
            torch._foreach_copy_(list(self._masters), list(self._masters.values()))
            self._seen = versions


def make_room_for_copies(model: nn.Module, dtype: torch.dtype) -> None:
    """Puts new parameters of `dtype`, without values, in the place of those of `model` that are trained and are of another dtype."""
    made: dict[nn.Parameter, nn.Parameter] = {}  # a parameter may have several places
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False, remove_duplicate=False)):
            if parameter.requires_grad and parameter.dtype != dtype:
                if parameter not in made:
                    made[parameter] = nn.Parameter(torch.empty_like(parameter, dtype=dtype, requires_grad=False))
                setattr(module, name, made[parameter])
