"""The mixture-of-experts layer of a decoder block: every token goes to a few experts, and none is dropped.

b rows, t positions, n = b * t tokens, m model width, e experts, k chosen for a token, s = n * k pairs of a token and an expert,
f width inside an expert.
"""

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paraxis.base.dtypes import at_least_fp32
from paraxis.base.errors import ConfigError
from paraxis.models.mlp import MLP
from paraxis.ops.grouped import grouped_linear
from paraxis.ops.routing import Routing, RoutingConfig, balance_loss, inject, route, z_loss


class Experts(nn.Module):
    """SwiGLU experts side by side, each with its own three matrices."""

    def __init__(self, experts: int, width: int, expert_width: int) -> None:
        super().__init__()
        self.gate_proj = nn.Parameter(torch.empty(experts, width, expert_width))
        self.up_proj = nn.Parameter(torch.empty(experts, width, expert_width))
        self.down_proj = nn.Parameter(torch.empty(experts, expert_width, width))
        for weight in self.parameters():
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)

    def forward(self, x_sm: Tensor, counts_e: Tensor) -> Tensor:
        """[s, m]; the first counts_e[0] rows of x_sm are expert 0's, and so on."""
        gate_sf = grouped_linear(x_sm, self.gate_proj, counts_e)
        up_sf = grouped_linear(x_sm, self.up_proj, counts_e)
        return grouped_linear(F.silu(gate_sf) * up_sf, self.down_proj, counts_e)


class Dispatch(Protocol):
    """Runs experts on rows sorted by expert, wherever the experts live; the outputs come back in the same order."""

    def __call__(self, x_sm: Tensor, counts_e: Tensor, experts: Experts) -> Tensor: ...


def dispatch_here(x_sm: Tensor, counts_e: Tensor, experts: Experts) -> Tensor:
    """All experts are on this device."""
    return experts(x_sm, counts_e)


class MoE(nn.Module):
    """sum over a token's experts of weight * expert(x), plus the shared expert's output where there is one.

    Balance and z-loss enter the gradient here (`inject`), summed over rows and times `auxiliary_scale`. Whoever trains sets that to
    1 / (rows of the step), a number or a scalar tensor, before the step's first forward; where several ranks run the layer on the
    same rows and their gradients are summed, to that over their number.
    """

    def __init__(self, width: int, expert_width: int, routing: RoutingConfig, shared_width: int = 0) -> None:
        super().__init__()
        self.routing = routing
        self.dispatch: Dispatch = dispatch_here
        self.auxiliary_scale: float | Tensor | None = None
        self.router = nn.Linear(width, routing.experts, bias=False)
        self.experts = Experts(routing.experts, width, expert_width)
        self.shared = MLP(width, shared_width) if shared_width else None

    def forward(self, x_btm: Tensor) -> Tensor:
        x_nm = x_btm.flatten(0, -2)
        # Of at least fp32: near ties between experts would otherwise be settled by rounding.
        logits_ne = F.linear(at_least_fp32(x_nm), at_least_fp32(self.router.weight))
        routing = route(logits_ne, self.routing)
        if (self.routing.balance_loss or self.routing.z_loss) and torch.is_grad_enabled():
            x_nm = inject(x_nm, self._auxiliary_loss(logits_ne, routing, rows=x_btm.shape[0]))
        y_nm = self._routed(x_nm, routing)
        if self.shared is not None:
            y_nm = y_nm + self.shared(x_nm)
        return y_nm.view_as(x_btm)

    def _routed(self, x_nm: Tensor, routing: Routing) -> Tensor:
        order_s = routing.expert_nk.flatten().argsort(stable=True)
        x_sm = x_nm.index_select(0, order_s // self.routing.chosen)
        y_sm = self.dispatch(x_sm, routing.counts_e, self.experts)
        # Back in token order each token's outputs lie together, so the weighted sum is a product and needs no atomic additions.
        y_nkm = y_sm.index_select(0, order_s.argsort()).unflatten(0, (-1, self.routing.chosen))
        return (routing.weight_nk.to(y_nkm.dtype).unsqueeze(1) @ y_nkm).squeeze(1)

    def _auxiliary_loss(self, logits_ne: Tensor, routing: Routing, rows: int) -> Tensor:
        if self.auxiliary_scale is None:
            raise ConfigError(
                f"routing.balance_loss={self.routing.balance_loss} and routing.z_loss={self.routing.z_loss} need a training step that "
                "says how many rows it has, which this release does not; set both to 0"
            )
        loss = self.routing.balance_loss * balance_loss(routing, rows) + self.routing.z_loss * z_loss(logits_ne, rows)
        return loss * self.auxiliary_scale
