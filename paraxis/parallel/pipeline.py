"""Running a pipeline schedule: each rank works through its list, and activations and gradients travel between stages.

Messages between two ranks go through one channel a direction, in the order in which the sender's list makes them. The receiver reads
that list too, so it posts its receives in the same order, one ahead of need: nothing waits for a message that was sent behind another.
"""

import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from paraxis.base.schedule import Action, Schedule
from paraxis.base.seams import Batch
from paraxis.parallel.deferred import OwedGradients, defer_linears
from paraxis.parallel.mesh import Mesh


@dataclass(frozen=True)
class Lines:
    """How a rank reaches its pipeline peers: `ranks[r]` is pipeline rank r's number in the world.

    Every pair of ranks that talk has a group for each direction, `groups[source, target]`: NCCL works through a group's messages in the
    order they were asked for, so that with fewer groups a message could wait behind one that its own arrival brings about.
    `store` tells a stage's output shape, once.
    """

    rank: int
    ranks: Sequence[int]
    groups: Mapping[tuple[int, int], dist.ProcessGroup]
    store: dist.Store

    def sending(self, tensor: Tensor, target: int, tag: int = 0) -> dist.Work:
        """Starts sending a contiguous tensor to pipeline rank `target`; it must be kept until the work is done."""
        return self._start(dist.isend, tensor, target, self.groups[self.rank, target], tag)

    def receiving(self, buffer: Tensor, source: int, tag: int = 0) -> dist.Work:
        """Starts receiving into `buffer` from pipeline rank `source`."""
        return self._start(dist.irecv, buffer, source, self.groups[source, self.rank], tag)

    def _start(self, operation: Any, tensor: Tensor, peer: int, group: dist.ProcessGroup, tag: int) -> dist.Work:
        [work] = dist.batch_isend_irecv([dist.P2POp(operation, tensor, self.ranks[peer], group, tag)])
        return work


def build_lines(mesh: Mesh, schedule: Schedule, ends_talk: bool) -> Lines:
    """Groups for every pair of ranks between which `schedule` sends; `ends_talk`: for the first and last stage's ranks, too.

    Every rank of the world makes all pipelines' groups, as torch asks for.
    """
    pairs = {
        (schedule.rank_of[action.stage], schedule.rank_of[to])
        for own in schedule.actions
        for action in own
        if (to := sent_to(action, schedule)) is not None
    }
    if ends_talk:
        ends = schedule.rank_of[0], schedule.rank_of[-1]
        pairs |= {ends, ends[::-1]}
    own, groups = mesh.pipeline, {}
    for pipeline in mesh.axes.mesh.flatten(1).t().tolist():  # pp is the outermost axis
        for source, target in sorted((a, b) for a, b in pairs if a != b):
            group = dist.new_group([pipeline[source], pipeline[target]])
            if pipeline == own:
                groups[source, target] = group
    lines = Lines(mesh.at["pp"], own, groups, dist.PrefixStore("pipeline", mesh.world.store))
    # The first message through a group has its two ranks wait for each other: in one order here, not in the middle of a schedule.
    for source, target in groups:
        if lines.rank in (source, target):
            start = lines.sending if lines.rank == source else lines.receiving
            start(torch.zeros(1, device=mesh.world.device.torch), target if lines.rank == source else source).wait()
    return lines


class Reduction(Protocol):
    """What sharded data parallelism wants to know: when a stage's gradients may travel."""

    def before_backward(self, module: nn.Module, last: bool) -> None:
        """A backward of `module` is about to run; `last` says that nothing will be added to its gradients afterwards."""
        ...

    def gradients_added(self, module: nn.Module) -> None:
        """Gradients of `module` were made outside a backward."""
        ...

    def gradients_complete(self, module: nn.Module) -> None:
        """The gradients of `module` are complete, though no backward was announced as the last."""
        ...


def sent_to(action: Action, schedule: Schedule) -> int | None:
    """The stage that takes what `action` makes, if any: the next one for F, the one before for B and I."""
    if action.kind == "F":
        return action.stage + 1 if action.stage + 1 < schedule.stages else None
    return action.stage - 1 if action.kind in "BI" and action.stage else None


@dataclass
class _Arrivals:
    """Messages from one rank in the order it sends them, and those that were asked for already."""

    expected: deque[Action]
    posted: dict[Action, tuple[Tensor, Any]] = field(default_factory=dict)


class Pipeline:
    """One rank's part of a pipeline: its stages by number, and the schedule that all ranks follow.

    A stage's module is called with the micro-batch and the activations of the stage before (None for the first stage); the last
    stage returns the summed loss, the others one tensor, of one shape and dtype for all micro-batches.
    """

    def __init__(self, stages: Mapping[int, nn.Module], schedule: Schedule, lines: Lines, device: torch.device) -> None:
        self._stages, self._schedule, self._lines, self._device = stages, schedule, lines, device
        self._gradient_by = {(a.stage, a.micro_batch): a for own in schedule.actions for a in own if a.kind in "BI"}
        self._owed = {stage: OwedGradients() for stage in stages}
        if schedule.splits_backward:
            for stage, module in stages.items():
                defer_linears(module, self._owed[stage])
        self._shapes: dict[int, tuple[list[int], torch.dtype]] = {}
        self._met: set[str] = set()

    def forward_backward(self, batches: Sequence[Batch], scale: Tensor, reduction: Reduction) -> Tensor:
        """Accumulates the gradients of `scale` times the micro-batches' summed losses; returns that loss, 0 without the last stage."""
        assert len(batches) == self._schedule.micro_batches
        return _Step(self, self._schedule, batches, scale, reduction, self._wire("training")).run()

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """The summed loss of one batch, without gradients; 0 without the last stage."""
        one = torch.ones((), device=self._device)
        return _Step(self, forward_only(self._schedule), [batch], one, None, self._wire("scoring")).run()

    def _wire(self, purpose: str) -> torch.device:
        """Which device's memory messages travel through: the first time the host's, which is slow and cannot get stuck.

        A kernel that is run for the first time is compiled, measured and loaded, for which CUDA waits until the device is idle. It
        never is while a receive is under way that waits for a rank which waits for us.
        """
        first = purpose not in self._met
        self._met.add(purpose)
        return torch.device("cpu") if first else self._device


def forward_only(schedule: Schedule) -> Schedule:
    """One micro-batch through the same stages on the same ranks, without a backward."""
    actions = tuple(
        tuple(Action("F", stage, 0) for stage, holder in enumerate(schedule.rank_of) if holder == rank) for rank in range(schedule.ranks)
    )
    return Schedule(f"{schedule.name}, forward", schedule.rank_of, 1, actions)


class _Step:
    """What one rank holds during one step: kept activations, messages under way, the loss so far."""

    def __init__(
        self,
        pipeline: Pipeline,
        schedule: Schedule,
        batches: Sequence[Batch],
        scale: Tensor,
        reduction: Reduction | None,
        wire: torch.device,
    ) -> None:
        self._p, self._schedule, self._batches, self._scale, self._reduction = pipeline, schedule, batches, scale, reduction
        self._wire = wire
        self._number = 0
        own = schedule.actions[pipeline._lines.rank]
        self._last_of = {stage: max(n for n, a in enumerate(own) if a.stage == stage) for stage in pipeline._stages}
        self._weights_owed: dict[tuple[int, int], list[Callable[[], None]]] = {}
        self._kept: dict[tuple[int, int], tuple[Tensor | None, Tensor]] = {}
        self._handed: dict[Action, Tensor] = {}  # between two stages of this rank
        self._sending: list[tuple[Tensor, Any]] = []
        self._loss = torch.zeros((), dtype=torch.float64, device=scale.device)
        rank = pipeline._lines.rank
        self._arrivals = {
            source: _Arrivals(deque(a for a in own if (to := sent_to(a, schedule)) is not None and schedule.rank_of[to] == rank))
            for source, own in enumerate(schedule.actions)
            if source != rank
        }

    def run(self) -> Tensor:
        """Works through this rank's list, waits for what is still being sent, and returns the loss."""
        for number, action in enumerate(self._schedule.actions[self._p._lines.rank]):
            self._number = number
            if action.kind == "F":
                self._forward(action)
            elif action.kind == "W":
                self._weights(action)
            else:
                self._backward(action)
        for _, work in self._sending:
            work.wait()
        assert not self._kept
        return self._loss

    def _forward(self, action: Action) -> None:
        stage, schedule = action.stage, self._schedule
        x = self._take(Action("F", stage - 1, action.micro_batch)).requires_grad_(self._reduction is not None) if stage else None
        out = self._p._stages[stage](self._batches[action.micro_batch], x)
        if stage == schedule.stages - 1:
            out = out * self._scale.to(out.dtype)
            self._loss += out.detach()
        else:
            self._hand_on(action, out.detach())
        if self._reduction is not None:
            self._kept[stage, action.micro_batch] = x, out

    def _backward(self, action: Action) -> None:
        assert self._reduction is not None
        stage = action.stage
        x, out = self._kept.pop((stage, action.micro_batch))
        self._reduction.before_backward(self._p._stages[stage], last=self._last_of[stage] == self._number)
        last = stage == self._schedule.stages - 1
        grad = None if last else self._take(self._p._gradient_by[stage + 1, action.micro_batch])
        owed = self._p._owed[stage]
        owed.defer = action.kind == "I"
        torch.autograd.backward(out, grad)
        if owed.defer:
            self._weights_owed[stage, action.micro_batch] = owed.take()
        if x is not None:
            assert x.grad is not None
            self._hand_on(action, x.grad)

    def _weights(self, action: Action) -> None:
        assert self._reduction is not None
        for make in self._weights_owed.pop((action.stage, action.micro_batch)):
            make()
        self._reduction.gradients_added(self._p._stages[action.stage])
        if self._last_of[action.stage] == self._number:
            self._reduction.gradients_complete(self._p._stages[action.stage])

    def _hand_on(self, action: Action, tensor: Tensor) -> None:
        """Sends what `action` made to the rank whose stage takes it."""
        to = sent_to(action, self._schedule)
        assert to is not None
        lines, target = self._p._lines, self._schedule.rank_of[to]
        if target == lines.rank:
            self._handed[action] = tensor
            return
        if action.kind == "F":
            self._tell_shape(action.stage, tensor)
        tensor = tensor.contiguous().to(self._wire)
        work = lines.sending(tensor, target, self._tag(action))
        self._sending = [(kept, earlier) for kept, earlier in self._sending if not earlier.is_completed()] + [(tensor, work)]

    def _take(self, action: Action) -> Tensor:
        """What `action`, of another stage, made."""
        if action in self._handed:
            return self._handed.pop(action)
        arrivals = self._arrivals[self._schedule.rank_of[action.stage]]
        while action not in arrivals.posted:
            self._post(arrivals)
        buffer, work = arrivals.posted.pop(action)
        work.wait()
        if arrivals.expected and self._shape_known(arrivals.expected[0]):
            self._post(arrivals)
        return buffer.to(self._p._device)

    def _post(self, arrivals: _Arrivals) -> None:
        """Asks for the next message of a rank."""
        action = arrivals.expected.popleft()
        source = self._schedule.rank_of[action.stage]
        shape, dtype = self._shape(action.stage if action.kind == "F" else action.stage - 1)
        buffer = torch.empty(shape, dtype=dtype, device=self._wire)
        arrivals.posted[action] = buffer, self._p._lines.receiving(buffer, source, self._tag(action))

    def _tag(self, action: Action) -> int:
        return (action.micro_batch * self._schedule.stages + action.stage) * 2 + (action.kind == "F")

    def _tell_shape(self, stage: int, tensor: Tensor) -> None:
        if stage not in self._p._shapes:
            self._p._shapes[stage] = list(tensor.shape), tensor.dtype
            described = json.dumps([list(tensor.shape), str(tensor.dtype).removeprefix("torch.")])
            self._p._lines.store.set(f"shape/{stage}", described)

    def _shape_known(self, action: Action) -> bool:
        return (action.stage if action.kind == "F" else action.stage - 1) in self._p._shapes

    def _shape(self, stage: int) -> tuple[list[int], torch.dtype]:
        """The shape and dtype of a stage's output, as that stage told it."""
        if stage not in self._p._shapes:
            shape, dtype = json.loads(self._p._lines.store.get(f"shape/{stage}"))
            self._p._shapes[stage] = shape, getattr(torch, dtype)
        return self._p._shapes[stage]
