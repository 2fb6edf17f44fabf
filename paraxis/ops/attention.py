"""Causal attention behind one front: `choose_attention` meets a request, or refuses it with the reason; `auto` chooses.

Every backend is a `base.seams.Attend`: queries [b, t, h, d], keys and values [b, s, g, d] with h a multiple of g (grouped
queries: query head i reads key/value head i // (h / g)). Queries are the last t of the s positions. `mask` turns the
document numbers of a batch into what the backend needs, once a forward; None means attention sees the whole row.
"""

import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import BlockMask, flex_attention

from paraxis.base.device import Device
from paraxis.base.dtypes import at_least_fp32
from paraxis.base.errors import ConfigError
from paraxis.base.seams import Attend
from paraxis.ops import flash4

log = logging.getLogger("paraxis")

HALF = (torch.bfloat16, torch.float16)
BACKENDS = ("flash4", "cudnn", "flash", "flex", "sdpa", "reference")


def causal_mask(queries: int, keys: int, device: torch.device) -> Tensor:
    """Which keys each query sees, [t, s]: the queries are the last ones of the keys' positions."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)


def document_mask(documents_bt: Tensor) -> Tensor:
    """Which keys each query sees when it sees only its own document: [b, t, s], causal."""
    length = documents_bt.shape[1]
    return (documents_bt[:, :, None] == documents_bt[:, None, :]) & causal_mask(length, length, documents_bt.device)


class Reference:
    """Attention as its definition has it, with every score in memory; works everywhere."""

    def mask(self, documents_bt: Tensor | None) -> Tensor | None:
        return None if documents_bt is None else document_mask(documents_bt)

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: Tensor | None) -> Tensor:
        seen = causal_mask(q_bthd.shape[1], k_bsgd.shape[1], q_bthd.device) if mask is None else mask[:, None, None]
        q_btgrd = q_bthd.unflatten(2, (k_bsgd.shape[2], -1))
        scores_bgrts = at_least_fp32(torch.einsum("btgrd,bsgd->bgrts", q_btgrd, k_bsgd)) * q_bthd.shape[-1] ** -0.5
        weights_bgrts = scores_bgrts.masked_fill(~seen, -torch.inf).softmax(-1).to(v_bsgd.dtype)
        return torch.einsum("bgrts,bsgd->btgrd", weights_bgrts, v_bsgd).flatten(2, 3)


class Sdpa:
    """PyTorch's scaled_dot_product_attention, its own choice of kernel; documents become a boolean [b, t, s] mask."""

    def mask(self, documents_bt: Tensor | None) -> Tensor | None:
        return None if documents_bt is None else document_mask(documents_bt)

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: Tensor | None) -> Tensor:
        queries, keys = q_bthd.shape[1], k_bsgd.shape[1]
        if mask is None and 1 < queries < keys:  # SDPA's own causal mask takes the queries for the first positions
            mask = causal_mask(queries, keys, q_bthd.device)[None]
        if mask is None and queries > 1:  # a branch, since a compiled comparison of lengths is no bool, which SDPA insists on
            return _sdpa(q_bthd, k_bsgd, v_bsgd, None, causal=True)
        return _sdpa(q_bthd, k_bsgd, v_bsgd, None if mask is None else mask[:, None], causal=False)


@dataclass(frozen=True)
class FusedSdpa:
    """One fused CUDA kernel of scaled_dot_product_attention, and no other: fails rather than falls back. Whole rows only."""

    backend: SDPBackend

    def mask(self, documents_bt: Tensor | None) -> None:
        _refuse_documents(self.backend.name, documents_bt)

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: None) -> Tensor:
        assert q_bthd.shape[1] == k_bsgd.shape[1], "made for training: as many queries as keys"
        with sdpa_kernel([self.backend]):
            return _sdpa(q_bthd, k_bsgd, v_bsgd, None, causal=True)


class Flash4:
    """FlashAttention-4, for whole rows."""

    def mask(self, documents_bt: Tensor | None) -> None:
        _refuse_documents("flash4", documents_bt)

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: None) -> Tensor:
        assert q_bthd.shape[1] == k_bsgd.shape[1], "made for training: as many queries as keys"
        q_bhtd, k_bgsd, v_bgsd = (x.transpose(1, 2) for x in (q_bthd, k_bsgd, v_bsgd))
        return flash4.flash_attention_4(q_bhtd, k_bgsd, v_bgsd, True, None, 0)[0].transpose(1, 2)


class Flex:
    """FlexAttention with a document mask: blocks in which no query sees a key are skipped, not computed and masked."""

    BLOCK = 128

    def mask(self, documents_bt: Tensor | None) -> BlockMask | None:
        return None if documents_bt is None else document_block_mask(documents_bt, self.BLOCK)

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: BlockMask | None) -> Tensor:
        q_bhtd, k_bgsd, v_bgsd = (x.transpose(1, 2) for x in (q_bthd, k_bsgd, v_bsgd))
        if mask is None:
            return _sdpa(q_bthd, k_bsgd, v_bsgd, None, causal=True)
        grouped = q_bthd.shape[2] != k_bsgd.shape[2]
        return _compiled_flex()(q_bhtd, k_bgsd, v_bgsd, block_mask=mask, enable_gqa=grouped).transpose(1, 2)


def document_block_mask(documents_bt: Tensor, block: int) -> BlockMask:
    """FlexAttention's causal mask that keeps documents apart, from the first and last document of each block of positions.

    Never makes a [t, t] mask. A block pair is computed if its ranges of document numbers meet (exact where numbers never
    fall along a row, as packing has them; else some are computed in vain), and needs no mask inside if all are one document.
    """
    length = documents_bt.shape[1]
    blocks = -(-length // block)
    # The last block is filled up with its last document, which no range notices.
    filled = torch.cat([documents_bt, documents_bt[:, -1:].expand(-1, blocks * block - length)], dim=1)
    low_bn, high_bn = filled.unflatten(1, (blocks, block)).aminmax(dim=-1)
    number_n = torch.arange(blocks, device=documents_bt.device)
    before_nn, same_nn = number_n[:, None] > number_n, number_n[:, None] == number_n
    meets_bnn = (low_bn[:, :, None] <= high_bn[:, None, :]) & (low_bn[:, None, :] <= high_bn[:, :, None])
    one_bnn = (low_bn[:, :, None] == high_bn[:, None, :]) & (low_bn[:, None, :] == high_bn[:, :, None])
    full_bnn = one_bnn & before_nn
    partial_bnn = meets_bnn & (before_nn | same_nn) & ~full_bnn

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        return (t >= s) & (documents_bt[b, t] == documents_bt[b, s])

    return BlockMask.from_kv_blocks(
        *_listed(partial_bnn), *_listed(full_bnn), BLOCK_SIZE=block, mask_mod=sees, seq_lengths=(length, length)
    )


def choose_attention(request: str, device: Device, documents: bool, head_width: int | None, dtype: torch.dtype) -> Attend:
    """The backend called `request`; "auto" takes the first that works here and logs why.

    `documents` says whether batches keep documents apart; `head_width` is None where it is not known.
    Raises ConfigError, with the reason, for one that cannot run here.
    """
    problems = _problems(device, documents, head_width, dtype)
    if request == "auto":
        request = next(name for name, why in problems.items() if why is None)
        passed = "; ".join(f"not {name}: {why}" for name, why in problems.items() if why is not None)
        log.info("attention: auto chose %s on %s%s", request, device.name, f" ({passed})" if passed else "")
    elif why := problems.get(request, f"there is no such backend; choose auto or one of {', '.join(problems)}"):
        raise ConfigError(f"attention={request!r} cannot run here: {why}; attention=auto takes one that can")
    backends: dict[str, Attend] = {
        "flash4": Flash4(),
        "cudnn": FusedSdpa(SDPBackend.CUDNN_ATTENTION),
        "flash": FusedSdpa(SDPBackend.FLASH_ATTENTION),
        "flex": Flex(),
        "sdpa": Sdpa(),
        "reference": Reference(),
    }
    return backends[request]


def _problems(device: Device, documents: bool, head_width: int | None, dtype: torch.dtype) -> dict[str, str | None]:
    """Why each backend cannot run here, or None; the fastest first."""
    fused = None
    if not device.is_cuda:
        fused = f"it needs a CUDA device, this is {device.kind}"
    elif documents:
        fused = "it cannot keep documents apart"
    elif dtype not in HALF:
        fused = f"it computes in bf16 or fp16, not {dtype}"
    elif device.capability < (8, 0):
        fused = f"it needs an Ampere GPU or a newer one, this is {device.name}"
    width = head_width or 0
    cudnn = fused
    if fused is None and (width > 128 or width % 8):
        cudnn = f"heads of width {width} are not a multiple of 8 up to 128"
    elif fused is None and torch.are_deterministic_algorithms_enabled():
        cudnn = "its backward is not deterministic"
    elif fused is None and torch.version.hip is not None:
        cudnn = "this PyTorch is built for ROCm, which has no cuDNN"
    flash = fused
    if fused is None and (width > 256 or width % 8):
        flash = f"heads of width {width} are not a multiple of 8 up to 256"
    flex = None
    if not device.is_cuda:
        flex = f"it needs a CUDA device, this is {device.kind}"
    elif not documents:
        flex = "it pays only where documents are kept apart (data.document_mask)"
    elif dtype not in (*HALF, torch.float32):
        flex = f"it does not compute in {dtype}"
    elif 0 < width < 16:
        flex = f"heads of width {width} are under 16"
    newest = fused or flash4.why_not(device, width)
    return {"flash4": newest, "cudnn": cudnn, "flash": flash, "flex": flex, "sdpa": None, "reference": None}


def _refuse_documents(name: str, documents_bt: Tensor | None) -> None:
    if documents_bt is not None:
        raise ConfigError(f"attention {name} sees whole rows, but this batch keeps documents apart; use attention=auto")


def _sdpa(q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, seen: Tensor | None, *, causal: bool) -> Tensor:
    q_bhtd, k_bgsd, v_bgsd = (x.transpose(1, 2) for x in (q_bthd, k_bsgd, v_bsgd))
    grouped = q_bthd.shape[2] != k_bsgd.shape[2]
    return F.scaled_dot_product_attention(q_bhtd, k_bgsd, v_bgsd, attn_mask=seen, is_causal=causal, enable_gqa=grouped).transpose(1, 2)


def _listed(wanted_bnn: Tensor) -> tuple[Tensor, Tensor]:
    """How many key blocks each query block wants and which, those first: int32 [b, 1, n] and [b, 1, n, n]."""
    order_bnn = wanted_bnn.int().argsort(dim=-1, descending=True, stable=True)
    return wanted_bnn.sum(-1, dtype=torch.int32)[:, None], order_bnn.int()[:, None]


@cache
def _compiled_flex() -> Any:
    """FlexAttention is fast only when compiled; inside a compiled block this is traced through."""
    return torch.compile(flex_attention)
