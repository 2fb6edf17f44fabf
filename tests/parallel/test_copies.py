"""A rank that has its parameters to itself computes with copies of its masters, to the bit as it does through FSDP."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from paraxis.base.device import CPU
from paraxis.base.layout import Placed, whole_box
from paraxis.optim.build import build_optimizer
from paraxis.optim.config import OptimConfig
from paraxis.parallel.copies import Copies, make_room_for_copies
from paraxis.parallel.grads import Shard
from paraxis.recipes import RECIPES
from tests.measure import MadeRows, measure


def config(layers: int):
    made = RECIPES["debug"]()
    model = replace(made.model, width=32, heads=4, kv_heads=2, mlp_width=64, layers=layers, vocab_size=96)
    data = replace(made.data, seq_len=16)
    train = replace(made.train, micro_batch=2, global_tokens=8 * 16)  # four micro-batches on one rank
    return replace(made, model=model, data=data, train=train, precision="bf16")


@pytest.mark.parametrize("layout", ["", "tp2", "pp2.1f1b", "pp2.zbv"])
def test_masters_with_copies_train_as_fsdp_on_a_mesh_of_one_does(layout):
    made = config(layers=4 if layout.endswith("zbv") else 2)
    rows = MadeRows(96, 16)
    alone, sharded = (measure(config=made, layout=layout, rows=rows, steps=3, parallel={"reshard": how}) for how in ("never", "always"))
    assert alone.losses == sharded.losses
    assert alone.norms == sharded.norms
    for name, weight in sharded.weights.items():
        assert weight.dtype == torch.float32
        assert torch.equal(alone.weights[name], weight), name


def own(model: nn.Module) -> list[Shard]:
    masters = dict(model.named_parameters())
    make_room_for_copies(model, torch.bfloat16)
    places = {name: Placed(name, tuple(p.shape), whole_box(tuple(p.shape)), whole_box(tuple(p.shape))) for name, p in masters.items()}
    return [Shard(places[name], copy, nn.Parameter(masters[name].detach())) for name, copy in model.named_parameters()]


def test_copies_follow_whatever_writes_into_masters():
    model = nn.Linear(4, 4)
    shards = own(model)
    Copies(model, shards)
    x = torch.randn(2, 4, dtype=torch.bfloat16)

    def follows() -> bool:
        model(x)
        return all(torch.equal(shard.parameter, shard.local.bfloat16()) for shard in shards)

    assert follows()
    model(x).sum().backward()
    for shard in shards:
        shard.take_gradient()
        assert shard.parameter.grad is None
        assert shard.local.grad is not None
        assert shard.local.grad.dtype == torch.float32
    parameters = {shard.placed.name: shard.local for shard in shards}
    before = [shard.local.detach().clone() for shard in shards]
    shapes = {name: tuple(p.shape) for name, p in parameters.items()}
    boxes = {name: whole_box(shape) for name, shape in shapes.items()}
    build_optimizer(parameters, shapes, boxes, OptimConfig(lr=0.1), CPU, seed=0).step(0.1)
    torch.autograd.graph.increment_version([shard.local for shard in shards])  # as train_step does after a fused optimizer
    assert not any(torch.equal(was, shard.local) for was, shard in zip(before, shards, strict=True))
    assert follows()
    with torch.no_grad():
        shards[0].local.detach().fill_(3.0)  # as a checkpoint does
    assert follows()


def test_a_parameter_in_two_places_has_one_copy():
    model = nn.ModuleDict({"a": nn.Linear(4, 4, bias=False), "b": nn.Linear(4, 4, bias=False)})
    model["b"].weight = model["a"].weight
    make_room_for_copies(model, torch.bfloat16)
    assert model["a"].weight is model["b"].weight
    assert model["a"].weight.dtype == torch.bfloat16
