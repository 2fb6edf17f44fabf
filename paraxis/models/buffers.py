"""First values of a model's buffers: what its own `__init__` gives them, found without the memory of its parameters.

A model is built on the meta device, where tensors have no values. Parameters get theirs from init.py; buffers can hold anything
(statistics, frequencies, masks), so the model is built once more with only its parameters left out.
"""

from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_parameter_registration_hook

from paraxis.base.errors import ConfigError
from paraxis.base.seams import routed_layers


def buffer_names(model: nn.Module) -> set[str]:
    """The buffers that have first values: all but a router's tally, which every step begins by zeroing."""
    tallies = {f"{name}.tally_s" for name in routed_layers(model)}
    return {name for name, _ in model.named_buffers(remove_duplicate=False)} - tallies


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that torch saves with a model: all that were not registered with `persistent=False`."""
    saved = model.state_dict().keys()
    return {name: buffer for name, buffer in model.named_buffers(remove_duplicate=False) if name in saved}


def first_buffers(build: Callable[[], nn.Module], seed: int) -> dict[str, Tensor]:
    """Every buffer of the model that `build` makes, by name, on CPU; what it draws at random is drawn from `seed`.

    Raises ConfigError for one that is computed from a parameter, which has no values yet.
    """
    hook = register_module_parameter_registration_hook(cast(Any, _without_memory))  # its annotation forgets that it may return one
    state = torch.get_rng_state()
    try:
        torch.default_generator.manual_seed(seed)
        model = build()
    finally:
        torch.set_rng_state(state)
        hook.remove()
    buffers = dict(model.named_buffers(remove_duplicate=False))
    if empty := [name for name, buffer in buffers.items() if buffer.is_meta]:
        raise ConfigError(
            f"buffer {empty[0]} of {type(model).__name__} is computed from a parameter, but parameters get their values later; "
            "compute it in forward, or from settings"
        )
    return buffers


def fill_buffers(model: nn.Module, first: dict[str, Tensor]) -> None:
    """Gives the buffers of a model, or of a stage of it, their first values, cast once to the dtype they have there."""
    with torch.no_grad():
        for name, buffer in model.named_buffers(remove_duplicate=False):
            if name in first:
                buffer.copy_(first[name])


def _without_memory(module: nn.Module, name: str, parameter: nn.Parameter | None) -> nn.Parameter | None:
    """The same parameter on the meta device; None (no change) where it is there already."""
    if parameter is None or parameter.is_meta:
        return None
    return nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=parameter.requires_grad)
