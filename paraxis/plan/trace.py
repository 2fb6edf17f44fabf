"""One rank's training step, followed allocation by allocation: the step that training runs, on a device that is pretended."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from paraxis.base.axes import Degrees
from paraxis.base.dtypes import precision
from paraxis.base.seams import Batch
from paraxis.ops import loss
from paraxis.parallel.expert import ExpertDispatch
from paraxis.parallel.fsdp import fsdp_units, sent_apart
from paraxis.plan.compiled import pretending_to_compile
from paraxis.plan.fusion import COMPILED, last_uses, merged
from paraxis.plan.pretend import PRETENDED, EvenDispatch, PretendedDevice, pretended_world, replaced
from paraxis.plan.record import Recorder, Trace
from paraxis.plan.watch import watching
from paraxis.train.config import RunConfig
from paraxis.train.passes import Piped
from paraxis.train.run import Run, assemble
from paraxis.train.stages import build_order
from paraxis.train.step import train_step


def trace_step(config: RunConfig, ranks: int, rank: int, device: PretendedDevice) -> Trace:
    """A training step of rank `rank` of `ranks` that is not its first, which makes what steps keep between them.

    Where documents are kept apart, a row is taken for one document: the most that attention can take.
    Raises ConfigError for what cannot run.
    """
    assert config.compile != "auto", "memory.settle has chosen"
    with (
        pretended_world(ranks, rank, device) as world,
        pretending_to_compile(config.compile),
        Recorder() as recorder,
        recorder.sees_resizes(),
        _telling_of_graphs(recorder, config.compile != "none"),
    ):
        run = assemble(config, world, _NoRows(config.model.vocab_size), None)
        for module in run.modules:
            _use_pretended(module)
        _tell_shapes(run)
        if run.mesh.ep is not None:
            for router in run.routers.values():
                router.use_dispatch(EvenDispatch(ExpertDispatch(run.mesh.ep), run.mesh.degrees.ep))
        recorder.call("parameters", [x for shard in run.shards for x in (shard.parameter, shard.local)])
        recorder.call("optimizer", tree_leaves(run.optimizer.state()))
        _own(run, recorder)
        _meet(run)
        batches = _batches(run)
        with _marking(run, recorder), watching(run, recorder):
            train_step(run, batches, lr=1e-3)
        trace = recorder.stop()
    return _fused(trace) if config.compile == "inductor" else trace


@contextmanager
def _telling_of_graphs(recorder: Recorder, compiled: bool) -> Iterator[None]:
    """While inside, the recorder knows when one of the loss's compiled functions runs; where nothing is compiled, all may be merged later,
    as others' kernels are."""

    def told(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            if not recorder.follows:
                return function(*args)
            phase = recorder.at
            recorder.enter(*phase)  # of its own: what is merged in it is not merged with what is around it
            with replaced(recorder, "in_graph", True):
                out = function(*args)
            recorder.enter(*phase)
            return out

        return call

    plain = loss._compiled
    with replaced(loss, "_compiled", lambda: tuple(map(told, plain()))), replaced(recorder, "in_graph", not compiled):
        yield


def _fused(trace: Trace) -> Trace:
    """Without the allocations that are inside a kernel of compiled blocks."""
    last_use, inside = last_uses(trace.operators), set[int]()
    for phase, end in zip(trace.phases, [*(p.operator for p in trace.phases[1:]), len(trace.operators)], strict=True):
        if phase.kind in COMPILED:
            inside |= merged(trace.operators[phase.operator : end], end, last_use)[1]
    left = list(accumulate((number not in inside for number, _ in trace.events), initial=0))
    return replace(
        trace,
        events=[event for event in trace.events if event[0] not in inside],
        phases=[replace(phase, start=left[phase.start]) for phase in trace.phases],
        marks=[replace(mark, event=left[mark.event]) for mark in trace.marks],
    )


@dataclass
class _NoRows:
    vocab_size: int
    fingerprint: str = ""
    length: int = 0

    def row(self, index: int) -> dict[str, Any]:
        raise AssertionError("nothing reads the rows of a pretended run")


def _batches(run: Run) -> list[Batch]:
    """A step's micro-batches for this rank, as they arrive from the loader."""
    number = run.rows_per_step // (run.mesh.degrees.data_ranks * run.config.train.micro_batch)
    return [_batch(run) for _ in range(number)]


def _batch(run: Run) -> Batch:
    shape = (run.config.train.micro_batch, run.config.data.seq_len)
    return run.take(Batch(*(torch.zeros(shape, dtype=torch.int64) for _ in range(3))))


def _own(run: Run, recorder: Recorder) -> None:
    """Says whose each stored tensor of a block is."""
    place = {
        parameter: (stage, number)
        for stage, module in enumerate(run.modules)
        for number, block in enumerate(module.blocks())  # type: ignore[operator]
        for parameter in (*block.parameters(), *block.buffers())
    }
    for x, at in place.items():
        recorder.own(x, at, [x])
    for module in run.modules:
        for parameter, sent in sent_apart(module).items():
            recorder.call("parameters", [sent])
            recorder.own(parameter, place[parameter], [sent])
    for shard in run.shards:
        if (at := place.get(shard.parameter)) is not None:
            states = [tensors[shard.placed.name] for tensors in run.optimizer.state().values() if shard.placed.name in tensors]
            recorder.own(shard.parameter, at, [shard.local, *states])


def _meet(run: Run) -> None:
    """One micro-batch through the rank's stages and back, as in a first step: wrappers then have what they keep, and graphs are made."""
    scale = torch.ones((), dtype=torch.float64, device=PRETENDED)
    for router in run.routers.values():
        router.begin_step(scale)
    if not isinstance(run.passes, Piped):
        run.passes.forward_backward([_batch(run)], scale)
    else:
        pipeline, reduction = run.passes.pipeline, run.passes.reduction
        pipeline._met.add("training")  # messages travel between devices from the second step on
        shape, dtype = stage_output(run.config, run.mesh.degrees)
        for stage, module in pipeline._stages.items():
            x = torch.empty(shape, dtype=dtype, device=PRETENDED, requires_grad=True) if stage else None
            out = module(_batch(run), x)
            reduction.before_backward(module, last=True)
            torch.autograd.backward(out, torch.empty_like(out) if out.dim() else None)
    for shard in run.shards:
        shard.take_gradient()
        shard.drop_gradient()
        shard.local.detach().zero_()  # changed, as an optimizer's step would have: what is made of it once a step is made again


def _use_pretended(module: nn.Module) -> None:
    """Has FSDP make its buffers on the pretended device: it takes what a mesh of CPUs computes on."""
    for unit in fsdp_units(module):
        state = unit._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            if group is not None:
                group.device = PRETENDED
                for parameter in group.fsdp_params:
                    parameter.device = PRETENDED


def _tell_shapes(run: Run) -> None:
    """Answers, in the other pipeline ranks' place, what their stages' outputs look like."""
    degrees, config = run.mesh.degrees, run.config
    if degrees.pp == 1:
        return
    shape, dtype = stage_output(config, degrees)
    for stage in range(build_order(config, degrees).stages):
        run.world.store.set(f"pipeline/shape/{stage}", json.dumps([shape, str(dtype).removeprefix("torch.")]))


def stage_output(config: RunConfig, degrees: Degrees) -> tuple[list[int], torch.dtype]:
    """The shape and dtype of what one pipeline stage hands to the next."""
    tp = degrees.tp if config.parallel.sequence_parallel else 1
    shape = [config.train.micro_batch, config.data.seq_len // degrees.cp // tp, config.model.width]
    return shape, precision(config.precision).compute


@contextmanager
def _marking(run: Run, recorder: Recorder) -> Iterator[None]:
    """While inside, the recorder is told when blocks go forward and backward, and when the optimizer steps."""
    handles = []
    for stage, module in enumerate(run.modules):
        blocks = list(module.blocks())  # type: ignore[operator]
        for number, block in enumerate(blocks):
            handles.append(block.register_forward_pre_hook(partial(_goes_forward, recorder, stage, number), prepend=True))
            handles.append(block.register_forward_hook(partial(_went_forward, recorder, stage, number, number + 1 == len(blocks))))
    update = run.optimizer.step

    def step(*args: Any, **kwargs: Any) -> None:
        recorder.call("gradients", [shard.local.grad for shard in run.shards if shard.local.grad is not None])
        recorder.enter("optimizer")
        recorder.default = "optimizer"
        update(*args, **kwargs)
        recorder.default = "other"
        recorder.enter("end")

    recorder.start()
    recorder.enter("start")
    recorder.default = "activations"
    with replaced(run.optimizer, "step", step):
        yield
    for handle in handles:
        handle.remove()


def _goes_forward(recorder: Recorder, stage: int, block: int, module: nn.Module, args: tuple[Any, ...]) -> None:
    recorder.enter("forward", stage, block)
    x = args[0]
    if block == 0 and x.requires_grad and torch.is_grad_enabled():
        x.register_hook(lambda _: recorder.enter("after", stage))


def _went_forward(recorder: Recorder, stage: int, block: int, last: bool, module: nn.Module, args: tuple[Any, ...], out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(lambda _: recorder.enter("backward", stage, block))
    if last:
        recorder.enter("between", stage)
