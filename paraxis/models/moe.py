"""The mixture-of-experts layer of a decoder block: every token goes to a few experts, and none is dropped.

b rows, t positions, n = b * t tokens, m model width, e experts, k chosen for a token, s = n * k pairs of a token and an expert,
f width inside an expert.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paraxis.base.errors import ConfigError
from paraxis.base.layout import LayoutTable, Split
from paraxis.base.seams import Dispatch
from paraxis.models.mlp import MLP
from paraxis.ops.grouped import grouped_linear
from paraxis.ops.routing import (
    Routing,
    RoutingConfig,
    balance_loss,
    count_experts,
    entropy,
    inject,
    reorder,
    route,
    router_logits,
    sort_by_expert,
    tally_in_backward,
    z_loss,
)

# Where the experts of a decoder's layers may be split: shared out by `ep`, each cut along its hidden features by `tp`.
EXPERTS_LAYOUT: LayoutTable = {
    "layers.*.mlp.experts.gate_proj": (Split("ep", 0), Split("tp", 2)),
    "layers.*.mlp.experts.up_proj": (Split("ep", 0), Split("tp", 2)),
    "layers.*.mlp.experts.down_proj": (Split("ep", 0), Split("tp", 1)),
}


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


def dispatch_here(x_sm: Tensor, counts_e: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """All experts are on this device."""
    return experts(x_sm, counts_e)


def _alone(counts: Tensor) -> Tensor:
    """The sum over the one rank that has a row."""
    return counts


class MoE(nn.Module):
    """sum over a token's experts of weight * expert(x), plus the shared expert's output where there is one. A `Routed` (base/seams.py).

    Balance and z-loss enter the gradient here (`inject`), summed over rows and times the scale that `begin_step` was given: 1 / (rows of
    the step), or, where several ranks run the layer on the same rows and their gradients are summed, that over their number.
    """

    # Its backward has effects beside gradients, and a dispatch may read counts on the host: a compiled block leaves it as it is.
    traceable = False

    tally_s: Tensor

    def __init__(self, width: int, expert_width: int, routing: RoutingConfig, shared_width: int = 0) -> None:
        super().__init__()
        self.routing = routing
        self.router = nn.Linear(width, routing.experts, bias=False)
        self.bias = nn.Parameter(torch.zeros(routing.experts, dtype=torch.float32), requires_grad=False) if routing.has_bias else None
        self.experts = Experts(routing.experts, width, expert_width)
        self.shared = MLP(width, shared_width) if shared_width else None
        self.register_buffer("tally_s", torch.zeros(routing.experts + 1, dtype=torch.float64), persistent=False)
        self._dispatch: Dispatch = dispatch_here
        self._parts, self._sum_counts = 1, _alone
        self._scale: Tensor | None = None

    def forward(self, x_btm: Tensor) -> Tensor:
        x_nm = x_btm.flatten(0, -2)
        logits_ne = router_logits(x_nm, self.router.weight)
        routing = route(logits_ne, self.routing, self.bias)
        if (self.routing.balance_loss or self.routing.z_loss) and torch.is_grad_enabled():
            x_nm = inject(x_nm, self._auxiliary_loss(logits_ne, routing, rows=x_btm.shape[0]))
        y_nm = self._routed(x_nm, routing)
        if self.shared is not None:
            y_nm = y_nm + self.shared(x_nm)
        if torch.is_grad_enabled():
            seen_s = torch.cat([routing.counts_e.double(), entropy(routing.probability_ne).unsqueeze(0)])
            y_nm = tally_in_backward(y_nm, self.tally_s, seen_s)
        return y_nm.view_as(x_btm)

    def use_dispatch(self, dispatch: Dispatch) -> None:
        """Runs the experts with `dispatch` from now on."""
        self._dispatch = dispatch

    def share_rows(self, parts: int, sum_counts: Callable[[Tensor], Tensor]) -> None:
        """Each packed row is spread over `parts` ranks from now on; `sum_counts` sums an int64 tensor over them."""
        self._parts, self._sum_counts = parts, sum_counts

    def begin_step(self, scale: Tensor) -> None:
        """Zeroes the tally; auxiliary losses are scaled by `scale` until the next step."""
        self._scale = scale
        self.tally_s.zero_()

    @torch.no_grad()
    def end_step(self, counts_e: Tensor) -> None:
        """Moves the selection bias by `bias_rate`: up for experts chosen less often than the mean of the step's counts, else down."""
        if self.bias is not None and self.routing.bias_rate:
            behind_e = counts_e.sum() - counts_e * counts_e.numel()  # times e: whole numbers, so that an even count is seen as even
            self.bias.add_(behind_e.sign().to(self.bias), alpha=self.routing.bias_rate)

    def _routed(self, x_nm: Tensor, routing: Routing) -> Tensor:
        chosen = self.routing.chosen
        order_s, inverse_s = sort_by_expert(routing.expert_nk.flatten())
        y_sm = self._dispatch(reorder(x_nm, order_s, inverse_s, chosen), routing.counts_e, self.experts)
        # Back in token order each token's outputs lie together, so the weighted sum is a product and needs no atomic additions.
        y_nkm = reorder(y_sm, inverse_s, order_s).unflatten(0, (-1, chosen))
        return (routing.weight_nk.to(y_nkm.dtype).unsqueeze(1) @ y_nkm).squeeze(1)

    def _auxiliary_loss(self, logits_ne: Tensor, routing: Routing, rows: int) -> Tensor:
        config = self.routing
        if self._scale is None:
            raise ConfigError(
                f"routing.balance_loss={config.balance_loss} and routing.z_loss={config.z_loss} need a scale: call "
                "begin_step(1 / rows of the step) on this layer before the step's first forward, or set both to 0"
            )
        loss = config.z_loss * z_loss(logits_ne, rows, self._parts)
        if config.balance_loss:
            counts_be = self._sum_counts(count_experts(routing.expert_nk, config.experts, rows))
            loss = loss + config.balance_loss * balance_loss(routing.probability_ne, counts_be, self._parts)
        return loss * self._scale

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "MoE":
        """Where every cast and move of a module passes: neither the bias nor the tally is rounded to a narrower dtype."""
        exact = (self.bias, self.tally_s)

        def unrounded(x: Tensor) -> Tensor:
            y = fn(x)
            narrower = y.dtype.itemsize < x.dtype.itemsize and any(x is kept for kept in exact)
            return x.to(y.device) if narrower else y

        return super()._apply(unrounded, recurse)  # type: ignore[return-value]
