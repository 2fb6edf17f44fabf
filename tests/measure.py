"""What a layout computes, step by step: losses, norms, every gradient and weight, put together from the ranks' parts.

One process and any layout are measured by the same few lines, so that they can be compared number by number.
"""

import os
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.base.device import CPU
from paraxis.base.layout import Box, Placed, parse_layout, whole_box
from paraxis.base.seams import IGNORE, Batch
from paraxis.parallel.grads import sum_copies
from paraxis.parallel.world import World
from paraxis.train.config import RunConfig
from paraxis.train.run import Run, assemble
from paraxis.train.step import count_targets, forward_backward, train_step
from tests.worlds import run_world


@dataclass(frozen=True)
class MadeRows:
    """Random tokens whose rows differ in how many targets they train on, so that a mean of means would show.

    With `documents`, every row holds several documents of uneven length, one of which ends in the middle of the row.
    """

    vocab_size: int
    seq_len: int
    documents: bool = False
    length: int = 1 << 30
    fingerprint: str = "made"

    def row(self, index: int) -> dict[str, np.ndarray]:
        rng = np.random.default_rng(index)
        tokens = rng.integers(0, self.vocab_size, self.seq_len + 1)
        targets = tokens[1:].copy()
        targets[rng.random(self.seq_len) < rng.uniform(0.0, 0.7)] = IGNORE
        row = {"tokens_bt": tokens[:-1], "targets_bt": targets, "positions_bt": np.arange(self.seq_len)}
        if self.documents:
            ends = sorted({self.seq_len // 2, *rng.integers(1, self.seq_len, 3).tolist()})
            document = np.searchsorted(ends, np.arange(self.seq_len), side="right")
            starts = np.array([0, *ends])[document]
            row |= {"positions_bt": np.arange(self.seq_len) - starts, "documents_bt": document}
            targets[np.array(ends) - 1] = IGNORE
        return row


@dataclass
class Measured:
    """Losses and norms by step; gradients of the first step and weights after the last, whole, by parameter name."""

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)


Part = tuple[str, tuple[int, ...], Box, Tensor]


def this_world() -> World:
    """The World of a process that a test harness has already put in a process group."""
    store = dist.PrefixStore("exchange", dist.distributed_c10d._get_default_store())
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), CPU, store)


def run_of(config: RunConfig, rows: Any) -> Run:
    """The assembled run on this world, reading `rows`."""
    return assemble(config, this_world(), rows, None)


def measure_rank(config: RunConfig, rows: Any, steps: int) -> tuple[list[float], list[float], list[Part], list[Part]]:
    """On one rank: the gradients of a first pass, then `steps` training steps, and the stored weights after them."""
    run = run_of(config, rows)
    loader = run.loader()
    try:
        batches = next(loader)
        scale = count_targets(batches, run.mesh).double().reciprocal()
        forward_backward(run.model, batches, scale, run.strategy.reduce_each_micro_batch)
        for shard in run.shards:
            shard.take_gradient()
        sum_copies(run.shards, run.mesh)
        grads = [_part(shard.placed, shard.local.grad) for shard in run.shards]
        for shard in run.shards:
            shard.drop_gradient()
        losses, norms = [], []
        for _ in range(steps):
            report = train_step(
                run.model,
                run.shards,
                batches,
                run.optimizer,
                run.mesh,
                lr=config.optim.lr,
                max_norm=config.optim.clip_norm,
                each_micro_batch=run.strategy.reduce_each_micro_batch,
            )
            losses.append(report.loss)
            norms.append(report.grad_norm)
            batches = next(loader)
    finally:
        loader.close()
    return losses, norms, grads, [_part(shard.placed, shard.local) for shard in run.shards]


def _part(placed: Any, tensor: Tensor | None) -> Part:
    assert tensor is not None
    return placed.name, placed.shape, placed.stored, tensor.detach().clone()


def joined(ranks: list[list[Part]]) -> dict[str, Tensor]:
    """The ranks' parts put together. Copies of one part must agree; every element must come from some rank."""
    whole: dict[str, Tensor] = {}
    for parts in ranks:
        for name, shape, box, tensor in parts:
            out = whole.setdefault(name, torch.full(shape, torch.nan, dtype=tensor.dtype))
            at = box.slices_within(whole_box(shape))
            held = out[at]
            both = ~held.isnan()
            torch.testing.assert_close(
                held[both],
                tensor[both],
                rtol=1e-6 if tensor.dtype == torch.float32 else 1e-12,
                atol=1e-12,
                msg=lambda text, name=name: f"the ranks' copies of {name} differ: {text}",
            )
            out[at] = tensor
    assert not any(t.isnan().any() for t in whole.values()), "a part is missing, or not a number"
    return whole


def with_layout(config: RunConfig, layout: str) -> RunConfig:
    """The same run on another layout, its global batch unchanged: fewer data ranks accumulate more micro-batches."""
    degrees = {"dp": 1, "fsdp": 1, "tp": 1, **(parse_layout(layout) if layout else {})}
    return replace(config, parallel=replace(config.parallel, **degrees))


def measure(*, config: RunConfig, layout: str, rows: Any, steps: int = 2, timeout: float = 100.0) -> Measured:
    """What `config` computes on `layout` ("" is one process), on a new world of that many ranks."""
    config = with_layout(config, layout)
    results = run_world(measure_rank, config.parallel.degrees.ranks, config, rows, steps, timeout=timeout)
    losses, norms = results[0][0], results[0][1]
    assert all(r[0] == losses and r[1] == norms for r in results), "ranks report different losses or norms"
    return Measured(losses, norms, joined([r[2] for r in results]), joined([r[3] for r in results]))


def worst_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> tuple[float, str]:
    """The largest max|a-b| / max|b| over the tensors (absolute where max|b| < 1e-12), and whose it is."""
    assert a.keys() == b.keys()

    def difference(name: str) -> float:
        size = float(b[name].abs().max())
        return float((a[name] - b[name]).abs().max()) / (size if size >= 1e-12 else 1.0)

    return max((difference(name), name) for name in b)


def batches_of(rows: Any, first: int, count: int) -> Batch:
    """Rows `first` to `first + count` as one batch."""
    made = [rows.row(index) for index in range(first, first + count)]
    return Batch(**{name: torch.from_numpy(np.stack([row[name] for row in made])) for name in made[0]})


def placed_whole(name: str, parameter: Tensor) -> Placed:
    """Where a parameter lives on a rank that holds all of it."""
    box = whole_box(tuple(parameter.shape))
    return Placed(name, tuple(parameter.shape), box, box, None, 0, 1)
