"""Attention of a block of queries to a block of keys, with what it takes to merge blocks: the log-sum-exp of each query's scores.

Softmax over all keys is put together from softmaxes over some of them, as in online softmax (Milakov and Gimelshein, 2018,
arXiv:1805.02867): a part weighs exp(its log-sum-exp - the merged one). Going back, FlashAttention's formula (Dao et al., 2022,
arXiv:2205.14135, algorithm 4) needs only the merged output and log-sum-exp, so a part's gradients are computed from those.

b batch rows, t queries, s keys, h query heads, g key/value heads, d head width. `causal` is for a square block that lies on the
diagonal: query i sees keys 0 to i, of its own document where `documents` says that there are several. Every query of a block
sees a key of it: one that sees none is left out of the block, and so weighs nothing (output 0, log-sum-exp -inf) in `Merged`.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch
from torch import Tensor

from paraxis.base.device import Device
from paraxis.base.dtypes import at_least_fp32
from paraxis.ops import flash4
from paraxis.ops.attention import HALF, causal_mask, document_mask

log = logging.getLogger("paraxis")
aten = torch.ops.aten

Gradients = tuple[Tensor, Tensor, Tensor]


@dataclass(frozen=True)
class Runs:
    """The documents of a causal block, its rows laid end to end: document i is positions ends[i] to ends[i + 1] of the b * t.

    `ends`: int32 [documents + 1], on the block's device, from 0, the end of each row among them. `longest`: in positions.
    """

    ends: Tensor
    longest: int

    def numbers(self, b: int, t: int) -> Tensor:
        """The document of each position, [b, t]."""
        positions = torch.arange(b * t, dtype=torch.int32, device=self.ends.device)
        return torch.bucketize(positions, self.ends, right=True).view(b, t)


class Parts(Protocol):
    """Attention to a block of keys. `out` is [b, t, h, d]; `lse` is [b, h, t], at least fp32."""

    def forward(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, *, causal: bool, documents: Runs | None) -> tuple[Tensor, Tensor]:
        """The block's output and log-sum-exp."""
        ...

    def backward(
        self,
        grad_bthd: Tensor,
        q_bthd: Tensor,
        k_bsgd: Tensor,
        v_bsgd: Tensor,
        out_bthd: Tensor,
        lse_bht: Tensor,
        *,
        causal: bool,
        documents: Runs | None,
    ) -> Gradients:
        """What this block adds to the gradients of q, k and v, where `out` and `lse` are merged over all blocks."""
        ...


class ReferenceParts:
    """The block as its definition has it, with its scores in memory, in fp32 or fp64; works everywhere."""

    def forward(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, *, causal: bool, documents: Runs | None) -> tuple[Tensor, Tensor]:
        scores_bgrts = _scores(q_bthd, k_bsgd, causal, documents)
        lse_bgrt = scores_bgrts.logsumexp(-1)
        weights_bgrts = (scores_bgrts - lse_bgrt[..., None]).exp()
        out_btgrd = torch.einsum("bgrts,bsgd->btgrd", weights_bgrts, at_least_fp32(v_bsgd))
        return out_btgrd.flatten(2, 3), lse_bgrt.flatten(1, 2)

    def backward(
        self,
        grad_bthd: Tensor,
        q_bthd: Tensor,
        k_bsgd: Tensor,
        v_bsgd: Tensor,
        out_bthd: Tensor,
        lse_bht: Tensor,
        *,
        causal: bool,
        documents: Runs | None,
    ) -> Gradients:
        groups = (k_bsgd.shape[2], -1)
        q, grad, out = (at_least_fp32(x).unflatten(2, groups) for x in (q_bthd, grad_bthd, out_bthd))
        k, v = at_least_fp32(k_bsgd), at_least_fp32(v_bsgd)
        lse_bgrt = lse_bht.unflatten(1, groups)
        weights_bgrts = (_scores(q_bthd, k_bsgd, causal, documents) - lse_bgrt[..., None]).exp()
        weights_grad_bgrts = torch.einsum("btgrd,bsgd->bgrts", grad, v)
        delta_bgrt = (grad * out).sum(-1).permute(0, 2, 3, 1)
        scores_grad_bgrts = weights_bgrts * (weights_grad_bgrts - delta_bgrt[..., None]) * q_bthd.shape[-1] ** -0.5
        return (
            torch.einsum("bgrts,bsgd->btgrd", scores_grad_bgrts, k).flatten(2, 3),
            torch.einsum("bgrts,btgrd->bsgd", scores_grad_bgrts, q),
            torch.einsum("bgrts,btgrd->bsgd", weights_bgrts, grad),
        )


class _KernelParts(ABC):
    """What the fused kernels share: [b, heads, length, d] within, and documents taken one by one."""

    def forward(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, *, causal: bool, documents: Runs | None) -> tuple[Tensor, Tensor]:
        if documents is not None:
            return self._forward_documents(q_bthd, k_bsgd, v_bsgd, documents)
        q_bhtd, k_bgsd, v_bgsd = (x.transpose(1, 2) for x in (q_bthd, k_bsgd, v_bsgd))
        out_bhtd, lse_bht = self._forward(q_bhtd, k_bgsd, v_bgsd, causal)
        return out_bhtd.transpose(1, 2), lse_bht

    def backward(
        self,
        grad_bthd: Tensor,
        q_bthd: Tensor,
        k_bsgd: Tensor,
        v_bsgd: Tensor,
        out_bthd: Tensor,
        lse_bht: Tensor,
        *,
        causal: bool,
        documents: Runs | None,
    ) -> Gradients:
        grad_q_k_v_out = [grad_bthd, q_bthd, k_bsgd, v_bsgd, out_bthd]
        if documents is not None:
            return self._backward_documents(grad_q_k_v_out, lse_bht, documents)
        turned = [x.transpose(1, 2) for x in grad_q_k_v_out]
        dq, dk, dv = self._backward(turned, lse_bht.contiguous(), causal)
        return dq.transpose(1, 2), dk.transpose(1, 2), dv.transpose(1, 2)

    def _forward_documents(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, documents: Runs) -> tuple[Tensor, Tensor]:
        q, k, v = (_end_to_end(x)[None] for x in (q_bthd, k_bsgd, v_bsgd))
        runs = [slice(*run) for run in pairwise(documents.ends.tolist())]
        outs, lses = zip(*(self.forward(q[:, run], k[:, run], v[:, run], causal=True, documents=None) for run in runs), strict=True)
        return torch.cat(outs, dim=1)[0].unflatten(0, q_bthd.shape[:2]), _lse_by_row(torch.cat(lses, dim=2)[0], q_bthd)

    def _backward_documents(self, grad_q_k_v_out: list[Tensor], lse_bht: Tensor, documents: Runs) -> Gradients:
        grad, q, k, v, out = (_end_to_end(x)[None] for x in grad_q_k_v_out)
        lse = _lse_end_to_end(lse_bht)[None]
        grads = []
        for run in (slice(*run) for run in pairwise(documents.ends.tolist())):
            here = (grad[:, run], q[:, run], k[:, run], v[:, run], out[:, run], lse[:, :, run])
            grads.append(self.backward(*here, causal=True, documents=None))
        dq, dk, dv = (torch.cat(parts, dim=1)[0].unflatten(0, lse_bht.shape[::2]) for parts in zip(*grads, strict=True))
        return dq, dk, dv

    @abstractmethod
    def _forward(self, q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, causal: bool) -> tuple[Tensor, Tensor]: ...

    @abstractmethod
    def _backward(self, grad_q_k_v_out: list[Tensor], lse_bht: Tensor, causal: bool) -> Gradients: ...


class CpuFlashParts(_KernelParts):
    """PyTorch's flash attention for CPU, fp64 included."""

    def _forward(self, q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention_for_cpu(q_bhtd, k_bgsd, v_bgsd, 0.0, causal)

    def _backward(self, grad_q_k_v_out: list[Tensor], lse_bht: Tensor, causal: bool) -> Gradients:
        return aten._scaled_dot_product_flash_attention_for_cpu_backward(*grad_q_k_v_out, lse_bht, 0.0, causal)


class FlashParts(_KernelParts):
    """PyTorch's FlashAttention-2 for CUDA, in bf16 or fp16."""

    def _forward(self, q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return aten._scaled_dot_product_flash_attention(q_bhtd, k_bgsd, v_bgsd, 0.0, causal)[:2]

    def _backward(self, grad_q_k_v_out: list[Tensor], lse_bht: Tensor, causal: bool) -> Gradients:
        _, q, k, _, _ = grad_q_k_v_out
        seed = _no_seed(q)
        lengths = (None, None, q.shape[2], k.shape[2])
        return aten._scaled_dot_product_flash_attention_backward(*grad_q_k_v_out, lse_bht, *lengths, 0.0, causal, seed, seed)


class _DocumentsAtOnce(_KernelParts):
    """All documents of a block in one call, as sequences of variable length: its n = b * t positions end to end."""

    def _forward_documents(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, documents: Runs) -> tuple[Tensor, Tensor]:
        out_nhd, lse_hn = self._forward_at_once(_end_to_end(q_bthd), _end_to_end(k_bsgd), _end_to_end(v_bsgd), documents)
        return out_nhd.unflatten(0, q_bthd.shape[:2]), _lse_by_row(lse_hn, q_bthd)

    def _backward_documents(self, grad_q_k_v_out: list[Tensor], lse_bht: Tensor, documents: Runs) -> Gradients:
        grads = self._backward_at_once([_end_to_end(x) for x in grad_q_k_v_out], _lse_end_to_end(lse_bht), documents)
        dq, dk, dv = (x.unflatten(0, lse_bht.shape[::2]) for x in grads)
        return dq, dk, dv

    @abstractmethod
    def _forward_at_once(self, q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, documents: Runs) -> tuple[Tensor, Tensor]:
        """Output [n, h, d] and log-sum-exp [h, n] of causal attention within each document."""
        ...

    @abstractmethod
    def _backward_at_once(self, grad_q_k_v_out: list[Tensor], lse_hn: Tensor, documents: Runs) -> Gradients: ...


class VarlenParts(_DocumentsAtOnce, FlashParts):
    """FlashAttention-2 for CUDA, with all documents of a block in one call."""

    def _forward_at_once(self, q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, documents: Runs) -> tuple[Tensor, Tensor]:
        return aten._flash_attention_forward(q_nhd, k_ngd, v_ngd, *_varlen_lengths(documents), 0.0, True, False)[:2]

    def _backward_at_once(self, grad_q_k_v_out: list[Tensor], lse_hn: Tensor, documents: Runs) -> Gradients:
        seed = torch.zeros(2, dtype=torch.uint64, device=lse_hn.device)  # in place of a dropout's
        unused = torch.empty(0, device=lse_hn.device)
        return aten._flash_attention_backward(*grad_q_k_v_out, lse_hn, *_varlen_lengths(documents), 0.0, True, seed, unused)


class Flash4Parts(_DocumentsAtOnce):
    """FlashAttention-4, in bf16 or fp16."""

    def _forward(self, q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        return flash4.flash_attention_4(q_bhtd, k_bgsd, v_bgsd, causal, None, 0)

    def _backward(self, grad_q_k_v_out: list[Tensor], lse_bht: Tensor, causal: bool) -> Gradients:
        return flash4.flash_attention_4_backward(*grad_q_k_v_out, lse_bht, causal, None, 0)

    def _forward_at_once(self, q_nhd: Tensor, k_ngd: Tensor, v_ngd: Tensor, documents: Runs) -> tuple[Tensor, Tensor]:
        q, k, v = (x[None].transpose(1, 2) for x in (q_nhd, k_ngd, v_ngd))
        out, lse = flash4.flash_attention_4(q, k, v, True, documents.ends, documents.longest)
        return out[0].transpose(0, 1), lse[0]

    def _backward_at_once(self, grad_q_k_v_out: list[Tensor], lse_hn: Tensor, documents: Runs) -> Gradients:
        turned = [x[None].transpose(1, 2) for x in grad_q_k_v_out]
        grads = flash4.flash_attention_4_backward(*turned, lse_hn[None], True, documents.ends, documents.longest)
        dq, dk, dv = (x[0].transpose(0, 1) for x in grads)
        return dq, dk, dv


class CudnnParts(_KernelParts):
    """cuDNN's fused attention, in bf16 or fp16. Its log-sum-exp has a fourth dimension of size 1."""

    def _forward(self, q_bhtd: Tensor, k_bgsd: Tensor, v_bgsd: Tensor, causal: bool) -> tuple[Tensor, Tensor]:
        out_bhtd, lse, *_ = aten._scaled_dot_product_cudnn_attention(q_bhtd, k_bgsd, v_bgsd, None, True, 0.0, causal)
        return out_bhtd, lse.reshape(q_bhtd.shape[:3])

    def _backward(self, grad_q_k_v_out: list[Tensor], lse_bht: Tensor, causal: bool) -> Gradients:
        _, q, k, _, _ = grad_q_k_v_out
        seed = _no_seed(q)
        lengths = (None, None, q.shape[2], k.shape[2])
        return aten._scaled_dot_product_cudnn_attention_backward(
            *grad_q_k_v_out, lse_bht[..., None], seed, seed, None, *lengths, 0.0, causal
        )


@dataclass
class Merged:
    """The output and log-sum-exp of queries over the blocks added so far, in at least fp32: [b, t, h, d] and [b, h, t]."""

    out_bthd: Tensor
    lse_bht: Tensor

    @classmethod
    def nothing(cls, q_bthd: Tensor, width: int) -> "Merged":
        """What queries have seen before the first block; `width` is that of the values."""
        b, t, h, _ = q_bthd.shape
        dtype = torch.float64 if q_bthd.dtype == torch.float64 else torch.float32
        return cls(q_bthd.new_zeros(b, t, h, width, dtype=dtype), q_bthd.new_full((b, h, t), -torch.inf, dtype=dtype))

    def add(self, rows: slice, queries: slice, out_bthd: Tensor, lse_bht: Tensor) -> None:
        """Merges, in place, what `queries` of `rows` got from one more block."""
        old_bht, new_bht = self.lse_bht[rows, :, queries], at_least_fp32(lse_bht)
        both_bht = torch.logaddexp(old_bht, new_bht)
        keep_bth1, take_bth1 = ((x - _finite(both_bht)).exp().transpose(1, 2)[..., None] for x in (old_bht, new_bht))
        self.out_bthd[rows, queries] = keep_bth1 * self.out_bthd[rows, queries] + take_bth1 * at_least_fp32(out_bthd)
        self.lse_bht[rows, :, queries] = both_bht


def choose_parts(device: Device, dtype: torch.dtype, masked: bool, head_width: int, request: str = "auto") -> Parts:
    """The fastest parts that work here; logs why. `masked` says whether documents are kept apart.

    `request` is the attention that was asked for by name: FlashAttention-4 is not taken in the place of another.
    """
    newest = flash4.why_not(device, head_width) if request in ("auto", "flash4") else f"attention={request} was asked for"
    if not device.is_cuda:
        parts, why = CpuFlashParts(), "its CPU kernel computes in any dtype"
    elif dtype not in HALF:
        parts, why = ReferenceParts(), f"the fused kernels compute in bf16 or fp16, not {dtype}"
    elif head_width % 8 or head_width > 256:
        parts, why = ReferenceParts(), f"heads of width {head_width} are not a multiple of 8 up to 256"
    elif newest is None:
        parts, why = Flash4Parts(), "it is the fastest, and takes the documents of a block in one call"
    elif masked and torch.version.hip is None:
        parts, why = VarlenParts(), "it takes the documents of a block in one call, and blocks of any shape without preparing for each"
    elif head_width > 128 or torch.are_deterministic_algorithms_enabled() or torch.version.hip is not None:
        parts, why = FlashParts(), "cuDNN's is for heads of up to 128, not deterministic and not for ROCm"
    else:
        parts, why = CudnnParts(), f"it is the fastest without FlashAttention-4 ({newest})"
    log.info("attention to blocks of keys: chose %s on %s: %s", type(parts).__name__, device.name, why)
    return parts


def _scores(q_bthd: Tensor, k_bsgd: Tensor, causal: bool, documents: Runs | None) -> Tensor:
    """[b, g, r, t, s], query head g * r of key head g, -inf where a key is hidden."""
    q_btgrd = at_least_fp32(q_bthd).unflatten(2, (k_bsgd.shape[2], -1))
    scores_bgrts = torch.einsum("btgrd,bsgd->bgrts", q_btgrd, at_least_fp32(k_bsgd)) * q_bthd.shape[-1] ** -0.5
    if documents is not None:
        seen_bts = document_mask(documents.numbers(*q_bthd.shape[:2]))
        return scores_bgrts.masked_fill(~seen_bts[:, None, None], -torch.inf)
    if causal:
        return scores_bgrts.masked_fill(~causal_mask(q_bthd.shape[1], k_bsgd.shape[1], q_bthd.device), -torch.inf)
    return scores_bgrts


def _varlen_lengths(documents: Runs) -> tuple[Tensor, Tensor, int, int]:
    """Where queries and keys end, and the most of each."""
    # Told that no document has a second query, the kernel would take the heads of a group for queries: a path with an lse of its own.
    most = max(documents.longest, 2)
    return documents.ends, documents.ends, most, most


def _end_to_end(x_bthd: Tensor) -> Tensor:
    """A batch's rows after one another, [b * t, h, d]; no copy where there is one row."""
    return x_bthd.flatten(0, 1).contiguous()


def _lse_end_to_end(lse_bht: Tensor) -> Tensor:
    """[h, b * t], contiguous."""
    return lse_bht.transpose(0, 1).flatten(1).contiguous()


def _lse_by_row(lse_hn: Tensor, like_bthd: Tensor) -> Tensor:
    """[h, b * t] to [b, h, t]."""
    return lse_hn.unflatten(1, like_bthd.shape[:2]).transpose(0, 1)


def _finite(lse: Tensor) -> Tensor:
    """With 0 for -inf: exp(-inf - 0) is the 0 that a query without keys so far wants, where exp(-inf + inf) is not a number."""
    return lse.masked_fill(lse.isneginf(), 0.0)


def _no_seed(like: Tensor) -> Tensor:
    """In place of the state of a dropout that does not happen."""
    return torch.zeros(2, dtype=torch.int64, device=like.device)
