"""Assembling a run: the rooms that never import each other are introduced to each other here."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from paraxis.base.layout import Placed
from paraxis.base.seams import Batch, HasAttention, Routed, Rows, Staged, routed_layers
from paraxis.base.strategy import Strategy
from paraxis.data.loader import Loader
from paraxis.data.record import skipped_records
from paraxis.models.init import initialise
from paraxis.optim.build import Optimizer, build_optimizer
from paraxis.parallel.apply import parallelize
from paraxis.parallel.context import own_part
from paraxis.parallel.fsdp import PipelineReduction
from paraxis.parallel.grads import Shard
from paraxis.parallel.mesh import Mesh, build_mesh
from paraxis.parallel.pipeline import Pipeline, build_lines
from paraxis.parallel.tied import TiedCopies, tie
from paraxis.parallel.world import World
from paraxis.train.buffers import Buffer, make_buffers
from paraxis.train.check import check, on_meta
from paraxis.train.choose import build_attention, build_strategy
from paraxis.train.config import RunConfig
from paraxis.train.passes import Accumulation, Passes, Piped
from paraxis.train.recompute import build_keep
from paraxis.train.stages import Stages, build_stages


@dataclass
class Run:
    """Everything one rank trains with. `step` counts finished optimizer steps; `tokens` those in the rows it has read; `skipped_steps`
    the last steps in a row whose update was skipped. `damaged` names checkpoints that could not be read when the run was resumed.

    `modules` is the model, or a pipeline rank's stages of it. `routers` are the mixture-of-experts layers in them by name;
    `router_sizes` has those of the whole model, with the entries of their tallies.
    """

    config: RunConfig
    strategy: Strategy
    mesh: Mesh
    modules: Sequence[nn.Module]
    passes: Passes
    shards: list[Shard]
    buffers: Sequence[Buffer]
    tied: TiedCopies | None
    routers: dict[str, Routed]
    router_sizes: dict[str, int]
    optimizer: Optimizer
    rows: Rows
    held_out: Rows | None
    rows_per_step: int
    step: int = 0
    tokens: int = 0
    row: int = 0
    skipped_steps: int = 0
    damaged: tuple[str, ...] = ()

    @cached_property
    def flops_per_token(self) -> float:
        """Floating-point operations of one trained token, forward and backward; 0 where the model does not say."""
        count = getattr(self.config.model, "flops_per_token", None)
        return count(self.config.data.seq_len) if count else 0.0

    @property
    def skipped_records(self) -> int:
        """Broken records left out of the data so far."""
        return skipped_records(self.rows)

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

    def take(self, batch: Batch) -> Batch:
        """A batch as the loader made it, on this rank's device, with this rank's positions."""
        return own_part(batch.to(self.world.device.torch), self.mesh.degrees.cp, self.mesh.at["cp"])


def assemble(config: RunConfig, world: World, rows: Rows, held_out: Rows | None) -> Run:
    """Builds the model on no memory, cuts and spreads it, gives it its first values, and an optimizer over this rank's parts.

    torch's generators start from train.seed. Raises ConfigError for what cannot run.
    """
    torch.manual_seed(config.train.seed)
    check(config, world.size)
    mesh = build_mesh(world, config.parallel.degrees.filling(world.size))
    whole = on_meta(config)
    stages = build_stages(config, mesh.degrees, whole)
    strategy = build_strategy(config, world, mesh.at, stages, whole)
    models = own_models(config, mesh, stages)
    attend = build_attention(config, mesh, strategy.precision.compute) if isinstance(whole, HasAttention) else None
    keep = build_keep(config, mesh, strategy, stages, models)
    by_stage: dict[int, list[Shard]] = {}
    for stage, model in models.items():
        if isinstance(model, HasAttention) and attend is not None:
            model.use_attention(attend)
        by_stage[stage] = parallelize(model, mesh, strategy, filler(model, config.train.seed), keep)
    buffers = make_buffers(config, mesh, stages, whole, models)
    if stages is None:
        passes: Passes = Accumulation(models[0], strategy.reduce_each_micro_batch)
        shards, tied = by_stage[0], None
    else:
        shared = held_by_both_ends(config, stages)
        lines = build_lines(mesh, stages.schedule, ends_talk=bool(shared))
        pipeline = Pipeline(models, stages.schedule, lines, world.device.torch)
        passes = Piped(pipeline, PipelineReduction(strategy.reduce_each_micro_batch, strategy.reshard))
        shards, tied = tie(by_stage, shared, stages.schedule, lines)
    trained = [shard for shard in shards if not shard.placed.frozen]
    optimizer = build_optimizer(
        {shard.placed.name: shard.local for shard in trained},
        {name: tuple(parameter.shape) for name, parameter in whole.named_parameters() if parameter.requires_grad},
        {shard.placed.name: shard.placed.stored for shard in trained},
        config.optim,
        world.device,
        config.train.seed,
    )
    routers = {name: layer for model in models.values() for name, layer in routed_layers(model).items()}
    return Run(
        config=config,
        strategy=strategy,
        mesh=mesh,
        modules=list(models.values()),
        passes=passes,
        shards=shards,
        buffers=buffers,
        tied=tied,
        routers=routers,
        router_sizes={name: layer.tally_s.numel() for name, layer in routed_layers(whole).items()},
        optimizer=optimizer,
        rows=rows,
        held_out=held_out,
        rows_per_step=config.rows_per_step(mesh.degrees),
    )


def own_models(config: RunConfig, mesh: Mesh, stages: Stages | None) -> dict[int, nn.Module]:
    """This rank's stages by number, on the meta device; all of the model is stage 0 where there is no pipeline."""
    if stages is None:
        return {0: on_meta(config)}
    own: dict[int, nn.Module] = {}
    for stage, holder in enumerate(stages.schedule.rank_of):
        if holder == mesh.at["pp"]:
            model = on_meta(config)
            assert isinstance(model, Staged)
            model.keep(stages.layers[stage])
            own[stage] = model
    return own


def filler(model: nn.Module, seed: int) -> Callable[[Tensor, Placed], None]:
    """Gives this rank's part of a parameter its first values."""
    return lambda local, placed: initialise(model, local, placed, seed)


def held_by_both_ends(config: RunConfig, stages: Stages) -> set[str]:
    """Names of the parameters that both the first and the last stage have: a tied embedding's."""
    ends = []
    for layers in (stages.layers[0], stages.layers[-1]):
        model = on_meta(config)
        assert isinstance(model, Staged)
        model.keep(layers)
        ends.append({name for name, _ in model.named_parameters()})
    return ends[0] & ends[1]
