"""A model with state that no checkpoint would hold, refused before any process is started."""

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from paraxis.base.axes import AXES, Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.layout import place
from paraxis.models.buffers import persistent_buffers


def refuse_unsaved_model(model: nn.Module, degrees: Degrees) -> None:
    """Raises ConfigError for a model (on the meta device) with state that is neither a parameter nor a persistent buffer."""
    kind = type(model).__name__
    if strays := list(_stray_tensors(model)):
        raise ConfigError(
            f"{kind}.{strays[0]} is a plain tensor, which is neither saved nor moved to the device; "
            f"register it: nn.Parameter, register_buffer(name, tensor), or persistent=False for what __init__ computes anew"
        )
    buffers = persistent_buffers(model)
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)} | buffers.keys()
    if extra := sorted(model.state_dict().keys() - known):
        raise ConfigError(
            f"{kind} keeps {extra[0]} in its state_dict, which is neither a parameter nor a buffer, so no checkpoint would hold it; "
            "keep it in a persistent buffer"
        )
    for name, buffer in buffers.items():
        if place(name, tuple(buffer.shape), getattr(model, "layout", {}), degrees, dict.fromkeys(AXES, 0)).splits:
            raise ConfigError(f"the layout table of {kind} splits the buffer {name}, but they are whole on every rank; make it a parameter")
    for name, module in model.named_modules():
        if degrees.ranks > 1 and isinstance(module, nn.modules.batchnorm._BatchNorm):
            raise ConfigError(
                f"{name} normalises over the rows of one rank, so its numbers would differ between layouts; "
                "use a norm over features (LayerNorm, RMSNorm), or train on one rank"
            )


def _stray_tensors(model: nn.Module) -> Iterator[str]:
    """The attributes of modules that are, or directly contain, tensors nobody registered."""
    registered = {id(tensor) for tensor in [*model.parameters(), *model.buffers()]}
    for name, module in model.named_modules():
        for attribute, value in vars(module).items():
            inside: Any = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else (value,)
            if any(isinstance(one, Tensor) and id(one) not in registered for one in inside):
                yield f"{name}.{attribute}" if name else attribute
