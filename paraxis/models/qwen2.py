"""Qwen2 and Qwen2.5: a Llama whose queries, keys and values have biases, and some of the published shapes.

Shapes: "Qwen2.5 Technical Report" (arXiv:2412.15115, table 1) and the config.json of each release.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from paraxis.base.layout import LayoutTable, Split
from paraxis.models import llama
from paraxis.models.attention import Attention
from paraxis.models.decoder import Block, Decoder
from paraxis.models.llama import LlamaConfig
from paraxis.models.mlp import MLP
from paraxis.ops.rope import RopeConfig

# Our parameter names beside Hugging Face's.
KEYS = llama.KEYS | {
    "layers.{i}.attention.q_proj.bias": "model.layers.{i}.self_attn.q_proj.bias",
    "layers.{i}.attention.k_proj.bias": "model.layers.{i}.self_attn.k_proj.bias",
    "layers.{i}.attention.v_proj.bias": "model.layers.{i}.self_attn.v_proj.bias",
}


@dataclass(frozen=True, kw_only=True)
class Qwen2Config(LlamaConfig):
    """The shape of a Qwen2 or Qwen2.5, and how its parameters start."""

    norm_eps: Annotated[float, "added to the mean square before its root is taken"] = 1e-6
    rope: Annotated[RopeConfig, "rotary position embedding"] = field(default_factory=lambda: RopeConfig(theta=1_000_000.0))
    max_seq_len: Annotated[int, "positions the model is made for; written into Hugging Face's config"] = 32_768

    def build(self) -> Decoder:
        """The model; built under `torch.device("meta")` it takes no memory."""
        blocks = [
            Block(
                self.width,
                Attention(self.width, self.heads, self.kv_heads, self.head_width, bias=True),
                MLP(self.width, self.mlp_width),
                self.norm_eps,
            )
            for _ in range(self.layers)
        ]
        return llama.build_decoder(Qwen2Decoder, self, blocks, llama.init_table(self), KEYS)

    @property
    def parameters_count(self) -> int:
        """Parameters in all, a tied embedding counted once."""
        return super().parameters_count + self.layers * (self.heads + 2 * self.kv_heads) * self.head_width


class Qwen2Decoder(Decoder):
    """A decoder whose biases are split with the heads that they belong to."""

    layout: ClassVar[LayoutTable] = {**Decoder.layout, "layers.*.attention.[qkv]_proj.bias": Split("tp", 0)}


def qwen2_5_0_5b() -> Qwen2Config:
    """Qwen2.5 0.5B."""
    return _qwen2_5(width=896, layers=24, heads=14, kv_heads=2, mlp_width=4864, tied=True)


def qwen2_5_1_5b() -> Qwen2Config:
    """Qwen2.5 1.5B."""
    return _qwen2_5(width=1536, layers=28, heads=12, kv_heads=2, mlp_width=8960, tied=True)


def qwen2_5_3b() -> Qwen2Config:
    """Qwen2.5 3B."""
    return _qwen2_5(width=2048, layers=36, heads=16, kv_heads=2, mlp_width=11008, tied=True)


def qwen2_5_7b() -> Qwen2Config:
    """Qwen2.5 7B."""
    return _qwen2_5(width=3584, layers=28, heads=28, kv_heads=4, mlp_width=18944, tied=False, vocab_size=152_064)


def _qwen2_5(*, width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, tied: bool, vocab_size: int = 151_936) -> Qwen2Config:
    return Qwen2Config(vocab_size=vocab_size, width=width, layers=layers, heads=heads, kv_heads=kv_heads, mlp_width=mlp_width, tied=tied)
