"""Which experts each token goes to, and the losses that keep experts evenly used.

Top-k gating: Shazeer et al. 2017 (arXiv:1701.06538). Balance loss: Fedus et al. 2021 (Switch, arXiv:2101.03961, eq. 4), for k experts and
one packed row as DeepSeek-V3 states it (arXiv:2412.19437, eq. 17-20). z-loss: Zoph et al. 2022 (ST-MoE, arXiv:2202.08906, eq. 5).
Group-limited selection: DeepSeek-V2 (arXiv:2405.04434, section 2.2.2). Sigmoid gate and selection bias: DeepSeek-V3, section 2.1.2.

n tokens, e experts, k chosen for a token, g groups, b rows.
"""

from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from torch import Tensor

from paraxis.base.dtypes import at_least_fp32
from paraxis.base.errors import ConfigError

# Keeps normalised weights finite where every chosen sigmoid has underflowed.
TINY = 1e-20


@dataclass(frozen=True, kw_only=True)
class RoutingConfig:
    """How tokens choose experts."""

    experts: Annotated[int, "how many experts there are"]
    chosen: Annotated[int, "experts that each token goes to"]
    gate: Annotated[Literal["softmax", "sigmoid"], "what makes a score of a logit"] = "softmax"
    normalise: Annotated[bool, "divide the chosen experts' weights by their sum"] = True
    scale: Annotated[float, "factor on the weights"] = 1.0
    groups: Annotated[int, "equal groups of neighbouring experts; 1 means no limit by group"] = 1
    chosen_groups: Annotated[int, "groups that a token's experts may come from"] = 1
    group_score: Annotated[Literal["max", "top2"], "a group's score: its best expert's (V2), or the sum of its best two (V3)"] = "max"
    balance_loss: Annotated[float, "coefficient of the balance loss; 0 turns it off"] = 0.0
    z_loss: Annotated[float, "coefficient of the z-loss; 0 turns it off"] = 0.0

    def __post_init__(self) -> None:
        for name in ("experts", "chosen", "groups", "chosen_groups"):
            if getattr(self, name) < 1:
                raise ConfigError(f"routing.{name}={getattr(self, name)} must be at least 1")
        for name, choices in (("gate", ("softmax", "sigmoid")), ("group_score", ("max", "top2"))):
            if getattr(self, name) not in choices:
                raise ConfigError(f"routing.{name}={getattr(self, name)!r} is unknown; choose one of {', '.join(choices)}")
        if self.experts % self.groups:
            raise ConfigError(f"routing.groups={self.groups} does not divide routing.experts={self.experts}; choose groups that divides it")
        if self.chosen_groups > self.groups:
            raise ConfigError(f"routing.chosen_groups={self.chosen_groups} is more than routing.groups={self.groups}; lower it")
        if self.group_score == "top2" and self.experts < 2 * self.groups:
            raise ConfigError(f"routing.group_score='top2' needs two experts in each of {self.groups} groups; lower routing.groups")
        if self.chosen > (reach := self.chosen_groups * self.experts // self.groups):
            raise ConfigError(f"routing.chosen={self.chosen} is more than the {reach} experts a token can reach; lower it")
        if self.scale <= 0:
            raise ConfigError(f"routing.scale={self.scale} must be over 0")
        for name in ("balance_loss", "z_loss"):
            if getattr(self, name) < 0:
                raise ConfigError(f"routing.{name}={getattr(self, name)} must not be negative; 0 turns it off")


@dataclass(frozen=True)
class Routing:
    """Where tokens go. `expert_nk` is int64; `weight_nk` and `probability_ne` (scores that sum to 1 over experts) are of at least fp32.

    `counts_e`, int64, is how many tokens each expert receives.
    """

    expert_nk: Tensor
    weight_nk: Tensor
    probability_ne: Tensor
    counts_e: Tensor


def route(logits_ne: Tensor, config: RoutingConfig, bias_e: Tensor | None = None) -> Routing:
    """Chooses experts by score. `bias_e` is added to the scores for choosing only: weights, and so gradients, do not see it."""
    logits_ne = at_least_fp32(logits_ne)
    if config.gate == "softmax":
        score_ne = probability_ne = logits_ne.softmax(-1)
    else:
        score_ne = logits_ne.sigmoid()
        probability_ne = score_ne / (score_ne.sum(-1, keepdim=True) + TINY)
    preference_ne = score_ne.detach() if bias_e is None else score_ne.detach() + bias_e
    if config.chosen_groups < config.groups:
        preference_ne = _within_best_groups(preference_ne, config)
    expert_nk = preference_ne.topk(config.chosen, -1).indices
    weight_nk = score_ne.gather(-1, expert_nk)
    if config.normalise:
        weight_nk = weight_nk / (weight_nk.sum(-1, keepdim=True) + TINY)
    return Routing(expert_nk, weight_nk * config.scale, probability_ne, count_experts(expert_nk, config.experts, rows=1).squeeze(0))


def count_experts(expert_nk: Tensor, experts: int, rows: int) -> Tensor:
    """How often each expert is chosen in each of `rows` equal runs of tokens: int64 [b, e]."""
    expert_bi = expert_nk.reshape(rows, -1)
    slot_bi = expert_bi + experts * torch.arange(rows, device=expert_nk.device)[:, None]
    slots = torch.zeros(rows * experts, dtype=torch.int64, device=expert_nk.device)
    return slots.index_add_(0, slot_bi.flatten(), torch.ones_like(slot_bi.flatten())).view(rows, experts)


def balance_loss(routing: Routing, rows: int) -> Tensor:
    """The sum over rows of sum_e f_e P_e: P_e is the row's mean probability of expert e, f_e its share of choices times e.

    1 for a row whose experts are evenly used. Only P has a gradient. n is `rows` equal rows, one after the other.
    """
    experts = routing.probability_ne.shape[-1]
    mean_be = routing.probability_ne.unflatten(0, (rows, -1)).mean(1)
    chosen_be = count_experts(routing.expert_nk, experts, rows).to(mean_be.dtype)
    share_be = chosen_be * (experts / (routing.expert_nk.numel() // rows))
    return (share_be * mean_be).sum()


def z_loss(logits_ne: Tensor, rows: int) -> Tensor:
    """The sum over rows of the row's mean of logsumexp(logits)^2, which keeps logits small and so well rounded."""
    return at_least_fp32(logits_ne).logsumexp(-1).square().mean() * rows


def inject(x: Tensor, loss: Tensor) -> Tensor:
    """`x`, such that any backward through it also runs `loss.backward()`, wherever in a pipeline the layer is.

    `loss` is a scalar, already scaled to what should be added to the step's loss: the gradient that comes to `x` does not scale it.
    """
    return _Inject.apply(x, loss)


class _Inject(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.save_for_backward(loss)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        (loss,) = ctx.saved_tensors
        return gradient, torch.ones_like(loss)


def _within_best_groups(preference_ne: Tensor, config: RoutingConfig) -> Tensor:
    """`preference_ne` with minus infinity for experts outside each token's best groups."""
    grouped_ngi = preference_ne.unflatten(-1, (config.groups, -1))
    best = 1 if config.group_score == "max" else 2
    score_ng = grouped_ngi.topk(best, -1).values.sum(-1)
    group_nj = score_ng.topk(config.chosen_groups, -1).indices
    outside_ng = torch.ones_like(score_ng, dtype=torch.bool).scatter(-1, group_nj, False)
    return grouped_ngi.masked_fill(outside_ng.unsqueeze(-1), -torch.inf).flatten(-2)
