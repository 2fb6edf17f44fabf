"""The configuration of the optimizer, its learning-rate curve and its parameter groups."""

from dataclasses import dataclass, fields
from typing import Annotated, Literal

from paraxis.base.errors import ConfigError

# Norm gains and biases have no direction to shrink along, and the rows of an embedding that a batch does not use would shrink unseen.
NO_DECAY = ("*norm*", "*.bias", "*embed*")

# A setting that only some choices read: setting -> (the field that chooses, the choices that read it).
_READ_BY = {
    "betas": ("name", ("adamw",)),
    "eps": ("name", ("adamw",)),
    "state": ("name", ("adamw",)),
    "momentum": ("name", ("sgd",)),
    "decay": ("schedule", ("wsd",)),
    "final": ("schedule", ("linear", "cosine", "wsd")),
}


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimizer, its learning rate over time, and which parameters decay."""

    name: Annotated[Literal["adamw", "sgd"], "adamw (decoupled weight decay) or sgd (weight decay added to the gradient)"] = "adamw"
    lr: Annotated[float, "peak learning rate"] = 3e-4
    warmup: Annotated[int, "steps over which the learning rate rises to its peak"] = 100
    schedule: Annotated[Literal["constant", "linear", "cosine", "wsd"], "the curve after warm-up; wsd: stable, then linear decay"] = (
        "cosine"
    )
    decay: Annotated[float, "wsd: the fraction of all steps, at the end, over which the learning rate decays"] = 0.1
    final: Annotated[float, "linear, cosine, wsd: the learning rate at the end, as a fraction of the peak"] = 0.1
    betas: Annotated[tuple[float, ...], "adamw: decay rates of the running means of the gradient and of its square"] = (0.9, 0.95)
    eps: Annotated[float, "adamw: added to the root of the mean square, against division by zero"] = 1e-8
    state: Annotated[Literal["as_weights", "bf16"], "adamw: what both running means are stored in; bf16 is rounded stochastically"] = (
        "as_weights"
    )
    momentum: Annotated[float, "sgd: decay rate of the running sum of gradients; 0 keeps none"] = 0.0
    weight_decay: Annotated[float, "weight decay of the parameters that decay"] = 0.1
    no_decay: Annotated[tuple[str, ...], "name patterns (`*` crosses dots) of parameters that do not decay"] = NO_DECAY
    decay_vectors: Annotated[bool, "let parameters of fewer than two dimensions decay too"] = False
    clip_norm: Annotated[float, "scale gradients down to this global norm where theirs is larger; 0 means never"] = 1.0

    def __post_init__(self) -> None:
        for name, low, high in (
            ("lr", 0.0, 1e3),
            ("warmup", 0, 10**12),
            ("decay", 0.0, 1.0),
            ("final", 0.0, 1.0),
            ("eps", 0.0, 1.0),
            ("weight_decay", 0.0, 1e3),
            ("clip_norm", 0.0, float("inf")),
        ):
            if not low <= getattr(self, name) <= high:  # refuses NaN too
                raise ConfigError(f"optim.{name}={getattr(self, name)} must be from {low:g} to {high:g}")
        if not 0 <= self.momentum < 1:
            raise ConfigError(f"optim.momentum={self.momentum} must be at least 0 and below 1, such as 0.9")
        if len(self.betas) != 2 or not all(0 <= beta < 1 for beta in self.betas):
            raise ConfigError(f"optim.betas={self.betas} must be two numbers, each at least 0 and below 1, such as (0.9, 0.95)")
        self._refuse_unread()

    def _refuse_unread(self) -> None:
        """Refuses a setting that was changed but that nothing would read."""
        defaults = {field.name: field.default for field in fields(self)}
        for setting, (chooser, readers) in _READ_BY.items():
            choice, value, default = getattr(self, chooser), getattr(self, setting), defaults[setting]
            if choice not in readers and value != default:
                raise ConfigError(
                    f"optim.{setting}={value} is read by optim.{chooser}={' and '.join(readers)} only, but it is {choice}; "
                    f"leave optim.{setting} at {default}, or choose another {chooser}"
                )
