"""The mixture-of-experts layer against a naive loop over tokens, and against transformers' block."""

import pytest
import torch
from torch.nn import functional as F

from paraxis.base.errors import ConfigError
from paraxis.models.moe import MoE
from paraxis.ops.routing import RoutingConfig, balance_loss, route, z_loss

ROUTING = RoutingConfig(experts=8, chosen=3)


def layer(routing=ROUTING, shared_width=0, dtype=torch.float64) -> MoE:
    torch.manual_seed(0)
    moe = MoE(16, 24, routing, shared_width)
    torch.nn.init.normal_(moe.router.weight)
    return moe.to(dtype)


def tokens(dtype=torch.float64) -> torch.Tensor:
    return torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(1), dtype=dtype).requires_grad_()


def naive(moe: MoE, x_btm: torch.Tensor) -> torch.Tensor:
    """Token by token, from the definition."""
    rows = []
    for x_m in x_btm.flatten(0, 1):
        probability = (moe.router.weight @ x_m).softmax(0)
        best = probability.argsort(descending=True)[: moe.routing.chosen]
        weight = probability[best] / probability[best].sum()
        y = torch.zeros_like(x_m)
        for w, e in zip(weight, best, strict=True):
            hidden = F.silu(x_m @ moe.experts.gate_proj[e]) * (x_m @ moe.experts.up_proj[e])
            y = y + w * (hidden @ moe.experts.down_proj[e])
        rows.append(y if moe.shared is None else y + moe.shared(x_m))
    return torch.stack(rows).view_as(x_btm)


def gradients(moe, function, x, upstream, add=0.0):
    moe.zero_grad()
    x.grad = None
    ((function(x) * upstream).sum() + add).backward()
    return [x.grad, *(p.grad.clone() for p in moe.parameters())]


@pytest.mark.parametrize("shared_width", [0, 20])
def test_output_and_every_gradient_are_those_of_a_loop_over_tokens_in_fp64(shared_width):
    moe, x = layer(shared_width=shared_width), tokens()
    upstream = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    ours, theirs = moe(x), naive(moe, x)
    assert ours.dtype == torch.float64
    assert (ours - theirs).abs().max() <= 1e-12 * theirs.abs().max()
    expected = gradients(moe, lambda x: naive(moe, x), x, upstream)
    for a, b in zip(gradients(moe, moe, x, upstream), expected, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_is_the_same_layer_rounded(dtype, tolerance):
    x = tokens().detach().to(dtype)
    with torch.no_grad():
        expected = layer(dtype=dtype).double()(x.double())
        ours = layer(dtype=dtype)(x)
    assert ours.dtype == dtype
    assert (ours - expected).abs().max() <= tolerance * expected.abs().max()


def test_an_idle_expert_has_a_gradient_of_zero():
    moe, x = layer(RoutingConfig(experts=8, chosen=1), dtype=torch.bfloat16), tokens(torch.bfloat16)
    with torch.no_grad():
        moe.router.weight.zero_()
    moe(x).sum().backward()  # ties: all tokens go to one expert
    used = moe.experts.up_proj.grad.flatten(1).any(1)
    assert used.sum() == 1


def test_auxiliary_losses_join_the_gradient_at_their_scale_and_leave_the_output():
    routing = RoutingConfig(experts=8, chosen=3, balance_loss=0.5, z_loss=0.2)
    plain, moe, x = layer(), layer(routing), tokens()
    upstream = torch.randn(2, 10, 16, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(moe(x), plain(x))
    with pytest.raises(ConfigError, match="set both to 0"):
        moe(x)  # nobody has said how many rows the step has
    for scale in (0.25, torch.tensor(0.25, dtype=torch.float64)):
        moe.auxiliary_scale = scale
        ours = gradients(moe, moe, x, upstream)
        logits = x.flatten(0, 1) @ plain.router.weight.T
        added = 0.25 * (0.5 * balance_loss(route(logits, ROUTING), 2) + 0.2 * z_loss(logits, 2))
        for a, b in zip(ours, gradients(plain, plain, x, upstream, added), strict=True):
            assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_dispatch_sees_tokens_sorted_by_expert_and_can_be_exchanged():
    moe, x = layer(), tokens()
    seen = []

    def in_two_halves(x_sm, counts_e, experts):
        """Each half of the experts alone, as two ranks would run them."""
        seen.append(counts_e)
        first = torch.cat([counts_e[:4], torch.zeros_like(counts_e[4:])])
        cut = int(first.sum())
        return torch.cat([experts(x_sm[:cut], first), experts(x_sm[cut:], counts_e - first)])

    expected = moe(x)
    moe.dispatch = in_two_halves
    assert torch.equal(moe(x), expected)
    assert seen[0].sum() == 2 * 10 * 3


def test_transformers_block_on_the_same_weights_gives_the_same_in_fp32():
    qwen3_moe = pytest.importorskip("transformers.models.qwen3_moe.modeling_qwen3_moe")
    config = qwen3_moe.Qwen3MoeConfig(
        hidden_size=16, moe_intermediate_size=24, num_experts=8, num_experts_per_tok=3, norm_topk_prob=True, hidden_act="silu"
    )
    moe, x = layer(dtype=torch.float32), tokens(torch.float32)
    judge = qwen3_moe.Qwen3MoeSparseMoeBlock(config)
    gate_up = torch.cat([moe.experts.gate_proj, moe.experts.up_proj], -1).mT
    judge.load_state_dict(
        {"gate.weight": moe.router.weight, "experts.gate_up_proj": gate_up, "experts.down_proj": moe.experts.down_proj.mT}
    )
    with torch.no_grad():
        ours, theirs = moe(x), judge(x)
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
