"""Tensor parallelism, with sequence parallelism or without, from a layout table.

Every split parameter becomes a plain tensor of this rank's part, so the model's own code runs on it unchanged.
What changes is where whole activations are needed: modules under a `Gather` rule receive the whole sequence, and a linear
layer split along its input features sums its partial outputs and keeps this rank's positions.

Without sequence parallelism every rank has all positions everywhere, and all but the sums falls away. Then each rank's gradient of
an activation is a summand of it, from the loss on, where every rank has some of the vocabulary: the sum is made where forward makes
one, and summands of the gradients of whole parameters are added up at the end of a step, as those of positions are.
Source: Shoeybi et al. 2019 (Megatron-LM); Korthikanti et al. 2022, section 4.2.2 (sequence parallelism).
"""

import types
from collections.abc import Callable, Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paraxis.base.errors import ConfigError
from paraxis.base.layout import Gather, LayoutTable, Lookup, Partial, Placed, Split, Whole, matching
from paraxis.parallel.collectives import Group, gather_sequence, own_positions, sum_and_scatter_sequence, sum_summands
from paraxis.parallel.context import gather_zigzag, split_zigzag
from paraxis.parallel.mesh import Mesh
from paraxis.parallel.overlap import read_while_gathering, scatter_while_multiplying

Add = Callable[[Tensor, Group], Tensor]  # sums what ranks have made parts of


def shard_tensors(
    model: nn.Module, table: LayoutTable, placed: Mapping[str, Placed], mesh: Mesh, *, sequence: bool = True, overlap: bool = False
) -> None:
    """Cuts the split parameters of a model on the meta device to this rank's part, and installs the collectives.

    With `sequence`, activations are cut along the sequence between the layers that are; else every rank has all of them. With
    `overlap` the collectives run beside the products that need them, where the table says enough (see `overlap.py`).
    Raises ConfigError for a split parameter of a layer that has no tensor-parallel form, and for a `Gather` that names a wrong reader.
    """
    add = sum_and_scatter_sequence if sequence else sum_summands
    summed_outside = tuple(f"{name}." for name, _ in model.named_modules() if name and isinstance(matching(table, name), Partial))
    for name, module in model.named_modules():
        for short, parameter in list(module.named_parameters(recurse=False)):
            where = placed.get(f"{name}.{short}" if name else short)
            if where is None or not where.splits:
                continue
            setattr(module, short, nn.Parameter(torch.empty(where.computed.sizes, dtype=parameter.dtype, device="meta")))
            if short == "weight" and (split := where.split_along("tp")):
                _adapt(module, name, where, split, mesh.tp, None if name.startswith(summed_outside) else add, overlap)
        if name:
            rule = matching(table, name)
            readers = _readers(name, rule, placed) if overlap else ()
            _spread_sequence(module, rule, mesh, sequence, readers)
            if mesh.degrees.tp > 1 and isinstance(rule, Partial):
                module.register_forward_hook(_Add(mesh.tp, add))


def _readers(name: str, rule: object, placed: Mapping[str, Placed]) -> tuple[str, ...]:
    """The layers that the rule of the module `name` says read its input; ConfigError where one is not split along its outputs."""
    readers = rule.readers if isinstance(rule, Gather) else ()
    for reader in readers:
        where = placed.get(f"{name}.{reader}.weight")
        if where is None or where.split_along("tp") != Split("tp", 0):
            raise ConfigError(
                f'the layout table says that {name}.{reader} reads what {name} gathers, but does not split its weight by Split("tp", 0); '
                f"do that, or leave the readers out"
            )
    return readers


def _spread_sequence(module: nn.Module, rule: object, mesh: Mesh, sequence: bool, readers: tuple[str, ...]) -> None:
    """Gives a module the whole sequence where its rule asks for it, and takes this rank's positions of what it makes whole.

    Where `readers` multiply the sequence while it is gathered, the module gets their products instead. Only with `sequence` is there
    anything to gather from `tp`, and a rank's part to keep.
    """
    tp, cp = sequence and mesh.degrees.tp > 1, mesh.degrees.cp > 1
    if tp and readers:
        read_while_gathering(module, readers, mesh.tp)
    elif tp and isinstance(rule, Gather | Partial | Whole):
        module.register_forward_pre_hook(_GatherInput(mesh.tp))
    if cp and isinstance(rule, Whole):
        module.register_forward_pre_hook(_GatherContext(mesh.cp))
        module.register_forward_hook(_KeepOwnContext(mesh.cp))
    if tp and isinstance(rule, Whole | Lookup):
        module.register_forward_hook(_KeepOwnPositions(mesh.tp))


def _adapt(module: nn.Module, name: str, where: Placed, split: Split, group: Group, add: Add | None, overlap: bool) -> None:
    """Gives a layer whose weight is split the forward that its split needs. The layer itself sums its partial outputs by `add`, unless
    that is done around it; `overlap`: while it makes them.
    """
    if isinstance(module, nn.Linear) and split.dim == 0:
        module.out_features = where.computed.sizes[0]  # each rank makes its own outputs; nothing else changes
    elif isinstance(module, nn.Linear) and split.dim == 1:
        module.in_features = where.computed.sizes[1]
        if add is not None and overlap:
            scatter_while_multiplying(module, group)
        elif add is not None:
            cast(Any, module).product = types.MethodType(_product, module)
            module.forward = types.MethodType(_summed_linear(group, add), module)
        elif module.bias is not None:
            raise ConfigError(f"the layout table sums the output around {name}, which would add its bias once a rank; leave the bias out")
    elif isinstance(module, nn.Embedding) and split.dim == 0:
        assert add is not None, "tokens are embedded outside what is summed as a whole"
        module.forward = types.MethodType(_vocabulary_embedding(group, add, where.computed.offsets[0]), module)
    elif isinstance(module, nn.Linear | nn.Embedding):
        raise ConfigError(
            f"the layout table splits {name}.weight along dimension {split.dim}, which {type(module).__name__} "
            f"has no tensor-parallel form for; split a Linear along 0 or 1, an Embedding along 0"
        )


class _GatherInput:
    """Forward pre-hook: the first argument's sequence is made whole."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather_sequence(args[0], self.group), *args[1:])


class _Add:
    """Forward hook: the sum of an output of which every rank has made a summand."""

    def __init__(self, group: Group, add: Add) -> None:
        self.group, self.add = group, add

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return self.add(output, self.group)


class _GatherContext:
    """Forward pre-hook: the first argument, this rank's positions of a split context, is made the whole sequence."""

    def __init__(self, group: Group) -> None:
        self.group = group

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        return (gather_zigzag(args[0], self.group), *args[1:])


class _KeepOwnContext:
    """Forward hook: of an output that every context rank computed whole, this rank's positions."""

    def __init__(self, group: Group) -> None:
        self.rank, self.ranks = group.rank(), group.size()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return split_zigzag(output, self.ranks)[self.rank]


class _KeepOwnPositions:
    """Forward hook: of an output that every rank computed whole, this rank's positions."""

    def __init__(self, group: Group) -> None:
        self.rank, self.ranks = group.rank(), group.size()

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
        return own_positions(output, self.rank, self.ranks)


def _product(layer: nn.Linear, x_bti: Tensor) -> Tensor:
    """What a layer that holds a part of the input features adds to the output. A split backward puts its own in place of it."""
    return F.linear(x_bti, layer.weight)


def _summed_linear(group: Group, add: Add) -> Callable[[Any, Tensor], Tensor]:
    """Forward of a linear layer that holds a part of the input features, whose partial outputs are summed."""

    def forward(layer: Any, x_bti: Tensor) -> Tensor:
        y_bto = add(layer.product(x_bti), group)
        return y_bto if layer.bias is None else y_bto + layer.bias

    return forward


def _vocabulary_embedding(group: Group, add: Add, first: int) -> Callable[[nn.Embedding, Tensor], Tensor]:
    """Forward of an embedding that holds the vocabulary rows from `first` on; tokens elsewhere add zero."""

    def forward(layer: nn.Embedding, tokens_bt: Tensor) -> Tensor:
        row_bt = tokens_bt - first
        elsewhere_bt = (row_bt < 0) | (row_bt >= layer.weight.shape[0])
        x_btm = F.embedding(row_bt.masked_fill(elsewhere_bt, 0), layer.weight)
        return add(x_btm.masked_fill(elsewhere_bt.unsqueeze(-1), 0), group)

    return forward
