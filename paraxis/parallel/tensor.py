"""Tensor parallelism with sequence parallelism, from a layout table.

Every split parameter becomes a plain tensor of this rank's part, so the model's own code runs on it unchanged.
What changes is where whole activations are needed: modules under a `Gather` rule receive the whole sequence, and a linear
layer split along its input features sums its partial outputs and keeps this rank's positions.
Source: Shoeybi et al. 2019 (Megatron-LM); Korthikanti et al. 2022, section 4.2.2 (sequence parallelism).
"""

import types
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from paraxis.base.errors import ConfigError
from paraxis.base.layout import Gather, LayoutTable, Placed, Whole, matching
from paraxis.parallel.collectives import gather_sequence, own_positions, sum_and_scatter_sequence


def shard_tensors(model: nn.Module, table: LayoutTable, placed: Mapping[str, Placed], group: dist.ProcessGroup) -> None:
    """Cuts the split parameters of a model on the meta device to this rank's part, and installs the sequence collectives.

    Raises ConfigError for a split parameter of a layer that has no tensor-parallel form.
    """
    for name, module in model.named_modules():
        for short, parameter in list(module.named_parameters(recurse=False)):
            where = placed.get(f"{name}.{short}" if name else short)
            if where is not None and where.split is not None and where.split.axis == "tp":
                setattr(module, short, nn.Parameter(torch.empty(where.computed.sizes, dtype=parameter.dtype, device="meta")))
                if short == "weight":
                    _adapt(module, name, where, group)
        rule = matching(table, name) if name else None
        if isinstance(rule, Gather | Whole):
            module.register_forward_pre_hook(_GatherInput(group))
        if isinstance(rule, Whole):
            module.register_forward_hook(_KeepOwnPositions(group))


def _adapt(module: nn.Module, name: str, where: Placed, group: dist.ProcessGroup) -> None:
    """Gives a layer whose weight is split the forward that its split needs."""
    assert where.split is not None
    if isinstance(module, nn.Linear) and where.split.dim == 0:
        module.out_features = where.computed.sizes[0]  # each rank makes its own outputs; nothing else changes
    elif isinstance(module, nn.Linear) and where.split.dim == 1:
        module.in_features = where.computed.sizes[1]
        module.forward = types.MethodType(_summed_linear(group), module)
    elif isinstance(module, nn.Embedding) and where.split.dim == 0:
        module.forward = types.MethodType(_vocabulary_embedding(group, where.computed.offsets[0]), module)
    elif isinstance(module, nn.Linear | nn.Embedding):
        raise ConfigError(
            f"the layout table splits {name}.weight along dimension {where.split.dim}, which {type(module).__name__} "
            f"has no tensor-parallel form for; split a Linear along 0 or 1, an Embedding along 0"
        )


class _GatherInput:
    """Forward pre-hook: the first argument's sequence is made whole."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather_sequence(args[0], self.group), *args[1:])


class _KeepOwnPositions:
    """Forward hook: of an output that every rank computed whole, this rank's positions."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.rank, self.ranks = group.rank(), group.size()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return own_positions(output, self.rank, self.ranks)


def _summed_linear(group: dist.ProcessGroup) -> Callable[[nn.Linear, Tensor], Tensor]:
    """Forward of a linear layer that holds a part of the input features: partial outputs summed, own positions kept."""

    def forward(layer: nn.Linear, x_bti: Tensor) -> Tensor:
        y_bto = sum_and_scatter_sequence(F.linear(x_bti, layer.weight), group)
        return y_bto if layer.bias is None else y_bto + layer.bias

    return forward


def _vocabulary_embedding(group: dist.ProcessGroup, first: int) -> Callable[[nn.Embedding, Tensor], Tensor]:
    """Forward of an embedding that holds the vocabulary rows from `first` on; tokens elsewhere add zero."""

    def forward(layer: nn.Embedding, tokens_bt: Tensor) -> Tensor:
        row_bt = tokens_bt - first
        elsewhere_bt = (row_bt < 0) | (row_bt >= layer.weight.shape[0])
        x_btm = F.embedding(row_bt.masked_fill(elsewhere_bt, 0), layer.weight)
        return sum_and_scatter_sequence(x_btm.masked_fill(elsewhere_bt.unsqueeze(-1), 0), group)

    return forward
