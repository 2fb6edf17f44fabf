"""What a layout computes, step by step: losses, norms, every gradient and weight, put together from the ranks' parts.

One process and any layout are measured by the same few lines, through the very `train_step` that training calls, so that they can be
compared number by number.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, cast

import safetensors.torch
import torch
from torch import Tensor

from paraxis.base.errors import ConfigError
from paraxis.base.layout import Box, Placed, parse_layout, whole_box
from paraxis.base.seams import Batch, Rows
from paraxis.base.strategy import ParallelConfig
from paraxis.optim.build import Optimizer, scale_gradients
from paraxis.parallel.world import World
from paraxis.train.config import RunConfig
from paraxis.train.run import Run, assemble
from paraxis.train.step import StepReport, train_step


class Part(NamedTuple):
    """What one rank holds of a tensor of global `shape`: the rectangle `box`."""

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor


@dataclass
class Measured:
    """What one rank saw: losses and norms of a pass that trains nothing and of the steps after it; and, by what they are, its parts of

    gradient   the first pass's gradients, not clipped
    clipped    the first step's gradients as the optimizer gets them
    weight     the weights after the last step
    tokens     how many tokens the first pass sent to each expert, by mixture-of-experts layer
    """

    losses: list[float] = field(default_factory=list)
    norms: list[float] = field(default_factory=list)
    parts: dict[str, list[Part]] = field(default_factory=dict)

    def saw(self, report: StepReport) -> None:
        self.losses.append(report.loss)
        self.norms.append(report.grad_norm)

    def packed(self) -> bytes:
        """All of it as bytes that `unpacked` reads; no code travels with them."""
        told = [(what, part.name, part.shape, part.box.offsets, part.box.sizes) for what, parts in self.parts.items() for part in parts]
        tensors = {str(n): part.tensor for n, part in enumerate(part for parts in self.parts.values() for part in parts)}
        record = {"losses": self.losses, "norms": self.norms, "kinds": list(self.parts), "parts": told}
        return json.dumps(record).encode() + b"\n" + safetensors.torch.save(tensors)

    @classmethod
    def unpacked(cls, data: bytes) -> "Measured":
        text, _, blob = data.partition(b"\n")
        record, tensors = json.loads(text), safetensors.torch.load(blob)
        parts: dict[str, list[Part]] = {kind: [] for kind in record["kinds"]}
        for n, (what, name, shape, offsets, sizes) in enumerate(record["parts"]):
            parts[what].append(Part(name, tuple(shape), Box(tuple(offsets), tuple(sizes)), tensors[str(n)]))
        return cls(record["losses"], record["norms"], parts)


def with_layout(config: RunConfig, layout: str) -> RunConfig:
    """The same run on another layout ("" is one process). Its global batch stays: fewer data ranks accumulate more micro-batches.

    Raises ConfigError for a layout that cannot be read, or leaves a degree open.
    """
    said: dict[str, Any] = parse_layout(layout) if layout else {}
    of_tp = ("sequence_parallel", "async_tp") if said.get("tp", 1) > 1 else ()
    kept = {name: getattr(config.parallel, name) for name in ("reshard", "reduce", *of_tp)}
    if said.get("fsdp") == -1:
        raise ConfigError(f"layout {layout!r}: fsdp-1 takes what is left of a number of ranks, and here there is none; write a degree")
    return replace(config, parallel=ParallelConfig(**kept, **said))


class Recorder:
    """Stands in the optimizer's place: keeps the gradients that reach it, scaled, then has the optimizer act on them, or not."""

    def __init__(self, run: Run, acts: bool) -> None:
        self._run, self._acts = run, acts
        self.gradients: list[Part] = []

    def step(self, lr: float, found_inf: Tensor | None = None, scale: Tensor | None = None) -> None:
        self.gradients = [part_of(shard.placed, shard.local.grad) for shard in self._run.shards if shard.local.grad is not None]
        if scale is not None and self.gradients:
            scale_gradients([part.tensor for part in self.gradients], scale.cpu())
        if self._acts:
            self._run.optimizer.step(lr, found_inf, scale)


def take_step(run: Run, batches: Sequence[Batch], *, clip_norm: float, acts: bool) -> tuple[StepReport, list[Part]]:
    """One step as the training loop takes it, and the gradients as the optimizer got them, who `acts` on them or not."""
    recorder = Recorder(run, acts)
    config = replace(run.config, optim=replace(run.config.optim, clip_norm=clip_norm))
    watched = replace(run, config=config, optimizer=cast(Optimizer, recorder))
    return train_step(watched, [run.take(batch) for batch in batches], lr=config.optim.lr), recorder.gradients


def measure_rank(config: RunConfig, world: World, rows: Rows, steps: int) -> Measured:
    """On one rank: a pass that trains nothing, then `steps` training steps that clip to `optim.clip_norm`."""
    run, measured = assemble(config, world, rows, None), Measured()
    loader = run.loader()
    try:
        batches = next(loader)
        report, measured.parts["gradient"] = take_step(run, batches, clip_norm=0.0, acts=False)
        measured.saw(report)
        measured.parts["tokens"] = tokens_by_expert(run, report)
        for step in range(steps):
            report, gradients = take_step(run, batches, clip_norm=config.optim.clip_norm, acts=True)
            measured.saw(report)
            if step == 0:
                measured.parts["clipped"] = gradients
            batches = next(loader)
    finally:
        loader.close()
    measured.parts["weight"] = [part_of(shard.placed, shard.local) for shard in run.shards]
    return measured


def tokens_by_expert(run: Run, report: StepReport) -> list[Part]:
    """How many tokens of the step, over all ranks, each expert of each mixture-of-experts layer got."""
    counts = {name: report.tally[number, : size - 1].clone() for number, (name, size) in enumerate(run.router_sizes.items())}
    return [Part(name, (len(count_e),), whole_box((len(count_e),)), count_e) for name, count_e in counts.items()]


def part_of(placed: Placed, tensor: Tensor) -> Part:
    return Part(placed.name, placed.shape, placed.stored, tensor.detach().to("cpu", copy=True).contiguous())


def joined(ranks: Sequence[Sequence[Part]]) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The ranks' parts put together, and how far apart any two copies of the same element are, by name.

    Raises ValueError where no rank holds an element.
    """
    whole: dict[str, Tensor] = {}
    apart: dict[str, float] = {}
    for part in (part for parts in ranks for part in parts):
        out = whole.setdefault(part.name, torch.full(part.shape, torch.nan, dtype=part.tensor.dtype))
        at = part.box.slices_within(whole_box(part.shape))
        held = out[at]
        both = ~held.isnan()
        spread = float((held[both] - part.tensor[both]).abs().max()) if both.any() else 0.0
        apart[part.name] = max(apart.get(part.name, 0.0), spread)
        out[at] = torch.where(both, held, part.tensor)
    if missing := [name for name, tensor in whole.items() if tensor.isnan().any()]:
        raise ValueError(f"{missing[0]} is not a number somewhere, or no rank holds a part of it")
    return whole, apart


def relative(difference: float, size: float) -> float:
    """`difference` as a fraction of `size`; as it is where `size` is nothing. Not a number counts as infinitely far."""
    error = difference / (size if size >= 1e-12 else 1.0)
    return error if error == error else float("inf")


def differences(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], apart: Mapping[str, float] | None = None) -> dict[str, float]:
    """max|a-b| / max|b| by name (absolute where max|b| < 1e-12); `apart`, how far copies differ, counts as a difference too."""

    def difference(name: str) -> float:
        a, b = found[name], expected[name]
        if not b.numel():
            return 0.0
        return relative(max(float((a - b).abs().max()), (apart or {}).get(name, 0.0)), float(b.abs().max()))

    return {name: difference(name) for name in expected}


def worst_difference(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest of `differences`, and whose it is."""
    assert found.keys() == expected.keys()
    return max((difference, name) for name, difference in differences(found, expected).items())
