"""Blocks that cannot be compiled in one piece, cut as a compiler cuts them that has to leave some of their calls alone.

A first run of a block is taped: every operator that Python asks for, in order, with the frames from which it was asked. Dynamo compiles a
frame (the run of a function) up to a call that it must leave alone, and from there on; a frame that has such a call somewhere below it is
compiled by itself. So a piece is what one frame asks for between two such calls, with all frames below that have none. Then AOTAutograd
takes each piece as it takes a whole block.
"""

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import wraps
from itertools import groupby
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from paraxis.base.replaced import replaced

Values = dict[int, Any]  # by slot


@dataclass(frozen=True)
class Slot:
    """Where a value stands that a block is given, or makes while it runs."""

    number: int


@dataclass(frozen=True, eq=False)
class Entry:
    """One call, with slots in the place of values; `frames` from the block's own inwards. `opaque`: a compiler leaves it alone."""

    call: Callable[..., Any]
    given: Any
    result: Any
    frames: tuple[FrameType, ...]
    opaque: bool

    def run(self, values: Values) -> None:
        """Calls again, on what is in the slots now."""
        args, kwargs = _filled(self.given, values)
        for leaf, value in zip(tree_leaves(self.result), tree_leaves(self.call(*args, **kwargs)), strict=True):
            if isinstance(leaf, Slot):
                values[leaf.number] = value


def _slots(tree: Any) -> set[int]:
    return {leaf.number for leaf in tree_leaves(tree) if isinstance(leaf, Slot)}


def _filled(tree: Any, values: Values) -> Any:
    return tree_map(lambda leaf: values[leaf.number] if isinstance(leaf, Slot) else leaf, tree)


@dataclass
class Tape:
    """What a block asked for. Values are held, so that none has the identity of one that is gone."""

    entries: list[Entry] = field(default_factory=list)
    values: list[Any] = field(default_factory=list)
    _numbers: dict[int, int] = field(default_factory=dict)
    _above: FrameType | None = None

    def slot(self, value: Any) -> Slot:
        """That of a tensor, or of another object that a block is given."""
        if id(value) not in self._numbers:
            self._numbers[id(value)] = len(self.values)
            self.values.append(value)
        return Slot(self._numbers[id(value)])

    def known(self, tree: Any) -> Any:
        """With slots in the place of tensors, and of objects that have one."""
        return tree_map(lambda x: self.slot(x) if isinstance(x, Tensor) or id(x) in self._numbers else x, tree)

    def add(self, call: Callable[..., Any], given: Any, out: Any, *, opaque: bool = False) -> None:
        """A call that has been made. One that leaves no tensor is no step: what it said holds for every run."""
        if any(isinstance(leaf, Tensor) for leaf in tree_leaves(out)):
            self.entries.append(Entry(call, self.known(given), self.known(out), self._frames(), opaque))

    def forget(self) -> None:
        """Lets go of all of it: frames hold what they have made, and this."""
        self.entries.clear()
        self.values.clear()

    def _frames(self) -> tuple[FrameType, ...]:
        found, frame = list[FrameType](), sys._getframe(2)
        while frame is not None and frame is not self._above:
            found.append(frame)
            frame = frame.f_back  # type: ignore[assignment]
        return tuple(reversed(found))

    @contextmanager
    def running(self) -> Iterator[None]:
        """While inside, every call is taped."""
        self._above = sys._getframe(2)  # whoever runs the block
        with replaced(_now, "taping", self), replaced(torch.autograd.Function, "apply", classmethod(_applied)), _Mode(self):
            yield


class _Now:
    taping: Tape | None = None


_now = _Now()
_apply: Any = torch.autograd.Function.apply.__func__  # type: ignore[attr-defined]


class _Mode(TorchFunctionMode):
    def __init__(self, tape: Tape) -> None:
        super().__init__()
        self.tape = tape

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.tape.add(func, (args, kwargs or {}), out)
        return out


def _applied(cls: Any, *args: Any) -> Any:
    """An autograd function is one call, whatever it asks for itself."""
    return _as_one(lambda *given: _apply(cls, *given), args, {}, opaque=False)


def left_alone(function: Callable[..., Any]) -> Callable[..., Any]:
    """Stands in for torch.compiler.disable."""

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        return _as_one(function, args, kwargs, opaque=True)

    return call


def _as_one(call: Callable[..., Any], args: Any, kwargs: Any, *, opaque: bool) -> Any:
    tape = _now.taping
    if tape is None:
        return call(*args, **kwargs)
    with replaced(_now, "taping", None), torch._C.DisableTorchFunction():
        out = call(*args, **kwargs)
    tape.add(call, (args, kwargs), out, opaque=opaque)
    return out


Function = Callable[[list[Any]], list[Any]]


@dataclass(frozen=True)
class Pieces:
    """A block as steps from slots to slots: functions, and calls that are left alone (None). After each, what nobody needs any more is
    let go of."""

    steps: Sequence[tuple[Function | Entry, Sequence[int], Sequence[int], Sequence[int]]]  # ..., reads, makes, is done with
    given: Sequence[int]
    constants: Values
    result: Any

    def __call__(self, given: Sequence[Any]) -> Any:
        values = self.constants | dict(zip(self.given, given, strict=True))
        for step, reads, makes, done in self.steps:
            if isinstance(step, Entry):
                step.run(values)
            else:
                values |= zip(makes, step([values[number] for number in reads]), strict=True)
            for number in done:
                del values[number]
        return _filled(self.result, values)


def cut(tape: Tape, given: Sequence[int], result: Any, compiled: Callable[[Function, list[Any]], Function]) -> Pieces:
    """The pieces of a taped block that was given those slots and came to `result`.

    `compiled` makes a piece of a function, which ran on these values.
    """
    outcome, groups = tape.known(result), _groups(tape.entries)
    reads = [_slots([entry.given for entry in group]) for group in groups]
    makes = [_slots([entry.result for entry in group]) for group in groups]
    constants = set[int]().union(*reads) - set(given).union(*makes)
    there, steps = {*given, *constants}, list[Any]()
    for number, group in enumerate(groups):
        takes, later = sorted(reads[number] & there), _slots(outcome).union(*reads[number + 1 :])
        leaves = sorted(makes[number] & later)
        entries = [replace(entry, frames=()) for entry in group]
        step = entries[0] if group[0].opaque else compiled(_function(entries, takes, leaves), [tape.values[slot] for slot in takes])
        made = makes[number] if group[0].opaque else set(leaves)
        done = (there | made) - later
        there = (there | made) & later
        steps.append((step, takes, leaves, sorted(done)))
    return Pieces(steps, given, {slot: tape.values[slot] for slot in constants}, outcome)


def _function(entries: Sequence[Entry], takes: Sequence[int], leaves: Sequence[int]) -> Function:
    def run(given: list[Any]) -> list[Any]:
        values = dict(zip(takes, given, strict=True))
        for entry in entries:
            entry.run(values)
        return [values[slot] for slot in leaves]

    return run


def _groups(entries: Sequence[Entry]) -> list[list[Entry]]:
    """Entries that one compiled piece makes, and each opaque one by itself."""
    broken = {id(frame) for entry in entries if entry.opaque for frame in entry.frames}
    passed, keys = 0, list[Any]()
    for entry in entries:
        passed += entry.opaque
        deepest = next((id(frame) for frame in reversed(entry.frames) if id(frame) in broken), 0)
        keys.append((passed, entry.opaque, deepest))
    paired = groupby(zip(keys, entries, strict=True), key=lambda pair: pair[0])
    return [[entry for _, entry in group] for _, group in paired]
