"""One rank of a run that does not exist: a process group without peers, and a CUDA device without memory.

Tensors of the pretended device are fake: they have shape, dtype and a storage of a size, but no bytes. They say that they are on `cpu:0`,
which no real tensor does, so the two cannot be mistaken for each other: the host's own numbers (the mesh, say) stay real and can be read.
Fake tensors that say `cuda` would need a CUDA build of torch, and a driver, for autograd.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed import device_mesh
from torch.distributed.tensor import DTensor
from torch.nn import functional as F
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paraxis.base.device import Device
from paraxis.base.replaced import replaced
from paraxis.base.seams import Dispatch
from paraxis.models import init
from paraxis.parallel.collectives import functional
from paraxis.parallel.world import World
from paraxis.plan.rates import Accelerator
from paraxis.plan.remembered import Call, Result, call_of, known, made_again, remember

PRETENDED = torch.device("cpu", 0)
HALF = (torch.bfloat16, torch.float16)

_aten = torch.ops.aten
_MOVING = (_aten.set_.source_Storage, _aten.set_.source_Storage_storage_offset, _aten.set_.source_Tensor)  # into other storage
_composite_attention = F.scaled_dot_product_attention
composite_rms_norm = F.rms_norm
_addmm_of_one_dtype = torch.addmm


@dataclass(frozen=True)
class PretendedDevice(Device):
    """A CUDA device as far as choices go, whose tensors are fake. torch's meshes and FSDP take it for a CPU."""

    @property
    def torch(self) -> torch.device:
        return PRETENDED

    @property
    def is_cuda(self) -> bool:
        return True


def pretended(on: Accelerator) -> PretendedDevice:
    """The device that a run on this accelerator finds."""
    capability = (10, 0) if "fp4" in on.peak_flops else (9, 0) if "float8" in on.peak_flops else (8, 0)
    return PretendedDevice("cpu", 0, on.name, on.memory_bytes, capability)


class PretendedMemory(TorchDispatchMode):
    """While active, what is made on the pretended device, or from tensors there, is fake; all else is as ever."""

    def __init__(self) -> None:
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # comes back as the operators on local tensors that it is made of
        if kwargs.get("pin_memory"):
            kwargs = {**kwargs, "pin_memory": False}  # the host has no driver to pin with
        call = call_of(self.fake, func, args, kwargs)
        if call is not None and not call.tensors and kwargs.get("device") != PRETENDED:
            return func(*args, **kwargs)
        if call is not None and func not in _MOVING and (result := known(call)) is not None:
            out = made_again(self.fake, call, result)
        elif call is None and not (kwargs.get("device") == PRETENDED or any(self.holds(x) for x in tree_leaves((args, kwargs)))):
            return func(*args, **kwargs)
        else:
            with self.fake:
                out = func(*args, **kwargs)
            result = remember(self.fake, call, func, args, kwargs, out) if call is not None and func not in _MOVING else None
        self.made(func, args, kwargs, out, call, result)
        return out

    def holds(self, x: object) -> bool:
        """Whether `x` is a tensor on this device."""
        return isinstance(x, FakeTensor) and x.fake_mode is self.fake

    def made(self, func: Any, args: Any, kwargs: Any, out: Any, call: Call | None, result: Result | None) -> None:
        """An operator has returned `out`."""


class _FusedRmsNorm(torch.autograd.Function):
    """What CUDA's kernel leaves behind, forward and backward, from operators that move as many bytes."""

    @staticmethod
    def forward(ctx, x, weight):  # type: ignore[override]
        ctx.save_for_backward(x, weight, x.new_empty((*x.shape[:-1], 1), dtype=torch.float32))
        return x * weight

    @staticmethod
    def backward(ctx, grad):  # type: ignore[override]
        x, weight, _ = ctx.saved_tensors
        return grad * x, grad.flatten(0, -2).sum(0).to(weight.dtype)


def _rms_norm(x: torch.Tensor, shape: Any, weight: torch.Tensor | None = None, eps: float | None = None) -> torch.Tensor:
    fused = weight is not None and x.dtype == weight.dtype and x.dtype != torch.float64
    return _FusedRmsNorm.apply(x, weight) if fused else composite_rms_norm(x, shape, weight, eps)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **options: Any) -> torch.Tensor:
    """The fused kernel that was asked for; what fused kernels do not compute, as the CPU does."""
    if q.dtype not in HALF or options.get("attn_mask") is not None:
        return _composite_attention(q, k, v, **options)
    causal = options.get("is_causal", False)
    if not torch.backends.cuda.flash_sdp_enabled():
        return _aten._scaled_dot_product_cudnn_attention(q, k, v, None, torch.is_grad_enabled(), 0.0, causal)[0]
    return _aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal)[0]


def _addmm(*args: Any, **kwargs: Any) -> torch.Tensor:
    """With an output dtype of its own it is known to CUDA alone; it then writes where it is told to."""
    return kwargs["out"] if "out_dtype" in kwargs else _addmm_of_one_dtype(*args, **kwargs)


@dataclass(frozen=True)
class EvenDispatch:
    """Expert parallelism whose rows go to all ranks alike, as balanced routers send them: pretended counts cannot be read."""

    dispatch: Dispatch
    ranks: int

    def __call__(self, x_sm: torch.Tensor, counts_e: torch.Tensor, experts: Callable[..., torch.Tensor]) -> torch.Tensor:
        ends = [x_sm.shape[0] * n // self.ranks for n in range(self.ranks + 1)]
        even = [end - start for start, end in pairwise(ends)]
        with replaced(FakeTensor, "tolist", lambda counts: read_counts(even)):
            return self.dispatch(x_sm, counts_e, experts)


def read_counts(even: list[int]) -> list[list[int]]:
    """What the host reads of the device, rows sent and received: the one thing it waits for within a step."""
    return [even, even]


def _as_it_is(x: torch.Tensor) -> torch.Tensor:
    """What a collective has begun to fill: wrapped, it would be another tensor, with memory of its own and nothing to wait for."""
    return x


class _Event:
    """What StepReport asks of a CUDA event, whose real one wants a driver."""

    def record(self) -> None: ...


def _no_values(local: torch.Tensor, rule: Any, **place: Any) -> None:
    """Nobody reads the first values of pretended parameters, and making them takes a while."""


def _own_group(plain: Callable[..., Any], rank: int) -> Callable[..., Any]:
    """Makes no groups of others, of which a large world has thousands."""

    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        return plain(ranks, *args, **kwargs) if ranks is None or rank in ranks else dist.GroupMember.NON_GROUP_MEMBER

    return new_group


# What torch puts together differently for each device, or asks the device for, as CUDA has it; and what need not be done.
_REPLACED: tuple[tuple[Any, str, Any], ...] = (
    (F, "rms_norm", _rms_norm),
    (F, "scaled_dot_product_attention", _attention),
    (torch, "addmm", _addmm),
    (functional, "_maybe_wrap_tensor", _as_it_is),
    (torch.cuda, "Event", _Event),
    (FakeTensor, "is_cuda", property(lambda x: x.device == PRETENDED)),
    (init, "fill_", _no_values),
)


class PretendedWorld(World):
    """One rank of a run, asked by itself: what ranks agree on is what this one would have them do."""

    def agree_json(self, value: Any, ranks: Sequence[int], choose: Callable[[list[Any]], Any]) -> Any:
        return choose([value])


@contextmanager
def pretended_world(ranks: int, rank: int, device: PretendedDevice) -> Iterator[World]:
    """The `rank`-th of `ranks`, alone in this process: collectives return at once and leave their outputs as they are."""
    assert not dist.is_initialized(), "a process is in one world at a time"
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    with ExitStack() as after:
        after.callback(dist.destroy_process_group)
        for owner in (dist, device_mesh):
            after.enter_context(replaced(owner, "new_group", _own_group(owner.new_group, rank)))
        for owner, name, value in _REPLACED:
            after.enter_context(replaced(owner, name, value))
        yield PretendedWorld(rank, ranks, 0, device, dist.HashStore())
