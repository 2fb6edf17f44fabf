"""Held-out loss during training: every held-out target scored once, whatever the layout."""

import torch

from paraxis.data.loader import evaluation_batches
from paraxis.generate.score import score
from paraxis.parallel.collectives import sum_over
from paraxis.train.run import Run


def evaluate(run: Run) -> tuple[float, int]:
    """The mean loss in nats per target over the run's held-out rows, and the number of targets; the same on every rank."""
    assert run.held_out is not None
    device = run.world.device.torch
    batches = evaluation_batches(run.held_out, run.config.train.micro_batch, run.mesh.data_rank, run.mesh.degrees.data_ranks)
    run.model.eval()
    try:
        loss, targets = score(run.model, (batch.to(device) for batch in batches))
    finally:
        run.model.train()
    totals = sum_over(torch.stack([loss, targets.double()]).to(device)) / run.mesh.degrees.tp
    total_loss, total_targets = totals.tolist()
    return total_loss / max(total_targets, 1), round(total_targets)
