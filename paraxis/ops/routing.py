"""Which experts each token goes to, and the losses that keep experts evenly used.

Top-k gating: Shazeer et al. 2017 (arXiv:1701.06538). Balance loss: Fedus et al. 2021 (Switch, arXiv:2101.03961, eq. 4), for k experts and
one packed row as DeepSeek-V3 states it (arXiv:2412.19437, eq. 17-20). z-loss: Zoph et al. 2022 (ST-MoE, arXiv:2202.08906, eq. 5).
Group-limited selection: DeepSeek-V2 (arXiv:2405.04434, section 2.2.2). Sigmoid gate: DeepSeek-V3, section 2.1.2. Selection bias: there,
and Wang et al. 2024 (arXiv:2408.15664, algorithm 1).

n tokens, m model width, e experts, k chosen for a token, s = n * k pairs of a token and an expert, g groups, b rows.
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
    bias_rate: Annotated[float, "how far an expert's selection bias moves in a step, towards even use; 0 leaves it where it is"] = 0.0
    biased: Annotated[bool, "have a selection bias even if bias_rate is 0, as weights trained with one need"] = False

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
        for name in ("balance_loss", "z_loss", "bias_rate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"routing.{name}={getattr(self, name)} must not be negative; 0 turns it off")

    @property
    def has_bias(self) -> bool:
        """Whether experts are chosen with a bias."""
        return self.biased or self.bias_rate > 0


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


def balance_loss(probability_ne: Tensor, counts_be: Tensor, parts: int = 1) -> Tensor:
    """The sum over rows of sum_e f_e P_e: P_e is the row's mean probability of expert e, f_e its share of choices times e.

    1 for a row whose experts are evenly used. Only P has a gradient. n is b equal rows, one after the other, or one of `parts` equal
    parts of each: then counts_be is still of whole rows, and the sum over parts is the whole's loss.
    """
    rows, experts = counts_be.shape
    mean_be = probability_ne.unflatten(0, (rows, -1)).mean(1) / parts
    chosen_be = counts_be.to(mean_be.dtype)
    return (chosen_be * (experts / chosen_be.sum(1, keepdim=True)) * mean_be).sum()


def z_loss(logits_ne: Tensor, rows: int, parts: int = 1) -> Tensor:
    """The sum over rows of the row's mean of logsumexp(logits)^2, which keeps logits small and so well rounded.

    Of one of `parts` equal parts of each row, its share in that.
    """
    return at_least_fp32(logits_ne).logsumexp(-1).square().mean() * (rows / parts)


def entropy(probability_ne: Tensor) -> Tensor:
    """The summed entropy of the tokens' probabilities, in nats: a float64 scalar without gradient."""
    return torch.special.entr(probability_ne.detach()).sum(dtype=torch.float64)


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


def tally_in_backward(x: Tensor, tally: Tensor, seen: Tensor) -> Tensor:
    """`x`, such that a backward through it adds `seen` to `tally`.

    So a micro-batch is counted once: evaluation has no backward, and what is computed again in one belongs to a single backward.
    """
    return _Tally.apply(x, tally, seen)


class _Tally(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tally: Tensor, seen: Tensor) -> Tensor:
        ctx.tally = tally  # not saved as the graph's own tensors are: it is meant to change before backward
        ctx.save_for_backward(seen)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:  # type: ignore[override]
        (seen,) = ctx.saved_tensors
        ctx.tally.add_(seen)
        return gradient, None, None


def router_logits(x_nm: Tensor, weight_em: Tensor) -> Tensor:
    """x W^T in at least fp32: [n, e]. Near ties between experts would otherwise be settled by rounding.

    What it keeps for backward is of the dtype that came.
    """
    return _RouterLogits.apply(x_nm, weight_em)


class _RouterLogits(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nm: Tensor, weight_em: Tensor) -> Tensor:
        ctx.save_for_backward(x_nm, weight_em)
        return at_least_fp32(x_nm) @ at_least_fp32(weight_em).T

    @staticmethod
    def backward(ctx: Any, gradient_ne: Tensor) -> tuple[Tensor | None, Tensor | None]:  # type: ignore[override]
        x_nm, weight_em = ctx.saved_tensors
        of_x = (gradient_ne @ at_least_fp32(weight_em)).to(x_nm.dtype) if ctx.needs_input_grad[0] else None
        of_weight = (gradient_ne.T @ at_least_fp32(x_nm)).to(weight_em.dtype) if ctx.needs_input_grad[1] else None
        return of_x, of_weight


def sort_by_expert(expert_s: Tensor) -> tuple[Tensor, Tensor]:
    """Which pair stands at each place once pairs are sorted by expert (equals stay in order), and the place of each pair: the inverse."""
    order_s = expert_s.argsort(stable=True)
    places_s = torch.arange(order_s.numel(), device=order_s.device)
    return order_s, torch.empty_like(order_s).scatter_(0, order_s, places_s)


def reorder(x_nm: Tensor, order_s: Tensor, inverse_s: Tensor, copies: int = 1) -> Tensor:
    """The rows of x_nm, each `copies` times in succession, in another order: [s, m].

    Its gradient is gathered too, and a row's copies summed in their order: scattered additions would sum them in any order, rounding each.
    """
    return _Reorder.apply(x_nm, order_s, inverse_s, copies)


class _Reorder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_nm: Tensor, order_s: Tensor, inverse_s: Tensor, copies: int) -> Tensor:
        ctx.save_for_backward(inverse_s)
        ctx.copies = copies
        return x_nm.index_select(0, order_s if copies == 1 else order_s // copies)

    @staticmethod
    def backward(ctx: Any, gradient_sm: Tensor) -> tuple[Tensor, None, None, None]:  # type: ignore[override]
        (inverse_s,) = ctx.saved_tensors
        gradient_sm = gradient_sm.index_select(0, inverse_s)
        if ctx.copies > 1:
            gradient_sm = gradient_sm.unflatten(0, (-1, ctx.copies)).sum(1)
        return gradient_sm, None, None, None


def _within_best_groups(preference_ne: Tensor, config: RoutingConfig) -> Tensor:
    """`preference_ne` with minus infinity for experts outside each token's best groups."""
    grouped_ngi = preference_ne.unflatten(-1, (config.groups, -1))
    best = 1 if config.group_score == "max" else 2
    score_ng = grouped_ngi.topk(best, -1).values.sum(-1)
    group_nj = score_ng.topk(config.chosen_groups, -1).indices
    outside_ng = torch.ones_like(score_ng, dtype=torch.bool).scatter(-1, group_nj, False)
    return grouped_ngi.masked_fill(outside_ng.unsqueeze(-1), -torch.inf).flatten(-2)
