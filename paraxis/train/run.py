"""Assembling a run: the rooms that never import each other are introduced to each other here."""

import logging
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import nn

from paraxis.base.device import Device
from paraxis.base.dtypes import precision
from paraxis.base.errors import ConfigError
from paraxis.base.seams import HasAttention, Rows
from paraxis.base.strategy import Strategy
from paraxis.data.loader import Loader
from paraxis.models.init import initialise
from paraxis.ops.attention import choose_attention
from paraxis.optim.build import Optimizer, build_optimizer
from paraxis.parallel.apply import parallelize
from paraxis.parallel.grads import Shard
from paraxis.parallel.mesh import Mesh, build_mesh
from paraxis.parallel.world import World
from paraxis.train.config import RunConfig

log = logging.getLogger("paraxis")

# Whole gradients kept between micro-batches may take this share of a GPU's memory before they are reduced each time.
WHOLE_GRADIENT_SHARE = 0.1


@dataclass
class Run:
    """Everything one rank trains with. `step` counts finished optimizer steps; `tokens` those in the rows it has read."""

    config: RunConfig
    strategy: Strategy
    mesh: Mesh
    model: nn.Module
    shards: list[Shard]
    optimizer: Optimizer
    rows: Rows
    held_out: Rows | None
    rows_per_step: int
    step: int = 0
    tokens: int = 0
    row: int = 0
    skipped_records: int = 0

    @cached_property
    def flops_per_token(self) -> float:
        """Floating-point operations of one trained token, forward and backward; 0 where the model does not say."""
        count = getattr(self.config.model, "flops_per_token", None)
        return count(self.config.data.seq_len) if count else 0.0

    @property
    def world(self) -> World:
        return self.mesh.world

    def loader(self) -> Loader:
        """Reads on from the run's data position."""
        return Loader(
            self.rows,
            micro_batch=self.config.train.micro_batch,
            data_rank=self.mesh.data_rank,
            data_ranks=self.mesh.degrees.data_ranks,
            rows_per_step=self.rows_per_step,
            start_row=self.row,
            pin=self.world.device.is_cuda,
        )


def check(config: RunConfig, ranks: int) -> None:
    """Refuses, before any process is started, what cannot run on `ranks` ranks. Raises ConfigError."""
    degrees = config.parallel.degrees.filling(ranks)
    config.rows_per_step(degrees)
    if config.data.seq_len % degrees.tp:
        raise ConfigError(
            f"data.seq_len={config.data.seq_len} is not a multiple of parallel.tp={degrees.tp}, "
            f"which splits every row along the sequence; change either"
        )
    with torch.device("meta"):
        model = config.model.build()
    check_heads(config, degrees.tp)
    if ranks > 1 and (name := dropout_of(model)):
        raise ConfigError(f"{name} drops out at random, which differs between layouts; set its probability to 0 or train on one rank")


def check_heads(config: RunConfig, tp: int) -> None:
    """Refuses attention heads that tensor parallelism cannot share out."""
    for field in ("heads", "kv_heads"):
        heads = getattr(config.model, field, None)
        if isinstance(heads, int) and heads % tp:
            raise ConfigError(
                f"model.{field}={heads} is not divisible by parallel.tp={tp}; "
                f"use a degree that divides it: {', '.join(str(d) for d in range(1, heads + 1) if heads % d == 0)}"
            )


def dropout_of(model: nn.Module) -> str | None:
    """The name of the first module that drops out at random, if any."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0:
            return name
    return None


def build_strategy(config: RunConfig, world: World) -> Strategy:
    """The configuration's requests with every `auto` settled, each with its reason logged."""
    degrees = config.parallel.degrees.filling(world.size)
    compile_mode = config.compile
    if compile_mode == "auto":
        compile_mode = "inductor" if world.device.is_cuda else "none"
        log.info("compile: auto chose %s on %s", compile_mode, world.device.kind)
    reshard = {"auto": degrees.fsdp > 1, "always": True, "never": False}[config.parallel.reshard]
    return Strategy(
        degrees=degrees,
        precision=precision(config.precision),
        remat=config.remat,
        compile=compile_mode,
        reshard=reshard,
        reduce_each_micro_batch=_reduce_each(config, degrees.tp, world.device),
    )


def _reduce_each(config: RunConfig, tp: int, device: Device) -> bool:
    if config.parallel.reduce != "auto":
        return config.parallel.reduce == "micro_batch"
    with torch.device("meta"):
        whole = sum(p.numel() for p in config.model.build().parameters()) * precision(config.precision).reduce.itemsize // tp
    each = device.is_cuda and whole > WHOLE_GRADIENT_SHARE * device.memory_bytes
    log.info("gradients: auto reduces them %s (%.1f GiB whole)", "after each micro-batch" if each else "once a step", whole / 2**30)
    return each


def assemble(config: RunConfig, world: World, rows: Rows, held_out: Rows | None) -> Run:
    """Builds the model on no memory, spreads it, gives it its first values, and an optimizer over this rank's parts.

    Raises ConfigError for what cannot run.
    """
    check(config, world.size)
    strategy = build_strategy(config, world)
    mesh = build_mesh(world, strategy.degrees)
    with torch.device("meta"):
        model: nn.Module = config.model.build()
    if isinstance(model, HasAttention):
        documents = bool(getattr(config.data, "document_mask", False))
        width = getattr(config.model, "head_width", None)
        model.use_attention(choose_attention(config.attention, world.device, documents, width, strategy.precision.compute))
    shards = parallelize(model, mesh, strategy, lambda local, placed: initialise(model, local, placed, config.train.seed))
    optimizer = build_optimizer(
        {shard.placed.name: shard.local for shard in shards},
        {shard.placed.name: shard.placed.shape for shard in shards},
        config.optim,
        world.device,
    )
    return Run(config, strategy, mesh, model, shards, optimizer, rows, held_out, config.rows_per_step(strategy.degrees))
