"""Gradients across ranks: copies summed, one global norm, and what clips them, on this rank's stored parts alone.

Every rank holds disjoint parts of most parameters and copies of a few; a copy counts once in the norm.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paraxis.base.dtypes import at_least_fp32
from paraxis.base.layout import Placed
from paraxis.parallel.collectives import sum_over
from paraxis.parallel.mesh import Mesh


@dataclass(frozen=True)
class Shard:
    """One parameter on this rank: where it lives, the model's parameter, and `local`, a plain tensor of the stored part: the master."""

    placed: Placed
    parameter: nn.Parameter  # a DTensor over (dp, fsdp), whose gradient FSDP fills; a plain tensor where ranks share none, or it is frozen
    local: nn.Parameter

    def take_gradient(self) -> None:
        """Hands the gradient of this part to `local`, where the optimizer looks for it; zero where nothing came."""
        if self.placed.frozen:
            return
        grad = self.parameter.grad
        if grad is not None:
            self.local.grad = grad.to_local() if isinstance(grad, DTensor) else grad
        elif self.local.grad is None:  # of a copy, the master has it already
            self.local.grad = torch.zeros_like(self.local)

    def drop_gradient(self) -> None:
        self.parameter.grad = None
        self.local.grad = None


def local_gradients(shards: Iterable[Shard]) -> list[Tensor]:
    """The gradients of the stored parts, empty parts left out."""
    return [shard.local.grad for shard in shards if shard.local.grad is not None and shard.local.numel()]


def sum_copies(shards: Iterable[Shard], mesh: Mesh) -> None:
    """Sums over `tp` the gradients of parameters that its ranks hold whole: each saw only its own positions or heads.

    One collective a step, in the dtype of the stored gradient (fp32 under bf16 compute).
    """
    if mesh.degrees.tp == 1:
        return
    copied = local_gradients(shard for shard in shards if shard.placed.split_along("tp") is None)
    if not copied:
        return
    flat = sum_over(torch.cat([grad.flatten() for grad in copied]), mesh.tp)
    torch._foreach_copy_(copied, [part.view_as(grad) for part, grad in zip(flat.split([g.numel() for g in copied]), copied, strict=True)])


def square_sum(shards: Iterable[Shard]) -> Tensor:
    """This rank's share of the squared gradient norm, fp64: parts that several ranks store are counted by the first of them."""
    owned = local_gradients(shard for shard in shards if shard.placed.replica == 0)
    if not owned:
        return torch.zeros((), dtype=torch.float64, device=next(iter(shards)).local.device)
    return torch.stack(torch._foreach_norm([at_least_fp32(grad) for grad in owned])).double().square().sum()


def clip_factor(norm: Tensor, max_norm: float) -> Tensor:
    """max_norm / norm where the global `norm` (a scalar tensor) is larger, else 1: what clips gradients that are multiplied by it.

    In the norm's dtype. No host synchronisation.
    """
    return (max_norm / (norm + 1e-6)).clamp(max=1.0)
