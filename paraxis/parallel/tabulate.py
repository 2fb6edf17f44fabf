"""The table of a block's costly operators, read off its forward: traced with fake tensors, which have shapes and no bytes.

An output is followed by the memory it lies in, so that views of it count as itself.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

from paraxis.base.replaced import replaced
from paraxis.base.seams import Batch, routed_layers
from paraxis.parallel.knapsack import BlockTable, Operator
from paraxis.parallel.once import CALL, keeping

_aten = torch.ops.aten

# The kernels that attention may run by; which one it is can depend on the batch.
ATTENTION = {
    "aten._scaled_dot_product_cudnn_attention.default",
    "aten._scaled_dot_product_flash_attention.default",
    "aten._scaled_dot_product_efficient_attention.default",
    "aten._scaled_dot_product_flash_attention_for_cpu.default",
    "paraxis.scaled_dot_product_flash_attention_4.default",
    "flex_attention",
}
PRODUCTS = {
    "aten.mm.default": 0,
    "aten.bmm.default": 0,
    "aten.addmm.default": 1,
    "aten.baddbmm.default": 1,
    "aten._scaled_mm.default": 0,
    "paraxis.block_product.default": 0,
    "paraxis.fp4_product.default": 0,
    "aten._grouped_mm.default": 0,
    "paraxis.grouped_loop.default": 0,
}  # and which argument is the left matrix
SUMS = {"_c10d_functional.reduce_scatter_tensor.default", "_c10d_functional.all_reduce.default"}
FAMILIES = {**dict.fromkeys(ATTENTION, "attention"), **{name: name for name in (*PRODUCTS, *SUMS)}}


@dataclass(frozen=True)
class Rates:
    """What a device does in a second: operations of matrix products and of attention, bytes of memory, bytes to and from other ranks."""

    products: float
    attention: float
    memory: float
    link: float


# Shares of an accelerator's peak and the operations it can do while it reads a byte, as an H200 has them. Only ratios matter here.
def rates(peak_flops: float) -> Rates:
    """The rates of a device that can do so many operations a second in matrix products."""
    return Rates(products=0.73 * peak_flops, attention=0.6 * peak_flops, memory=peak_flops / 250, link=peak_flops / 2800)


def call_name(operator: Any) -> str | None:
    """The family of an operator that is worth keeping; None for a cheap one."""
    return FAMILIES.get(str(operator))


@dataclass
class _Made:
    """What is known of a piece of memory that a block's forward has made: its bytes, and what has to be there to compute it again."""

    bytes: int
    reach: frozenset[int]


@dataclass
class _Trace:
    operators: list[Operator] = field(default_factory=list)
    outputs: list[set[int]] = field(default_factory=list)  # the memory that each operator makes
    made: dict[int, _Made] = field(default_factory=dict)
    packed: set[int] = field(default_factory=set)
    at_costly: set[int] = field(default_factory=set)  # memory that an operator which no compiler merges with others reads or makes
    alive: list[Tensor] = field(default_factory=list)  # numbers of freed memory are used again
    counts: Counter[str] = field(default_factory=Counter)
    moved_bytes: int = 0
    replayed: int = 0  # operators before the last that backward needs something of
    input_bytes: int = 0
    once: Operator | None = None  # all that `once` computes


class _Recorder(TorchDispatchMode):
    """Notes a block's operators while `trace` is set."""

    def __init__(self, rates: Rates) -> None:
        super().__init__()
        self.rates = rates
        self.trace: _Trace | None = None
        self.inside: list[str] = []  # the modules of the block that are being called, by name

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self.trace is not None:
            self._note(self.trace, func, args, [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)], out)
        return out

    @contextmanager
    def following(self, block: nn.Module) -> Iterator[None]:
        """While inside, knows which module of `block` is being called."""
        names = {module: name for name, module in block.named_modules() if name}

        def enter(module: nn.Module, args: Any) -> None:
            self.inside.append(names.get(module, ""))

        def leave(module: nn.Module, args: Any, out: Any) -> None:
            self.inside.pop()

        handles = [register_module_forward_pre_hook(enter), register_module_forward_hook(leave)]
        yield
        for handle in handles:
            handle.remove()

    def pack(self, x: Tensor) -> Tensor:
        if self.trace is not None:
            self.trace.packed.add(_memory(x))
            self.trace.alive.append(x)
            self.trace.replayed = len(self.trace.operators)
        return x

    def compute(self, compute: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Runs what is computed once, and notes it in the block's one operator that needs no other."""
        before = len(self.trace.operators) if self.trace else 0
        made = compute()
        if self.trace is not None:
            size = sum(x.untyped_storage().nbytes() for x in made)
            seconds = sum(operator.seconds for operator in self.trace.operators[before:])
            so_far = self.trace.once or Operator((CALL, 0), 0, 0.0, place=self.inside[-1] if self.inside else "")
            self.trace.once = replace(so_far, bytes=so_far.bytes + size, seconds=so_far.seconds + seconds)
        return made

    def _note(self, trace: _Trace, func: Any, args: Any, read: Sequence[Tensor], out: Any) -> None:
        outputs = [x for x in tree_leaves(out) if isinstance(x, Tensor)]
        trace.alive += [*read, *outputs]
        inputs = {_memory(x) for x in read}
        new = {_memory(x): x.untyped_storage().nbytes() for x in outputs if _memory(x) not in inputs}
        reach = frozenset[int]().union(*(trace.made[number].reach for number in inputs if number in trace.made))
        family = call_name(func)
        if family is None:
            for number in inputs if func._schema.is_mutable else ():
                if number in trace.made:
                    trace.made[number].reach |= reach
            if func.namespace == "paraxis":  # a kernel of our own: what it makes is there, and not a step inside another one
                trace.at_costly |= inputs | set(new)
            if new or func._schema.is_mutable:
                trace.moved_bytes += sum(x.untyped_storage().nbytes() for x in (*read, *outputs))
        else:
            trace.at_costly |= inputs | set(new)
            seconds = self._seconds(func, args, outputs)
            trace.operators.append(
                Operator((family, trace.counts[family]), sum(new.values()), seconds, reach, self.inside[-1] if self.inside else "")
            )
            trace.outputs.append(set(new))
            trace.counts[family] += 1
            reach = frozenset({len(trace.operators) - 1})
        trace.made |= {number: _Made(size, reach) for number, size in new.items()}

    def _seconds(self, func: Any, args: Any, outputs: Sequence[Tensor]) -> float:
        name, out = str(func), outputs[0]
        if name in SUMS:
            return args[0].untyped_storage().nbytes() / self.rates.link
        if name in ATTENTION:
            q, k, v = args[:3]
            causal = name == "flex_attention" or any(
                x is True for x, a in zip(args, func._schema.arguments, strict=False) if a.name == "is_causal"
            )
            return 2 * q.numel() * k.shape[-2] * (1 + v.shape[-1] / k.shape[-1]) / (1 + causal) / self.rates.attention
        return 2 * out.numel() * args[PRODUCTS[name]].shape[-1] / self.rates.products


def _memory(x: Tensor) -> int:
    return x.untyped_storage()._cdata


@dataclass(frozen=True)
class Setting:
    """What a model is traced in: the device and dtype it computes with, the shape of what a stage hands on, how fast the device is.

    `fused`: blocks are compiled, so that only what backward needs is computed again, and what is cheap costs one pass over memory.
    `opaque`: what runs in them is hidden from the choice, but for what is computed `once`.
    `spread`: experts live on several ranks.
    """

    device: torch.device
    dtype: torch.dtype
    stream: tuple[int, ...]
    rates: Rates
    fused: bool
    opaque: bool
    spread: bool


def tabulate(model: nn.Module, batch: Batch, setting: Setting, *, first: bool) -> list[BlockTable]:
    """The table of each block of a model, or of one stage of it, whose parameters are on the meta device.

    Blocks of one kind (class, and shapes of parameters) share one table: the first of them is traced. `batch` has the shapes of a
    micro-batch as this rank takes it; `first` says that the model takes it alone, without what an earlier stage makes.
    """
    blocks: Sequence[nn.Module] = model.blocks()  # type: ignore[operator]
    if not len(blocks):
        return []
    recorder, traces = _Recorder(setting.rates), dict[Any, _Trace]()
    with _disable_current_modes(), torch.enable_grad(), ExitStack() as inside:
        for layer in routed_layers(model).values():
            layer.begin_step(torch.ones(()))
            if setting.spread:
                layer.use_dispatch(_here)
        inside.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        inside.enter_context(_alone())
        values = {name: _fake(p, setting) for name, p in model.named_parameters()} | {
            name: torch.empty(b.shape, dtype=b.dtype, device=setting.device) for name, b in model.named_buffers()
        }
        fields_of = {name: torch.empty(x.shape, dtype=x.dtype, device=setting.device) for name, x in vars(batch).items() if x is not None}
        stream = torch.empty(setting.stream, dtype=setting.dtype, device=setting.device, requires_grad=True)
        inside.enter_context(recorder)
        inside.enter_context(torch.autograd.graph.saved_tensors_hooks(recorder.pack, lambda x: x))
        inside.enter_context(keeping(recorder.compute))
        inside.enter_context(_visiting(blocks, recorder, traces))
        with suppress(_Seen):
            torch.func.functional_call(model, values, (replace(batch, **fields_of), *(() if first else (stream,))))
        tables = {kind: _table(trace, setting) for kind, trace in traces.items()}
    return [tables[_kind(block)] for block in blocks]


def _fake(parameter: Tensor, setting: Setting) -> Tensor:
    dtype = setting.dtype if parameter.requires_grad else parameter.dtype
    return torch.empty(parameter.shape, dtype=dtype, device=setting.device, requires_grad=parameter.requires_grad)


class _Seen(Exception):
    """All blocks have run: what follows them is not traced."""


def _kind(block: nn.Module) -> Any:
    return type(block), tuple((name, tuple(p.shape)) for name, p in block.named_parameters())


@contextmanager
def _visiting(blocks: Sequence[nn.Module], recorder: _Recorder, traces: dict[Any, _Trace]) -> Iterator[None]:
    """While inside, the first block of each kind is recorded, and all others hand on what they are called with."""

    def visited(block: nn.Module, forward: Any, last: bool, *args: Any) -> Any:
        out = args[0]
        if _kind(block) not in traces:
            recorder.trace = traces[_kind(block)] = _Trace()
            recorder.trace.input_bytes = sum(x.untyped_storage().nbytes() for x in args if isinstance(x, Tensor) and x.requires_grad)
            with recorder.following(block):
                out = forward(*args)
            recorder.trace = None
        if last:
            raise _Seen
        return out

    with ExitStack() as after:
        for block in blocks:
            forward = partial(visited, block, block.forward, block is blocks[-1])
            after.enter_context(replaced(block, "forward", forward))
        yield


@contextmanager
def _alone() -> Iterator[None]:
    """While inside, what ranks would send each other at once stays here."""
    with ExitStack() as after:
        for name in ("all_to_all_single", "all_reduce"):
            after.enter_context(replaced(dist, name, _nothing))
        yield


def _nothing(*args: Any, **kwargs: Any) -> list[Any]:
    return []


def _here(x_sm: Tensor, counts_e: Tensor, experts: Any) -> Tensor:
    """As many rows arrive from other ranks as are sent there."""
    return experts(x_sm, counts_e[: next(experts.parameters()).shape[0]])


def _table(trace: _Trace, setting: Setting) -> BlockTable:
    made, operators = trace.made, trace.operators
    packed = trace.packed & made.keys()
    if not setting.fused:  # every operator is run again, until the last one that backward needs something of
        required = frozenset(range(trace.replayed))
        operators = [replace(operator, needs=frozenset()) for operator in operators]
        whole, moved = packed, trace.moved_bytes
    else:
        required = frozenset[int]().union(*(made[number].reach for number in packed))
        # Cheap operators are fused into their readers: of their outputs only those stay that others read.
        behind = frozenset[int]().union(*(made[number].reach for number in packed - trace.at_costly))
        whole = (packed & trace.at_costly).union(*(trace.outputs[number] for number in behind))
        moved = 2 * sum(made[number].bytes for number in (packed & trace.at_costly).difference(*trace.outputs))
    table = BlockTable(
        operators=tuple(operators),
        required=required,
        input_bytes=trace.input_bytes,
        whole_bytes=trace.input_bytes + sum(made[number].bytes for number in whole),
        cheap_s=moved / setting.rates.memory,
    )
    return _hidden(table, trace.once) if setting.opaque else table


def _hidden(table: BlockTable, once: Operator | None) -> BlockTable:
    """The same block, of which nothing can be kept by itself but what is computed once."""
    if once is None:
        return replace(table, operators=(), required=frozenset(), cheap_s=table.backward_s)
    return replace(table, operators=(once,), required=frozenset({0}), cheap_s=table.backward_s - once.seconds)
