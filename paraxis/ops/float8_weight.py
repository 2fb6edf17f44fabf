"""A weight that travels between ranks in float8: gathered values and the scale they share, in place of a tensor in the compute dtype.

To autograd, to FSDP and to a compiler it is a tensor [o, i] of the compute dtype, whose gradient is an ordinary tensor. It can only be
multiplied as a factor of a float8 product: anything else is an error.
"""

from typing import Any

import torch
from torch import Tensor

_aten = torch.ops.aten


class Float8Weight(Tensor):
    """`values` float8 [o, i] and `inverse` fp32 [1, 1], what they are multiplied by; `dtype` is what it passes for."""

    values: Tensor
    inverse: Tensor

    @staticmethod
    def __new__(cls, values: Tensor, inverse: Tensor, dtype: torch.dtype) -> "Float8Weight":
        return Tensor._make_wrapper_subclass(cls, values.shape, strides=values.stride(), dtype=dtype, device=values.device)  # type: ignore[attr-defined]

    def __init__(self, values: Tensor, inverse: Tensor, dtype: torch.dtype) -> None:
        self.values, self.inverse = values, inverse

    def __repr__(self) -> str:  # type: ignore[override]
        return f"Float8Weight({tuple(self.shape)}, {self.dtype})"

    def __tensor_flatten__(self) -> tuple[list[str], torch.dtype]:
        return ["values", "inverse"], self.dtype

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, Tensor], dtype: torch.dtype, size: Any, stride: Any) -> "Float8Weight":
        return Float8Weight(inner["values"], inner["inverse"], dtype)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        weight = args[0]
        if func is torch.ops.paraxis.float8_parts.default:
            return weight.values.detach(), weight.inverse.detach()
        if func in (_aten.detach.default, _aten.alias.default):
            return cls(weight.values.detach(), weight.inverse, weight.dtype)
        if func is _aten.as_strided.default:  # FSDP shapes what it has gathered
            _, size, stride, *_ = args
            assert (tuple(size), tuple(stride)) == (tuple(weight.shape), weight.stride())
            return cls(weight.values, weight.inverse, weight.dtype)
        raise TypeError(f"a weight gathered in float8 is a factor of float8 products alone, but {func} was called on it")


# An operator, so that tracing sees through it.
@torch.library.custom_op("paraxis::float8_parts", mutates_args=())
def float8_parts(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Values and inverse scale of a Float8Weight, which answers this itself."""
    raise TypeError(f"a {type(weight).__name__} has no float8 values")
