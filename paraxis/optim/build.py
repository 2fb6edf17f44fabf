"""AdamW and SGD on this rank's stored parts, in one fused kernel call a group, with a step that can be skipped on the device.

The kernels are the ones behind `torch.optim.AdamW(fused=True)` and `torch.optim.SGD(fused=True)`; they exist for CPU and
CUDA and for every floating dtype. They are called directly, and only here, because the state then belongs to us: named,
complete from the first step on, and with one update count for all parameters. tests/optim holds them to `torch.optim`.
They take no scale for gradients, so clipping costs another pass over these; where `ops/adamw.py` can do all in one pass, it does. What
is stored in bf16 is always stepped there: rounded to nearest, it would lose most updates.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paraxis.base.device import Device
from paraxis.base.layout import Box
from paraxis.ops.adamw import has_kernel, step_adamw
from paraxis.ops.rounding import Place, place_of
from paraxis.optim.config import OptimConfig
from paraxis.optim.groups import group_names


@dataclass(frozen=True)
class _Group:
    """The parameters of one call (same rule, same weight decay, same dtype, none empty) and their state, in the same order."""

    rule: str  # of `_UPDATE`
    weight_decay: float
    parameters: list[Tensor]
    state: dict[str, list[Tensor]]
    places: list[Place]

    @property
    def grads(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        assert len(grads) == len(self.parameters), "every stored parameter has a gradient before the optimizer steps"
        return grads

    def scaled_grads(self, scale: Tensor | None) -> list[Tensor]:
        """The gradients, after they have been multiplied by `scale`."""
        if scale is not None:
            scale_gradients(self.grads, scale)
        return self.grads


class Optimizer:
    """Steps every parameter by the rule that `config.name` names, and holds all that must be remembered between steps."""

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        places: Mapping[str, Place],
        groups: Mapping[str, Sequence[str]],
        config: OptimConfig,
        device: Device,
    ) -> None:
        self._config = config
        # How many updates were applied. It lives on the device so that skipping needs no host; fp32, which the kernels
        # read, counts exactly to 2**24.
        self._updates = torch.zeros((), dtype=torch.float32, device=device.torch)
        self._state = {
            state: {
                name: torch.zeros_like(parameter, requires_grad=False, dtype=state_dtype(config, parameter.dtype))
                for name, parameter in parameters.items()
            }
            for state in state_names(config)
        }
        self._groups: list[_Group] = []
        for group, names in groups.items():
            # A rank may store nothing of a small parameter: that one stays in the state, but no kernel sees it.
            stored = [name for name in names if name in parameters and parameters[name].numel()]
            alike: dict[tuple[str, torch.dtype], list[str]] = {}
            for name in stored:
                alike.setdefault((_rule(parameters[name], config, device), parameters[name].dtype), []).append(name)
            weight_decay = config.weight_decay if group == "decay" else 0.0
            for (rule, _), members in alike.items():
                state = {name: [tensors[member] for member in members] for name, tensors in self._state.items()}
                own: list[Tensor] = [parameters[name] for name in members]
                self._groups.append(_Group(rule, weight_decay, own, state, [places[name] for name in members]))

    @torch.no_grad()
    def step(self, lr: float, found_inf: Tensor | None = None, scale: Tensor | None = None) -> None:
        """Updates the parameters from their `.grad`, multiplied by `scale`, at learning rate `lr`.

        `found_inf` is a float32 scalar on the parameters' device: where it is 1, parameters, state and update count stay
        bitwise as they are; where it is 0 the step is taken. The host never waits to learn which it was.
        `scale` is a scalar there too, of any floating dtype. Afterwards gradients are scaled where no kernel of ours read them.
        """
        self._updates += 1
        for group in self._groups:
            _UPDATE[group.rule](group, self._config, lr, self._updates, found_inf, scale)
        if found_inf is not None:
            self._updates -= found_inf

    def state(self) -> dict[str, dict[str, Tensor]]:
        """State name -> parameter name -> the tensor itself, in the parameter's local shape. To load, copy into them."""
        return self._state

    def counters(self) -> dict[str, float]:
        """{"updates": n}: the updates applied so far, skipped steps left out; the same on every rank. Waits for the device."""
        return {"updates": self._updates.item()}

    def load_counters(self, counters: Mapping[str, float]) -> None:
        """Restores what `counters` returned."""
        self._updates.fill_(counters["updates"])


def state_names(config: OptimConfig) -> tuple[str, ...]:
    """What the optimizer keeps of each parameter, in its shape."""
    if config.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum else ()


def state_dtype(config: OptimConfig, stored: torch.dtype) -> torch.dtype:
    """What that is kept in, for a parameter that is stored in `stored`."""
    return torch.bfloat16 if config.state == "bf16" else stored


def state_bytes(config: OptimConfig, stored: torch.dtype) -> int:
    """Bytes of all of that for one entry of a parameter."""
    return len(state_names(config)) * state_dtype(config, stored).itemsize


def scale_gradients(gradients: Sequence[Tensor], scale: Tensor) -> None:
    """Multiplies gradients (at least one, of one dtype) in place by a scalar tensor, taken in their dtype. No host synchronisation."""
    torch._foreach_mul_(list(gradients), scale.to(gradients[0].dtype))


def _adamw(group: _Group, config: OptimConfig, lr: float, updates: Tensor, found_inf: Tensor | None, scale: Tensor | None) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2); g is the gradient times `scale`, n counts this update too:

    p         -= lr * weight_decay * p
    exp_avg    = b1 * exp_avg    + (1 - b1) * g
    exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * g * g
    p         -= lr * (exp_avg / (1 - b1**n)) / (sqrt(exp_avg_sq / (1 - b2**n)) + eps)
    """
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        group.parameters,
        group.scaled_grads(scale),
        group.state["exp_avg"],
        group.state["exp_avg_sq"],
        [],  # no running maximum (AMSGrad)
        [updates] * len(group.parameters),  # only read
        lr=lr,
        beta1=config.betas[0],
        beta2=config.betas[1],
        weight_decay=group.weight_decay,
        eps=config.eps,
        amsgrad=False,
        maximize=False,
        found_inf=found_inf,
    )


def _adamw_at_once(group: _Group, config: OptimConfig, lr: float, updates: Tensor, found_inf: Tensor | None, scale: Tensor | None) -> None:
    """`_adamw`, reading gradients once and not writing them; what is stored in bf16 is rounded stochastically."""
    means, mean_squares = group.state["exp_avg"], group.state["exp_avg_sq"]
    places = [number for place in group.places for number in place]
    constants = (lr, *config.betas, config.eps, group.weight_decay)
    kernel = group.rule == BY_KERNEL
    step_adamw(group.parameters, group.grads, means, mean_squares, places, kernel, updates, scale, found_inf, *constants)


def _sgd(group: _Group, config: OptimConfig, lr: float, updates: Tensor, found_inf: Tensor | None, scale: Tensor | None) -> None:
    """Stochastic gradient descent; g is the gradient times `scale`:

    g              += weight_decay * p
    momentum_buffer = momentum * momentum_buffer + g
    p              -= lr * momentum_buffer
    """
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        group.parameters,
        group.scaled_grads(scale),
        group.state.get("momentum_buffer", []),
        weight_decay=group.weight_decay,
        momentum=config.momentum,
        lr=lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,  # the buffer starts at zero, which gives the same first step
        found_inf=found_inf,
    )


BY_KERNEL, BY_OPERATORS = "adamw at once, by a kernel", "adamw at once, by operators"
_UPDATE = {"adamw": _adamw, BY_KERNEL: _adamw_at_once, BY_OPERATORS: _adamw_at_once, "sgd": _sgd}


def _rule(parameter: Tensor, config: OptimConfig, device: Device) -> str:
    """Which of `_UPDATE` steps a parameter."""
    if config.name == "adamw" and has_kernel(parameter, device):
        return BY_KERNEL
    return BY_OPERATORS if config.name == "adamw" and state_dtype(config, parameter.dtype) == torch.bfloat16 else config.name


def build_optimizer(
    parameters: Mapping[str, nn.Parameter],
    global_shapes: Mapping[str, Sequence[int]],
    boxes: Mapping[str, Box],
    config: OptimConfig,
    device: Device,
    seed: int,
) -> Optimizer:
    """The optimizer that `config` names, over the parts in `parameters` (name -> plain local tensor, possibly empty).

    `global_shapes` has the uncut shape of every parameter of the model, so that groups do not depend on the layout; `boxes` says which part
    of it each of `parameters` is, so that stochastic rounding, of which `seed` decides, does not either.
    Raises ConfigError when a pattern of `optim.no_decay` matches no parameter.
    """
    places = {name: place_of(name, global_shapes[name], box, seed) for name, box in boxes.items() if box.numel}
    return Optimizer(parameters, places, group_names(global_shapes, config), config, device)
