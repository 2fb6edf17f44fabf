"""A recipe whose model keeps what an optimizer knows nothing of: `tests/train/stateful.py:run --model.normalises=true`."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paraxis.base.layout import Split
from paraxis.base.seams import Batch
from paraxis.observe.config import MetricsConfig
from paraxis.ops.loss import reference_head_loss
from paraxis.optim.config import OptimConfig
from paraxis.train.config import RunConfig, TrainConfig
from tests.train.planted import VOCABULARY, PlantedData, Rows

WIDTH = 8


class Stateful(nn.Module):
    """Embedding, layers, head; what it counts and draws changes what it computes."""

    def __init__(self, config: "StatefulConfig") -> None:
        super().__init__()
        self.config = config
        self.layout = {"embed.weight": Split("tp", 0)} | ({"counted": Split("tp", 0)} if config.fault == "split" else {})
        self.embed, self.head = nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.stack = nn.ModuleDict({str(number): nn.Linear(WIDTH, WIDTH) for number in range(4)})
        self.norm = nn.BatchNorm1d(WIDTH) if config.normalises else None
        self.register_buffer("counted", torch.zeros(2, dtype=torch.int64))
        self.register_buffer("drawn", torch.rand(WIDTH) + 0.5)
        self.register_buffer("table", torch.linspace(0.5, 1.5, WIDTH), persistent=False)
        if config.fault == "plain":
            self.average = torch.zeros(3)
        if config.fault == "computed":
            self.register_buffer("largest", self.head.weight.detach().max())

    def forward(self, batch: Batch, x_btm: Tensor | None = None) -> Tensor:
        x_btm = self.embed(batch.tokens_bt) if x_btm is None else x_btm
        for layer in self.stack.values():
            x_btm = x_btm + layer(x_btm * self.table)
        if self.training:
            self.counted[0] += batch.tokens_bt.sum() if self.config.counts_rows else 1
        x_btm = x_btm * self.drawn * (1 + 0.1 * self.counted[0])
        if self.head is None:
            return x_btm
        if self.norm is not None:
            x_btm = self.norm(x_btm.flatten(0, 1)).view_as(x_btm)
        return reference_head_loss(F.dropout(x_btm, self.config.drops), self.head.weight, batch.targets_bt)

    def keep(self, layers: range) -> None:
        self.embed = None if layers.start else self.embed
        self.head = self.head if layers.stop == len(self.stack) else None
        self.stack = nn.ModuleDict({str(number): self.stack[str(number)] for number in layers})

    def blocks(self) -> list[nn.Module]:
        return list(self.stack.values())


class WithExtraState(Stateful):
    """It hides a number where only its own state_dict knows of it."""

    def get_extra_state(self) -> int:
        return 1


@dataclass(frozen=True, kw_only=True)
class StatefulConfig:
    """What it keeps, and what is wrong with that."""

    normalises: Annotated[bool, "with statistics of the rows seen so far"] = False
    counts_rows: Annotated[bool, "counts what is in its rows, which is not the same on every rank"] = False
    drops: Annotated[float, "drops out, by a function that no module shows"] = 0.0
    fault: Annotated[str, "plain, extra, split or computed: a state that cannot be saved"] = ""
    vocab_size: Annotated[int, "entries of the vocabulary"] = VOCABULARY

    def build(self) -> nn.Module:
        return WithExtraState(self) if self.fault == "extra" else Stateful(self)


class StreamedRows(Rows):
    """Rows that remember where they are."""

    def state_dict(self) -> dict[str, int]:
        return {"at": 1}


@dataclass(frozen=True, kw_only=True)
class StatefulData(PlantedData):
    """Planted rows, which may have a state of their own."""

    streamed: Annotated[bool, "the rows remember where they are"] = False

    def rows(self, seed: int) -> Rows:
        return StreamedRows(self, seed) if self.streamed else super().rows(seed)


def run() -> RunConfig:
    """Two rows a step on one rank or on two."""
    return RunConfig(
        name="stateful",
        model=StatefulConfig(),
        data=StatefulData(),
        train=TrainConfig(steps=6, global_tokens=16),
        optim=OptimConfig(lr=1e-2, warmup=0, schedule="constant"),
        precision="fp32",
        metrics=MetricsConfig(tensorboard=False),
    )
