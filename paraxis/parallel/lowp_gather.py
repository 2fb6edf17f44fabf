"""Weights that FSDP gathers in float8: cast once a step by their owners, from the fp32 masters, with scales that all ranks agree on.

Half the bytes travel, and no block casts a weight. Weights of one product share a scale. All scales are made together: one pass over
this rank's parts, one reduction over the ranks that hold the others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from paraxis.ops.float8 import inverse_scale
from paraxis.ops.float8_weight import Float8Weight
from paraxis.parallel.collectives import max_over
from paraxis.parallel.fsdp import gather_by
from paraxis.parallel.mesh import Mesh

FORMAT = torch.float8_e4m3fn


@dataclass
class _Weight:
    """A `Gathering` (parallel/fsdp.py) of one weight: this rank's part of the master, what is sent of it, and its scale."""

    stored: Tensor
    values: Tensor
    dtype: torch.dtype
    inverse: Tensor

    def send(self) -> Tensor:
        return self.values.view(torch.uint8)  # of bytes, gloo moves any and NCCL as many as of one parameter in bf16 and one in float8

    def receive(self, arrived: Tensor, before: Tensor | None) -> Tensor:
        if before is None:
            return Float8Weight(arrived.view(FORMAT), self.inverse, self.dtype)
        assert isinstance(before, Float8Weight)
        before.inverse = self.inverse  # its values are in `arrived` again, whose storage it has kept
        return before


class _CastOnce:
    """Forward pre-hook: casts the stored parts where they have changed since the last forward, an optimizer's step or a resume ago."""

    def __init__(self, products: Sequence[Sequence[_Weight]], mesh: Mesh, cast_into: Callable[[Tensor, Tensor, Tensor], None]) -> None:
        self._weights = [weight for product in products for weight in product]
        device = self._weights[0].stored.device
        numbers = [number for number, product in enumerate(products) for _ in product]
        self._product_w = torch.tensor(numbers).to(device)
        self._products, self._cast_into = len(products), cast_into
        self._group = mesh.sharding.get_group("fsdp")
        self._seen: list[int] = []

    def __call__(self, module: nn.Module, args: Any) -> None:
        versions = [weight.stored._version for weight in self._weights]
        if versions != self._seen:
            self._cast()
            self._seen = versions

    @torch.no_grad()
    def _cast(self) -> None:
        largest_w = torch.stack(torch._foreach_norm([weight.stored for weight in self._weights], torch.inf))
        largest_p = largest_w.new_zeros(self._products).scatter_reduce(0, self._product_w, largest_w, "amax")
        inverse_w = inverse_scale(max_over(largest_p, self._group), FORMAT)[self._product_w]
        # One every 16 bytes: four apart, cuBLAS refused a product on an H200, for which this is our guess at the reason.
        for weight, inverse in zip(self._weights, inverse_w[:, None].repeat(1, 4)[:, 0].split(1), strict=True):
            weight.inverse = inverse.view(1, 1)
            self._cast_into(weight.values.flatten(), weight.stored.flatten(), inverse)


def _cast_into(values_n: Tensor, stored_n: Tensor, inverse_1: Tensor) -> None:
    """The stored numbers, scaled to the range of the format, as `values_n`."""
    values_n.copy_(stored_n * inverse_1.reciprocal())


@cache
def _compiled() -> Callable[[Tensor, Tensor, Tensor], None]:
    return torch.compile(_cast_into, fullgraph=True, dynamic=True)


def gather_in_float8(model: nn.Module, products: Sequence[Sequence[str]], mesh: Mesh, dtype: torch.dtype, *, compiled: bool) -> None:
    """Gathers the weights of the layers of each product in float8, as tensors that pass for `dtype`.

    A product with a weight whose rows ranks cannot share out evenly is left as it is, and its layers cast what they get.
    """
    shards = mesh.degrees.shards
    layers = dict(model.named_modules())
    chosen = [product for product in products if all(cast(Any, layers[name]).weight.shape[0] % shards == 0 for name in product)]
    ways: dict[nn.Parameter, _Weight] = {}
    for name in (name for product in chosen for name in product):
        parameter = cast(nn.Parameter, layers[name].weight)
        if parameter.requires_grad:
            with torch.no_grad():
                stored = cast(DTensor, parameter).to_local()
            ways[parameter] = _Weight(stored, torch.empty_like(stored, dtype=FORMAT), dtype, torch.empty(0))
    together = [[ways[cast(nn.Parameter, layers[name].weight)] for name in product] for product in chosen]
    if together:
        gather_by(model, ways)
        model.register_forward_pre_hook(_CastOnce(together, mesh, _compiled() if compiled else _cast_into), prepend=True)
