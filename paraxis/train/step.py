"""One optimizer step, on one screen: count targets, forward and backward, sum copies, clip, update."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from paraxis.base.device import Device
from paraxis.base.seams import Batch
from paraxis.parallel.collectives import gather_rows, sum_over
from paraxis.parallel.grads import clip_factor, square_sum, sum_copies
from paraxis.parallel.mesh import Mesh
from paraxis.train.run import Run


@dataclass(frozen=True)
class Said:
    """What this rank tells the others with a step: was it asked to stop, how long it waited for data, memory at its peak."""

    stop: bool = False
    data_s: float = 0.0
    memory_gib: float = 0.0

    def on(self, device: Device) -> Tensor:
        """These on the device, float64 [3]; from pinned memory, since the host would wait there for the whole backward otherwise."""
        values = torch.empty(3, dtype=torch.float64, pin_memory=device.is_cuda)
        values.copy_(torch.tensor([self.stop, self.data_s, self.memory_gib]))
        return values.to(device.torch, non_blocking=True)


class StepReport:
    """What a step did, as one small matrix with a row a rank, copied to the host without waiting for it.

    Reading any property waits for the copy; read it a step later and the wait is over. Every rank reads the same
    numbers, so decisions taken on them are taken by all alike.
    """

    def __init__(self, rows: Tensor, targets: Tensor, tally: Tensor, tp: int, device: Device) -> None:
        self._tp, self._routers = tp, tally.shape
        flat = torch.cat([targets.double().view(1), tally.flatten(), rows.flatten()])
        self._host = torch.empty(flat.shape, dtype=flat.dtype, pin_memory=device.is_cuda)
        self._host.copy_(flat, non_blocking=True)
        self._copied = torch.cuda.Event() if device.is_cuda else None
        if self._copied is not None:
            self._copied.record()
        self._ranks = rows.shape[0]

    @cached_property
    def _read(self) -> Tensor:
        if self._copied is not None:
            self._copied.synchronize()
        return self._host

    @property
    def _rows(self) -> Tensor:
        return self._read[1 + self._routers.numel() :].view(self._ranks, -1)

    @property
    def tally(self) -> Tensor:
        """How often each router chose each of its experts, and the summed entropy of its tokens in nats: float64 [layers, experts + 1]."""
        return self._read[1 : 1 + self._routers.numel()].view(self._routers)

    @property
    def experts(self) -> dict[str, float]:
        """Of a mixture of experts: the most and least used expert's load in any layer (1 is even), and the mean entropy in nats."""
        if not self._routers.numel():
            return {}
        chosen, entropy = self.tally[:, :-1], self.tally[:, -1]
        load = chosen / chosen.mean(1, keepdim=True)
        tokens = chosen.sum(1)
        loads = {"expert_load_max": load.max().item(), "expert_load_min": load.min().item()}
        return {**loads, "router_entropy": (entropy / tokens).mean().item()}

    @property
    def targets(self) -> int:
        """Target tokens of the step, over all ranks."""
        return int(self._read[0])

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


def train_step(run: Run, batches: Sequence[Batch], *, lr: float, said: Said = Said()) -> StepReport:
    """One optimizer step over this rank's micro-batches. The loss is the sum over targets divided by the step's global target count.

    Where loss or gradients are not finite the update is skipped, on the device and on all ranks alike.
    """
    shards, mesh, max_norm = run.shards, run.mesh, run.config.optim.clip_norm
    targets, loss, tally = make_gradients(run, batches)
    rows = gather_rows(torch.cat([torch.stack([square_sum(shards), loss.double()]), said.on(mesh.world.device)]), mesh.world.size)
    norm, total_loss = rows[:, 0].sum().sqrt(), rows[:, 1].sum()
    skip = ~torch.isfinite(norm + total_loss)
    run.optimizer.step(lr, found_inf=skip.float(), scale=clip_factor(norm, max_norm) if max_norm else None)
    torch.autograd.graph.increment_version([shard.local for shard in shards])  # fused kernels do not say that they have written
    for number, name in enumerate(run.router_sizes):
        if name in run.routers:
            run.routers[name].end_step(tally[number, :-1].masked_fill(skip, 0.0))  # counts of zero leave a bias where it is
    for shard in shards:
        shard.drop_gradient()
    if run.tied is not None:
        run.tied.follow()
    return StepReport(rows, targets, tally, mesh.degrees.tp, mesh.world.device)


def make_gradients(run: Run, batches: Sequence[Batch]) -> tuple[Tensor, Tensor, Tensor]:
    """Forward and backward: every stored part then has the gradient of the step's mean loss.

    Returns the step's targets over all ranks (int64), the loss of this rank's rows, and the routers' tally [layers, experts + 1].
    """
    mesh = run.mesh
    targets = count_targets(batches, mesh)
    for router in run.routers.values():
        router.begin_step(torch.full((), 1.0 / (run.rows_per_step * mesh.degrees.tp), dtype=torch.float64, device=targets.device))
    loss = run.passes.forward_backward(batches, targets.clamp(min=1).double().reciprocal())
    for shard in run.shards:
        shard.take_gradient()
    sum_copies(run.shards, mesh)
    if run.tied is not None:
        run.tied.sum_gradients()
    return targets, loss, sum_tallies(run)


def count_targets(batches: Sequence[Batch], mesh: Mesh) -> Tensor:
    """The step's target tokens over all ranks, an int64 scalar on the device; ranks that read the same ones count once."""
    own = torch.stack([batch.target_count for batch in batches]).sum()
    return sum_over(own) // mesh.degrees.same_rows


def sum_tallies(run: Run) -> Tensor:
    """Every router's choices and entropy over all ranks, float64 [layers, experts + 1]; tensor-parallel peers count the same ones."""
    size = max(run.router_sizes.values(), default=1)
    own = torch.zeros(len(run.router_sizes), size, dtype=torch.float64, device=run.world.device.torch)
    for number, name in enumerate(run.router_sizes):
        if name in run.routers:
            own[number] = run.routers[name].tally_s
    return sum_over(own) / run.mesh.degrees.tp if run.router_sizes else own
