"""How a model is spread and executed: the record that a recipe asks for, a planner may return, and training applies."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from paraxis.base.axes import Degrees
from paraxis.base.dtypes import PRECISIONS, Precision
from paraxis.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ways each axis is split, and what FSDP trades memory for."""

    dp: Annotated[int, "replicas that hold all parameters (replicated data parallelism)"] = 1
    fsdp: Annotated[int, "ways that parameters, gradients and optimizer state are sharded; -1 takes what is left"] = 1
    tp: Annotated[int, "tensor-parallel ranks, with sequence parallelism and a vocabulary-parallel loss"] = 1
    reshard: Annotated[
        Literal["auto", "always", "never"],
        "free a block's gathered parameters after its forward (always), or keep them for backward (never); auto frees them when fsdp > 1",
    ] = "auto"
    reduce: Annotated[
        Literal["auto", "micro_batch", "step"],
        "when gradients are summed over ranks: after each micro-batch, or once a step (keeps them whole meanwhile); auto looks at memory",
    ] = "auto"

    def __post_init__(self) -> None:
        _ = self.degrees  # refuses degrees below one

    @property
    def degrees(self) -> Degrees:
        return Degrees(dp=self.dp, fsdp=self.fsdp, tp=self.tp)


@dataclass(frozen=True, kw_only=True)
class RematConfig:
    """Which activations are recomputed in backward instead of kept (activation checkpointing)."""

    mode: Annotated[
        Literal["none", "selective", "full"],
        "none keeps all; selective keeps matrix products and attention, and recomputes what is cheap; full keeps only block inputs",
    ] = "none"
    every: Annotated[int, "apply it to every n-th block"] = 1

    def __post_init__(self) -> None:
        if self.every < 1:
            raise ConfigError(f"remat.every={self.every} must be 1 or more; 2 means every second block")


CompileMode = Literal["auto", "none", "inductor", "aot_eager"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One resolved way to run: degrees settled, precision looked up, compile chosen (no `auto` left in `compile`)."""

    degrees: Degrees
    precision: Precision = field(default_factory=lambda: PRECISIONS["bf16"])
    remat: RematConfig = field(default_factory=RematConfig)
    compile: CompileMode = "none"
    reshard: bool = True
    reduce_each_micro_batch: bool = False
