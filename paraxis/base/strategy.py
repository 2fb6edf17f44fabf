"""How a model is spread and executed: the record that a recipe asks for, a planner may return, and training applies."""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from paraxis.base.axes import DEGREES, Degrees
from paraxis.base.dtypes import PRECISIONS, LowPrecision, Precision
from paraxis.base.errors import ConfigError
from paraxis.base.layout import IDLE

ContextKind = Literal["auto", "ring", "ulysses", "usp", "allgather"]

# Large enough for matrix products at full speed, small enough that 128k logits of so many tokens are half a GiB in bf16.
LOSS_TOKENS = 2048


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    """How many ways each axis is split, how pipelines and split sequences work, and what FSDP trades memory for."""

    dp: Annotated[int, "replicas that hold all parameters (replicated data parallelism)"] = 1
    fsdp: Annotated[int, "ways that parameters, gradients and optimizer state are sharded; -1 takes what is left"] = 1
    tp: Annotated[int, "tensor-parallel ranks, with a vocabulary-parallel loss"] = 1
    pp: Annotated[int, "pipeline ranks, each with some of the layers"] = 1
    cp: Annotated[int, "context-parallel ranks, each with some positions of every row"] = 1
    ep: Annotated[int, "ways that experts are shared out among the fsdp x cp ranks, which it divides"] = 1
    schedule: Annotated[
        str, "pipeline schedule: gpipe, 1f1b, interleaved, bfs, zbh1, zbv, dualpipev, or a CSV file of actions; auto takes 1f1b"
    ] = "auto"
    microbatches: Annotated[
        int, "micro-batches of a step; 0: as many as train.global_tokens asks for, and where that is 0 too, one (with pp: 2 x pp)"
    ] = 0
    stages_a_rank: Annotated[int, "pipeline stages of each rank; 0: 2 for interleaved, bfs, zbv and dualpipev, 1 for the others"] = 0
    cuts: Annotated[tuple[int, ...], "layers of each pipeline stage, in order; empty: cut by cost, the head counted"] = ()
    cp_kind: Annotated[
        ContextKind,
        "how attention crosses cp: ring, ulysses (all-to-all over heads), usp (both), allgather; auto: ulysses where heads divide",
    ] = "auto"
    cp_ulysses: Annotated[int, "with usp: how many neighbours exchange heads (divides cp); the ring goes across them"] = 0
    sequence_parallel: Annotated[
        bool, "with tp: activations outside attention and feed-forward are cut along the sequence; false keeps all on every rank"
    ] = True
    async_tp: Annotated[bool, "with tp: activations travel between ranks while others of them are being multiplied"] = False
    reshard: Annotated[
        Literal["auto", "always", "never"],
        "free a block's gathered parameters after its forward (always), or keep them for backward (never); auto frees them when "
        "fsdp x cp > 1, except in a pipeline whose stages fit, where they are gathered once a step",
    ] = "auto"
    reduce: Annotated[
        Literal["auto", "micro_batch", "step"],
        "when gradients are summed over ranks: after each micro-batch, or once a step (keeps them whole meanwhile); auto looks at memory",
    ] = "auto"
    travel: Annotated[
        Literal["auto", "computed", "reduced"],
        "how gradients travel between fsdp ranks: in the dtype they were computed in, and summed in fp32 where they arrive (computed), or "
        "in fp32, summed on their way (reduced); auto: computed among up to 8 GPUs",
    ] = "auto"

    auto: Annotated[
        bool, "have the planner choose what is not set on the command line: degrees, schedule, micro-batch, recomputation (see --cluster)"
    ] = False

    def __post_init__(self) -> None:
        _ = self.degrees  # refuses degrees below one
        for name in ("microbatches", "stages_a_rank", "cp_ulysses"):
            if getattr(self, name) < 0:
                raise ConfigError(f"parallel.{name}={getattr(self, name)} must be 0 or more")
        if any(layers < 1 for layers in self.cuts):
            raise ConfigError(f"parallel.cuts={','.join(map(str, self.cuts))}: every stage needs a layer at least")
        if self.cp_kind not in ("auto", "usp") and self.cp_ulysses:
            raise ConfigError(f"parallel.cp_ulysses={self.cp_ulysses} is read by cp_kind=usp, not {self.cp_kind}; leave one of them out")
        if self.cp_kind == "usp" and not self.cp_ulysses:
            raise ConfigError("parallel.cp_kind=usp needs parallel.cp_ulysses: how many of the cp ranks exchange heads")
        if self.cp_ulysses and self.cp % self.cp_ulysses and not self.auto:
            raise ConfigError(f"parallel.cp_ulysses={self.cp_ulysses} does not divide parallel.cp={self.cp}; choose one that does")
        if not self.auto:  # which may choose to use the axis
            self._refuse_idle_settings()
        if self.async_tp and not self.sequence_parallel:
            raise ConfigError(
                "parallel.async_tp=True sends the parts of a cut sequence, but parallel.sequence_parallel=False keeps it whole; "
                "leave one of them out"
            )

    def _refuse_idle_settings(self) -> None:
        """An explicit request is met or refused: settings of an axis that is not used are a mistake."""
        for axis, idle in IDLE.items():
            said = [name for name, value in idle.items() if getattr(self, name) != value]
            if getattr(self, axis) == 1 and said:
                raise ConfigError(
                    f"parallel.{said[0]}={getattr(self, said[0])} says nothing while parallel.{axis}=1; raise that, or leave this out"
                )

    @property
    def degrees(self) -> Degrees:
        return Degrees(**{axis: getattr(self, axis) for axis in DEGREES})


@dataclass(frozen=True, kw_only=True)
class RematConfig:
    """Which activations are recomputed in backward instead of kept (activation checkpointing)."""

    mode: Annotated[
        Literal["none", "selective", "full", "budget", "auto"],
        "none keeps all; selective keeps matrix products and attention, and recomputes what is cheap; full keeps only block inputs; budget "
        "keeps what fits in remat.budget and saves most time; auto keeps all where it fits, else as budget",
    ] = "none"
    budget: Annotated[
        Literal["auto"] | float, "GiB of activations that a rank may keep for backward, with mode=budget; auto: what the device has left"
    ] = "auto"
    every: Annotated[int, "with mode=selective or full: apply it to every n-th block"] = 1

    def __post_init__(self) -> None:
        if self.budget != "auto" and (self.mode != "budget" or not self.budget > 0):
            wrong = "must be more than 0" if self.mode == "budget" else f"is read by remat.mode=budget, not {self.mode}; leave one out"
            raise ConfigError(f"remat.budget={self.budget} {wrong}")
        if self.every > 1 and self.mode in ("none", "budget", "auto"):
            raise ConfigError(f"remat.every={self.every} is read by remat.mode=selective and full, not {self.mode}; leave one of them out")
        if self.every < 1:
            raise ConfigError(f"remat.every={self.every} must be 1 or more; 2 means every second block")


CompileMode = Literal["auto", "none", "inductor", "aot_eager"]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """One resolved way to run: degrees settled, precision looked up, compile chosen (no `auto` left in `compile`)."""

    degrees: Degrees
    precision: Precision = field(default_factory=lambda: PRECISIONS["bf16"])
    low_precision: LowPrecision | None = None
    remat: RematConfig = field(default_factory=RematConfig)
    compile: CompileMode = "none"
    sequence_parallel: bool = True
    async_tp: bool = False
    reshard: bool = True
    reduce_each_micro_batch: bool = False
    loss_tokens: int = LOSS_TOKENS  # whose logits are in memory at a time; 0: all
    half_travels: bool = False  # gradients are summed in the reduce dtype where they arrive, not on their way
