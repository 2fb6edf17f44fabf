"""Activation checkpointing: what a block keeps for backward, and what it computes again.

Source: Chen et al. 2016, "Training deep nets with sublinear memory cost"; selective form: Korthikanti et al. 2022, section 5.
"""

from collections.abc import Iterable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from paraxis.base.strategy import RematConfig

_aten = torch.ops.aten

# Costly to compute or to communicate again; everything else (norms, rotations, activations, casts) is cheap.
KEPT: set[Any] = {
    _aten.mm.default,
    _aten.bmm.default,
    _aten.addmm.default,
    _aten._scaled_dot_product_cudnn_attention.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    _aten._grouped_mm.default,
}
if hasattr(torch.ops.higher_order, "flex_attention"):
    KEPT.add(torch.ops.higher_order.flex_attention)


# Experts that FSDP gathers by themselves do so inside a block; what its hooks tell the profiler differs when they run again.
SAC_IGNORED_OPS |= {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_blocks(blocks: Iterable[nn.Module], config: RematConfig) -> None:
    """Makes every `config.every`-th block recompute in backward what `config.mode` does not keep."""
    if config.mode == "none":
        return
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    if config.mode == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, _policy)
    for number, block in enumerate(blocks):
        if number % config.every == 0:
            block.forward = _recomputed(block.forward, options)


def _recomputed(forward: Any, options: dict[str, Any]) -> Any:
    @wraps(forward)
    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    return recomputed
