"""A decoder-only transformer, written for one device. b rows, t positions, m model width, v vocabulary.

Outside `attention` and `mlp` everything acts on each position alone, and nothing assumes how many positions x has: under
sequence parallelism a rank holds some of them there. The rope tables and the mask are the whole sequence's.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from paraxis.base.errors import ConfigError
from paraxis.base.keys import KeyTable
from paraxis.base.layout import Gather, LayoutTable, Split
from paraxis.base.seams import Attend, Batch, HeadLoss
from paraxis.models.attention import Attention
from paraxis.models.init import InitTable
from paraxis.models.mla import MLA
from paraxis.ops.attention import Sdpa
from paraxis.ops.loss import chunked_head_loss
from paraxis.ops.norm import RMSNorm
from paraxis.ops.rope import RopeConfig, YarnConfig, rope_tables


class Block(nn.Module):
    """One layer: attention, then the feed-forward, each on normalised input and added to the residual stream."""

    def __init__(self, width: int, attention: Attention | MLA, mlp: nn.Module, norm_eps: float) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(width, norm_eps)
        self.attention = attention
        self.mlp_norm = RMSNorm(width, norm_eps)
        self.mlp = mlp

    def forward(self, x_btm: Tensor, cos_btf: Tensor, sin_btf: Tensor, mask: Any) -> Tensor:
        x_btm = x_btm + self.attention(self.attention_norm(x_btm), cos_btf, sin_btf, mask)
        return x_btm + self.mlp(self.mlp_norm(x_btm))


class Head(nn.Module):
    """The vocabulary projection [v, m]. The loss is computed in its call, so that the matrix can be gathered by itself."""

    def __init__(self, vocab_size: int, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(vocab_size, width) * width**-0.5)

    def forward(self, x_btm: Tensor, targets_bt: Tensor, head_loss: HeadLoss) -> Tensor:
        return head_loss(x_btm, self.weight, targets_bt)


class Decoder(nn.Module):
    """Embedding, blocks, norm, head. `forward` gives a batch's summed loss, `logits` what it is made of."""

    layout: ClassVar[LayoutTable] = {
        "embed.weight": Split("tp", 0),
        "layers.*.attention": Gather(readers=("q_proj", "k_proj", "v_proj")),
        "layers.*.attention.[qkv]_proj.weight": Split("tp", 0),
        "layers.*.attention.o_proj.weight": Split("tp", 1),
        "layers.*.mlp": Gather(readers=("gate_proj", "up_proj")),
        "layers.*.mlp.gate_proj.weight": Split("tp", 0),
        "layers.*.mlp.up_proj.weight": Split("tp", 0),
        "layers.*.mlp.down_proj.weight": Split("tp", 1),
        "head.weight": Split("tp", 0),
    }

    def __init__(
        self,
        *,
        vocab_size: int,
        width: int,
        blocks: Sequence[nn.Module],
        norm: nn.Module,
        rope: RopeConfig | YarnConfig | None,
        positions: int = 0,
        tied: bool,
        init: InitTable,
        keys: KeyTable,
    ) -> None:
        """Positions reach the blocks as `rope` tables, which a block is then called with, or as vectors learned for so many `positions`."""
        super().__init__()
        self.rope, self.init, self.keys, self.most_positions = rope, init, keys, positions or None
        self.attend: Attend = Sdpa()
        self.head_loss: HeadLoss = chunked_head_loss
        self.embed: nn.Embedding | None = nn.Embedding(vocab_size, width)
        self.positions = nn.Embedding(positions, width) if positions else None
        self.layers = nn.ModuleDict({str(number): block for number, block in enumerate(blocks)})
        self.norm: nn.Module | None = norm
        self.head = None if tied else Head(vocab_size, width)

    def forward(self, batch: Batch, x_btm: Tensor | None = None) -> Tensor:
        """The loss summed over the batch's targets, a scalar of at least fp32; of a pipeline's earlier stages, what they hand on."""
        x_btm = self._embedded(batch.tokens_bt, batch.positions_bt) if x_btm is None else x_btm
        x_btm = self._through_blocks(x_btm, batch.positions_bt, batch.documents_bt)
        if self.norm is None:
            return x_btm
        if self.head is None:
            return self.head_loss(self.norm(x_btm), self.head_weight, batch.targets_bt)
        return self.head(self.norm(x_btm), batch.targets_bt, self.head_loss)

    def logits(self, tokens_bt: Tensor, positions_bt: Tensor | None = None, documents_bt: Tensor | None = None) -> Tensor:
        """What the model predicts to follow each token: [b, t, v]. Positions count from 0 unless given."""
        if positions_bt is None:
            positions_bt = torch.arange(tokens_bt.shape[1], device=tokens_bt.device).expand_as(tokens_bt)
        assert self.norm is not None, "a pipeline's earlier stages have no logits"
        x_btm = self._through_blocks(self._embedded(tokens_bt, positions_bt), positions_bt, documents_bt)
        return F.linear(self.norm(x_btm), self.head_weight)

    def _embedded(self, tokens_bt: Tensor, positions_bt: Tensor) -> Tensor:
        assert self.embed is not None, "a pipeline's later stages take the activations of the one before"
        x_btm = self.embed(tokens_bt)
        if self.most_positions is not None and tokens_bt.shape[1] > self.most_positions:
            raise ConfigError(f"rows of {tokens_bt.shape[1]} tokens are longer than the model's {self.most_positions} positions; cut them")
        return x_btm if self.positions is None else x_btm + self.positions(positions_bt)

    def _through_blocks(self, x_btm: Tensor, positions_bt: Tensor, documents_bt: Tensor | None) -> Tensor:
        tables_btf = () if self.rope is None else rope_tables(positions_bt, self.rope, self.rope_width, dtype=x_btm.dtype)
        mask = self.attend.mask(documents_bt)
        for block in self.blocks():
            x_btm = block(x_btm, *tables_btf, mask)
        return x_btm

    def keep(self, layers: range) -> None:
        """Becomes the pipeline stage that runs `layers`. A tied embedding stays at both ends."""
        last = layers.stop == len(self.layers)
        if layers.start:
            self.positions = None
            if not (last and self.head is None):
                self.embed = None
        if not last:
            self.norm = self.head = None
        self.layers = nn.ModuleDict({str(number): self.layers[str(number)] for number in layers})

    @property
    def head_weight(self) -> Tensor:
        """The vocabulary projection [v, m]: the head's, or the embedding where they are tied."""
        projection = self.embed if self.head is None else self.head
        assert projection is not None
        return projection.weight

    @property
    def rope_width(self) -> int:
        """How much of a head positions turn."""
        return self.blocks()[0].attention.rope_width

    def blocks(self) -> list[Any]:
        """The repeated units that are compiled, recomputed and gathered one at a time."""
        return list(self.layers.values())

    def ends(self) -> list[nn.Module]:
        """What is gathered by itself beside the blocks: the head, which a tied embedding has not."""
        return [] if self.head is None else [self.head]

    def use_attention(self, attend: Attend) -> None:
        """Computes attention with `attend` from now on, in every layer."""
        self.attend = attend
        for block in self.blocks():
            block.attention.attend = attend

    def use_head_loss(self, head_loss: HeadLoss) -> None:
        """Computes projection and loss with `head_loss` from now on."""
        self.head_loss = head_loss
