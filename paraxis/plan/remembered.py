"""What operators return for given shapes, remembered: a fake tensor made again costs a tenth of what finding out its shape does.

torch's own memory of this kind makes keys that know about symbolic shapes, which nothing here has.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

MOST = 30_000  # calls that are remembered before all are forgotten
SIMPLE = (int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format)


@dataclass
class Call:
    """The key of a call, its tensors in order, and their storages, each once."""

    key: tuple[Any, ...] = ()
    tensors: list[FakeTensor] = field(default_factory=list)
    storages: dict[int, int] = field(default_factory=dict)  # by address: which one of the call's


@dataclass(frozen=True)
class Output:
    """One output: `argument` says which of the call's tensors it is, or (`view`) whose storage it has; without, it is new."""

    shape: tuple[int, ...] = ()
    stride: tuple[int, ...] = ()
    offset: int = 0
    dtype: torch.dtype = torch.float32
    device: torch.device | None = None
    argument: int = -1
    view: bool = False
    constant: Any = None

    @property
    def new(self) -> bool:
        return self.device is not None and self.argument < 0


@dataclass
class Result:
    """What a call returns, and in what; `described` is what it asks of the device, with storages for allocations, once that is known."""

    outputs: tuple[Output, ...]
    container: type | None
    described: Any = None
    is_described: bool = False


_KNOWN: dict[tuple[Any, ...], Result] = {}


def call_of(fake: FakeTensorMode, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Call | None:
    """The call, where it is made of tensors of `fake` and plain values alone."""
    call = Call()
    parts: list[Any] = [func]
    if not _add(fake, call, parts, args):
        return None
    for name, value in kwargs.items():
        parts.append(name)
        if not _add(fake, call, parts, (value,)):
            return None
    call.key = tuple(parts)
    return call


def _add(fake: FakeTensorMode, call: Call, parts: list[Any], values: Sequence[Any]) -> bool:
    for x in values:
        kind = type(x)
        if kind in SIMPLE:
            parts.append((kind, x))
        elif isinstance(x, FakeTensor):
            if x.fake_mode is not fake or x.constant is not None or x.dtype.is_complex:
                return False
            storage = x.untyped_storage()
            number = call.storages.setdefault(storage._cdata, len(call.storages))
            parts.append((x.shape, x.stride(), x.storage_offset(), x.dtype, x.fake_device, number, storage.nbytes()))
            call.tensors.append(x)
        elif kind in (list, tuple):
            parts.append((kind, len(x)))
            if not _add(fake, call, parts, x):
                return False
        else:
            return False
    return True


def known(call: Call) -> Result | None:
    return _KNOWN.get(call.key)


def remember(fake: FakeTensorMode, call: Call, func: Any, args: Sequence[Any], kwargs: dict[str, Any], out: Any) -> Result | None:
    """What `out` is, for the next such call; None where that cannot be said, as of calls that change the shapes that they are given."""
    outputs = _outputs(call, out)
    after = call_of(fake, func, args, kwargs)
    if outputs is None or after is None or after.key != call.key:
        return None
    if len(_KNOWN) >= MOST:
        _KNOWN.clear()
    found = _KNOWN[call.key] = Result(tuple(outputs), type(out) if isinstance(out, list | tuple) else None)
    return found


def _outputs(call: Call, out: Any) -> list[Output] | None:
    found: list[Output] = []
    tensors = 0
    for x in out if isinstance(out, list | tuple) else (out,):
        if isinstance(x, FakeTensor):
            described = _output(call, x)
            if described is None:
                return None
            found.append(described)
            tensors += 1
        elif type(x) in SIMPLE:
            found.append(Output(constant=x))
        else:
            return None
    return found if tensors or out is None else None


def _output(call: Call, x: FakeTensor) -> Output | None:
    for number, given in enumerate(call.tensors):
        if given is x:
            return Output(device=x.fake_device, argument=number)
    if x.constant is not None or x.dtype.is_complex or x.requires_grad:
        return None
    own = x.untyped_storage()
    argument = next((n for n, given in enumerate(call.tensors) if given.untyped_storage()._cdata == own._cdata), -1)
    if argument < 0:
        plain = torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="meta")
        if x.storage_offset() or plain.untyped_storage().nbytes() != own.nbytes():
            return None
    return Output(x.shape, x.stride(), int(x.storage_offset()), x.dtype, x.fake_device, argument, argument >= 0)


def made_again(fake: FakeTensorMode, call: Call, result: Result) -> Any:
    """The outputs of a call like one that was made before."""
    made = [_made(fake, call, output) for output in result.outputs]
    return made[0] if result.container is None else result.container(made)


def _made(fake: FakeTensorMode, call: Call, output: Output) -> Any:
    if output.device is None:
        return output.constant
    if output.argument < 0:
        return FakeTensor(fake, torch.empty_strided(output.shape, output.stride, dtype=output.dtype, device="meta"), output.device)
    given = call.tensors[output.argument]
    if not output.view:
        return given
    meta = torch.empty(0, dtype=output.dtype, device="meta")
    meta.set_(given.untyped_storage(), output.offset, output.shape, output.stride)
    return FakeTensor(fake, meta, output.device)


def new_outputs(out: Any, result: Result) -> list[Any]:
    """The outputs with storage of their own."""
    outputs = (out,) if result.container is None else out
    return [x for x, output in zip(outputs, result.outputs, strict=True) if output.new]
