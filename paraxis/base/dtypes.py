"""Which dtypes a run computes, reduces and stores in: one word, the same meaning on every layout."""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from paraxis.base.errors import ConfigError

Scaling = Literal["tensorwise", "rowwise", "blockwise", "mxfp8", "nvfp4"]


@dataclass(frozen=True)
class Precision:
    """`compute` is what matrix products see, `reduce` what gradients are summed in, `master` what is stored.

    With `scaling`, the linear layers of blocks cast what they see to eight or four bits and scale it so; all else computes in `compute`.
    """

    name: str
    compute: torch.dtype
    reduce: torch.dtype
    master: torch.dtype
    scaling: Scaling | None = None

    @property
    def products(self) -> str:
        """What the peak of most of its matrix products goes by: fp64, fp32, bf16, float8 or fp4."""
        if self.scaling is not None:
            return "fp4" if self.scaling == "nvfp4" else "float8"
        return {torch.float64: "fp64", torch.float32: "fp32"}.get(self.compute, "bf16")


PRECISIONS = {
    "fp64": Precision("fp64", torch.float64, torch.float64, torch.float64),
    "fp32": Precision("fp32", torch.float32, torch.float32, torch.float32),
    "bf16": Precision("bf16", torch.bfloat16, torch.float32, torch.float32),
    "bf16_weights": Precision("bf16_weights", torch.bfloat16, torch.float32, torch.bfloat16),
    "float8_tensorwise": Precision("float8_tensorwise", torch.bfloat16, torch.float32, torch.float32, "tensorwise"),
    "float8_rowwise": Precision("float8_rowwise", torch.bfloat16, torch.float32, torch.float32, "rowwise"),
    "float8_blockwise": Precision("float8_blockwise", torch.bfloat16, torch.float32, torch.float32, "blockwise"),
    "mxfp8": Precision("mxfp8", torch.bfloat16, torch.float32, torch.float32, "mxfp8"),
    "nvfp4": Precision("nvfp4", torch.bfloat16, torch.float32, torch.float32, "nvfp4"),
}


# Token counts and features that products of this scaling divide into blocks, and kernels take.
MULTIPLES: dict[Scaling, int] = {"tensorwise": 16, "rowwise": 16, "blockwise": 128, "mxfp8": 32, "nvfp4": 32}


@dataclass(frozen=True, kw_only=True)
class Float8Config:
    """Which linear layers are left out of float8, how its partial sums are kept, and what travels."""

    skip: Annotated[
        tuple[str, ...], "linear layers that stay in bf16, by name (* for anything): layers.0.* or *.down_proj; head and routers always do"
    ] = ()
    fast_sums: Annotated[
        Literal["auto", "outputs", "all", "none"],
        "products whose partial sums keep fewer bits, which is faster on Hopper; auto: outputs if tensorwise, all if rowwise",
    ] = "auto"
    gather: Annotated[
        Literal["bf16", "float8"],
        "what weights are gathered in: bf16, and cast where they are used; or float8 (tensorwise alone), cast once a step before that",
    ] = "bf16"


@dataclass(frozen=True)
class LowPrecision:
    """One resolved way to multiply in eight or four bits, as the precision called `name` has it."""

    name: str
    scaling: Scaling
    gradient: torch.dtype  # the format of the gradients of outputs
    fast_output: bool
    fast_gradients: bool
    multiple: int  # tokens, input and output features of a product must be multiples of this
    skip: tuple[str, ...] = ()
    gathered: bool = False  # weights travel in float8


def low_precision(dtypes: Precision, config: Float8Config) -> LowPrecision | None:
    """How a precision's linear layers multiply; None where as everything does. Raises ConfigError for a setting that says nothing."""
    if dtypes.scaling is None:
        said = next((name for name, value in vars(config).items() if value != getattr(Float8Config(), name)), None)
        if said:
            raise ConfigError(f"float8.{said} says nothing while precision={dtypes.name}; choose a float8 precision, or leave it out")
        return None
    usual = {"tensorwise": "outputs", "rowwise": "all"}.get(dtypes.scaling, "none")
    if usual == "none" and config.fast_sums != "auto":
        raise ConfigError(f"float8.fast_sums={config.fast_sums}: products of blocks add up in one way only; leave it out")
    if dtypes.scaling != "tensorwise" and config.gather == "float8":
        raise ConfigError(
            f"float8.gather=float8 sends weights with one scale each, but precision={dtypes.name} has many; "
            "use precision=float8_tensorwise, or leave it out"
        )
    fast = usual if config.fast_sums == "auto" else config.fast_sums
    formats: dict[Scaling, torch.dtype] = {"tensorwise": torch.float8_e5m2, "nvfp4": torch.float4_e2m1fn_x2}
    return LowPrecision(
        name=dtypes.name,
        scaling=dtypes.scaling,
        gradient=formats.get(dtypes.scaling, torch.float8_e4m3fn),
        fast_output=fast != "none",
        fast_gradients=fast == "all",
        multiple=MULTIPLES[dtypes.scaling],
        skip=config.skip,
        gathered=config.gather == "float8",
    )


def precision(name: str) -> Precision:
    """The precision called `name`; raises ConfigError for an unknown one."""
    if name not in PRECISIONS:
        raise ConfigError(f"precision={name!r} is unknown; choose one of {', '.join(PRECISIONS)}")
    return PRECISIONS[name]


def scoring_dtype(name: str) -> torch.dtype:
    """What a command that only scores or samples computes in. Raises ConfigError for what is of use in training alone."""
    found = precision(name)
    if found.scaling is not None:
        raise ConfigError(f"precision={name} is a way to train; what it trains is scored and sampled in bf16, so use bf16, fp32 or fp64")
    return found.compute


def at_least_fp32(x: torch.Tensor) -> torch.Tensor:
    """`x` in fp32, or in fp64 where it already is: `.float()` would round an fp64 run."""
    return x if x.dtype == torch.float64 else x.float()
