"""The one place that says in which order the axes are applied to a model."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paraxis.base.layout import Placed, place
from paraxis.base.seams import HasHeadLoss, routed_layers
from paraxis.base.strategy import Strategy
from paraxis.ops.loss import chunked_head_loss
from paraxis.parallel.collectives import sum_over
from paraxis.parallel.copies import Copies, make_room_for_copies
from paraxis.parallel.expert import ExpertDispatch
from paraxis.parallel.fsdp import shard_parameters
from paraxis.parallel.grads import Shard
from paraxis.parallel.lowp import convert_linears
from paraxis.parallel.lowp_gather import gather_in_float8
from paraxis.parallel.mesh import Mesh
from paraxis.parallel.remat import Kept, checkpoint_blocks, kept_by
from paraxis.parallel.tensor import shard_tensors
from paraxis.parallel.vocabulary import VocabularyParallelLoss

Fill = Callable[[Tensor, Placed], None]
Keep = Callable[[nn.Module], Sequence[Kept]]


def parallelize(model: nn.Module, mesh: Mesh, strategy: Strategy, fill: Fill, keep: Keep | None = None) -> list[Shard]:
    """Spreads a model, or one stage of it, built on the meta device over the mesh and gives its parameters their first values.

    `fill(local, placed)` writes this rank's stored part of one parameter; `keep(model)`, where the strategy leaves that open, says what
    each block keeps for backward, and may run the model with fake tensors. Returns the parameters in model order.
    Raises ConfigError where a split does not divide a parameter.
    """
    layout: Any = getattr(model, "layout", {})
    blocks: Sequence[nn.Module] = model.blocks() if hasattr(model, "blocks") else ()  # type: ignore[operator]
    ends: Sequence[nn.Module] = model.ends() if hasattr(model, "ends") else ()  # type: ignore[operator]
    degrees = mesh.degrees
    model.to(strategy.precision.master)
    placed = {
        name: place(name, tuple(p.shape), layout, degrees, mesh.at, frozen=not p.requires_grad) for name, p in model.named_parameters()
    }
    shard_tensors(model, layout, placed, mesh, sequence=strategy.sequence_parallel, overlap=strategy.async_tp)
    if isinstance(model, HasHeadLoss):
        how: Any = {"chunk_tokens": strategy.loss_tokens, "compiled": strategy.compile == "inductor"}
        split = partial(VocabularyParallelLoss, mesh.tp, sequence=strategy.sequence_parallel, **how)
        model.use_head_loss(split() if degrees.tp > 1 else partial(chunked_head_loss, **how))
    products: list[list[str]] = []
    if strategy.low_precision is not None:
        products = convert_linears(model, layout, strategy.low_precision)  # after tensor parallelism, whose parts are what is multiplied
    kept = kept_by(strategy.remat, len(blocks)) if keep is None else keep(model)
    exchange(model, mesh)
    whole = [block for block in blocks if degrees.cp == 1 and not untraceable(block)]
    compile_blocks([block for block in blocks if block not in whole], strategy.compile, whole=False)  # recomputation then runs the pieces
    checkpoint_blocks(blocks, kept, lambda block: strategy.compile != "none" and block in whole)
    compile_blocks(whole, strategy.compile, whole=True)  # after recomputation, which it then sees; before FSDP's eager hooks
    alone = degrees.shards == degrees.dp == 1 and not strategy.reshard
    if not alone:
        shard_parameters(model, blocks, ends, mesh, strategy.precision, placed, strategy.reshard, strategy.half_travels)
    model.to_empty(device=mesh.world.device.torch)
    stored = dict(model.named_parameters())
    if alone:
        make_room_for_copies(model, strategy.precision.compute)
    if strategy.low_precision is not None and strategy.low_precision.gathered:
        gather_in_float8(model, products, mesh, strategy.precision.compute, compiled=strategy.compile == "inductor")
    shards = [_filled(parameter, stored[name], placed[name], fill) for name, parameter in model.named_parameters()]
    if alone:
        Copies(model, shards)
    return shards


def exchange(model: nn.Module, mesh: Mesh) -> None:
    """Tells mixture-of-experts layers where their experts are, and with whom they share rows."""
    for layer in routed_layers(model).values():
        if mesh.ep is not None:
            layer.use_dispatch(ExpertDispatch(mesh.ep))
        if mesh.degrees.cp > 1:
            layer.share_rows(mesh.degrees.cp, partial(sum_over, group=mesh.cp))


def compile_blocks(blocks: Sequence[nn.Module], backend: str, whole: bool) -> None:
    """Compiles each block's forward for the shapes it meets; blocks of one kind share what was compiled.

    `whole`: in one piece. Modules with `traceable = False`, and attention across ranks, run eagerly between compiled pieces.
    """
    if backend == "none":
        return
    for block in blocks:
        for module in untraceable(block):
            module.forward = torch.compiler.disable(module.forward)
        block.forward = torch.compile(block.forward, backend=backend, fullgraph=whole, dynamic=False)


def untraceable(whole: nn.Module) -> list[Any]:
    """The modules of a block, or of a model, that no compiler may look into."""
    return [module for module in whole.modules() if not getattr(module, "traceable", True)]


def _filled(parameter: nn.Parameter, stored: nn.Parameter, placed: Placed, fill: Fill) -> Shard:
    with torch.no_grad():
        part = stored.to_local() if isinstance(stored, DTensor) else stored.detach()
        local = nn.Parameter(part, requires_grad=parameter.requires_grad)
        assert tuple(local.shape) == placed.stored.sizes, (placed, local.shape)
        if local.numel():
            fill(local, placed)
    return Shard(placed, parameter, local)
