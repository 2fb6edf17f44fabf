"""Grouped matrix products: rows sorted by expert, each multiplied with its own expert's matrix.

A readable loop, and one kernel for all experts (`torch.nn.functional.grouped_mm`) where the shapes allow it in bf16, the one dtype that
the kernel takes on CPU, on CUDA and when traced.
n rows, e experts, m input features, k output features.
"""

import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

log = logging.getLogger(__name__)

# The kernel loads rows of its operands, and of their gradients, in pieces of this size.
ALIGNMENT_BYTES = 16


def grouped_linear(x_nm: Tensor, weight_emk: Tensor, counts_e: Tensor) -> Tensor:
    """Each row times the matrix of its expert: [n, k]. The first counts_e[0] rows are expert 0's, and so on; counts may be 0.

    `counts_e` is an integer tensor and sums to n: the kernel leaves rows past the sum uninitialised.
    """
    if grouped_problem(x_nm, weight_emk):
        return _loop(x_nm, weight_emk, counts_e)
    ends_e = counts_e.cumsum(0).to(torch.int32)
    return _ContiguousGradient.apply(F.grouped_mm(x_nm.contiguous(), weight_emk, offs=ends_e))


def reference_grouped_linear(x_nm: Tensor, weight_emk: Tensor, counts_e: Tensor) -> Tensor:
    """One product an expert, of any dtype: what the kernel is held to. Reads the counts on the host."""
    parts = x_nm.split(counts_e.tolist())
    return torch.cat([part @ weight for part, weight in zip(parts, weight_emk.unbind(), strict=True)])


def grouped_problem(x_nm: Tensor, weight_emk: Tensor) -> str | None:
    """Why the kernel cannot multiply these, or None."""
    if x_nm.dtype != torch.bfloat16:
        return f"it takes bf16, not {x_nm.dtype}"
    for features in weight_emk.shape[1:]:
        if features * x_nm.element_size() % ALIGNMENT_BYTES:
            return f"rows of {features} in {x_nm.dtype} are not a multiple of {ALIGNMENT_BYTES} bytes"
    if x_nm.shape[0] == 0:
        return "there are no rows"
    return None


# The loop as an operator: what it reads on the host, and says, is hidden from tracing: compiled blocks and fake tensors can have it.
@torch.library.custom_op("paraxis::grouped_loop", mutates_args=())
def _loop(x_nm: Tensor, weight_emk: Tensor, counts_e: Tensor) -> Tensor:
    _say_once(grouped_problem(x_nm, weight_emk))
    return reference_grouped_linear(x_nm, weight_emk, counts_e)


@_loop.register_fake
def _(x_nm: Tensor, weight_emk: Tensor, counts_e: Tensor) -> Tensor:
    return x_nm.new_empty(x_nm.shape[0], weight_emk.shape[2])


@torch.library.custom_op("paraxis::grouped_loop_backward", mutates_args=())
def _loop_backward(gradient_nk: Tensor, x_nm: Tensor, weight_emk: Tensor, counts_e: Tensor) -> tuple[Tensor, Tensor]:
    counts = counts_e.tolist()
    products = [x.mT @ gradient for x, gradient in zip(x_nm.split(counts), gradient_nk.split(counts), strict=True)]
    return reference_grouped_linear(gradient_nk, weight_emk.mT, counts_e), torch.stack(products)


@_loop_backward.register_fake
def _(gradient_nk: Tensor, x_nm: Tensor, weight_emk: Tensor, counts_e: Tensor) -> tuple[Tensor, Tensor]:
    return x_nm.new_empty(x_nm.shape), weight_emk.new_empty(weight_emk.shape)


def _keep_operands(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _loop_gradients(ctx: Any, gradient_nk: Tensor) -> tuple[Tensor, Tensor, None]:
    return *_loop_backward(gradient_nk, *ctx.saved_tensors), None


_loop.register_autograd(_loop_gradients, setup_context=_keep_operands)


class _ContiguousGradient(torch.autograd.Function):
    """The identity, whose gradient is laid out in memory: the kernel's backward refuses the expanded gradient of a sum."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.contiguous()


@cache
def _say_once(reason: str | None) -> None:
    log.info("grouped products run as a loop over experts: the kernel is not used, because %s", reason)
