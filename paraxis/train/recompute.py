"""What blocks keep for backward where memory decides (`remat.mode=budget` and `auto`), and how much memory there is for it."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from paraxis.base.device import Device
from paraxis.base.errors import ConfigError
from paraxis.base.layout import place
from paraxis.base.schedule import most_in_flight
from paraxis.base.seams import Batch
from paraxis.base.strategy import Strategy
from paraxis.observe.throughput import peak_flops
from paraxis.optim.build import state_bytes
from paraxis.parallel.apply import Keep, untraceable
from paraxis.parallel.knapsack import BlockTable, Choice, choices, fill
from paraxis.parallel.mesh import Mesh
from paraxis.parallel.remat import Kept
from paraxis.parallel.tabulate import Setting, rates, tabulate
from paraxis.train.config import RunConfig
from paraxis.train.stages import Stages

log = logging.getLogger("paraxis")

GIB = 2**30
# What the allocator holds and cannot use for want of pieces that fit, the CUDA context, the buffers of collectives. An 8B model's step on
# two H200s reserves 2.5 GiB more than its tensors take, of 140; without them the allocator stops to free and take them again.
RESERVE_SHARE = 0.07
NOMINAL_FLOPS = 1e15  # of a device whose peak is not known: only ratios of rates decide


def build_keep(config: RunConfig, mesh: Mesh, strategy: Strategy, stages: Stages | None, models: Mapping[int, nn.Module]) -> Keep | None:
    """What says how much each block keeps, given the model or stage that it is in; None where `remat.mode` says so itself.

    `models` are this rank's stages. Raises ConfigError for a budget of memory that is not known.
    """
    device, remat = mesh.world.device, config.remat
    if remat.mode not in ("budget", "auto"):
        return None
    if remat.budget == "auto" and not device.is_cuda:
        if remat.mode == "budget":
            raise ConfigError(f"remat.budget=auto needs a GPU, whose memory is known, and this is {device.kind}; give it in GiB")
        log.info("recomputation: auto keeps everything: memory is counted on GPUs, and this is %s", device.kind)
        return lambda model: [None] * len(model.blocks())  # type: ignore[arg-type,operator]
    return _Budget(config, mesh, strategy, stages, models)


@dataclass(frozen=True)
class _Budget:
    """Fills the memory there is for activations with what saves most time."""

    config: RunConfig
    mesh: Mesh
    strategy: Strategy
    stages: Stages | None
    models: Mapping[int, nn.Module]

    def __call__(self, model: nn.Module) -> Sequence[Kept]:
        first = next(iter(self.models.values())) is model
        [stage] = [number for number, own in self.models.items() if own is model]
        tables = tabulate_stage(self.config, self.mesh, self.strategy, model, first=stage == 0)
        if not tables:
            return []
        budget, said = self._budget(tables)
        at_once = most_in_flight(self.stages.schedule)[self.mesh.at["pp"]] if self.stages else 1
        found = self._agree(budget / sum(table.whole_bytes for table in tables), fill_blocks(tables, int(budget) // at_once))
        least = sum(choices(table)[0].bytes for table in tables) * at_once
        if found is None and self.config.remat.budget != "auto":
            raise ConfigError(
                f"remat.budget={self.config.remat.budget} GiB is less than what is kept where everything is computed again: the inputs of "
                f"{len(tables)} blocks for {at_once} micro-batches take {least / GIB:.4g} GiB; give {(least - budget) / GIB:.4g} GiB more, "
                "or lower train.micro_batch"
            )
        if found is None:
            log.warning("recomputation: %s; even block inputs alone, %.1f GiB, do not fit by this estimate", said, least / GIB)
            found = [choices(table)[0] for table in tables]
        if first:
            _say(self.config.remat.mode, said, tables, found, at_once)
        return [choice.kept for choice in found]

    def _agree(self, room: float, found: Sequence[Choice] | None) -> Sequence[Choice] | None:
        """What the rank with the least `room` for what it would keep has found: computing again can be a meeting of ranks, to which either
        all come or none. Their tables are not quite the same: in a ring, a rank's place decides which keys its queries see.
        """
        mine = None if found is None else [(choice.bytes, choice.seconds, choice.kept) for choice in found]
        _, agreed = self.mesh.world.agree_json((room, mine), self.mesh.stage, lambda told: min(told, key=lambda one: one[0]))
        if agreed is None:
            return None
        calls = [kept if kept is None else tuple((name, number) for name, number in kept) for _, _, kept in agreed]
        return [Choice(size, seconds, kept) for (size, seconds, _), kept in zip(agreed, calls, strict=True)]

    def _budget(self, tables: Sequence[BlockTable]) -> tuple[float, str]:
        """Bytes for activations, and where the figure comes from."""
        if self.config.remat.budget != "auto":
            return self.config.remat.budget * GIB, f"remat.budget={self.config.remat.budget:g} GiB"
        device = self.mesh.world.device
        held = held_besides(self.config, self.strategy, self.models, self.mesh.at["pp"], max(table.whole_bytes for table in tables))
        left = device.memory_bytes * (1 - RESERVE_SHARE) - sum(held.values())
        parts = ", ".join(f"{name} {size / GIB:.1f}" for name, size in held.items())
        return left, f"{left / GIB:.1f} GiB are left of {device.memory_bytes / GIB:.1f} ({parts}, reserve {RESERVE_SHARE:.0%})"


def fill_blocks(tables: Sequence[BlockTable], budget: int) -> list[Choice] | None:
    """What each block keeps; None where `budget` bytes are less than block inputs take."""
    kinds = list(dict.fromkeys(tables))
    found = fill([(choices(kind), tables.count(kind)) for kind in kinds], budget)
    if found is None:
        return None
    waiting = {kind: iter(mix.choices) for kind, mix in zip(kinds, found, strict=True)}
    return [next(waiting[table]) for table in tables]


def tabulate_stage(config: RunConfig, mesh: Mesh, strategy: Strategy, model: nn.Module, *, first: bool) -> list[BlockTable]:
    """The table of each block of a model, or stage, as this run computes it. Raises ConfigError where it cannot be traced."""
    degrees, device = mesh.degrees, mesh.world.device
    length = config.data.seq_len // degrees.cp
    rows = config.train.micro_batch
    batch = Batch(*(torch.empty(rows, length, dtype=torch.int64, device="meta") for _ in range(3)))
    compiled = strategy.compile != "none"
    opaque = compiled and (degrees.cp > 1 or bool(untraceable(model)))
    setting = Setting(
        device=device.torch,
        dtype=strategy.precision.compute,
        stream=(rows, length // (degrees.tp if strategy.sequence_parallel else 1), getattr(config.model, "width", 0)),
        rates=rates(_peak(device, strategy)),
        fused=compiled,
        opaque=opaque,
        spread=mesh.ep is not None,
    )
    try:
        return tabulate(model, batch, setting, first=first)
    except ConfigError:
        raise
    except Exception as error:
        raise ConfigError(
            f"remat.mode={config.remat.mode} follows a forward of {type(model).__name__} without data, which failed "
            f"({type(error).__name__}: {error}); use remat.mode=none, selective or full"
        ) from error


def _peak(device: Device, strategy: Strategy) -> float:
    known = peak_flops(device.name, strategy.precision.products) if device.is_cuda else None
    return known or NOMINAL_FLOPS


def held_besides(
    config: RunConfig, strategy: Strategy, models: Mapping[int, nn.Module], pipeline_rank: int, one_pass: int
) -> dict[str, float]:
    """Bytes that a rank holds besides what blocks keep, between a micro-batch's forward and its backward, when it holds most. What blocks
    keep then goes away faster than gradients come. `one_pass` is what backward reads of one block.

    Of ranks that share a stage the one that stores most is meant, so that all come to one answer: collectives that are part of what is
    computed again have to be so on every rank.
    """
    degrees, dtypes = strategy.degrees, strategy.precision
    at = {"dp": 0, "fsdp": 0, "cp": 0, "tp": 0, "pp": pipeline_rank}
    stored, computed, largest, ends = 0, 0, 0, 0
    for model in models.values():
        layout = getattr(model, "layout", {})
        placed = {name: place(name, tuple(p.shape), layout, degrees, at) for name, p in model.named_parameters()}
        blocks: Sequence[nn.Module] = model.blocks()  # type: ignore[operator]
        names = {id(p): name for name, p in model.named_parameters()}
        of_blocks = [sum(placed[names[id(p)]].computed.numel for p in block.parameters()) for block in blocks]
        whole = sum(where.computed.numel for where in placed.values())
        stored += sum(where.stored.numel for where in placed.values())
        computed += whole
        largest, ends = max([largest, *of_blocks]), ends + whole - sum(of_blocks)
    compute, reduce, master = dtypes.compute.itemsize, dtypes.reduce.itemsize, dtypes.master.itemsize
    micro_batches = config.rows_per_step(degrees) // (degrees.data_ranks * config.train.micro_batch)
    vocabulary = getattr(config.model, "vocab_size", 0) // degrees.tp
    tokens = config.train.tokens_with_logits(config.train.micro_batch * config.data.seq_len // degrees.cp)
    width = getattr(config.model, "width", 0)
    logits = tokens * vocabulary * (2 * compute + 4) + vocabulary * width * (compute + 4)  # a chunk's, and their weight's gradient
    # A block's gradients are made in one dtype and summed in another, while the next one's are made.
    backward = one_pass + 2 * largest * (compute + reduce)
    held = {
        "parameters": stored * master,
        "optimizer": stored * state_bytes(config.optim, dtypes.master),
        "gradients of earlier micro-batches": (computed * reduce if not strategy.reduce_each_micro_batch else stored * master)
        if micro_batches > 1
        else 0,
        "gathered parameters": (ends + 2 * largest if strategy.reshard else computed) * compute,
        "head, or one block's backward": max(logits, backward),
    }
    return {name: size for name, size in held.items() if size}


def _say(mode: str, said: str, tables: Sequence[BlockTable], found: Sequence[Choice], at_once: int) -> None:
    whole = sum(table.whole_bytes for table in tables) * at_once
    kept = sum(choice.bytes for choice in found) * at_once
    seconds = sum(choice.seconds for choice in found)
    log.info(
        "recomputation: %s keeps %.3g of %.3g GiB of activations, for %.3g ms of computing again a micro-batch: %s; %s",
        mode, kept / GIB, whole / GIB, 1000 * seconds, "; ".join(_runs(tables, found)), said,
    )  # fmt: skip


def _runs(tables: Sequence[BlockTable], found: Sequence[Choice]) -> list[str]:
    """`blocks 0-11 keep attention, mlp.up_proj`, one for each run of blocks that keep the same: the modules whose products are kept."""
    said: list[str] = []
    start = 0
    for number, (table, choice) in enumerate(zip(tables, found, strict=True)):
        if number + 1 < len(found) and (tables[number + 1], found[number + 1]) == (table, choice):
            continue
        kept = choice.kept or ()
        places = ", ".join(operator.place or operator.call[0] for operator in table.operators if operator.call in kept) or "their inputs"
        said.append(f"blocks {start}-{number} keep {'everything' if choice.kept is None else places}")
        start = number + 1
    return said
