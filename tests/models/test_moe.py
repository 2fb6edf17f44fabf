"""The mixture-of-experts layer against a naive loop over tokens, and against transformers' block."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from paraxis.base.errors import ConfigError
from paraxis.base.seams import routed_layers
from paraxis.base.strategy import RematConfig
from paraxis.models.moe import MoE
from paraxis.ops.routing import RoutingConfig, balance_loss, count_experts, route, z_loss
from paraxis.parallel.apply import compile_blocks
from paraxis.parallel.remat import checkpoint_blocks, kept_by

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


def upstream_of(x):
    return torch.randn(x.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64).to(x.dtype)


def gradients(moe, function, x, upstream, add=0.0):
    moe.zero_grad()
    x.grad = None
    ((function(x) * upstream).sum() + add).backward()
    return [x.grad, *(p.grad.clone() for p in moe.parameters() if p.requires_grad)]


@pytest.mark.parametrize("shared_width", [0, 20])
def test_output_and_every_gradient_are_those_of_a_loop_over_tokens_in_fp64(shared_width):
    moe, x = layer(shared_width=shared_width), tokens()
    upstream = upstream_of(x)
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


def test_training_knows_the_layer_by_its_seam():
    assert list(routed_layers(layer())) == [""]


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
    upstream = upstream_of(x)
    with torch.no_grad():
        assert torch.equal(moe(x), plain(x))
    with pytest.raises(ConfigError, match="begin_step"):
        moe(x)  # nobody has said how many rows the step has
    moe.begin_step(torch.tensor(0.25, dtype=torch.float64))
    ours = gradients(moe, moe, x, upstream)
    logits = x.flatten(0, 1) @ plain.router.weight.T
    chosen = route(logits, ROUTING)
    balance = balance_loss(chosen.probability_ne, count_experts(chosen.expert_nk, 8, rows=2))
    added = 0.25 * (0.5 * balance + 0.2 * z_loss(logits, 2))
    for a, b in zip(ours, gradients(plain, plain, x, upstream, added), strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


@pytest.mark.parametrize("parts", [2, 4])
def test_auxiliary_losses_of_rows_cut_over_ranks_have_the_gradients_of_whole_rows(parts):
    moe = layer(RoutingConfig(experts=8, chosen=3, balance_loss=0.5, z_loss=0.2))
    moe.begin_step(torch.tensor(0.25, dtype=torch.float64))
    x = torch.randn(2, 12, 16, generator=torch.Generator().manual_seed(1), dtype=torch.float64).requires_grad_()
    whole = gradients(moe, moe, x, upstream_of(x))
    shards = [shard.detach().requires_grad_() for shard in x.chunk(parts, 1)]
    counts = []
    moe.share_rows(parts, lambda c: counts.append(c) or c)
    for shard in shards:
        moe(shard)  # what each would give to the sum
    moe.share_rows(parts, lambda c: torch.stack(counts).sum(0))
    found = [gradients(moe, moe, shard, up) for shard, up in zip(shards, upstream_of(x).chunk(parts, 1), strict=True)]
    of_x, *of_weights = zip(*found, strict=True)
    for a, b in zip([torch.cat(of_x, 1), *(sum(each) for each in of_weights)], whole, strict=True):
        assert (a - b).abs().max() <= 1e-12 * b.abs().max()


def test_each_micro_batch_is_tallied_once_recomputed_or_not_and_evaluation_never():
    moe, x = layer(), tokens()
    other = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    expected = torch.zeros(9, dtype=torch.float64)
    for batch in (x, other):
        chosen = route(batch.detach().flatten(0, 1) @ moe.router.weight.detach().T, ROUTING)
        p = chosen.probability_ne
        expected += torch.cat([chosen.counts_e.double(), -(p * p.log()).sum().view(1)])

    def recomputed(x):
        return checkpoint(moe, x, use_reentrant=False)

    for run in (moe, recomputed):
        moe.tally_s.fill_(torch.nan)  # a model made by to_empty has anything there
        moe.begin_step(torch.tensor(1.0))
        for batch in (x, other):
            run(batch).sum().backward()
        with torch.no_grad():
            run(x)
        run(x)  # and never went back
        torch.testing.assert_close(moe.tally_s, expected, rtol=1e-14, atol=0)


def test_recomputing_the_layer_gives_the_same_gradients():
    moe, x = layer(RoutingConfig(experts=8, chosen=3, balance_loss=0.5, z_loss=0.2, bias_rate=0.1), shared_width=20), tokens()
    moe.begin_step(torch.tensor(0.25, dtype=torch.float64))
    expected = gradients(moe, moe, x, upstream_of(x))
    recomputed = gradients(moe, lambda x: checkpoint(moe, x, use_reentrant=False), x, upstream_of(x))
    assert all(torch.equal(a, b) for a, b in zip(recomputed, expected, strict=True))


def test_the_bias_rises_where_an_expert_is_chosen_too_seldom_and_only_chooses():
    moe, x = layer(RoutingConfig(experts=8, chosen=3, bias_rate=2.0)), tokens()
    plain = layer()
    assert torch.equal(moe(x), plain(x))
    moe.end_step(torch.tensor([3, 0, 4, 1, 3, 3, 9, 1], dtype=torch.float64))  # 3 on average
    assert moe.bias.tolist() == [0, 2, -2, 2, 0, 0, -2, 2]
    moe.begin_step(torch.tensor(1.0))
    moe(x).sum().backward()
    assert moe.bias.grad is None
    assert moe.tally_s[[1, 3, 7]].eq(2 * 10).all()  # no probability can make that up
    plain.end_step(torch.ones(8, dtype=torch.float64))


def test_there_is_a_bias_where_weights_need_one_and_it_stays_where_its_rate_is_zero():
    moe = layer(RoutingConfig(experts=8, chosen=3, biased=True))
    moe.end_step(torch.arange(8, dtype=torch.float64))
    assert not moe.bias.any()
    assert "bias" not in dict(layer().named_parameters())
    assert [name for name, parameter in moe.named_parameters() if not parameter.requires_grad] == ["bias"]


def test_no_cast_rounds_the_bias_or_the_tally():
    with torch.device("meta"):
        moe = MoE(16, 24, RoutingConfig(experts=8, chosen=3, biased=True)).to(torch.bfloat16)
    moe.to_empty(device="cpu")
    assert (moe.router.weight.dtype, moe.bias.dtype, moe.tally_s.dtype) == (torch.bfloat16, torch.float32, torch.float64)
    assert moe.double().bias.dtype == torch.float64
    assert list(moe.state_dict()) == [name for name, _ in moe.named_parameters()]  # the tally is no part of it


class Residual(nn.Module):
    """A block with the layer in it."""

    def __init__(self, moe):
        super().__init__()
        self.linear, self.moe = nn.Linear(16, 16, dtype=torch.float64), moe

    def forward(self, x):
        return x + self.moe(self.linear(x).tanh())


@pytest.mark.parametrize("remat", ["none", "selective", "full"])
def test_a_block_compiled_around_the_layer_gives_the_same_gradients_and_tally(remat):
    block, x = Residual(layer(RoutingConfig(experts=8, chosen=3, balance_loss=0.5, z_loss=0.2, bias_rate=0.1))), tokens()
    assert not block.moe.traceable

    def outcome():
        block.moe.begin_step(torch.tensor(0.25, dtype=torch.float64))
        return [*gradients(block, block, x, upstream_of(x)), block.moe.tally_s.clone()]

    expected = outcome()
    compile_blocks([block], "aot_eager", whole=False)
    checkpoint_blocks([block], kept_by(RematConfig(mode=remat), 1), lambda block: False)
    for a, b in zip(outcome(), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)


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
    moe.use_dispatch(in_two_halves)
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
