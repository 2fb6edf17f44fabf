"""Attention of a recipe's shape by itself: every backend, whole rows and rows of several documents, forward and backward."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from paraxis.base.device import Device
from paraxis.base.dtypes import precision
from paraxis.base.errors import ConfigError
from paraxis.observe.stopwatch import median_s
from paraxis.ops.attention import BACKENDS, choose_attention
from paraxis.train.config import RunConfig

DOCUMENT_TOKENS = 1000  # the mean of exponentially distributed lengths


@dataclass(frozen=True)
class Shape:
    """What attention is given: `rows` of `length` positions, `heads` query and `kv_heads` key/value heads of `width`."""

    rows: int
    length: int
    heads: int
    kv_heads: int
    width: int

    def flops(self, documents_bt: Tensor | None) -> float:
        """Of a forward pass: two products of 2 * width operations for every pair of a query and a key that it sees, in every head."""
        if documents_bt is None:
            pairs = self.rows * self.length * (self.length + 1) / 2
        else:
            lengths = torch.cat([torch.unique_consecutive(row, return_counts=True)[1] for row in documents_bt]).double()
            pairs = float((lengths * (lengths + 1) / 2).sum())
        return 4.0 * pairs * self.heads * self.width


def shape_of(config: RunConfig) -> Shape:
    """The attention of a recipe's model, at its sequence length and micro-batch. Raises ConfigError for a model that names no heads."""
    model = config.model
    if not all(hasattr(model, name) for name in ("heads", "kv_heads", "head_width")):
        raise ConfigError(
            f"bench attention needs a model with heads, kv_heads and head_width; {type(model).__name__} has not; try llama3_8b"
        )
    return Shape(config.train.micro_batch, config.data.seq_len, model.heads, model.kv_heads, model.head_width)


def documents(shape: Shape, device: Device) -> Tensor:
    """Document numbers [b, t] of rows packed with documents of DOCUMENT_TOKENS on average; the same in every run."""
    generator = torch.Generator().manual_seed(0)
    ends_bt = torch.rand(shape.rows, shape.length, generator=generator) < 1 / DOCUMENT_TOKENS
    return ends_bt.long().cumsum(1).to(device.torch)


def attention_rows(config: RunConfig, device: Device) -> Iterator[dict[str, Any]]:
    """A row for each backend and kind of batch: milliseconds, and 10^12 operations a second (a backward pass counts 2.5 forwards)."""
    shape, dtype = shape_of(config), precision(config.precision).compute
    for kind in ("whole rows", "documents"):
        documents_bt = documents(shape, device) if kind == "documents" else None
        for backend in BACKENDS:
            row = {"name": backend, "batch": kind, "shape": f"{shape.rows} x {shape.length:,}", "precision": config.precision}
            try:
                yield {**row, "heads": shape.heads, "width": shape.width, **_measure(backend, shape, documents_bt, device, dtype)}
            except ConfigError as error:
                yield {**row, "not here": str(error).partition(" cannot run here: ")[2].partition(";")[0]}
            except torch.OutOfMemoryError:
                yield {**row, "not here": "its scores do not fit into memory"}


def _measure(backend: str, shape: Shape, documents_bt: Tensor | None, device: Device, dtype: torch.dtype) -> dict[str, float]:
    attend = choose_attention(backend, device, documents_bt is not None, shape.width, dtype)
    if device.is_cuda and backend == "reference" and shape.rows * shape.heads * shape.length**2 > 2**31:
        raise torch.OutOfMemoryError
    generator = torch.Generator(device.torch).manual_seed(0)

    def random(heads: int) -> Tensor:
        return torch.randn(shape.rows, shape.length, heads, shape.width, dtype=dtype, device=device.torch, generator=generator)

    q, k, v = (random(heads).requires_grad_() for heads in (shape.heads, shape.kv_heads, shape.kv_heads))
    mask, cotangent = attend.mask(documents_bt), random(shape.heads)
    with torch.no_grad():
        forward_s = median_s(lambda: attend(q, k, v, mask), device)
    out = attend(q, k, v, mask)
    backward_s = median_s(lambda: torch.autograd.grad(out, (q, k, v), cotangent, retain_graph=True), device)
    flops = shape.flops(documents_bt)
    return {
        "forward_ms": forward_s * 1e3,
        "backward_ms": backward_s * 1e3,
        "forward_tflops": flops / forward_s / 1e12,
        "backward_tflops": 2.5 * flops / backward_s / 1e12,
    }
