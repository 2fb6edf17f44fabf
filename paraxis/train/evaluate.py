"""Held-out loss during training: every held-out target scored once, whatever the layout."""

import torch

from paraxis.data.loader import evaluation_batches
from paraxis.generate.score import score
from paraxis.parallel.collectives import sum_over
from paraxis.train.run import Run


def evaluate(run: Run) -> tuple[float, int]:
    """The mean loss in nats per target over the run's held-out rows, and the number of targets; the same on every rank."""
    assert run.held_out is not None
    degrees = run.mesh.degrees
    batches = evaluation_batches(run.held_out, run.config.train.micro_batch, run.mesh.data_rank, degrees.data_ranks)
    for module in run.modules:
        module.eval()
    try:
        loss, targets = score(run.passes.forward, map(run.take, batches))
    finally:
        for module in run.modules:
            module.train()
    total_loss, total_targets = sum_over(torch.stack([loss, targets.double()]).to(run.world.device.torch)).tolist()
    total_loss, total_targets = total_loss / degrees.tp, round(total_targets / degrees.same_rows)
    return total_loss / max(total_targets, 1), total_targets
