"""Sharded and replicated data parallelism, and mixed precision, by FSDP2; parameters that one rank has to itself are copies.py's.

Gradients are summed, not averaged: the loss is already divided by the step's global count of targets.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.fsdp._fully_shard._fsdp_param import ExtensionsData
from torch.distributed.tensor import Shard as ShardAlong

from paraxis.base.dtypes import Precision
from paraxis.base.layout import Placed
from paraxis.base.seams import routed_layers
from paraxis.parallel.copies import Copies
from paraxis.parallel.mesh import Mesh
from paraxis.parallel.reduction import Reduction


def shard_parameters(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    ends: Iterable[nn.Module],
    mesh: Mesh,
    precision: Precision,
    placed: Mapping[str, Placed],
    reshard: bool,
    half_travels: bool,
) -> None:
    """Shards experts that are split by `ep`, then `blocks` and `ends`, then what is left of `model`; compute, reduction and master
    dtypes as `precision` says.

    `reshard` frees a block's gathered parameters between its forward and its backward; with `half_travels` gradients travel as they were
    computed, see `Reduction`. Frozen parameters are left as they are.
    """
    parameters = dict(model.named_parameters())
    frozen = {parameters[name] for name, where in placed.items() if where.frozen}
    dim_of = {parameters[name]: where.shard_dim for name, where in placed.items()}
    policy = MixedPrecisionPolicy(param_dtype=precision.compute, reduce_dtype=precision.reduce, cast_forward_inputs=False)
    options: dict[str, Any] = {"mp_policy": policy, "ignored_params": frozen}
    if mesh.degrees.ep > 1:
        for layer in routed_layers(model).values():
            fully_shard(
                layer.experts,
                mesh=mesh.experts,
                reshard_after_forward=reshard,
                shard_placement_fn=lambda parameter: ShardAlong(dim_of[parameter]),
                **options,
            )
    for block in blocks:
        fully_shard(block, mesh=mesh.sharding, reshard_after_forward=reshard, **options)
    # These parameters are needed again as soon as backward starts, so they stay.
    for module in (*ends, model):
        fully_shard(module, mesh=mesh.sharding, reshard_after_forward=False, **options)
    for unit in fsdp_units(model):
        unit.set_gradient_divide_factor(1.0)
        unit.set_force_sum_reduction_for_comms(True)  # gloo has no pre-multiplied sum; a plain sum is what we mean
    for group in _groups(model):
        group._reduce_scatter_comm = Reduction(group, precision.compute if half_travels else None, replicas=mesh.degrees.dp)


def fsdp_units(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP gathers one at a time, the root first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


class Gathering(Protocol):
    """How one parameter is gathered: `send` gives what travels of this rank's part, `receive` makes the parameter of what has arrived.

    `receive` is given the parameter that it made before, to fill again; it returns one with the storage that FSDP may free.
    """

    def send(self) -> Tensor: ...

    def receive(self, arrived: Tensor, before: Tensor | None) -> Tensor: ...


def gather_by(model: nn.Module, ways: Mapping[nn.Parameter, Gathering]) -> None:
    """Gathers these parameters, sharded already and not on the meta device, in their own ways.

    The one front for what FSDP2 asks of a stored part that has its own way: two methods, found by their names.
    """
    for group in _groups(model):
        for held in group.fsdp_params:
            if held.sharded_param in ways:
                held._extensions_data = ExtensionsData()
                stored = held.sharded_param._local_tensor
                stored.fsdp_pre_all_gather, stored.fsdp_post_all_gather = _hooks(ways[held.sharded_param])


def sent_apart(model: nn.Module) -> dict[nn.Parameter, Tensor]:
    """What travels of this rank's part of each parameter that is gathered in a way of its own."""
    parts = [(held.sharded_param, held.sharded_param._local_tensor) for group in _groups(model) for held in group.fsdp_params]
    return {
        parameter: stored.fsdp_pre_all_gather(None, None, None, None, None)[0][0]
        for parameter, stored in parts
        if hasattr(stored, "fsdp_pre_all_gather")
    }


def _hooks(way: Gathering) -> tuple[Any, Any]:
    def send(mesh: Any, outer_size: Any, outer_stride: Any, module: Any, policy: Any) -> tuple[tuple[Tensor, ...], None]:
        return (way.send(),), None

    def receive(arrived: tuple[Tensor, ...], metadata: None, dtype: torch.dtype, *, out: Tensor | None = None) -> Any:
        made = way.receive(arrived[0], out)
        return None if out is not None else (made, arrived)

    return send, receive


def reduce_now(model: nn.Module, last: bool, each_micro_batch: bool, only: bool = False) -> None:
    """Says, before a micro-batch's backward, whether its gradients travel: on the `last` always, before it only if each one shall.

    They do so as they were computed where none of other micro-batches were added: with each, or where it is the step's `only` one.
    Replicas (dp) are summed once, after the last, in either case. A model whose parameters are one rank's own has nothing to travel.
    """
    if not isinstance(model, FSDPModule):
        return
    for group in _groups(model):
        group._reduce_scatter_comm.as_computed = each_micro_batch or only
    model.set_requires_gradient_sync(last or each_micro_batch)
    model.set_requires_all_reduce(last)
    model.set_is_last_backward(last)


@dataclass(frozen=True)
class PipelineReduction:
    """When a pipeline stage's gradients travel: once a step, when they are complete, or after each micro-batch, which needs less memory.

    The one front for FSDP2's private post-backward: weight gradients that a split backward makes later are made outside autograd,
    where FSDP's own hooks do not see them.
    """

    each_micro_batch: bool = False
    reshard: bool = False  # after each backward; else parameters stay gathered from a step's first forward to its last backward

    def before_backward(self, module: nn.Module, last: bool) -> None:
        reduce_now(module, last, self.each_micro_batch)
        if isinstance(module, FSDPModule):
            module.set_reshard_after_backward(last or self.reshard)

    def gradients_added(self, module: nn.Module) -> None:
        """Gradients were made outside a backward: they join those of the micro-batches before, in the reduce dtype."""
        if isinstance(copies := getattr(module, "copies", None), Copies):
            copies.take()
        for group in _groups(module):
            for parameter in group.fsdp_params:
                parameter.accumulate_unsharded_grad_if_needed()
                parameter.to_accumulated_grad_if_needed()

    def gradients_complete(self, module: nn.Module) -> None:
        """Sums the gradients over ranks now, as FSDP does after a last backward."""
        self.before_backward(module, last=True)
        for group in _groups(module):
            group.post_backward()
        if isinstance(module, FSDPModule):
            module._get_fsdp_state()._root_post_backward_final_callback()


def _groups(module: nn.Module) -> list[Any]:
    states = [unit._get_fsdp_state() for unit in fsdp_units(module)]
    # torch 2.11 and 2.12 have one group a module, 2.13 a list.
    found = [getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group] for state in states]
    return [group for groups in found for group in groups if group is not None]
