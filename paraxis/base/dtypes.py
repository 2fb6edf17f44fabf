"""Which dtypes a run computes, reduces and stores in: one word, the same meaning on every layout."""

from dataclasses import dataclass

import torch

from paraxis.base.errors import ConfigError


@dataclass(frozen=True)
class Precision:
    """`compute` is what matrix products see, `reduce` what gradients are summed in, `master` what is stored."""

    name: str
    compute: torch.dtype
    reduce: torch.dtype
    master: torch.dtype


PRECISIONS = {
    "fp64": Precision("fp64", torch.float64, torch.float64, torch.float64),
    "fp32": Precision("fp32", torch.float32, torch.float32, torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, torch.float32, torch.float32),
}


def precision(name: str) -> Precision:
    """The precision called `name`; raises ConfigError for an unknown one."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision={name!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or in fp64 where it already is: `.float()` would round an fp64 run."""
    return x if x.dtype == torch.float64 else x.float()
