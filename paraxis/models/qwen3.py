"""Qwen3, dense and mixture-of-experts: a Llama whose query and key heads are normalised, and the published shapes.

Shapes: "Qwen3 Technical Report" (arXiv:2505.09388, tables 1 and 2) and the config.json of each release.
"""

from dataclasses import dataclass, field
from typing import Annotated, ClassVar

from paraxis.base.keys import Stacked
from paraxis.base.layout import LayoutTable, Partial
from paraxis.models import llama
from paraxis.models.attention import Attention
from paraxis.models.decoder import Block, Decoder
from paraxis.models.init import Init, Normal
from paraxis.models.llama import LlamaConfig
from paraxis.models.mlp import MLP
from paraxis.models.moe import EXPERTS_LAYOUT, MoE
from paraxis.ops.rope import RopeConfig
from paraxis.ops.routing import RoutingConfig

# Our parameter names beside Hugging Face's.
KEYS = llama.KEYS | {
    "layers.{i}.attention.q_norm.weight": "model.layers.{i}.self_attn.q_norm.weight",
    "layers.{i}.attention.k_norm.weight": "model.layers.{i}.self_attn.k_norm.weight",
}
MOE_KEYS: dict[str, str | Stacked] = {ours: theirs for ours, theirs in KEYS.items() if ".mlp." not in ours} | {
    "layers.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
    "layers.{i}.mlp.experts.gate_proj": Stacked("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", transpose=True),
    "layers.{i}.mlp.experts.up_proj": Stacked("model.layers.{i}.mlp.experts.{e}.up_proj.weight", transpose=True),
    "layers.{i}.mlp.experts.down_proj": Stacked("model.layers.{i}.mlp.experts.{e}.down_proj.weight", transpose=True),
}


@dataclass(frozen=True, kw_only=True)
class Qwen3Config(LlamaConfig):
    """The shape of a dense Qwen3, and how its parameters start."""

    head_size: Annotated[int | None, "width of one head; none means width / heads"] = 128
    norm_eps: Annotated[float, "added to the mean square before its root is taken"] = 1e-6
    rope: Annotated[RopeConfig, "rotary position embedding"] = field(default_factory=lambda: RopeConfig(theta=1_000_000.0))
    max_seq_len: Annotated[int, "positions the model is made for; written into Hugging Face's config"] = 40_960

    def build(self) -> Decoder:
        """The model; built under `torch.device("meta")` it takes no memory."""
        blocks = [_block(self, MLP(self.width, self.mlp_width)) for _ in range(self.layers)]
        return llama.build_decoder(Decoder, self, blocks, llama.init_table(self), KEYS)

    @property
    def parameters_count(self) -> int:
        """Parameters in all, a tied embedding counted once."""
        return super().parameters_count + self.layers * 2 * self.head_width


@dataclass(frozen=True, kw_only=True)
class Qwen3MoEConfig(Qwen3Config):
    """The shape of a Qwen3 whose every feed-forward layer is a mixture of experts."""

    mlp_width: Annotated[int, "width inside one expert"]
    routing: Annotated[RoutingConfig, "how tokens choose experts"]

    def build(self) -> Decoder:
        """The model; built under `torch.device("meta")` it takes no memory."""
        blocks = [_block(self, MoE(self.width, self.mlp_width, self.routing)) for _ in range(self.layers)]
        return llama.build_decoder(MoEDecoder, self, blocks, moe_init_table(self), MOE_KEYS)

    @property
    def parameters_count(self) -> int:
        """Parameters in all: a dense model whose feed-forward layers are one expert, the other experts, and the routers."""
        return super().parameters_count + self.layers * self._matrices_beside_one_expert(self.routing.experts)

    def flops_per_token(self, seq_len: int) -> float:
        """As a Llama's (see there), with the router and the experts that a token is sent to in place of the feed-forward layer."""
        return super().flops_per_token(seq_len) + 6.0 * self.layers * self._matrices_beside_one_expert(self.routing.chosen)

    def _matrices_beside_one_expert(self, experts: int) -> int:
        """Entries of a block's router, and of all but one of so many experts."""
        return self.width * self.routing.experts + (experts - 1) * 3 * self.width * self.mlp_width


class MoEDecoder(Decoder):
    """A decoder whose routers see whole rows on each rank of `tp`, and whose experts are cut by expert and along their hidden features."""

    layout: ClassVar[LayoutTable] = {
        **{pattern: rule for pattern, rule in Decoder.layout.items() if ".mlp" not in pattern},
        "layers.*.mlp": Partial(),
        **EXPERTS_LAYOUT,
    }


def moe_init_table(config: Qwen3MoEConfig) -> dict[str, Init]:
    """As a Llama's; an expert starts as a feed-forward layer does, and a router as narrow as the other matrices."""
    dense = llama.init_table(config)
    down = {name.replace(".mlp.", ".mlp.experts.").removesuffix(".weight"): rule for name, rule in dense.items() if ".mlp." in name}
    attention = {name: rule for name, rule in dense.items() if ".mlp." not in name}
    return down | attention | {"*.experts.*_proj": Normal(config.init_std), "*.router.weight": Normal(config.init_std)}


def _block(config: Qwen3Config, mlp: MLP | MoE) -> Block:
    attention = Attention(config.width, config.heads, config.kv_heads, config.head_width, config.norm_eps)
    return Block(config.width, attention, mlp, config.norm_eps)


def qwen3_0_6b() -> Qwen3Config:
    """Qwen3 0.6B."""
    return _dense(width=1024, layers=28, heads=16, mlp_width=3072, tied=True)


def qwen3_1_7b() -> Qwen3Config:
    """Qwen3 1.7B."""
    return _dense(width=2048, layers=28, heads=16, mlp_width=6144, tied=True)


def qwen3_4b() -> Qwen3Config:
    """Qwen3 4B."""
    return _dense(width=2560, layers=36, heads=32, mlp_width=9728, tied=True)


def qwen3_8b() -> Qwen3Config:
    """Qwen3 8B."""
    return _dense(width=4096, layers=36, heads=32, mlp_width=12288, tied=False)


def qwen3_14b() -> Qwen3Config:
    """Qwen3 14B."""
    return _dense(width=5120, layers=40, heads=40, mlp_width=17408, tied=False)


def qwen3_32b() -> Qwen3Config:
    """Qwen3 32B."""
    return _dense(width=5120, layers=64, heads=64, mlp_width=25600, tied=False)


def qwen3_30b_a3b() -> Qwen3MoEConfig:
    """Qwen3 30B with 3B active."""
    return _moe(width=2048, layers=48, heads=32, mlp_width=768)


def qwen3_235b_a22b() -> Qwen3MoEConfig:
    """Qwen3 235B with 22B active."""
    return _moe(width=4096, layers=94, heads=64, mlp_width=1536)


def _dense(*, width: int, layers: int, heads: int, mlp_width: int, tied: bool) -> Qwen3Config:
    """What all dense Qwen3 share: 151,936 tokens and 8 key/value heads."""
    return Qwen3Config(vocab_size=151_936, width=width, layers=layers, heads=heads, kv_heads=8, mlp_width=mlp_width, tied=tied)


def _moe(*, width: int, layers: int, heads: int, mlp_width: int) -> Qwen3MoEConfig:
    """What both share: 4 key/value heads, and 8 of 128 experts for each token."""
    return Qwen3MoEConfig(
        vocab_size=151_936,
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=4,
        mlp_width=mlp_width,
        routing=RoutingConfig(experts=128, chosen=8, balance_loss=0.001),
    )
