"""Every `auto` of a run settled, each with its reason logged."""

import logging
from collections.abc import Mapping

import torch
from torch import nn

from paraxis.base.axes import Degrees
from paraxis.base.device import Device
from paraxis.base.dtypes import LowPrecision, Precision, low_precision, precision
from paraxis.base.errors import ConfigError
from paraxis.base.layout import place
from paraxis.base.seams import Attend
from paraxis.base.strategy import CompileMode, Strategy
from paraxis.ops.attention import choose_attention
from paraxis.ops.attention_parts import ReferenceParts, choose_parts
from paraxis.ops.lowp import scaling_problem
from paraxis.parallel.context import context_attention
from paraxis.parallel.mesh import Mesh
from paraxis.parallel.world import World
from paraxis.train.check import context_kind
from paraxis.train.config import RunConfig
from paraxis.train.stages import Stages

log = logging.getLogger("paraxis")

# Whole gradients kept between micro-batches may take this share of a GPU's memory before they are reduced each time.
WHOLE_GRADIENT_SHARE = 0.1
# A pipeline stage's gathered parameters may take this share before they are gathered for each micro-batch.
GATHERED_SHARE = 0.25
# So many ranks at most send gradients to each other directly: a host's, as a rule.
ALL_TO_ALL_RANKS = 8


def build_strategy(config: RunConfig, world: World, at: Mapping[str, int], stages: Stages | None, model: nn.Module) -> Strategy:
    """How this run is executed on `world`; `model` is the whole one, on the meta device."""
    degrees, dtypes = config.parallel.degrees.filling(world.size), precision(config.precision)
    entries = entries_computed_with(model, degrees, at)
    return Strategy(
        degrees=degrees,
        precision=dtypes,
        low_precision=_low_precision(config, dtypes, world.device),
        remat=config.remat,
        compile=_compile(config, world.device, stages),
        sequence_parallel=config.parallel.sequence_parallel,
        async_tp=config.parallel.async_tp,
        reshard=_reshard(config, degrees, entries, dtypes, world.device),
        reduce_each_micro_batch=_reduce_each(config, stages, entries, dtypes, world.device),
        loss_tokens=config.train.loss_tokens,
        half_travels=_half_travels(config, degrees, dtypes, world.device),
    )


def entries_computed_with(model: nn.Module, degrees: Degrees, at: Mapping[str, int]) -> int:
    """Entries of the parameters that one rank has while all of its own are gathered; of a pipeline's, the average rank."""
    layout = getattr(model, "layout", {})
    whole = (place(name, tuple(p.shape), layout, degrees, at).computed.numel for name, p in model.named_parameters())
    return sum(whole) // degrees.pp


def _compile(config: RunConfig, device: Device, stages: Stages | None) -> CompileMode:
    if config.compile != "auto":
        return config.compile
    if stages is not None and stages.schedule.splits_backward:
        log.info("compile: auto chose none: parallel.schedule=%s splits the backward, which compiled blocks cannot", stages.schedule.name)
        return "none"
    chosen = "inductor" if device.is_cuda else "none"
    log.info("compile: auto chose %s on %s", chosen, device.kind)
    return chosen


def _low_precision(config: RunConfig, dtypes: Precision, device: Device) -> LowPrecision | None:
    recipe = low_precision(dtypes, config.float8)
    if recipe is not None and (problem := scaling_problem(recipe, device)):
        raise ConfigError(f"precision={dtypes.name}: {problem}; use precision=bf16, or another one that the GPU has")
    return recipe


def _reshard(config: RunConfig, degrees: Degrees, entries: int, dtypes: Precision, device: Device) -> bool:
    if config.parallel.reshard != "auto":
        return config.parallel.reshard == "always"
    if degrees.shards == 1 or degrees.pp == 1:
        return degrees.shards > 1
    gathered = entries * dtypes.compute.itemsize
    freed = device.is_cuda and gathered > GATHERED_SHARE * device.memory_bytes
    log.info("parameters: auto gathers them %s (%.1f GiB)", "for each micro-batch" if freed else "once a step", gathered / 2**30)
    return freed


def _reduce_each(config: RunConfig, stages: Stages | None, entries: int, dtypes: Precision, device: Device) -> bool:
    if config.parallel.reduce != "auto":
        return config.parallel.reduce == "micro_batch"
    if stages is not None and stages.schedule.splits_backward:
        log.info("gradients: auto reduces them once a step: parallel.schedule=%s makes a stage's at different times", stages.schedule.name)
        return False
    whole = entries * dtypes.reduce.itemsize
    each = device.is_cuda and whole > WHOLE_GRADIENT_SHARE * device.memory_bytes
    log.info("gradients: auto reduces them %s (%.1f GiB whole)", "after each micro-batch" if each else "once a step", whole / 2**30)
    return each


def _half_travels(config: RunConfig, degrees: Degrees, dtypes: Precision, device: Device) -> bool:
    """Among few, since then every rank sends every other one its part: a ring sends less from host to host."""
    if config.parallel.travel != "auto" or degrees.shards == 1 or dtypes.compute == dtypes.reduce:
        return config.parallel.travel == "computed"
    chosen = device.is_cuda and degrees.shards <= ALL_TO_ALL_RANKS
    log.info("gradients: auto has them travel %s among %d ranks", "as computed" if chosen else "in the reduce dtype", degrees.shards)
    return chosen


def build_attention(config: RunConfig, mesh: Mesh, dtype: torch.dtype) -> Attend:
    """The attention that `config` asks for: of whole rows, or across the `cp` ranks."""
    device, parallel, cp = mesh.world.device, config.parallel, mesh.degrees.cp
    documents = bool(getattr(config.data, "document_mask", False))
    width = getattr(config.model, "head_width", None)
    attend = choose_attention(config.attention, device, documents, width, dtype)
    if cp == 1:
        return attend
    kind = context_kind(config, mesh.degrees)
    if parallel.cp_kind == "auto" and not parallel.cp_ulysses:
        log.info("context: auto chose %s over cp=%d", kind, cp)
    parts = choose_parts(device, dtype, documents, width or 0, config.attention)
    whole = parts if config.attention == "auto" and not isinstance(parts, ReferenceParts) else None
    return context_attention(kind, parallel.cp_ulysses, mesh, parts, whole, attend)
