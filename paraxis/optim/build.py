"""AdamW and SGD on this rank's stored parts, in one fused kernel call a group, with a step that can be skipped on the device.

The kernels are the ones behind `torch.optim.AdamW(fused=True)` and `torch.optim.SGD(fused=True)`; they exist for CPU and
CUDA and for every floating dtype. They are called directly, and only here, because the state then belongs to us: named,
complete from the first step on, and with one update count for all parameters. tests/optim holds them to `torch.optim`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paraxis.base.device import Device
from paraxis.optim.config import OptimConfig
from paraxis.optim.groups import group_names


@dataclass(frozen=True)
class _Group:
    """The parameters of one kernel call (same weight decay, same dtype, none empty) and their state, in the same order."""

    weight_decay: float
    parameters: list[Tensor]
    state: dict[str, list[Tensor]]

    @property
    def grads(self) -> list[Tensor]:
        grads = [parameter.grad for parameter in self.parameters if parameter.grad is not None]
        assert len(grads) == len(self.parameters), "every stored parameter has a gradient before the optimizer steps"
        return grads


class Optimizer:
    """Steps every parameter by the rule that `config.name` names, and holds all that must be remembered between steps."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], groups: Mapping[str, Sequence[str]], config: OptimConfig, device: Device
    ) -> None:
        self._config = config
        # How many updates were applied. It lives on the device so that skipping needs no host; fp32, which the kernels
        # read, counts exactly to 2**24.
        self._updates = torch.zeros((), dtype=torch.float32, device=device.torch)
        self._state = {
            state: {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in parameters.items()}
            for state in state_names(config)
        }
        self._groups: list[_Group] = []
        for group, names in groups.items():
            for dtype in dict.fromkeys(parameter.dtype for parameter in parameters.values()):
                # A rank may store nothing of a small parameter: that one stays in the state, but no kernel sees it.
                stored = [name for name in names if name in parameters and parameters[name].numel() and parameters[name].dtype == dtype]
                state = {name: [tensors[parameter] for parameter in stored] for name, tensors in self._state.items()}
                weight_decay = config.weight_decay if group == "decay" else 0.0
                self._groups.append(_Group(weight_decay, [parameters[name] for name in stored], state))

    @torch.no_grad()
    def step(self, lr: float, found_inf: Tensor | None = None) -> None:
        """Updates the parameters from their `.grad`, at learning rate `lr`.

        `found_inf` is a float32 scalar on the parameters' device: where it is 1, parameters, state and update count stay
        bitwise as they are; where it is 0 the step is taken. The host never waits to learn which it was.
        """
        self._updates += 1
        for group in self._groups:
            if group.parameters:
                _UPDATE[self._config.name](group, self._config, lr, self._updates, found_inf)
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
    """What the optimizer keeps of each parameter, in its shape and dtype."""
    if config.name == "adamw":
        return ("exp_avg", "exp_avg_sq")
    return ("momentum_buffer",) if config.momentum else ()


def _adamw(group: _Group, config: OptimConfig, lr: float, updates: Tensor, found_inf: Tensor | None) -> None:
    """AdamW (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2); g is the gradient, n counts this update too:

    p         -= lr * weight_decay * p
    exp_avg    = b1 * exp_avg    + (1 - b1) * g
    exp_avg_sq = b2 * exp_avg_sq + (1 - b2) * g * g
    p         -= lr * (exp_avg / (1 - b1**n)) / (sqrt(exp_avg_sq / (1 - b2**n)) + eps)
    """
    torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
        group.parameters,
        group.grads,
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


def _sgd(group: _Group, config: OptimConfig, lr: float, updates: Tensor, found_inf: Tensor | None) -> None:
    """Stochastic gradient descent; g is the gradient:

    g              += weight_decay * p
    momentum_buffer = momentum * momentum_buffer + g
    p              -= lr * momentum_buffer
    """
    torch._fused_sgd_(  # pyright: ignore[reportPrivateImportUsage]
        group.parameters,
        group.grads,
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


_UPDATE = {"adamw": _adamw, "sgd": _sgd}


def build_optimizer(
    parameters: Mapping[str, nn.Parameter], global_shapes: Mapping[str, Sequence[int]], config: OptimConfig, device: Device
) -> Optimizer:
    """The optimizer that `config` names, over the parts in `parameters` (name -> plain local tensor, possibly empty).

    `global_shapes` has the uncut shape of every parameter of the model, so that groups do not depend on the layout.
    Raises ConfigError when a pattern of `optim.no_decay` matches no parameter.
    """
    return Optimizer(parameters, group_names(global_shapes, config), config, device)
