"""Asynchronous tensor parallelism: activations travel between ranks while others of them are being multiplied.

The gathering before column-split products and the summing after row-split ones are taken apart into messages of one rank's positions.
Where products wait for positions, a rank starts with its own while the others' travel; where others wait for products, it makes theirs
first and its own last. Nothing is sent that the plain form does not send, and each product is made once.
Source: Wang et al. 2023, "Overlap Communication with Dependent Computation via Decomposition in Large Deep Learning Models".

b rows, t positions (t/n of them a rank's own, u), i and o input and output features. A product is x @ matrix, with a matrix [i, o].
"""

import types
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.parallel.collectives import Group, arrived, shift
from paraxis.parallel.deferred import OwedGradients, weight_gradient


def _multiply_gathered(x_bui: Tensor, matrices: Sequence[Tensor], group: Group) -> tuple[Tensor, list[Tensor]]:
    """Every rank's positions [b, t, i], and their products with each matrix, made as they arrive."""
    rank, ranks = group.rank(), group.size()
    travelling = [shift(x_bui, by, group) for by in range(1, ranks)]
    parts = {rank: x_bui}
    products = {rank: [x_bui @ matrix for matrix in matrices]}
    for by, part in enumerate(travelling, start=1):
        source = (rank - by) % ranks
        parts[source] = arrived(part)
        products[source] = [parts[source] @ matrix for matrix in matrices]
    whole = torch.cat([parts[source] for source in range(ranks)], dim=1)
    return whole, [torch.cat([products[source][n] for source in range(ranks)], dim=1) for n in range(len(matrices))]


def _send_products(xs_bti: Sequence[Tensor], matrices: Sequence[Tensor], group: Group) -> list[Tensor]:
    """Makes the sum of x @ matrix over the pairs for each rank's positions; the others' travel there. `_sum` takes what is returned."""
    rank, ranks = group.rank(), group.size()

    def product(target: int) -> Tensor:
        first, *more = [x.chunk(ranks, dim=1)[target] @ matrix for x, matrix in zip(xs_bti, matrices, strict=True)]
        return sum(more, start=first)

    travelling = [shift(product((rank + by) % ranks), by, group) for by in range(1, ranks)]
    return [product(rank), *travelling]


def _sum(own_and_travelling: list[Tensor]) -> Tensor:
    """The ranks' summands, added up in the order of a ring: the next rank's first, one's own last."""
    own, *travelling = own_and_travelling
    farthest, *nearer = [arrived(part) for part in reversed(travelling)]
    return sum(nearer, start=farthest) + own


class _GatherAndMultiply(torch.autograd.Function):
    """x [b, t/n, i] gathered, and its products with the transposed weights, each [b, t, o]. Backward sums over ranks and scatters."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group, owed: OwedGradients | None, *weights: Tensor):  # type: ignore[override]
        whole, products = _multiply_gathered(x, [weight.t() for weight in weights], group)
        ctx.save_for_backward(whole, *weights)
        ctx.group, ctx.owed = group, owed
        if owed is not None:
            ctx.parameters = weights
        return tuple(products)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        whole, *weights = ctx.saved_tensors
        needs_x, _, _, *needs = ctx.needs_input_grad
        parts = _send_products(grads, weights, ctx.group) if needs_x else None
        parameters = weights if ctx.owed is None else ctx.parameters
        made = [
            weight_gradient(whole, grad, weight, ctx.owed) if need else None
            for grad, weight, need in zip(grads, parameters, needs, strict=True)
        ]
        return (None if parts is None else _sum(parts)), None, None, *made


class _MultiplyAndScatter(torch.autograd.Function):
    """x [b, t, i] times the transposed weight, summed over ranks, this rank's positions kept: [b, t/n, o]. Backward gathers."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group, owed: OwedGradients | None, weight: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(x, weight)
        ctx.group, ctx.owed = group, owed
        if owed is not None:
            ctx.parameter = weight
        return _sum(_send_products([x], [weight.t()], group))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        x, weight = ctx.saved_tensors
        needs_x, _, _, needs_weight = ctx.needs_input_grad
        whole, [grad_x] = _multiply_gathered(grad, [weight], ctx.group)
        parameter = weight if ctx.owed is None else ctx.parameter
        made = weight_gradient(x, whole, parameter, ctx.owed) if needs_weight else None
        return (grad_x if needs_x else None), None, None, made


def read_while_gathering(module: nn.Module, readers: Sequence[str], group: Group) -> None:
    """Gathers the sequence of what `module` is called with while the layers `readers` multiply it; their forward only hands out."""
    for name in readers:
        layer: Any = getattr(module, name)
        layer.owed = None
        layer.forward = types.MethodType(handing_out(name), layer)
    module.register_forward_pre_hook(_GatherProducts(tuple(readers), group))


class _GatherProducts:
    """Forward pre-hook: in place of its first argument, the module gets what its readers make of that, by their names."""

    def __init__(self, readers: tuple[str, ...], group: Group) -> None:
        self.readers, self.group = readers, group

    def __call__(self, module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        layers: list[Any] = [getattr(module, name) for name in self.readers]
        products = _GatherAndMultiply.apply(args[0], self.group, layers[0].owed, *(layer.weight for layer in layers))
        return (dict(zip(self.readers, products, strict=True)), *args[1:])


def handing_out(name: str) -> Any:
    """Forward of a layer that is called with the products of all that read one input, and gives its own, with its bias."""

    def forward(layer: nn.Linear, products: Mapping[str, Tensor]) -> Tensor:
        return products[name] if layer.bias is None else products[name] + layer.bias

    return forward


def scatter_while_multiplying(layer: Any, group: Group) -> None:
    """Sends a layer's partial outputs to the ranks whose positions they are while it makes others."""

    def forward(layer: Any, x_bti: Tensor) -> Tensor:
        y_buo = _MultiplyAndScatter.apply(x_bti, group, layer.owed, layer.weight)
        return y_buo if layer.bias is None else y_buo + layer.bias

    layer.owed = None
    layer.forward = types.MethodType(forward, layer)
