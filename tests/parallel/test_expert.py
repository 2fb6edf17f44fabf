"""Experts spread over ranks equal experts on one: outputs, and the gradients of inputs and of every expert."""

import pytest
import torch
import torch.distributed as dist

from paraxis.base.strategy import RematConfig
from paraxis.models.moe import Experts, MoE
from paraxis.ops.routing import RoutingConfig
from paraxis.parallel.expert import ExpertDispatch
from paraxis.parallel.remat import checkpoint_blocks, kept_by
from tests.worlds import run_world

EXPERTS, WIDTH = 8, 6
F64 = torch.float64


def counts_of(name, ranks):
    """How many rows each rank has for each expert: [n, e]."""
    if name == "uneven":
        return torch.randint(0, 7, (ranks, EXPERTS), generator=torch.Generator().manual_seed(5))
    counts = torch.zeros(ranks, EXPERTS, dtype=torch.int64)
    if name == "all to one expert":
        counts[:, 5] = 4
    elif name == "one rank has rows":
        counts[1] = torch.arange(EXPERTS)
    return counts  # "none": zeros


def all_experts() -> Experts:
    torch.manual_seed(0)
    return Experts(EXPERTS, WIDTH, 10).to(F64)


def own_experts(of: Experts, rank, ranks) -> Experts:
    """The part of all experts that a rank holds."""
    own = Experts(EXPERTS // ranks, WIDTH, 10).to(F64)
    for mine, whole in zip(own.parameters(), of.parameters(), strict=True):
        mine.data = whole.detach().chunk(ranks)[rank].clone()
    return own


def rows_of(counts, rank):
    """A rank's rows, sorted by expert, and the gradient that comes to their outputs."""
    g = torch.Generator().manual_seed(100 + rank)
    total = int(counts[rank].sum())
    return torch.randn(total, WIDTH, generator=g, dtype=F64).requires_grad_(), torch.randn(total, WIDTH, generator=g, dtype=F64)


def spread(counts):
    """One rank: its outputs, the gradients of its rows, and those of its experts."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    experts = own_experts(all_experts(), rank, ranks)
    dispatch = ExpertDispatch(dist.distributed_c10d._get_default_group())
    x, upstream = rows_of(counts, rank)
    y = dispatch(x, counts[rank], experts)
    y.backward(upstream)
    return y.detach(), x.grad, [p.grad for p in experts.parameters()]


@pytest.mark.parametrize("name", ["uneven", "all to one expert", "one rank has rows", "none"])
@pytest.mark.parametrize("ranks", [2, 4])
def test_spread_experts_give_the_outputs_and_gradients_of_one_process(ranks, name):
    counts = counts_of(name, ranks)
    found = run_world(spread, ranks, counts)
    experts = all_experts()
    for rank, (y, x_grad, _) in enumerate(found):
        x, upstream = rows_of(counts, rank)
        expected = experts(x, counts[rank])
        expected.backward(upstream)
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x_grad, x.grad, rtol=1e-12, atol=1e-12)
    for number, parameter in enumerate(experts.parameters()):
        joined = torch.cat([gradients[number] for _, _, gradients in found])  # of no rows they are zeros, not None
        torch.testing.assert_close(joined, parameter.grad, rtol=1e-12, atol=1e-12)


ROUTING = RoutingConfig(experts=EXPERTS, chosen=3, balance_loss=0.3, z_loss=0.1, bias_rate=0.1)


def layer() -> MoE:
    torch.manual_seed(1)
    moe = MoE(WIDTH, 10, ROUTING, shared_width=4).to(F64)
    moe.begin_step(torch.tensor(0.25, dtype=F64))
    return moe


def batch(rank):
    return torch.randn(2, 5 + rank, WIDTH, generator=torch.Generator().manual_seed(rank), dtype=F64).requires_grad_()


def run(moe, x):
    return moe(x.sin())


def trained(remat, compiled):
    """One rank: the layer's output and gradients by name, its experts' own part only, and its tally."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    moe, x = layer(), batch(rank)
    moe.experts = own_experts(moe.experts, rank, ranks)
    moe.use_dispatch(ExpertDispatch(dist.distributed_c10d._get_default_group()))
    checkpoint_blocks([moe], kept_by(RematConfig(mode=remat), 1), lambda block: False)
    y = torch.compile(run, backend="aot_eager", dynamic=False)(moe, x) if compiled else run(moe, x)
    y.square().sum().backward()
    gradients = {name: p.grad for name, p in moe.named_parameters() if p.requires_grad}
    return y.detach(), x.grad, gradients, moe.tally_s


@pytest.mark.parametrize(
    ("ranks", "remat", "compiled"), [(2, "none", False), (4, "none", False), (2, "selective", False), (4, "full", False), (2, "none", True)]
)
def test_a_layer_with_spread_experts_trains_as_it_does_on_one_process(ranks, remat, compiled):
    found = run_world(trained, ranks, remat, compiled)
    moe = layer()
    for rank, (y, x_grad, _, _) in enumerate(found):
        x = batch(rank)
        expected = run(moe, x)
        expected.square().sum().backward()
        torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(x_grad, x.grad, rtol=1e-12, atol=1e-12)
    for name, parameter in moe.named_parameters():
        if parameter.requires_grad:
            each = [gradients[name] for _, _, gradients, _ in found]
            whole = torch.cat(each) if name.startswith("experts.") else torch.stack(each).sum(0)
            torch.testing.assert_close(whole, parameter.grad, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(torch.stack([tally for *_, tally in found]).sum(0), moe.tally_s, rtol=1e-14, atol=0)
