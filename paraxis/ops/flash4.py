"""FlashAttention-4 as an operator that compilers, checkpoints and fake tensors know: causal attention on Hopper and Blackwell GPUs.

Source: Zadouri et al., 2026, arXiv:2603.05451. The kernels are those of the package flash-attn-4, which a user installs; what is asked of
its private functions is asked here alone. They are compiled when first called, for a dtype and width, and kept on disk.

b batch rows, t queries, s keys, h query heads, g key/value heads, d head width.
"""

import warnings
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch
from torch import Tensor

from paraxis.base.device import Device
from paraxis.base.env import keep_attention_kernels

PACKAGE = "flash-attn-4"
GENERATIONS = (9, 10)  # Hopper, Blackwell: compute capabilities that it has both passes for


@cache
def installed_version() -> str | None:
    """The version of the package, or None where it is not installed."""
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None


def why_not(device: Device, head_width: int) -> str | None:
    """Why these kernels cannot run on `device` with heads of this width, or None."""
    if torch.version.hip is not None or device.capability[0] not in GENERATIONS:
        return f"FlashAttention-4 is for Hopper and Blackwell GPUs, this is {device.name}"
    if not 0 < head_width <= 128 or head_width % 8:
        return f"heads of width {head_width} are not a multiple of 8 up to 128" if head_width else "the width of heads is not known"
    return None if installed_version() else f"the package {PACKAGE} is not installed"


# Documents lie end to end in one row, document i at positions ends[i] to ends[i + 1] (int32), none longer than `longest`.
# Arguments are named and laid out as those of PyTorch's own attention, by which the planner and the choice of what to recompute know it.
@torch.library.custom_op("paraxis::scaled_dot_product_flash_attention_4", mutates_args=())
def flash_attention_4(
    query: Tensor, key: Tensor, value: Tensor, is_causal: bool, ends: Tensor | None, longest: int
) -> tuple[Tensor, Tensor]:
    """Output [b, h, t, d] and log-sum-exp [b, h, t], fp32, for a query [b, h, t, d], key and value [b, g, s, d], in bf16 or fp16."""
    packed = ends is not None
    q, k, v = (_turned(x, packed) for x in (query, key, value))
    out, lse = _kernels()._flash_attn_fwd(q, k, v, causal=is_causal, return_lse=True, **_lengths(ends, longest))[:2]
    return _turned_back(out, packed), lse[None] if packed else lse


@flash_attention_4.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, ends: Tensor | None, longest: int) -> tuple[Tensor, Tensor]:
    b, h, t, _ = query.shape
    return query.new_empty(b, t, h, value.shape[-1]).transpose(1, 2), query.new_empty(b, h, t, dtype=torch.float32)


@torch.library.custom_op("paraxis::scaled_dot_product_flash_attention_4_backward", mutates_args=())
def flash_attention_4_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    is_causal: bool,
    ends: Tensor | None,
    longest: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of query, key and value, laid out as these."""
    packed = ends is not None
    tensors = [_turned(x, packed) for x in (query, key, value, out, grad_out)]
    lse = (logsumexp[0] if packed else logsumexp).contiguous()
    exactly = torch.are_deterministic_algorithms_enabled()
    grads = _kernels()._flash_attn_bwd(*tensors, lse, causal=is_causal, deterministic=exactly, **_lengths(ends, longest))
    dq, dk, dv = (_turned_back(x, packed) for x in grads[:3])
    return dq, dk, dv


@flash_attention_4_backward.register_fake
def _(grad_out: Tensor, query: Tensor, key: Tensor, value: Tensor, *_others: Any) -> tuple[Tensor, Tensor, Tensor]:
    dq, dk, dv = (x.new_empty(x.transpose(1, 2).shape).transpose(1, 2) for x in (query, key, value))
    return dq, dk, dv


def _keep(ctx: Any, inputs: Any, output: Any) -> None:
    query, key, value, ctx.is_causal, ctx.ends, ctx.longest = inputs
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(query, key, value, *output)


def _backward(ctx: Any, grad_out: Tensor, grad_lse: Tensor | None) -> Any:
    assert grad_lse is None, "nobody differentiates through the log-sum-exp"
    grads = flash_attention_4_backward(grad_out, *ctx.saved_tensors, ctx.is_causal, ctx.ends, ctx.longest)
    return *grads, None, None, None


flash_attention_4.register_autograd(_backward, setup_context=_keep)


def _turned(x: Tensor, packed: bool) -> Tensor:
    """[b, heads, length, d] to the kernels' [b, length, heads, d], of documents [length, heads, d]."""
    return x[0].transpose(0, 1) if packed else x.transpose(1, 2)


def _turned_back(x: Tensor, packed: bool) -> Tensor:
    """In memory it stays as it comes from the kernels, or is copied to be as compilers were told."""
    return (x[None] if packed else x).contiguous().transpose(1, 2)


def _lengths(ends: Tensor | None, longest: int) -> dict[str, Any]:
    return {} if ends is None else {"cu_seqlens_q": ends, "cu_seqlens_k": ends, "max_seqlen_q": longest, "max_seqlen_k": longest}


@cache
def _kernels() -> Any:
    keep_attention_kernels()
    warnings.filterwarnings("ignore", "Argument aux_data", UserWarning)  # the package's compiler, about the package's own kernels
    return import_module("flash_attn.cute.interface")
