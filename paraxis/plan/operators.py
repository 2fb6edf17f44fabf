"""What an operator on the pretended device asks of a real one: products, attention, memory traffic, messages."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.utils._pytree import tree_leaves

from paraxis.plan.hardware import ExchangeKind

DTYPES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.float8_e4m3fn: "float8",
    torch.float8_e5m2: "float8",
    torch.uint8: "fp4",  # two numbers
}
Sort = Literal["product", "attention", "traffic", "exchange", "begin", "wait", "read"]


@dataclass(frozen=True, kw_only=True)
class Operator:
    """One operator of a traced step, on the stream `lane`.

    `reads` and `writes` are allocations and bytes of them. A product has its sizes (m, n, k, batch), attention (batch, heads, width,
    queries, keys) and whether it is `causal` and a `backward`; an exchange the ranks of its group, the bytes of its whole buffer, and the
    allocation that a later `wait` for it names. At a `read` the host waits for the device. `begin` says that what follows on its lane
    travels as one, `early` that it was asked for ahead of the device. `fusible`: a compiler makes one kernel of such that follow from
    each other.
    """

    name: str
    sort: Sort
    lane: str = "compute"
    dtype: str = ""
    sizes: tuple[int, ...] = ()
    causal: bool = False
    backward: bool = False
    reads: tuple[tuple[int, int], ...] = ()
    writes: tuple[tuple[int, int], ...] = ()
    fusible: bool = False
    early: bool = False
    exchange: ExchangeKind | None = None
    group: tuple[int, ...] = ()
    bytes: int = 0
    result: int = -1

    @property
    def flops(self) -> float:
        """Floating-point operations of products and attention; of a causal mask the half that counts."""
        if self.sort == "product":
            return 2.0 * math.prod(self.sizes)
        if self.sort == "attention":
            return (10 if self.backward else 4) * math.prod(self.sizes) * (0.5 if self.causal else 1.0)
        return 0.0


Number = Callable[[Any], int | None]  # which allocation a tensor lies in

# Operators that compute nothing: they make room, or say something to the allocator or the profiler.
IDLE = ("aten::empty", "aten::new_empty", "aten::resize_", "aten::record_stream", "aten::set_", "aten::detach", "profiler::")
# These read only as much of their first argument as they leave.
PICK = ("aten::embedding", "aten::index", "aten::gather", "aten::index_select", "aten::slice", "aten::select")
# These leave nothing of what was in the tensor that they change.
OVERWRITE = ("aten::copy_", "aten::_foreach_copy_", "aten::zero_", "aten::fill_", "fsdp::", "paraxis::sum_parts")
GATHERED = "fsdp::all_gather_copy_in"  # copies a rank's parameters to their place in what is gathered
# A kernel of their own even where a compiler writes the others: they sort, search or scatter.
ALONE = ("sort", "topk", "scatter", "index_put", "embedding", "cumsum", "nonzero", "_fused_", "_foreach_", "fsdp::", "histc", "bincount")
# Products: which arguments are multiplied.
PRODUCTS = {
    "aten::mm": (0, 1),
    "aten::bmm": (0, 1),
    "aten::addmm": (1, 2),
    "aten::addmm_": (1, 2),
    "aten::baddbmm": (1, 2),
    "aten::_scaled_mm": (0, 1),
    "aten::_grouped_mm": (0, 1),
}
# Ours, whose factors both have the summed dimension last, and how many numbers of it an entry is.
BLOCK_PRODUCTS = {"paraxis::block_product": (0, 2, 1), "paraxis::fp4_product": (0, 3, 2)}
# Exchanges: the kind, and the argument (of the result, -1) that is the whole buffer.
EXCHANGED: dict[str, tuple[ExchangeKind, int]] = {
    "c10d::_allgather_base_": ("all_gather", 0),
    "c10d::_reduce_scatter_base_": ("reduce_scatter", 1),
    "c10d::allreduce_": ("all_reduce", 0),
    "c10d::alltoall_base_": ("all_to_all", 0),
    "_c10d_functional::all_gather_into_tensor": ("all_gather", -1),
    "_c10d_functional::reduce_scatter_tensor": ("reduce_scatter", 0),
    "_c10d_functional::all_reduce": ("all_reduce", 0),
    "_c10d_functional::all_reduce_": ("all_reduce", 0),
    "_c10d_functional::all_to_all_single": ("all_to_all", 0),
}


def describe(func: Any, args: Any, kwargs: Any, out: Any, number: Number, lane: str) -> Operator | None:
    """What a call of `func` asks of the device; None for what asks nothing, and for messages between pipeline stages."""
    name = func._schema.name
    if name.startswith(IDLE):
        return None
    if name == "_c10d_functional::wait_tensor":
        return Operator(name=name, sort="wait", lane=lane, result=_number(number, args[0]))
    if name in EXCHANGED:
        return _exchange(func, name, args, kwargs, out, number, lane)
    if name.startswith(("c10d::", "_c10d_functional::")):
        return None
    reads, writes = _traffic(func, name, args, kwargs, out, number)
    if not writes:
        return None  # a view
    common: dict[str, Any] = {"name": name, "lane": lane, "reads": reads, "writes": writes}
    if name in PRODUCTS:
        left, right = (args[place] for place in PRODUCTS[name])
        return Operator(sort="product", dtype=DTYPES[left.dtype], sizes=_product_sizes(left, right, out), **common)
    if name in BLOCK_PRODUCTS:
        left, right, numbers = BLOCK_PRODUCTS[name]
        sizes = args[left].shape[0], args[right].shape[0], args[left].shape[1] * numbers, 1
        return Operator(sort="product", dtype=DTYPES[args[left].dtype], sizes=sizes, **common)
    if "attention" in name and name.startswith(("aten::", "paraxis::")):
        return _attention(func, name, args, kwargs, common)
    fusible = func.namespace in ("aten", "prims") and not any(word in name for word in ALONE)
    return Operator(sort="traffic", fusible=fusible, **common)


def product(left: Tensor, right: Tensor, out: Tensor, number: Number) -> Operator:
    """A product that does not come through the dispatcher: left @ right, added to `out`."""
    reads = tuple(_touched([left, right, out], number))
    return Operator(
        name="product",
        sort="product",
        dtype=DTYPES[left.dtype],
        sizes=_product_sizes(left, right, out),
        reads=reads,
        writes=tuple(_touched([out], number)),
    )


def _product_sizes(left: Tensor, right: Tensor, out: Any) -> tuple[int, ...]:
    """(m, n, k, batch). Of grouped products, whose groups share out one dimension, the work is that of one group's share times groups."""
    if left.dim() == 3 and right.dim() == 3:
        return left.shape[1], right.shape[2], left.shape[2], left.shape[0]
    if left.dim() == 2 and right.dim() == 3:  # rows shared out among the groups' matrices
        return max(1, left.shape[0] // right.shape[0]), right.shape[2], left.shape[1], right.shape[0]
    if isinstance(out, Tensor) and out.dim() == 3:  # the inner dimension is
        return left.shape[0], right.shape[1], max(1, left.shape[1] // out.shape[0]), out.shape[0]
    return left.shape[0], right.shape[1], left.shape[1], 1


def _attention(func: Any, name: str, args: Any, kwargs: Any, common: dict[str, Any]) -> Operator:
    said = {argument.name: value for argument, value in zip(func._schema.arguments, args, strict=False)} | kwargs
    q, k = said["query"], said["key"]
    # [batch, heads, positions, width] of most, [batch, positions, heads, width] of those that flash attention itself has.
    heads, queries, keys = (1, 2, 2) if "scaled_dot_product" in name else (2, 1, 1)
    return Operator(
        sort="attention",
        dtype=DTYPES[q.dtype],
        sizes=(q.shape[0], q.shape[heads], q.shape[3], q.shape[queries], k.shape[keys]),
        causal=bool(said.get("is_causal", False)),
        backward="backward" in name,
        **common,
    )


def _exchange(func: Any, name: str, args: Any, kwargs: Any, out: Any, number: Number, lane: str) -> Operator:
    kind, place = EXCHANGED[name]
    buffers = [x for x in tree_leaves(out if place < 0 else args[place]) if isinstance(x, Tensor)]
    group = next(ranks for x in tree_leaves((args, kwargs)) if (ranks := _group(x)) is not None)
    made = [x for x in tree_leaves(out) if isinstance(x, Tensor)] or buffers
    to_one = name.endswith("::all_to_all_single") and sum(rows > 0 for rows in args[2]) == 1  # as `collectives.shift` sends
    return Operator(
        name=name,
        sort="exchange",
        lane=lane,
        exchange="p2p" if to_one and len(group) > 1 else kind,
        group=group,
        reads=tuple(_touched(args[place] if place >= 0 else args[:1], number)),
        bytes=sum(x.numel() * x.element_size() for x in buffers),
        result=_number(number, made[0]) if name.startswith("_c10d_functional") else -1,
    )


def _group(x: Any) -> tuple[int, ...] | None:
    """The ranks of a process group, as operators are given one: boxed, or by name."""
    if isinstance(x, str):
        if x in ("sum", "avg", "max", "min", "product"):
            return None
        return tuple(dist.get_process_group_ranks(_resolve_process_group(x)))  # type: ignore[arg-type]
    if isinstance(x, torch.ScriptObject):
        try:
            group = dist.ProcessGroup.unbox(x)
        except RuntimeError:
            return None  # a kind of sum, which is boxed too
        return tuple(dist.get_process_group_ranks(group))
    return None


def _traffic(func: Any, name: str, args: Any, kwargs: Any, out: Any, number: Number) -> tuple[tuple[tuple[int, int], ...], ...]:
    """What a kernel reads and writes: arguments and results; no writes for a view."""
    changed: list[Any] = []
    given: list[Any] = []
    for argument, value in zip(func._schema.arguments, args, strict=False):
        (changed if argument.alias_info is not None and argument.alias_info.is_write else given).append(value)
    for argument in func._schema.arguments[len(args) :]:
        if argument.name in kwargs:
            (changed if argument.alias_info is not None and argument.alias_info.is_write else given).append(kwargs[argument.name])
    over = name.startswith(OVERWRITE) or func._overloadname == "out"
    if name == GATHERED:  # its schema does not say so
        given, changed = args[:1], [x.narrow(0, 0, args[3]) for x in args[1:2]]
    reads = {place: bytes for x in (given if over else [*given, *changed]) for place, bytes in _touched(x, number)}
    writes = {place: bytes for x in changed for place, bytes in _touched(x, number)}
    held = {*reads, *writes}
    for place, bytes in _touched(out, number):
        if place not in held:
            writes[place] = bytes
    if name.startswith(PICK) and writes and (picked := dict(_touched(args[:1], number))):
        reads |= {place: min(bytes, sum(writes.values())) for place, bytes in picked.items()}
    return tuple(reads.items()), tuple(writes.items())


def _touched(tensors: Any, number: Number) -> Iterator[tuple[int, int]]:
    """Allocations that tensors lie in, and how many bytes of them: of a list, of all that lie there; no more than there are."""
    if isinstance(tensors, Tensor):
        if (place := number(tensors)) is not None:
            yield place, min(tensors.numel() * tensors.element_size(), tensors.untyped_storage().nbytes())
    elif isinstance(tensors, list | tuple):
        found: dict[int, int] = {}
        for x in tensors:
            for place, bytes in _touched(x, number):
                found[place] = min(found.get(place, 0) + bytes, x.untyped_storage().nbytes() if isinstance(x, Tensor) else 1 << 62)
        yield from found.items()


def _number(number: Number, x: Any) -> int:
    found = number(x)
    return -1 if found is None else found
