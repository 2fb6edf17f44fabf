"""Vocabulary projection and loss of a recipe's shape by themselves: the reference, our chunks, and Liger's kernel where it is installed."""

from collections.abc import Callable, Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from paraxis.base.device import Device
from paraxis.base.dtypes import precision
from paraxis.base.errors import ConfigError
from paraxis.observe.memory import GIB
from paraxis.observe.stopwatch import median_s
from paraxis.ops.loss import chunked_head_loss, reference_head_loss
from paraxis.train.config import RunConfig

CHUNKS = (1024, 2048, 4096, 8192)  # tokens

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def loss_rows(config: RunConfig, device: Device) -> Iterator[dict[str, Any]]:
    """A row for each way: milliseconds of forward and backward together, and the memory it needs at its peak beside what it is given.

    Raises ConfigError for a model without a vocabulary and a width.
    """
    model, dtype = config.model, precision(config.precision).compute
    if not all(hasattr(model, name) for name in ("vocab_size", "width")):
        raise ConfigError(f"bench loss needs a model with vocab_size and width; {type(model).__name__} has not; try llama3_8b")
    tokens = config.train.micro_batch * config.data.seq_len
    generator = torch.Generator(device.torch).manual_seed(0)
    x_nm = torch.randn(tokens, model.width, dtype=dtype, device=device.torch, generator=generator).requires_grad_()
    weight_vm = torch.randn(model.vocab_size, model.width, dtype=dtype, device=device.torch, generator=generator) * model.width**-0.5
    weight_vm.requires_grad_()
    targets_n = torch.randint(model.vocab_size, (tokens,), device=device.torch, generator=generator)
    for name, loss in _ways(device, tokens).items():
        row = {"name": name, "tokens": tokens, "vocabulary": model.vocab_size, "width": model.width, "precision": config.precision}
        try:
            yield {**row, **_measure(loss, x_nm, weight_vm, targets_n, device)}
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            yield {**row, "not here": "its logits do not fit into memory"}


def _ways(device: Device, tokens: int) -> dict[str, Loss]:
    ways: dict[str, Loss] = {"reference": reference_head_loss}
    for compiled in (False, True) if device.is_cuda else (False,):
        for chunk in sorted({min(chunk, tokens) for chunk in CHUNKS}):
            how = partial(chunked_head_loss, chunk_tokens=chunk, compiled=compiled)
            ways[f"chunks of {chunk:,}" + (", compiled" if compiled else "")] = how
    if device.is_cuda and find_spec("liger_kernel"):
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss  # pyright: ignore[reportMissingImports]

        liger = LigerFusedLinearCrossEntropyLoss(reduction="sum")
        ways["Liger's fused linear cross-entropy"] = lambda x, weight, targets: liger(weight, x, targets)
    return ways


def _measure(loss: Loss, x_nm: Tensor, weight_vm: Tensor, targets_n: Tensor, device: Device) -> dict[str, float]:
    def both() -> None:
        torch.autograd.grad(loss(x_nm, weight_vm, targets_n), (x_nm, weight_vm))

    seconds = median_s(both, device)
    figures = {"forward_and_backward_ms": seconds * 1e3, "tflops": 6.0 * targets_n.numel() * weight_vm.numel() / seconds / 1e12}
    if not device.is_cuda:
        return figures
    before = torch.cuda.memory_allocated(device.torch)
    torch.cuda.reset_peak_memory_stats(device.torch)
    both()
    return {**figures, "peak_gib": (torch.cuda.max_memory_allocated(device.torch) - before) / GIB}
