"""Differentiable collectives along the sequence, traceable by torch.compile.

The one front for `torch.distributed._functional_collectives`, which torch keeps private. Activations are [b, t, ...];
with n ranks each holds t / n consecutive positions of every row.
"""

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional

Group = dist.ProcessGroup

# torch 2.13 renamed these; 2.11 and 2.12 know the old names only.
_all_gather_first = getattr(functional, "all_gather_single", None) or functional.all_gather_tensor
_reduce_scatter_first = getattr(functional, "reduce_scatter_single", None) or functional.reduce_scatter_tensor
_all_gather_into = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def _waited(x: Tensor) -> Tensor:
    """What a collective brings, once it is there. In a graph torch waits by itself, and a compiler that sees two waits keeps for backward
    what nobody needs there."""
    return x if torch.compiler.is_compiling() else functional.wait_tensor(x)


# The collectives work along the first dimension. torch's own handling of another one cannot be compiled on 2.11.
def _all_gather(x: Tensor, group: Group) -> Tensor:
    ranks, b, *rest = group.size(), *x.shape
    parts = _waited(_all_gather_first(x.contiguous(), 0, group))
    return parts.view(ranks, b, *rest).transpose(0, 1).reshape(b, ranks * rest[0], *rest[1:])


def _reduce_scatter(x: Tensor, group: Group) -> Tensor:
    ranks, b, t, *rest = group.size(), *x.shape
    parts = x.view(b, ranks, t // ranks, *rest).transpose(0, 1).reshape(ranks * b, t // ranks, *rest)
    return _waited(_reduce_scatter_first(parts.contiguous(), "sum", 0, group))


def _all_reduce(x: Tensor, group: Group) -> Tensor:
    return _waited(functional.all_reduce(x.contiguous(), "sum", group))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _all_gather(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _reduce_scatter(grad, ctx.group), None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _reduce_scatter(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _all_gather(grad, ctx.group), None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override]
        ctx.group = group
        return _all_reduce(x, group)

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _all_reduce(grad, ctx.group), None


def gather_sequence(x: Tensor, group: Group) -> Tensor:
    """[b, t/n, ...] to [b, t, ...]: every rank's positions in order. Backward sums the ranks' gradients and keeps this rank's part."""
    return _Gather.apply(x, group)


def sum_and_scatter_sequence(x: Tensor, group: Group) -> Tensor:
    """[b, t, ...] to [b, t/n, ...]: the ranks' tensors summed, this rank's positions kept. Backward gathers."""
    return _Scatter.apply(x, group)


def sum_summands(x: Tensor, group: Group) -> Tensor:
    """The ranks' tensors summed, on every rank. Each rank's gradient is a summand too, of which backward makes the sum."""
    return _Sum.apply(x, group)


def shift(x: Tensor, by: int, group: Group) -> Tensor:
    """Starts sending `x` to the rank `by` places on, round the end; `arrived` waits for what comes from as far back. Outside autograd."""
    rank, ranks = group.rank(), group.size()
    sent, received = [0] * ranks, [0] * ranks
    sent[(rank + by) % ranks] = received[(rank - by) % ranks] = x.shape[0]
    return functional.all_to_all_single(x.contiguous(), received, sent, group)


def exchange(x: Tensor, group: Group) -> Tensor:
    """Starts sending entry i of [n, ...] to rank i; `arrived` waits for what the ranks send here, in their order. Outside autograd."""
    return functional.all_to_all_single(x.contiguous(), None, None, group)


def arrived(x: Tensor) -> Tensor:
    """What a `shift` or an `exchange` brings, once it is there."""
    return functional.wait_tensor(x)


def own_positions(x: Tensor, rank: int, ranks: int) -> Tensor:
    """This rank's part [b, t/n, ...] of a tensor [b, t, ...] that every rank holds. Backward leaves the other positions zero."""
    part = x.shape[1] // ranks
    return x.narrow(1, rank * part, part)


def sum_over(x: Tensor, group: Group | None = None) -> Tensor:
    """`x` summed over the group in place (the whole world by default), outside autograd."""
    dist.all_reduce(x, group=group)
    return x


def max_over(x: Tensor, group: Group) -> Tensor:
    """The largest of the group's values, in place, outside autograd."""
    dist.all_reduce(x, op=dist.ReduceOp.MAX, group=group)
    return x


def gather_rows(x: Tensor, ranks: int) -> Tensor:
    """Every rank's 1-D `x` as the rows of a [ranks, n] matrix, the same on all ranks."""
    rows = x.new_empty(ranks * x.numel())
    _all_gather_into(rows, x)
    return rows.view(ranks, -1)
