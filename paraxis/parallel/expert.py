"""Expert parallelism: every rank of a group holds some of a layer's experts, and rows travel to theirs and back.

Source: Lepikhin et al. 2020, "GShard" (arXiv:2006.16668), without its capacity limit: no row is dropped, so splits are uneven.

s rows, m model width, e experts, n ranks, l = e / n experts of a rank.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.ops.routing import reorder, sort_by_expert
from paraxis.parallel.collectives import Group


class ExpertDispatch:
    """A `Dispatch` (base/seams.py) to experts spread over `group`: rank r of n holds experts r * e / n to (r + 1) * e / n.

    Every rank takes part in every exchange, forward and backward, also with no row to send or to receive.
    """

    def __init__(self, group: Group) -> None:
        self.group = group
        # What travels is measured on the host. Asked for here and not at import: it loads the compiler, which takes a second.
        self._untraced = cast("Callable[..., Tensor]", torch.compiler.disable(self._run))

    def __call__(self, x_sm: Tensor, counts_e: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return self._untraced(x_sm, counts_e, experts)

    def _run(self, x_sm: Tensor, counts_e: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        arriving_nl = torch.empty_like(counts_e).view(self.group.size(), -1)
        dist.all_to_all_single(arriving_nl, counts_e.view_as(arriving_nl), group=self.group)
        # The one wait for the device.
        sent, received = torch.stack([counts_e.view_as(arriving_nl), arriving_nl]).sum(2).tolist()
        # Each source's rows arrive sorted by expert, one source after the other.
        expert_nl = torch.arange(arriving_nl.shape[1], device=counts_e.device).expand_as(arriving_nl)
        expert_s = expert_nl.flatten().repeat_interleave(arriving_nl.flatten(), output_size=sum(received))
        order_s, inverse_s = sort_by_expert(expert_s)
        here_sm = _Exchange.apply(x_sm, sent, received, self.group)
        y_sm = experts(reorder(here_sm, order_s, inverse_s), arriving_nl.sum(0))
        return _Exchange.apply(reorder(y_sm, inverse_s, order_s), received, sent, self.group)


class _Exchange(torch.autograd.Function):
    """Rows to other ranks and from them: `sent[r]` go to rank r, in order, and `received[r]` come from it. Backward is the way back."""

    @staticmethod
    def forward(ctx: Any, x_sm: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.back = received, sent, group
        return _all_to_all(x_sm, sent, received, group)

    @staticmethod
    def backward(ctx: Any, gradient_sm: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        return _all_to_all(gradient_sm, *ctx.back), None, None, None


def _all_to_all(x_sm: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    y_sm = x_sm.new_empty(sum(received), *x_sm.shape[1:])
    dist.all_to_all_single(y_sm, x_sm.contiguous(), received, sent, group=group)
    return y_sm
