"""One optimizer step, on one screen: count targets, forward and backward, sum copies, clip, update."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from paraxis.base.device import Device
from paraxis.base.dtypes import at_least_fp32
from paraxis.base.seams import Batch
from paraxis.optim.build import Optimizer
from paraxis.parallel.collectives import gather_rows, sum_over
from paraxis.parallel.fsdp import reduce_now
from paraxis.parallel.grads import Shard, clip, square_sum, sum_copies
from paraxis.parallel.mesh import Mesh


@dataclass(frozen=True)
class Said:
    """What this rank tells the others with a step: was it asked to stop, how long it waited for data, memory at its peak."""

    stop: bool = False
    data_s: float = 0.0
    memory_gib: float = 0.0


class StepReport:
    """What a step did, as one small matrix with a row a rank, copied to the host without waiting for it.

    Reading any property waits for the copy; read it a step later and the wait is over. Every rank reads the same
    numbers, so decisions taken on them are taken by all alike.
    """

    def __init__(self, rows: Tensor, targets: Tensor, tp: int, device: Device) -> None:
        self._tp = tp
        flat = torch.cat([rows.flatten(), targets.double().view(1)])
        self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=device.is_cuda)
        self._host.copy_(flat, non_blocking=True)
        self._copied = torch.cuda.Event() if device.is_cuda else None
        if self._copied is not None:
            self._copied.record()
        self._ranks = rows.shape[0]

    @cached_property
    def _rows(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host[:-1].view(self._ranks, -1)

    @property
    def targets(self) -> int:
        """Target tokens of the step, over all ranks."""
        _ = self._rows
        return int(self._host[-1])

    @property
    def loss(self) -> float:
        """Mean loss per target token, in nats."""
        return float(self._rows[:, 1].sum()) / self._tp

    @property
    def grad_norm(self) -> float:
        """The global gradient norm before clipping."""
        return float(self._rows[:, 0].sum().sqrt())

    @property
    def finite(self) -> bool:
        """Whether loss and gradients were finite; the update was skipped where not."""
        return bool(torch.isfinite(self._rows[:, :2]).all())

    @property
    def bad_ranks(self) -> list[int]:
        """The ranks whose own loss, or else whose stored gradients, were not finite."""
        for column in (1, 0):
            bad = (~torch.isfinite(self._rows[:, column])).nonzero().flatten().tolist()
            if bad:
                return bad
        return []

    @property
    def stop(self) -> bool:
        """Whether any rank was asked to stop."""
        return bool(self._rows[:, 2].any())

    @property
    def data_s(self) -> float:
        """The longest that any rank waited for data, in seconds."""
        return float(self._rows[:, 3].max())

    @property
    def memory_gib(self) -> float:
        """The largest peak of any rank's device memory so far."""
        return float(self._rows[:, 4].max())


def train_step(
    model: nn.Module,
    shards: Sequence[Shard],
    batches: Sequence[Batch],
    optimizer: Optimizer,
    mesh: Mesh,
    *,
    lr: float,
    max_norm: float,
    each_micro_batch: bool = False,
    said: Said = Said(),
) -> StepReport:
    """One optimizer step over this rank's micro-batches. The loss is the sum over targets divided by the step's global target count.

    Where loss or gradients are not finite the update is skipped, on the device and on all ranks alike. `max_norm=0` does not clip.
    """
    targets = count_targets(batches, mesh)
    loss = forward_backward(model, batches, targets.clamp(min=1).double().reciprocal(), each_micro_batch)
    for shard in shards:
        shard.take_gradient()
    sum_copies(shards, mesh)
    own = [square_sum(shards), loss.double(), *torch.tensor([said.stop, said.data_s, said.memory_gib], dtype=torch.float64).to(loss.device)]
    rows = gather_rows(torch.stack(own), mesh.world.size)
    norm, total_loss = rows[:, 0].sum().sqrt(), rows[:, 1].sum()
    if max_norm:
        clip(shards, norm, max_norm)
    optimizer.step(lr, found_inf=(~torch.isfinite(norm + total_loss)).float())
    for shard in shards:
        shard.drop_gradient()
    return StepReport(rows, targets, mesh.degrees.tp, mesh.world.device)


def count_targets(batches: Sequence[Batch], mesh: Mesh) -> Tensor:
    """The step's target tokens over all ranks, an int64 scalar on the device; tensor-parallel peers read the same rows, counted once."""
    own = torch.stack([batch.target_count for batch in batches]).sum()
    return sum_over(own) // mesh.degrees.tp


def forward_backward(model: nn.Module, batches: Sequence[Batch], scale: Tensor, each_micro_batch: bool) -> Tensor:
    """Accumulates `scale` times the gradients of the micro-batches' summed losses; returns the scaled loss of this rank's rows."""
    total = torch.zeros((), dtype=torch.float64, device=scale.device)
    for number, batch in enumerate(batches):
        reduce_now(model, last=number == len(batches) - 1, each_micro_batch=each_micro_batch)
        loss = at_least_fp32(model(batch))
        loss = loss * scale.to(loss.dtype)
        loss.backward()
        total += loss.detach()
    return total
