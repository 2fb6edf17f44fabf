"""A recipe whose rows misbehave where a test asks them to: `tests/train/planted.py:run --data.bad_rows=5`.

On two data ranks with one row each, row 2 * (step - 1) + rank is what that rank trains on at that step.
"""

import os
import signal
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
from torch import Tensor, nn

from paraxis.base.seams import Batch
from paraxis.models.decoder import Decoder
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen3 import Qwen3MoEConfig
from paraxis.observe.config import MetricsConfig
from paraxis.ops.loss import reference_head_loss
from paraxis.ops.routing import RoutingConfig
from paraxis.optim.config import OptimConfig
from paraxis.train.config import RunConfig, TrainConfig

VOCABULARY = 32
BAD_TOKEN = 31  # a row that holds it has a loss that is not a number


@dataclass(frozen=True)
class Rows:
    """Random rows, some of which are planted."""

    config: "PlantedData"
    seed: int
    length: int = 10
    vocab_size: int = VOCABULARY
    fingerprint: str = "planted"

    def row(self, index: int) -> dict[str, np.ndarray]:
        if index in self.config.killing_rows and self.config.killed_rank in (-1, int(os.environ.get("RANK", "0"))):
            os.kill(os.getpid(), signal.SIGKILL)
        if index in self.config.raising_rows:
            raise ValueError(f"row {index} cannot be read")
        if index == self.config.signal_row and not Path("signalled").exists():
            Path("signalled").touch()
            os.kill(os.getpid() if self.config.one_process else os.getppid(), self.config.signal)
            time.sleep(0.3)  # so that the rows after it are trained on when the signal has arrived
        tokens = np.random.default_rng((self.seed, index)).integers(0, BAD_TOKEN, self.config.seq_len + 1)
        if index in self.config.bad_rows:
            tokens[0] = BAD_TOKEN
        return {"tokens_bt": tokens[:-1], "targets_bt": tokens[1:], "positions_bt": np.arange(self.config.seq_len)}


@dataclass(frozen=True, kw_only=True)
class PlantedData:
    """What is wrong with which rows."""

    seq_len: Annotated[int, "tokens in a row"] = 8
    bad_rows: Annotated[tuple[int, ...], "rows whose loss is not a number"] = ()
    raising_rows: Annotated[tuple[int, ...], "rows that cannot be read"] = ()
    killing_rows: Annotated[tuple[int, ...], "rows whose reader is killed"] = ()
    killed_rank: Annotated[int, "which of a row's readers that is; -1: all of them"] = -1
    signal_row: Annotated[int, "row whose first reader sends `signal` to the launcher"] = -1
    one_process: Annotated[bool, "the reader itself was started by a person"] = False
    signal: Annotated[int, "that signal"] = 0

    def rows(self, seed: int) -> Rows:
        return Rows(self, seed)

    def held_out(self) -> Rows | None:
        return Rows(self, seed=1)


class Poisoned(nn.Module):
    """A decoder that is poisoned by BAD_TOKEN."""

    def __init__(self, inner: Decoder, poison: float) -> None:
        super().__init__()
        self.inner, self.poison = inner, poison
        self.layout = {f"inner.{pattern}": rule for pattern, rule in inner.layout.items()}
        self.init = {f"inner.{pattern}": rule for pattern, rule in inner.init.items()}
        self.use_attention, self.use_head_loss, self.blocks = inner.use_attention, inner.use_head_loss, inner.blocks

    def forward(self, batch: Batch) -> Tensor:
        loss = self.inner(batch)
        return loss * torch.where((batch.tokens_bt == BAD_TOKEN).any(), self.poison, 1.0)


@dataclass(frozen=True, kw_only=True)
class PoisonedConfig:
    """The shape of the decoder inside, and how it is poisoned."""

    llama: LlamaConfig = field(
        default_factory=lambda: LlamaConfig(vocab_size=VOCABULARY, width=16, layers=1, heads=4, kv_heads=2, mlp_width=32)
    )
    poison: Annotated[float, "what the loss of a bad row is multiplied with"] = float("inf")
    dropout: Annotated[float, "how much of the hidden state is dropped"] = 0.0

    @property
    def vocab_size(self) -> int:
        return self.llama.vocab_size

    def build(self) -> nn.Module:
        model = Poisoned(self.llama.build(), self.poison)
        if self.dropout:
            model.dropout = nn.Dropout(self.dropout)
        return model

    def flops_per_token(self, seq_len: int) -> float:
        return self.llama.flops_per_token(seq_len)


class Bigrams(nn.Module):
    """Predicts from one token alone: it has no blocks that a pipeline could cut, and nothing lets its positions see each other."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(vocab_size, 8), nn.Linear(8, vocab_size, bias=False)

    def forward(self, batch: Batch) -> Tensor:
        return reference_head_loss(self.embed(batch.tokens_bt), self.head.weight, batch.targets_bt)


@dataclass(frozen=True, kw_only=True)
class BigramsConfig:
    """The size of its vocabulary."""

    vocab_size: Annotated[int, "entries of the vocabulary"] = VOCABULARY

    def build(self) -> nn.Module:
        return Bigrams(self.vocab_size)


def run() -> RunConfig:
    """Eight steps of a row on each data rank."""
    return _of(PoisonedConfig())


def layers() -> RunConfig:
    """The same of four plain layers."""
    return _of(LlamaConfig(vocab_size=VOCABULARY, width=16, layers=4, heads=4, kv_heads=2, mlp_width=32))


def experts() -> RunConfig:
    """The same of a mixture of experts whose balance loss, z-loss and selection bias are all on."""
    routing = RoutingConfig(experts=8, chosen=2, balance_loss=0.1, z_loss=0.1, bias_rate=0.003)
    sizes = {"vocab_size": VOCABULARY, "width": 16, "layers": 4, "heads": 4, "kv_heads": 2, "head_size": 4, "mlp_width": 16}
    return _of(Qwen3MoEConfig(**sizes, routing=routing))


def bigrams() -> RunConfig:
    """The same of a model that cannot be cut at all."""
    return _of(BigramsConfig())


def _of(model: Any) -> RunConfig:
    return RunConfig(
        name="planted",
        model=model,
        data=PlantedData(),
        train=TrainConfig(steps=8),
        optim=OptimConfig(lr=1e-2, warmup=0),
        precision="fp32",
        metrics=MetricsConfig(tensorboard=False),
    )
