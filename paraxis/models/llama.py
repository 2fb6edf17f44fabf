"""Llama 3: its configuration, how it is built, and the published shapes.

Shapes: "The Llama 3 Herd of Models" (arXiv:2407.21783, table 3) for 3.1, the model cards of Llama 3.2 for 1B and 3B.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated

from paraxis.base.errors import ConfigError
from paraxis.base.keys import KeyTable
from paraxis.models.attention import Attention
from paraxis.models.decoder import Block, Decoder
from paraxis.models.init import Init, InitTable, Normal
from paraxis.models.mlp import MLP
from paraxis.ops.norm import RMSNorm
from paraxis.ops.rope import RopeConfig

# Our parameter names beside Hugging Face's.
KEYS = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.{i}.attention_norm.weight": "model.layers.{i}.input_layernorm.weight",
    "layers.{i}.attention.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "layers.{i}.attention.k_proj.weight": "model.layers.{i}.self_attn.k_proj.weight",
    "layers.{i}.attention.v_proj.weight": "model.layers.{i}.self_attn.v_proj.weight",
    "layers.{i}.attention.o_proj.weight": "model.layers.{i}.self_attn.o_proj.weight",
    "layers.{i}.mlp_norm.weight": "model.layers.{i}.post_attention_layernorm.weight",
    "layers.{i}.mlp.gate_proj.weight": "model.layers.{i}.mlp.gate_proj.weight",
    "layers.{i}.mlp.up_proj.weight": "model.layers.{i}.mlp.up_proj.weight",
    "layers.{i}.mlp.down_proj.weight": "model.layers.{i}.mlp.down_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


@dataclass(frozen=True, kw_only=True)
class LlamaConfig:
    """The shape of a Llama, and how its parameters start."""

    vocab_size: Annotated[int, "entries of the vocabulary"]
    width: Annotated[int, "width of the residual stream"]
    layers: Annotated[int, "how many blocks"]
    heads: Annotated[int, "query heads of a block"]
    kv_heads: Annotated[int, "key/value heads of a block; divides heads"]
    mlp_width: Annotated[int, "width inside the feed-forward layer"]
    head_size: Annotated[int | None, "width of one head; none means width / heads"] = None
    norm_eps: Annotated[float, "added to the mean square before its root is taken"] = 1e-5
    rope: Annotated[RopeConfig, "rotary position embedding"] = field(default_factory=RopeConfig)
    tied: Annotated[bool, "use the embedding as the vocabulary projection too"] = False
    max_seq_len: Annotated[int, "positions the model is made for; written into Hugging Face's config"] = 8192
    init_std: Annotated[float, "standard deviation of the first weights; those that add to the residual stream start narrower"] = 0.02

    def __post_init__(self) -> None:
        for name in ("vocab_size", "width", "layers", "heads", "kv_heads", "mlp_width", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.heads % self.kv_heads:
            raise ConfigError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}; choose kv_heads that divides it"
            )
        if self.head_size is None and self.width % self.heads:
            raise ConfigError(
                f"model.width={self.width} is not a multiple of model.heads={self.heads}; change either, or set model.head_size"
            )
        if self.head_width < 2 or self.head_width % 2:
            raise ConfigError(f"heads of width {self.head_width} have no pairs to rotate; make model.head_size (or width / heads) even")
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be over 0")

    @property
    def head_width(self) -> int:
        return self.width // self.heads if self.head_size is None else self.head_size

    def build(self) -> Decoder:
        """The model; built under `torch.device("meta")` it takes no memory."""
        return build_llama(self)

    @property
    def parameters_count(self) -> int:
        """Parameters in all, a tied embedding counted once."""
        embeddings = self.vocab_size * self.width * (1 if self.tied else 2)
        return embeddings + self.layers * (_block_matrices(self) + 2 * self.width) + self.width

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one trained token, forward and backward, in a row of `seq_len`.

        6 * (entries of the matrices it is multiplied with: the blocks' and the head's; the embedding is only looked up)
        + 6 * layers * heads * head_width * seq_len for attention: two products of 2 * heads * head_width * s operations over the
        s = seq_len / 2 keys a position sees on average, three times (forward once, backward twice). Recomputation is not counted.
        """
        matrices = self.layers * _block_matrices(self) + self.vocab_size * self.width
        return 6.0 * matrices + 6.0 * self.layers * self.heads * self.head_width * seq_len


def torchtitan_flops_per_token(config: LlamaConfig, seq_len: int) -> float:
    """The same by TorchTitan's convention, for comparing MFU with it: norms count as matrices, attention without the causal half."""
    parameters = config.parameters_count - config.vocab_size * config.width
    return 6.0 * parameters + 12.0 * config.layers * config.heads * config.head_width * seq_len


def build_llama(config: LlamaConfig) -> Decoder:
    """A Llama of this shape."""
    blocks = [
        Block(
            config.width,
            Attention(config.width, config.heads, config.kv_heads, config.head_width),
            MLP(config.width, config.mlp_width),
            config.norm_eps,
        )
        for _ in range(config.layers)
    ]
    return build_decoder(Decoder, config, blocks, init_table(config), KEYS)


def build_decoder(kind: type[Decoder], config: LlamaConfig, blocks: Sequence[Block], init: InitTable, keys: KeyTable) -> Decoder:
    """The decoder around `blocks` that a configuration of Llama's kind asks for."""
    return kind(
        vocab_size=config.vocab_size,
        width=config.width,
        blocks=blocks,
        norm=RMSNorm(config.width, config.norm_eps),
        rope=config.rope,
        tied=config.tied,
        init=init,
        keys=keys,
    )


def init_table(config: LlamaConfig) -> dict[str, Init]:
    """How parameters start. What layer l (from 0) adds to the residual stream is narrowed by 1 / sqrt(2 (l + 1)), the number of terms
    summed so far, so that the stream's width grows slowly. A free-standing embedding starts at width 1, which the first norm then leaves
    alone (from 0.02 it would magnify the embedding's gradient fifty times), and a head at 1 / sqrt(width), for logits of width 1.
    """
    table: dict[str, Init] = {}
    for layer in range(config.layers):
        narrowed = Normal(config.init_std / (2 * (layer + 1)) ** 0.5)
        table |= {f"layers.{layer}.attention.o_proj.weight": narrowed, f"layers.{layer}.mlp.down_proj.weight": narrowed}
    embed = Normal(config.init_std if config.tied else 1.0)
    return table | {"*_proj.weight": Normal(config.init_std), "embed.weight": embed, "head.weight": Normal(config.width**-0.5)}


def _block_matrices(config: LlamaConfig) -> int:
    """Entries of one block's matrices."""
    attention = config.width * config.head_width * 2 * (config.heads + config.kv_heads)
    return attention + 3 * config.width * config.mlp_width


def llama3_1b() -> LlamaConfig:
    """Llama 3.2 1B."""
    return _llama3(width=2048, layers=16, heads=32, kv_heads=8, mlp_width=8192, tied=True, factor=32.0)


def llama3_3b() -> LlamaConfig:
    """Llama 3.2 3B."""
    return _llama3(width=3072, layers=28, heads=24, kv_heads=8, mlp_width=8192, tied=True, factor=32.0)


def llama3_8b() -> LlamaConfig:
    """Llama 3.1 8B."""
    return _llama3(width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14336, tied=False, factor=8.0)


def llama3_70b() -> LlamaConfig:
    """Llama 3.1 70B."""
    return _llama3(width=8192, layers=80, heads=64, kv_heads=8, mlp_width=28672, tied=False, factor=8.0)


def llama3_405b() -> LlamaConfig:
    """Llama 3.1 405B, as released (8 key/value heads)."""
    return _llama3(width=16384, layers=126, heads=128, kv_heads=8, mlp_width=53248, tied=False, factor=8.0)


def _llama3(*, width: int, layers: int, heads: int, kv_heads: int, mlp_width: int, tied: bool, factor: float) -> LlamaConfig:
    """What all of Llama 3.1 and 3.2 share: 128,256 tokens, and RoPE stretched from 8,192 to 131,072 positions."""
    return LlamaConfig(
        vocab_size=128_256,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        mlp_width=mlp_width,
        tied=tied,
        rope=RopeConfig(theta=500_000.0, factor=factor),
        max_seq_len=131_072,
    )
