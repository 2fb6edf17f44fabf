"""A language model of one's own, outside the package: causal convolutions and gated layers in place of attention."""

from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from paraxis.base.layout import Gather, Split, Whole
from paraxis.data.config import DataConfig
from paraxis.models.init import Normal
from paraxis.ops.loss import chunked_head_loss
from paraxis.train.config import RunConfig, TrainConfig


class Mixer(nn.Module):  # needs earlier positions, so where ranks share a row each runs all of it (`Whole`)
    def __init__(self, width: int) -> None:
        super().__init__()
        self.kernel = nn.Parameter(torch.empty(width, 1, 4))

    def forward(self, x_btm):
        padded_bmt = F.pad(x_btm.transpose(1, 2), (self.kernel.shape[2] - 1, 0))
        return F.conv1d(padded_bmt, self.kernel, groups=len(self.kernel)).transpose(1, 2)


class Gated(nn.Module):  # split over its hidden features (`Gather`: its input is the whole sequence)
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(width, 2 * width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x_btm):
        return self.down(F.gelu(self.gate(x_btm)) * self.up(x_btm))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.mixer, self.gated = nn.LayerNorm(width), Mixer(width), Gated(width)

    def forward(self, x_btm):
        x_btm = x_btm + self.mixer(self.norm(x_btm))
        return x_btm + self.gated(x_btm)


class Convolutional(nn.Module):
    layout = {
        "*.mixer": Whole(), "*.gated": Gather(), "*.up.*": Split("tp", 0), "*.gate.*": Split("tp", 0),
        "*.down.weight": Split("tp", 1), "embed.weight": Split("tp", 0), "head.weight": Split("tp", 0),
    }  # fmt: skip
    init = {"*.kernel": Normal(0.3)}
    keys = {"embed.weight": "wte.weight", "stack.{i}.mixer.kernel": "h.{i}.conv", "head.weight": "lm_head.weight"}

    def __init__(self, config: "ConvolutionalConfig") -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(config.vocab_size, config.width), nn.Linear(config.width, config.vocab_size, bias=False)
        self.stack = nn.ModuleDict({str(number): Block(config.width) for number in range(config.depth)})
        self.head_loss = chunked_head_loss

    def forward(self, batch, x_btm=None):  # the summed loss; in a pipeline, x_btm is what the stage before has made
        x_btm = self.embed(batch.tokens_bt) if x_btm is None else x_btm
        for block in self.blocks():
            x_btm = block(x_btm)
        return x_btm if self.head is None else self.head_loss(x_btm, self.head.weight, batch.targets_bt)

    def keep(self, layers):  # become the pipeline stage that runs these blocks; names stay
        self.embed = None if layers.start else self.embed
        self.head = self.head if layers.stop == len(self.stack) else None
        self.stack = nn.ModuleDict({str(number): self.stack[str(number)] for number in layers})

    def blocks(self):
        return list(self.stack.values())

    def use_head_loss(self, head_loss):
        self.head_loss = head_loss


@dataclass(frozen=True, kw_only=True)
class ConvolutionalConfig:
    """The shape of the model; every field can be set from the command line."""

    vocab_size: Annotated[int, "entries of the vocabulary"] = 512
    width: Annotated[int, "width of the residual stream"] = 64
    depth: Annotated[int, "how many blocks"] = 2

    def build(self) -> nn.Module:
        return Convolutional(self)


def tiny() -> RunConfig:
    data = DataConfig(paths=("stdlib:heldout",), tokenizer="train:512", seq_len=64)
    return RunConfig(name="convolutional", model=ConvolutionalConfig(), data=data, train=TrainConfig(steps=20, micro_batch=2))
