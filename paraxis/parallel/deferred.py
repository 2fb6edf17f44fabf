"""Backward in two halves for zero-bubble pipelines: input gradients now, the weight gradients of linear layers when W asks for them.

Source: Qi et al. 2023, "Zero Bubble Pipeline Parallelism" (arXiv:2401.10241), section 2.1. The gradient of a linear layer's weight
needs only its input and its output's gradient, which are kept until then; vectors (norms, biases) get theirs with the first half.
"""

import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OwedGradients:
    """The weight gradients that one stage still has to make. While `defer` is set, a backward adds to them instead of making them."""

    def __init__(self) -> None:
        self.defer = False
        self._owed: list[Callable[[], None]] = []

    def add(self, make: Callable[[], None]) -> None:
        self._owed.append(make)

    def take(self) -> list[Callable[[], None]]:
        """What was added since the last time: one micro-batch's share."""
        owed, self._owed = self._owed, []
        return owed


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, bias, owed):
        ctx.save_for_backward(x, weight)
        ctx.weight, ctx.owed = weight, owed
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx, *grad_outputs):
        (grad,) = grad_outputs
        x, weight = ctx.saved_tensors
        grad_x = grad @ weight if ctx.needs_input_grad[0] else None
        grad_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        grad_weight = weight_gradient(x, grad, ctx.weight, ctx.owed) if ctx.needs_input_grad[1] else None
        return grad_x, grad_weight, grad_bias, None


def weight_gradient(x: Tensor, grad: Tensor, weight: Tensor, owed: OwedGradients | None) -> Tensor | None:
    """The gradient of a linear layer's weight, of its input and its output's gradient; or None, and it is owed."""

    @torch.no_grad()  # an owed one is made outside autograd
    def product() -> Tensor:
        return grad.flatten(0, -2).t() @ x.flatten(0, -2)

    if owed is None or not owed.defer:
        return product()
    owed.add(lambda: _accumulate(weight, product()))
    return None


def _accumulate(parameter: Tensor, gradient: Tensor) -> None:
    parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)


def defer_linears(module: nn.Module, owed: OwedGradients) -> None:
    """Lets every linear layer of `module` put off its weight's gradient, those that sum over tensor-parallel ranks too.

    Layers that have `owed` know how to, once they are told to whom.
    """

    def forward(layer: nn.Linear, x: Tensor) -> Tensor:
        return _Linear.apply(x, layer.weight, layer.bias, owed)

    def product(layer: nn.Linear, x: Tensor) -> Tensor:
        return _Linear.apply(x, layer.weight, None, owed)

    linears: list[Any] = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    for layer in linears:
        if hasattr(layer, "owed"):
            layer.owed = owed
        elif hasattr(layer, "product"):
            layer.product = types.MethodType(product, layer)
        else:
            layer.forward = types.MethodType(forward, layer)
