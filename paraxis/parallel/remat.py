"""Activation checkpointing: what a block keeps for backward, and what it computes again.

Source: Chen et al. 2016, "Training deep nets with sublinear memory cost"; selective form: Korthikanti et al. 2022, section 5.
"""

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache, partial, wraps
from hashlib import sha256
from inspect import getsource
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.checkpoint import SAC_IGNORED_OPS, CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from paraxis.base.strategy import RematConfig
from paraxis.ops.flash4 import flash_attention_4
from paraxis.ops.float8 import block_product
from paraxis.ops.fp4 import fp4_product
from paraxis.parallel.knapsack import Call
from paraxis.parallel.once import CALL, computed_once
from paraxis.parallel.tabulate import call_name

# What one block keeps: everything (None), what is costly, or these calls' outputs alone.
Kept = Literal["costly"] | tuple[Call, ...] | None

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
    flash_attention_4._opoverload,
    torch.ops._c10d_functional.reduce_scatter_tensor.default,
    torch.ops._c10d_functional.all_reduce.default,
    _aten._grouped_mm.default,
    _aten._scaled_mm.default,
    block_product._opoverload,
    fp4_product._opoverload,
}
if hasattr(torch.ops.higher_order, "flex_attention"):
    KEPT.add(torch.ops.higher_order.flex_attention)


# Experts that FSDP gathers by themselves do so inside a block; what its hooks tell the profiler differs when they run again.
SAC_IGNORED_OPS |= {torch.ops.profiler._record_function_enter_new.default, torch.ops.profiler._record_function_exit._RecordFunction}


def _policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator in KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def _contexts(kept: tuple[Call, ...]) -> Any:
    """Contexts for one forward and its recomputation that keep the outputs of these calls."""
    calls: Counter[tuple[bool, str]] = Counter()

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        family = call_name(operator)
        if family is None:
            return CheckpointPolicy.PREFER_RECOMPUTE
        place = context.is_recompute, family  # torch 2.11 asks again while it recomputes
        calls[place] += 1
        return CheckpointPolicy.MUST_SAVE if (family, calls[place] - 1) in kept else CheckpointPolicy.PREFER_RECOMPUTE

    return create_selective_checkpoint_contexts(policy)


def kept_by(config: RematConfig, blocks: int) -> list[Kept]:
    """What each of `blocks` keeps by a mode that says so for all alike."""
    modes: dict[str, Kept] = {"none": None, "selective": "costly", "full": ()}
    return [modes[config.mode] if number % config.every == 0 else None for number in range(blocks)]


def checkpoint_blocks(blocks: Sequence[nn.Module], kept: Sequence[Kept], traced: Callable[[nn.Module], bool]) -> None:
    """Makes each block recompute in backward what it does not keep; `traced` says whether it is compiled in one piece afterwards."""
    for block, what in zip(blocks, kept, strict=True):
        if what is None:
            continue
        # Generators are put back for the second time: what a block drops out it has to drop out again.
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": True}
        if what == "costly":
            options["context_fn"] = _known(partial(create_selective_checkpoint_contexts, _policy), what)
        elif any(name == CALL for name, _ in what):
            options["context_fn"] = computed_once
        elif what or traced(block):  # is told of every operator: those in autograd functions of which it is not told torch 2.11 keeps
            options["context_fn"] = _known(partial(_contexts, what), what)
        block.forward = _recomputed(block.forward, options)


def _known(contexts: Any, kept: Kept) -> Any:
    """`contexts`, by which a compiled graph can be found again in torch's cache: a name for all that decides what they keep."""
    contexts.cache_hash = sha256(repr((kept, _source())).encode()).hexdigest()
    return contexts


@cache
def _source() -> tuple[str, ...]:
    return tuple(getsource(sys.modules[function.__module__]) for function in (_known, call_name))


def _recomputed(forward: Any, options: dict[str, Any]) -> Any:
    @wraps(forward)
    def recomputed(*args: Any) -> Any:
        return checkpoint(forward, *args, **options)

    return recomputed
