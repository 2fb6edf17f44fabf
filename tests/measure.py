"""What a layout computes in tests: worlds of gloo ranks, measured by the lines that `paraxis verify` measures with."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.base.device import CPU
from paraxis.base.layout import Placed, whole_box
from paraxis.base.seams import Batch
from paraxis.parallel.world import World
from paraxis.train.config import RunConfig
from paraxis.train.run import Run, assemble
from paraxis.verify import measure as verify_measure
from paraxis.verify.measure import Part, with_layout, worst_difference
from paraxis.verify.rows import MadeRows
from tests.worlds import run_world

__all__ = ["MadeRows", "Measured", "Part", "batches_of", "joined", "measure", "placed_whole", "run_of", "with_layout", "worst_difference"]


@dataclass
class Measured:
    """Losses and norms by step; gradients of the first step and weights after the last, whole, by parameter name.

    `tokens`: by mixture-of-experts layer, how many tokens the first step sent to each expert.
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    grads: dict[str, Tensor] = field(default_factory=dict)
    weights: dict[str, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)


def this_world() -> World:
    """The World of a process that a test harness has already put in a process group."""
    store = dist.PrefixStore("exchange", dist.distributed_c10d._get_default_store())
    return World(dist.get_rank(), dist.get_world_size(), int(os.environ["LOCAL_RANK"]), CPU, store)


def run_of(config: RunConfig, rows: Any) -> Run:
    """The assembled run on this world, reading `rows`."""
    return assemble(config, this_world(), rows, None)


def measure_rank(config: RunConfig, rows: Any, steps: int) -> verify_measure.Measured:
    """On one rank: the gradients of a first pass, then `steps` training steps, and the stored weights after them."""
    return verify_measure.measure_rank(config, this_world(), rows, steps)


def joined(ranks: list[list[Part]]) -> dict[str, Tensor]:
    """The ranks' parts put together. Copies of one part must agree; every element must come from some rank."""
    whole, apart = verify_measure.joined(ranks)
    for name, tensor in whole.items():
        allowed = (1e-6 if tensor.dtype == torch.float32 else 1e-12) * float(tensor.abs().max()) + 1e-12
        assert apart[name] <= allowed, f"the ranks' copies of {name} differ by {apart[name]}"
    return whole


def measure(
    *, config: RunConfig, layout: str, rows: Any, steps: int = 2, timeout: float = 100.0, parallel: Mapping[str, Any] = MappingProxyType({})
) -> Measured:
    """What `config` computes on `layout` ("" is one process) with more settings of `parallel`, on a new world of that many ranks."""
    config = with_layout(config, layout)
    config = replace(config, parallel=replace(config.parallel, **parallel))
    ranks: list[verify_measure.Measured] = run_world(measure_rank, config.parallel.degrees.ranks, config, rows, steps, timeout=timeout)
    losses, norms = ranks[0].losses, ranks[0].norms
    assert all(r.losses == losses and r.norms == norms for r in ranks), "ranks report different losses or norms"
    wholes = [joined([rank.parts[kind] for rank in ranks]) for kind in ("gradient", "weight", "tokens")]
    return Measured(losses[1:], norms[1:], *wholes)  # the first are those of the pass that trains nothing


def batches_of(rows: Any, first: int, count: int) -> Batch:
    """Rows `first` to `first + count` as one batch."""
    made = [rows.row(index) for index in range(first, first + count)]
    return Batch(**{name: torch.from_numpy(np.stack([row[name] for row in made])) for name in made[0]})


def placed_whole(name: str, parameter: Tensor) -> Placed:
    """Where a parameter lives on a rank that holds all of it."""
    box = whole_box(tuple(parameter.shape))
    return Placed(name, tuple(parameter.shape), box, box)
