"""The configuration of a whole run: what a recipe returns, what the command line overrides, what is saved with the run."""

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import torch

from paraxis.base.axes import Degrees
from paraxis.base.dtypes import Float8Config, low_precision, precision
from paraxis.base.errors import ConfigError
from paraxis.base.strategy import LOSS_TOKENS, CompileMode, ParallelConfig, RematConfig
from paraxis.checkpoint.config import CheckpointConfig
from paraxis.data.config import DataConfig
from paraxis.observe.config import MetricsConfig, ProfileConfig
from paraxis.optim.config import OptimConfig

InitParts = Literal["weights", "weights+optimizer"]


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long to train, on how much at a time."""

    steps: Annotated[int, "optimizer steps in all"] = 100
    seed: Annotated[int, "seed of the initial values and of the data order"] = 0
    global_tokens: Annotated[int, "tokens of one optimizer step over all ranks; 0: what parallel.microbatches says"] = 0
    micro_batch: Annotated[int, "rows a data rank puts through the model at a time"] = 1
    loss_tokens: Annotated[int, "tokens whose logits are in memory at a time; 0: those of a whole micro-batch"] = LOSS_TOKENS
    deterministic: Annotated[bool, "use deterministic kernels only, and refuse operators that have none"] = False
    bad_steps: Annotated[int, "stop after this many steps in a row whose loss or gradient was not finite (each is skipped)"] = 5
    init_from: Annotated[
        str, "weights to begin with: a checkpoint, a run's folder (its newest) or a Hugging Face folder; empty for none"
    ] = ""
    init_parts: Annotated[InitParts, "what to take of them: weights, or weights+optimizer"] = "weights"
    init_skip: Annotated[tuple[str, ...], "names or patterns of tensors that are not taken, or that only one of the two has"] = ()
    init_resize: Annotated[bool, "where vocabularies differ, take the rows of the ids that both have"] = False
    sample: Annotated[str, "prompt to continue at the end of the run; empty for none"] = ""

    def __post_init__(self) -> None:
        for name, least in (("steps", 1), ("micro_batch", 1), ("global_tokens", 0), ("loss_tokens", 0), ("bad_steps", 1)):
            if getattr(self, name) < least:
                raise ConfigError(f"train.{name}={getattr(self, name)} must be {least} or more")
        if not self.init_from and (
            idle := [n for n in ("init_parts", "init_skip", "init_resize") if getattr(self, n) not in ("weights", (), False)]
        ):
            raise ConfigError(
                f"train.{idle[0]} is about the weights to begin with, but there are none; set train.init_from, or leave it out"
            )

    def tokens_with_logits(self, tokens: int) -> int:
        """Of how many tokens there are logits in memory, of a micro-batch of so many."""
        return min(tokens, self.loss_tokens or tokens)


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """Held-out loss during training."""

    every: Annotated[int, "score the held-out data every so many steps, and at the end; 0 means never"] = 0
    paths: Annotated[tuple[str, ...], "held-out text, JSONL or Parquet files, globs or URLs; each token is predicted once"] = ()

    def __post_init__(self) -> None:
        if self.every < 0:
            raise ConfigError(f"eval.every={self.every} must be 0 (never) or more")
        if self.every and not self.paths:
            raise ConfigError(f"eval.every={self.every} needs held-out data; set eval.paths, or eval.every=0")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. `model` is any frozen dataclass with the members of `base.seams.ModelConfig`; `data` a DataConfig or a recipe's own."""

    name: Annotated[str, "the run's name; its folder is runs/NAME unless --run-dir says otherwise"] = "run"
    model: Any
    data: Any = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    remat: RematConfig = field(default_factory=RematConfig)
    compile: Annotated[CompileMode, "compile each block: inductor, aot_eager (slow, for tests), none; auto compiles on GPUs"] = "auto"
    precision: Annotated[
        str,
        "fp64, fp32, bf16 (computes in bf16; keeps weights, gradients and optimizer state in fp32), bf16_weights (keeps those in bf16 too, "
        "rounded stochastically), or bf16 with the blocks' linear layers in eight or four bits: float8_tensorwise, float8_rowwise, "
        "float8_blockwise, and on Blackwell mxfp8, nvfp4",
    ] = "bf16"
    float8: Float8Config = field(default_factory=Float8Config)
    attention: Annotated[str, "attention kernel: auto, or one by name (flash4, cudnn, flash, flex, sdpa, reference)"] = "auto"
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    metrics: MetricsConfig = field(default_factory=MetricsConfig)

    def __post_init__(self) -> None:
        dtypes = precision(self.precision)
        low_precision(dtypes, self.float8)  # refuses settings that say nothing
        if dtypes.master == torch.bfloat16 and self.optim.name != "adamw":
            raise ConfigError(
                f"precision={self.precision} keeps weights in bf16, where most updates are lost unless they are rounded stochastically, as "
                f"optim.name=adamw does and {self.optim.name} does not; use adamw, or precision=bf16"
            )
        if dtypes.master == torch.float64 and self.optim.state == "bf16":
            raise ConfigError(
                f"optim.state=bf16 has AdamW computed in fp32, but precision={self.precision} keeps weights in fp64; "
                "use optim.state=as_weights"
            )
        if self.checkpoint.keep_best and not self.eval.every:
            raise ConfigError(
                f"checkpoint.keep_best={self.checkpoint.keep_best} goes by the held-out loss, which nothing takes; "
                "set eval.every and eval.paths, or checkpoint.keep_best=0"
            )

    def rows_per_step(self, degrees: Degrees) -> int:
        """Rows of one optimizer step over all data ranks. Raises ConfigError where what is asked for does not divide or agree."""
        rows = degrees.data_ranks * self.train.micro_batch
        asked = self.parallel.microbatches
        if not self.train.global_tokens:
            return rows * (asked or (2 * degrees.pp if degrees.pp > 1 else 1))
        tokens = rows * self.data.seq_len
        if self.train.global_tokens % tokens:
            below = self.train.global_tokens // tokens * tokens
            near = f"{below} or {below + tokens}" if below else f"{tokens}"
            raise ConfigError(
                f"train.global_tokens={self.train.global_tokens} is not a multiple of {tokens} "
                f"({degrees.data_ranks} data ranks x train.micro_batch={self.train.micro_batch} x data.seq_len={self.data.seq_len}); "
                f"use {near}, or another micro-batch"
            )
        if asked and self.train.global_tokens != asked * tokens:
            raise ConfigError(
                f"train.global_tokens={self.train.global_tokens} makes {self.train.global_tokens // tokens} micro-batches of {tokens} "
                f"tokens, but parallel.microbatches={asked}; leave one of them out"
            )
        return self.train.global_tokens // self.data.seq_len
