"""While a step is traced: who told the device what. FSDP's streams, pipeline actions and micro-batches, as a recorder is told of them.

The one front for what FSDP2 keeps private of its gathering and reducing; `tests/plan/test_timing.py` holds it to what travels.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param_group as groups
from torch.distributed.fsdp._fully_shard._fsdp_common import TrainingState
from torch.distributed.fsdp._fully_shard._fsdp_param import FSDPParam
from torch.distributed.fsdp._fully_shard._fsdp_state import FSDPState

from paraxis.base.schedule import Action
from paraxis.parallel import pipeline
from paraxis.parallel.copies import Copies
from paraxis.parallel.deferred import OwedGradients
from paraxis.parallel.fsdp import PipelineReduction
from paraxis.plan import pretend
from paraxis.plan.operators import Operator, product
from paraxis.plan.pretend import replaced
from paraxis.train.passes import Accumulation, Piped
from paraxis.train.run import Run


class Watched(Protocol):
    """What is told."""

    lane: str

    @property
    def at(self) -> tuple[str, int, int]: ...

    def place_of(self, parameter: Any) -> tuple[int, int]: ...

    def enter(self, kind: str, stage: int = 0, block: int = -1) -> None: ...

    def note(self, operator: Operator) -> None: ...

    def number(self, x: Any) -> int | None: ...

    def mark(self, kind: str, action: Action | None = None) -> None: ...


@contextmanager
def watching(run: Run, told: Watched) -> Iterator[None]:
    """While inside, `told` hears of everything but the operators themselves, which it sees."""
    group, step = groups.FSDPParamGroup, pipeline._Step
    with ExitStack() as inside:
        for owner, name, wrapper in (
            (group, "unshard", _gathers),
            (group, "wait_for_unshard", _waits),
            (groups, "foreach_reduce", _reduces),
            (FSDPState, "_root_post_backward_final_callback", _reduced),
            (step, "_forward", _acts),
            (step, "_backward", _acts),
            (step, "_weights", _acts),
            (Accumulation, "forward_backward", _passes),
            (Piped, "forward_backward", _passes),
            (torch, "addmm", _multiplies),
            (OwedGradients, "add", _owes),
            (PipelineReduction, "gradients_added", _outside),
            (PipelineReduction, "gradients_complete", _outside),
            (FSDPParam, "accumulate_unsharded_grad_if_needed", _adds),
            (group, "post_backward", _ends),
            (Copies, "_take", _takes),
            (pretend, "read_counts", _reads),
        ):
            inside.enter_context(replaced(owner, name, _bound(wrapper, told, getattr(owner, name))))
        for module in run.modules:
            inside.callback(module.register_forward_pre_hook(partial(_begins, told), prepend=True).remove)
        yield


def _bound(wrapper: Callable[..., Any], told: Watched, plain: Callable[..., Any]) -> Callable[..., Any]:
    """A function, so that it is bound to an instance where it stands in for a method."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return wrapper(told, plain, *args, **kwargs)

    return call


def _begins(told: Watched, module: nn.Module, args: Any) -> None:
    told.mark("batch")


def _gathers(told: Watched, plain: Callable[..., Any], group: Any, *args: Any, **kwargs: Any) -> None:
    if group._all_gather_result is not None or group.is_unsharded:
        plain(group, *args, **kwargs)
        return
    early = group._training_state == TrainingState.FORWARD
    told.note(Operator(name="gather", sort="begin", lane="all_gather", early=early))
    with replaced(told, "lane", "all_gather"):
        plain(group, *args, **kwargs)


def _waits(told: Watched, plain: Callable[..., Any], group: Any) -> None:
    if group._all_gather_result is not None:
        told.note(Operator(name="gathered", sort="wait", lane="all_gather"))
    plain(group)


def _reduces(told: Watched, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    # The buffer that the reduction before this one reads is given back first.
    told.note(Operator(name="reduced", sort="wait", lane="reduce_scatter"))
    told.note(Operator(name="reduce", sort="begin", lane="reduce_scatter"))
    with replaced(told, "lane", "reduce_scatter"):
        return plain(*args, **kwargs)


def _reduced(told: Watched, plain: Callable[..., Any], state: Any) -> None:
    plain(state)  # the root's gradients are reduced in it
    told.note(Operator(name="all reduced", sort="wait", lane="reduce_scatter", result=EVERYTHING))


def _acts(told: Watched, plain: Callable[..., Any], step: Any, action: Action) -> None:
    told.mark("action", action)
    plain(step, action)


def _passes(told: Watched, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    told.mark("passes")
    out = plain(*args, **kwargs)
    told.mark("tail")
    return out


def _multiplies(told: Watched, plain: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    out = plain(*args, **kwargs)
    if "out_dtype" in kwargs:  # which no dispatcher sees, see pretend.py
        told.note(product(args[1], args[2], out, told.number))
    return out


def _owes(told: Watched, plain: Callable[..., Any], owed: OwedGradients, make: Callable[[], None]) -> None:
    _, stage, block = told.at

    def later() -> None:
        told.enter("weights", stage, block)
        make()
        told.enter("start", stage)  # what all were made of is let go after the last, which is not its block's doing

    plain(owed, later)


def _outside(told: Watched, plain: Callable[..., Any], *args: Any) -> None:
    told.enter("weights", told.at[1])
    plain(*args)
    told.enter("start", told.at[1])


def _goes_on(told: Watched, parameter: Any) -> None:
    """Outside autograd, where no block's hook says whose turn it is."""
    if told.at[0] == "weights":
        told.enter("weights", *told.place_of(parameter))


def _adds(told: Watched, plain: Callable[..., Any], parameter: Any) -> None:
    _goes_on(told, parameter.sharded_param)
    plain(parameter)


def _ends(told: Watched, plain: Callable[..., Any], group: Any, *args: Any) -> None:
    if group.fsdp_params:
        _goes_on(told, group.fsdp_params[0].sharded_param)
    plain(group, *args)


def _takes(told: Watched, plain: Callable[..., Any], copies: Any, copy: Any) -> None:
    _goes_on(told, copy)
    plain(copies, copy)


def _reads(told: Watched, plain: Callable[..., Any], *args: Any) -> Any:
    told.note(Operator(name="counts", sort="read"))
    return plain(*args)


EVERYTHING = -2  # in place of one exchange's number: all of its stream
