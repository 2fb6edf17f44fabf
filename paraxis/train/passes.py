"""The forward and backward passes of a step: of one model, micro-batch after micro-batch, or of a pipeline's stages."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from paraxis.base.dtypes import at_least_fp32
from paraxis.base.seams import Batch
from paraxis.parallel.fsdp import PipelineReduction, reduce_now
from paraxis.parallel.pipeline import Pipeline


class Passes(Protocol):
    """What a training step, and evaluation, want of the model as this rank has it."""

    def forward_backward(self, batches: Sequence[Batch], scale: Tensor) -> Tensor:
        """Accumulates `scale` times the gradients of the micro-batches' summed losses; returns the scaled loss of this rank's rows."""
        ...

    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of a batch; 0 on a pipeline's ranks without the last stage."""
        ...


@dataclass(frozen=True)
class Accumulation:
    """A whole model; gradients are summed over ranks after the last micro-batch, or after each where memory is short."""

    model: nn.Module
    each_micro_batch: bool

    def forward_backward(self, batches: Sequence[Batch], scale: Tensor) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=scale.device)
        for number, batch in enumerate(batches):
            last = number == len(batches) - 1
            reduce_now(self.model, last=last, each_micro_batch=self.each_micro_batch, only=len(batches) == 1)
            loss = at_least_fp32(self.model(batch))
            loss = loss * scale.to(loss.dtype)
            loss.backward()
            total += loss.detach()
        return total

    def forward(self, batch: Batch) -> Tensor:
        return self.model(batch)


@dataclass(frozen=True)
class Piped:
    """This rank's stages of a pipeline."""

    pipeline: Pipeline
    reduction: PipelineReduction

    def forward_backward(self, batches: Sequence[Batch], scale: Tensor) -> Tensor:
        return self.pipeline.forward_backward(batches, scale, self.reduction)

    def forward(self, batch: Batch) -> Tensor:
        return self.pipeline.forward(batch)
