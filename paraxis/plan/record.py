"""The record of a step: every allocation and operator in order, and who watches for them."""

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._pytree import tree_leaves

from paraxis.base.schedule import Action
from paraxis.plan.allocator import fits, reserved_bytes
from paraxis.plan.operators import Operator, describe
from paraxis.plan.pretend import PretendedMemory, replaced
from paraxis.plan.remembered import Call, Result, new_outputs

CATEGORIES = ("parameters", "gradients", "optimizer", "activations", "communication", "other")
ROUND = 512  # bytes: CUDA's caching allocator gives out multiples of it

# What an argument of an operator is for: buffers that are made for a collective, gradients on their way into one.
_SAYS = {
    "c10d::_allgather_base_": (0, "communication"),
    "c10d::_reduce_scatter_base_": (1, "communication"),
    "c10d::recv_": (0, "communication"),
    "fsdp::chunk_cat": (0, "gradients"),
}
# The same, of what runs while gradients are reduced.
_SAYS_REDUCING = {"c10d::alltoall_base_": (1, "communication"), "paraxis::sum_parts": (0, "communication")}
# What cuBLAS takes of the allocator for each thread that multiplies, of which there are two: the host's, and autograd's for the device.
# That of Hopper and later; torch's own default elsewhere is a quarter of it.
WORKSPACE_BYTES = 32 << 20


@dataclass(frozen=True)
class Phase:
    """A stretch of a step, from event `start` and operator `operator` on. `block` counts those of this rank's `stage`-th stage; -1
    outside blocks."""

    kind: str
    start: int
    stage: int = 0
    block: int = -1
    operator: int = 0


@dataclass(frozen=True)
class Mark:
    """A place in the lists of operators and events: where the `passes` begin, each micro-batch's forward (`batch`), each `action` of a
    pipeline, and the `tail` after the last."""

    kind: str
    operator: int
    action: Action | None = None
    event: int = 0


@dataclass
class Trace:
    """A step as a list of events: at each, an allocation (a number) grows or shrinks by so many bytes.

    `before` has the bytes of each allocation that the step finds, `category` what each allocation is for, `stream` the CUDA stream it
    was made on, where that is not the one that computes (0). `operators` is what the device is asked for, in order, with `marks` in it.
    `owner` says of what the step finds which stage's and block's parameter, state or buffer it is.
    """

    before: dict[int, int] = field(default_factory=dict)
    events: list[tuple[int, int]] = field(default_factory=list)
    category: list[str] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    stream: dict[int, int] = field(default_factory=dict)
    operators: list[Operator] = field(default_factory=list)
    marks: list[Mark] = field(default_factory=list)
    owner: dict[int, tuple[int, int]] = field(default_factory=dict)

    @cached_property
    def reserved(self) -> int:
        """What CUDA's caching allocator reserves for it, in bytes."""
        return reserved_bytes(*self._allocations())

    def fits(self, limit: float) -> bool:
        """Whether the allocator can do with `limit` bytes, giving back and asking again where it has to."""
        return fits(*self._allocations(), limit)

    def _allocations(self) -> tuple[list[tuple[int, int, int]], list[tuple[int, int, int]]]:
        before = [(self.stream.get(number, 0), number, held) for number, held in sorted(self.before.items())]
        return before, [(self.stream.get(number, 0), number, change) for number, change in self.events]


class Recorder(PretendedMemory):
    """Follows the storages of tensors on the pretended device from the operator that makes them until nothing refers to them."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.default = "other"
        self.lane = "compute"
        self.in_graph = True  # whether what runs outside blocks may be merged with what is around it
        self.follows = False  # whether operators are noted, not only allocations
        self._places: dict[Any, tuple[int, int]] = {}  # of blocks' parameters and buffers
        self._held: dict[int, tuple[int, int]] = {}  # by storage: the allocation and its bytes
        self._watched: dict[int, weakref.ref[Any]] = {}
        self._streams: dict[Any, int] = {torch.cpu.current_stream(): 0}

    @contextmanager
    def sees_resizes(self) -> Iterator[None]:
        """While inside, storages that are emptied or filled are followed too: FSDP gathers parameters into such, use after use."""

        def resize(storage: torch.UntypedStorage, size: int) -> None:
            plain(storage, size)
            if storage._cdata in self._held:
                self._set(storage, "parameters")

        plain = torch.UntypedStorage.resize_
        with replaced(torch.UntypedStorage, "resize_", resize):
            yield

    def made(self, func: Any, args: Any, kwargs: Any, out: Any, call: Call | None, result: Result | None) -> None:
        for x in tree_leaves(out) if result is None else new_outputs(out, result):
            if self.holds(x):
                self._set(x.untyped_storage(), None)
        name, reducing = func._schema.name, self.lane == "reduce_scatter"
        if (said := _SAYS.get(name) or (_SAYS_REDUCING.get(name) if reducing else None)) is not None:
            place, category = said
            self.call(category, tree_leaves(args[place]), only="activations")
        if self.follows and (operator := self._described(func, args, kwargs, out, call, result)) is not None:
            self.note(operator)

    def _described(self, func: Any, args: Any, kwargs: Any, out: Any, call: Call | None, result: Result | None) -> Operator | None:
        """What a call asks of the device, remembered with the call's storages in the place of allocations."""
        if call is None or result is None or func.namespace in ("c10d", "_c10d_functional"):  # which are of one world
            return describe(func, args, kwargs, out, self.number, self.lane)
        storages = list(call.storages)
        storages += [x.untyped_storage()._cdata for x in new_outputs(out, result)]
        if not result.is_described:
            numbers = {storage: number for number, storage in enumerate(storages)}
            result.described = describe(func, args, kwargs, out, lambda x: numbers[x.untyped_storage()._cdata], "compute")
            result.is_described = True
        if result.described is None:
            return None
        held = [self._held.get(storage) for storage in storages]
        reads, writes = (
            tuple((one[0], bytes) for place, bytes in touched if (one := held[place]) is not None)
            for touched in (result.described.reads, result.described.writes)
        )
        return replace(result.described, lane=self.lane, reads=reads, writes=writes)

    def note(self, operator: Operator) -> None:
        """The device is asked for something."""
        if operator.fusible and self.at[0] == "between" and not self.in_graph:  # of what is outside blocks, only some is compiled
            operator = replace(operator, fusible=False)
        self.trace.operators.append(operator)

    def mark(self, kind: str, action: Action | None = None) -> None:
        """Something begins."""
        self.trace.marks.append(Mark(kind, len(self.trace.operators), action, len(self.trace.events)))

    def call(self, category: str, tensors: Any, only: str | None = None) -> None:
        """Says what `tensors` are for, from the time they were made."""
        for x in tensors:
            number = self.number(x.to_local() if isinstance(x, DTensor) else x)
            if number is not None and (only is None or self.trace.category[number] == only):
                self.trace.category[number] = category

    def number(self, x: Any) -> int | None:
        """Which allocation a tensor lies in; None for the host's."""
        held = self._held.get(x.untyped_storage()._cdata) if self.holds(x) else None
        return None if held is None else held[0]

    def own(self, x: Tensor, at: tuple[int, int], tensors: Any) -> None:
        """Says that parameter or buffer `x`, which is stored in `tensors`, is a stage's and block's of the rank."""
        self._places[x] = at
        for stored in tensors:
            if (number := self.number(stored.to_local() if isinstance(stored, DTensor) else stored)) is not None:
                self.trace.owner[number] = at

    def place_of(self, parameter: Any) -> tuple[int, int]:
        """Whose a parameter is: of which stage and block; of no block, -1."""
        return self._places.get(parameter, (0, -1))

    @property
    def at(self) -> tuple[str, int, int]:
        """The phase that is under way, and its stage and block."""
        phase = self.trace.phases[-1] if self.trace.phases else Phase("start", 0)
        return phase.kind, phase.stage, phase.block

    def start(self) -> None:
        """The step begins: what is held now it finds."""
        self.trace.before = dict(self._held.values())
        for _ in range(2):
            self.trace.before[len(self.trace.category)] = WORKSPACE_BYTES
            self.trace.category.append("other")
        self.trace.events.clear()
        self.follows = True

    def stop(self) -> Trace:
        """What was recorded; what happens from now on is not."""
        trace, self.trace = self.trace, replace(self.trace, events=[], operators=[])
        self.follows = False
        return trace

    def enter(self, kind: str, stage: int = 0, block: int = -1) -> None:
        """A phase begins."""
        self.trace.phases.append(Phase(kind, len(self.trace.events), stage, block, len(self.trace.operators)))

    def _set(self, storage: torch.UntypedStorage, category: str | None) -> None:
        """Notes a storage's size. An empty one that grows is a new allocation."""
        key, size = storage._cdata, -(-storage.nbytes() // ROUND) * ROUND
        number, held = self._held.get(key, (-1, 0))
        if number >= 0 and size == held:
            return
        if number < 0 or not held:
            number = len(self.trace.category)
            self.trace.category.append(category or self.default)
            # FSDP's buffers are on CUDA streams of their own, where only the like of them find room.
            if stream := self._streams.setdefault(torch.cpu.current_stream(), len(self._streams)):
                self.trace.stream[number] = stream
        if key not in self._watched:
            self._watched[key] = weakref.ref(storage, partial(self._gone, key))
        self._held[key] = number, size
        self.trace.events.append((number, size - held))

    def _gone(self, key: int, _: Any) -> None:
        del self._watched[key]
        number, size = self._held.pop(key)
        self.trace.events.append((number, -size))
