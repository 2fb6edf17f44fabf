"""The one place that says in which order the axes are applied to a model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paraxis.base.layout import Placed, place
from paraxis.base.seams import HasHeadLoss
from paraxis.base.strategy import Strategy
from paraxis.ops.loss import chunked_head_loss
from paraxis.parallel.fsdp import shard_parameters
from paraxis.parallel.grads import Shard
from paraxis.parallel.mesh import Mesh
from paraxis.parallel.remat import checkpoint_blocks
from paraxis.parallel.tensor import shard_tensors
from paraxis.parallel.vocabulary import VocabularyParallelLoss

Fill = Callable[[Tensor, Placed], None]


def parallelize(model: nn.Module, mesh: Mesh, strategy: Strategy, fill: Fill) -> list[Shard]:
    """Spreads a model built on the meta device over the mesh and gives its parameters their first values.

    `fill(local, placed)` writes this rank's stored part of one parameter. Returns the parameters in model order.
    Raises ConfigError where a split does not divide a parameter.
    """
    layout: Any = getattr(model, "layout", {})
    blocks: Sequence[nn.Module] = model.blocks() if hasattr(model, "blocks") else ()  # type: ignore[operator]
    model.to(strategy.precision.master)
    placed = {name: place(name, tuple(p.shape), layout, mesh.degrees, mesh.at) for name, p in model.named_parameters()}
    if mesh.degrees.tp > 1:
        shard_tensors(model, layout, placed, mesh.tp)
    if isinstance(model, HasHeadLoss):
        fused = strategy.compile == "inductor"
        vocabulary_parallel = mesh.degrees.tp > 1
        model.use_head_loss(VocabularyParallelLoss(mesh.tp, fused) if vocabulary_parallel else partial(chunked_head_loss, compiled=fused))
    checkpoint_blocks(blocks, strategy.remat)
    compile_blocks(blocks, strategy.compile)  # after recomputation, which it then sees; before FSDP, whose hooks must stay eager
    shard_parameters(model, blocks, mesh.sharding, strategy.precision, strategy.reshard)
    model.to_empty(device=mesh.world.device.torch)
    return [_filled(parameter, placed[name], fill) for name, parameter in model.named_parameters()]


def compile_blocks(blocks: Sequence[nn.Module], backend: str) -> None:
    """Compiles each block's forward, whole and for the shapes it meets; blocks of one kind share what was compiled."""
    if backend == "none":
        return
    for block in blocks:
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=True, dynamic=False)


def _filled(parameter: nn.Parameter, placed: Placed, fill: Fill) -> Shard:
    with torch.no_grad():
        local = nn.Parameter(cast(DTensor, parameter).to_local(), requires_grad=parameter.requires_grad)
        assert tuple(local.shape) == placed.stored.sizes, (placed, local.shape)
        if local.numel():
            fill(local, placed)
    return Shard(placed, parameter, local)
