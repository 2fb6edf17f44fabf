"""Scoring text: the loss a model has on it."""

from collections.abc import Iterable

import torch
from torch import Tensor

from paraxis.base.seams import Batch, Forward


@torch.no_grad()
def score(forward: Forward, batches: Iterable[Batch]) -> tuple[Tensor, Tensor]:
    """The loss summed over all targets of `batches` (fp64) and how many there were (int64): scalars on the batches' device.

    Both can be added over ranks; their quotient is the mean loss in nats a target. Nothing waits for the device.
    """
    loss, targets = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.int64)
    for batch in batches:
        loss = loss.to(batch.tokens_bt.device) + forward(batch).double()
        targets = targets.to(batch.tokens_bt.device) + batch.target_count
    return loss, targets
