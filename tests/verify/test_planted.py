"""`paraxis verify` finds bugs: each of these is planted in ranks of more than one process, found, and named.

The table is to be extended: a name, the model, a layout that has the bug, how to plant it, and what must be said of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from paraxis.models.llama import LlamaConfig
from paraxis.models.moe import MoE
from paraxis.models.qwen3 import Qwen3MoEConfig
from paraxis.ops.routing import RoutingConfig
from paraxis.optim.build import Optimizer
from paraxis.parallel import apply, collectives, tensor
from paraxis.parallel.fsdp import fsdp_units
from paraxis.parallel.grads import Shard, local_gradients
from paraxis.parallel.tied import TiedCopies
from paraxis.recipes import RECIPES
from paraxis.train import passes, run, step
from paraxis.train.config import RunConfig
from paraxis.verify.run import verify

Make = Callable[[Any], Callable[..., Any]]

DENSE = RECIPES["debug"]().model
TIED = replace(DENSE, tied=True)
EXPERTS = Qwen3MoEConfig(
    vocab_size=96,
    width=32,
    layers=2,
    heads=4,
    kv_heads=2,
    mlp_width=32,
    routing=RoutingConfig(experts=8, chosen=2, balance_loss=0.1, z_loss=0.1),
)


@dataclass(frozen=True)
class Bug:
    """A bug: `make(right)` gives the wrong function that stands at `owner.name` where there are several ranks."""

    layout: str
    owner: Any
    name: str
    make: Make
    said: str
    model: LlamaConfig = DENSE


def no_count(right):
    return lambda batches, mesh: torch.ones((), dtype=torch.int64)


def own_count(right):
    """Each rank divides by its own targets: a mean of means."""
    return lambda batches, mesh: torch.stack([batch.target_count for batch in batches]).sum() * dist.get_world_size()


def averages(right):
    def wrong(model, *args, **kwargs):
        right(model, *args, **kwargs)
        for unit in fsdp_units(model):
            unit.set_gradient_divide_factor(float(dist.get_world_size()))

    return wrong


def norm_of_ones_own(right):
    """The first rank takes the norm for half of what the others do."""
    return lambda norm, max_norm: right(norm / 2 if dist.get_rank() == 0 else norm, max_norm)


def copies_counted(right):
    return lambda shards: torch.stack([grad.double().square().sum() for grad in local_gradients(shards)]).sum()


def last_only(right):
    """The loss of all micro-batches, the gradient of the last."""

    def wrong(self, batches, scale):
        with torch.no_grad():
            before = sum(self.model(batch) * scale for batch in batches[:-1])
        return right(self, batches[-1:], scale) + before

    return wrong


def nothing(right):
    return lambda *args: None


def unsummed(right):
    return lambda x, group: collectives.own_positions(x, group.rank(), group.size())


def shifted(right):
    """The second rank's positions are one too high."""

    def wrong(batch, parts, index):
        own = right(batch, parts, index)
        return replace(own, positions_bt=own.positions_bt + index)

    return wrong


def experts_twice(right):
    def wrong(self):
        right(self)
        if ".experts." in self.placed.name:
            self.local.grad.mul_(2.0)

    return wrong


def no_decay(right):
    def wrong(self, parameters, places, groups, config, device):
        right(self, parameters, places, groups, replace(config, weight_decay=0.0), device)

    return wrong


def by_micro_batch(right):
    return lambda self, scale: right(self, scale * 2)


def half_tally(right):
    return lambda spread: right(spread) / dist.get_world_size()


BUGS = {
    "never divided by the count of targets": Bug("fsdp2", step, "count_targets", no_count, "all gradients, by a factor of "),
    "a mean of means": Bug("dp2", step, "count_targets", own_count, "all gradients, "),
    "gradients averaged over ranks": Bug("fsdp2", apply, "shard_parameters", averages, "all gradients, by a factor of 0.5"),
    "clipped by a norm of the rank's own": Bug("fsdp2", step, "clip_factor", norm_of_ones_own, "all clipped gradients, "),
    "copies counted in the norm": Bug("dp2", step, "square_sum", copies_counted, "gradient norm, by a factor of 1.414"),
    "only the last micro-batch's gradient": Bug("dp2", passes.Accumulation, "forward_backward", last_only, "all gradients, "),
    "norm weights not summed over tp": Bug("tp2", step, "sum_copies", nothing, "norm.weight"),
    "partial outputs not summed over tp": Bug("tp2", tensor, "sum_and_scatter_sequence", unsummed, "all gradients, "),
    "positions off by one on a context rank": Bug("cp2", run, "own_part", shifted, "all gradients, "),
    "expert gradients scaled twice": Bug("fsdp2xep2", Shard, "take_gradient", experts_twice, "mlp.experts.", EXPERTS),
    "weight decay forgotten": Bug("fsdp2", Optimizer, "__init__", no_decay, "after steps of sgd"),
    "a tied embedding's second gradient lost": Bug("pp2", TiedCopies, "sum_gradients", nothing, "gradient of embed.weight", TIED),
    "auxiliary losses scaled by micro-batch": Bug("dp2", MoE, "begin_step", by_micro_batch, "gradient", EXPERTS),
    "experts' tokens averaged over ranks": Bug("dp2", step, "sum_tallies", half_tally, "counts of tokens by expert", EXPERTS),
}


def planted(bug: Bug) -> Callable[..., Any]:
    """What stands in the right function's place: itself on one process."""
    right = getattr(bug.owner, bug.name)
    wrong = bug.make(right)
    return lambda *args, **kwargs: (wrong if dist.get_world_size() > 1 else right)(*args, **kwargs)


def config_of(model: LlamaConfig) -> RunConfig:
    return replace(RECIPES["debug"](), model=model)


@pytest.mark.parametrize("name", BUGS)
def test_a_planted_bug_is_found_and_named(name, monkeypatch):
    bug = BUGS[name]
    monkeypatch.setattr(bug.owner, bug.name, planted(bug))
    [row] = verify(config_of(bug.model), [bug.layout], steps=2)
    assert not row.ok
    assert bug.said in row.reason, row.reason
    assert row.grad_name is not None, row.account


@pytest.mark.parametrize(("layout", "model"), sorted({(bug.layout, bug.model) for bug in BUGS.values()}, key=str))
def test_without_a_bug_the_same_layouts_pass(layout, model):
    [row] = verify(config_of(model), [layout], steps=2)
    assert row.ok, row.reason + row.account
