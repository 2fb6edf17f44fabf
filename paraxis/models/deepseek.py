"""DeepSeek-V2 and V3: latent attention, experts beside shared ones after a few dense layers, and the published shapes.

Shapes: DeepSeek-V2 (arXiv:2405.04434, section 3.1.2 and appendix B), DeepSeek-V3 (arXiv:2412.19437, section 4.2), Moonlight
(arXiv:2502.16982), and the config.json of each release. V3's multi-token prediction modules are not part of this model.
"""

from dataclasses import dataclass, field
from typing import Annotated

from paraxis.base.errors import ConfigError
from paraxis.base.keys import KeyTable, Stacked
from paraxis.base.layout import Gather, LayoutTable, Partial, Split
from paraxis.models import llama
from paraxis.models.decoder import Block, Decoder
from paraxis.models.init import Init, Normal
from paraxis.models.mla import MLA
from paraxis.models.mlp import MLP
from paraxis.models.moe import EXPERTS_LAYOUT, MoE
from paraxis.ops.norm import RMSNorm
from paraxis.ops.rope import YarnConfig
from paraxis.ops.routing import RoutingConfig

# Our parameter names beside Hugging Face's. Models without a latent vector for queries have q_proj, the others q_a and q_b.
KEYS: KeyTable = {ours: theirs for ours, theirs in llama.KEYS.items() if ".k_proj." not in ours and ".v_proj." not in ours} | {
    "layers.{i}.attention.q_a_proj.weight": "model.layers.{i}.self_attn.q_a_proj.weight",
    "layers.{i}.attention.q_a_norm.weight": "model.layers.{i}.self_attn.q_a_layernorm.weight",
    "layers.{i}.attention.q_b_proj.weight": "model.layers.{i}.self_attn.q_b_proj.weight",
    "layers.{i}.attention.kv_a_proj.weight": "model.layers.{i}.self_attn.kv_a_proj_with_mqa.weight",
    "layers.{i}.attention.kv_a_norm.weight": "model.layers.{i}.self_attn.kv_a_layernorm.weight",
    "layers.{i}.attention.kv_b_proj.weight": "model.layers.{i}.self_attn.kv_b_proj.weight",
    "layers.{i}.mlp.router.weight": "model.layers.{i}.mlp.gate.weight",
    "layers.{i}.mlp.bias": "model.layers.{i}.mlp.gate.e_score_correction_bias",
    "layers.{i}.mlp.experts.gate_proj": Stacked("model.layers.{i}.mlp.experts.{e}.gate_proj.weight", transpose=True),
    "layers.{i}.mlp.experts.up_proj": Stacked("model.layers.{i}.mlp.experts.{e}.up_proj.weight", transpose=True),
    "layers.{i}.mlp.experts.down_proj": Stacked("model.layers.{i}.mlp.experts.{e}.down_proj.weight", transpose=True),
    "layers.{i}.mlp.shared.gate_proj.weight": "model.layers.{i}.mlp.shared_experts.gate_proj.weight",
    "layers.{i}.mlp.shared.up_proj.weight": "model.layers.{i}.mlp.shared_experts.up_proj.weight",
    "layers.{i}.mlp.shared.down_proj.weight": "model.layers.{i}.mlp.shared_experts.down_proj.weight",
}


@dataclass(frozen=True, kw_only=True)
class DeepSeekConfig:
    """The shape of a DeepSeek-V2 or V3, which differ in `routing` alone, and how its parameters start."""

    vocab_size: Annotated[int, "entries of the vocabulary"]
    width: Annotated[int, "width of the residual stream"]
    layers: Annotated[int, "how many blocks"]
    dense_layers: Annotated[int, "how many of them, the first, have one feed-forward layer in place of experts"] = 1
    heads: Annotated[int, "attention heads of a block"]
    q_rank: Annotated[int | None, "width of the vector that a block's queries are made of; none makes them of its input"] = None
    kv_rank: Annotated[int, "width of the vector that a block's keys and values are made of"] = 512
    nope_width: Annotated[int, "entries of a head's queries and keys that positions leave alone"] = 128
    rope_width: Annotated[int, "entries of a head's queries and keys that positions turn"] = 64
    value_width: Annotated[int, "entries of a head's values"] = 128
    mlp_width: Annotated[int, "width inside the feed-forward layer of a dense block"]
    expert_width: Annotated[int, "width inside one expert"]
    shared_experts: Annotated[int, "experts that every token goes to, as wide as the others; they are one layer"] = 1
    routing: Annotated[RoutingConfig, "how tokens choose experts"]
    norm_eps: Annotated[float, "added to the mean square before its root is taken; latent vectors have their own"] = 1e-6
    rope: Annotated[YarnConfig, "rotary position embedding"] = field(default_factory=YarnConfig)
    max_seq_len: Annotated[int, "positions the model is made for; written into Hugging Face's config"] = 163_840
    init_std: Annotated[float, "standard deviation of the first weights; those that add to the residual stream start narrower"] = 0.02

    def __post_init__(self) -> None:
        counts = ("vocab_size", "width", "layers", "heads", "kv_rank", "nope_width", "value_width", "mlp_width", "expert_width")
        for name in (*counts, "shared_experts", "max_seq_len"):
            if getattr(self, name) < 1:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be at least 1")
        if self.q_rank is not None and self.q_rank < 1:
            raise ConfigError(f"model.q_rank={self.q_rank} must be at least 1, or none")
        if not 0 <= self.dense_layers <= self.layers:
            raise ConfigError(f"model.dense_layers={self.dense_layers} must be from 0 to model.layers={self.layers}")
        if self.rope_width < 2 or self.rope_width % 2:
            raise ConfigError(f"model.rope_width={self.rope_width} has no pairs to rotate; make it even")
        if self.value_width > self.head_width:
            raise ConfigError(
                f"model.value_width={self.value_width} is more than nope_width + rope_width = {self.head_width}; "
                "values as wide as queries and keys are the most that attention takes, so lower it"
            )
        for name in ("norm_eps", "init_std"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"model.{name}={getattr(self, name)} must be over 0")

    @property
    def head_width(self) -> int:
        """Of queries and keys, and so of what attention is given; values have `value_width`."""
        return self.nope_width + self.rope_width

    def build(self) -> "DeepSeek":
        """The model; built under `torch.device("meta")` it takes no memory."""
        return DeepSeek(self)

    @property
    def parameters_count(self) -> int:
        """Parameters in all, selection biases included."""
        routing, expert_layers = self.routing, self.layers - self.dense_layers
        norms = self.layers * (2 * self.width + self.kv_rank + (self.q_rank or 0)) + self.width
        biases = expert_layers * routing.experts if routing.has_bias else 0
        return 2 * self.vocab_size * self.width + self._block_matrices(routing.experts) + norms + biases

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one trained token, forward and backward, in a row of `seq_len`.

        As a Llama's (see there), with the router and the experts that a token is sent to, and heads whose values are not as wide as
        their queries and keys.
        """
        matrices = self._block_matrices(self.routing.chosen) + self.vocab_size * self.width
        return 6.0 * matrices + 3.0 * self.layers * self.heads * (self.head_width + self.value_width) * seq_len

    def _block_matrices(self, experts: int) -> int:
        """Entries of all blocks' matrices, with so many experts beside the shared ones."""
        queries = self.heads * self.head_width
        attention = self.width * queries if self.q_rank is None else self.q_rank * (self.width + queries)
        attention += self.width * (self.kv_rank + self.rope_width) + self.kv_rank * self.heads * (self.nope_width + self.value_width)
        attention += self.heads * self.value_width * self.width
        mixture = self.width * self.routing.experts + 3 * self.width * self.expert_width * (experts + self.shared_experts)
        dense = 3 * self.width * self.mlp_width
        return self.layers * attention + self.dense_layers * dense + (self.layers - self.dense_layers) * mixture


class DeepSeek(Decoder):
    """A decoder with latent attention, whose first blocks are dense."""

    def __init__(self, config: DeepSeekConfig) -> None:
        super().__init__(
            vocab_size=config.vocab_size,
            width=config.width,
            blocks=[_block(config, layer) for layer in range(config.layers)],
            norm=RMSNorm(config.width, config.norm_eps),
            rope=config.rope,
            tied=False,
            init=init_table(config),
            keys=KEYS,
        )
        self.layout = layout_table(config)  # type: ignore[misc]  # of this shape: the names of dense and mixed layers do not tell them apart


def _block(config: DeepSeekConfig, layer: int) -> Block:
    attention = MLA(
        config.width,
        config.heads,
        q_rank=config.q_rank,
        kv_rank=config.kv_rank,
        nope_width=config.nope_width,
        rope_width=config.rope_width,
        value_width=config.value_width,
        score_scale=config.rope.score_scale,
    )
    if layer < config.dense_layers:
        return Block(config.width, attention, MLP(config.width, config.mlp_width), config.norm_eps)
    mixture = MoE(config.width, config.expert_width, config.routing, shared_width=config.shared_experts * config.expert_width)
    return Block(config.width, attention, mixture, config.norm_eps)


def layout_table(config: DeepSeekConfig) -> LayoutTable:
    """Where this shape may be split. Latent vectors and their norms are whole on each rank of `tp`, which has some of the heads."""
    mixed = {f"layers.{layer}.mlp": Partial() for layer in range(config.dense_layers, config.layers)}
    return {
        **mixed,
        **Decoder.layout,
        "layers.*.attention": Gather(),  # latent vectors, made on every rank, are made of its input too
        "layers.*.attention.q_b_proj.weight": Split("tp", 0),
        "layers.*.attention.kv_b_proj.weight": Split("tp", 0),
        **EXPERTS_LAYOUT,
        "layers.*.mlp.shared.gate_proj.weight": Split("tp", 0),
        "layers.*.mlp.shared.up_proj.weight": Split("tp", 0),
        "layers.*.mlp.shared.down_proj.weight": Split("tp", 1),
    }


def init_table(config: DeepSeekConfig) -> dict[str, Init]:
    """As a Llama's (see there); experts, shared or not, start as a feed-forward layer does, and routers as narrow as the other matrices."""
    table: dict[str, Init] = {}
    for layer in range(config.layers):
        narrowed = Normal(config.init_std / (2 * (layer + 1)) ** 0.5)
        table |= {f"layers.{layer}.attention.o_proj.weight": narrowed, f"layers.{layer}.mlp.*down_proj*": narrowed}
    matrices = dict.fromkeys(("*_proj.weight", "*.experts.*_proj", "*.router.weight"), Normal(config.init_std))
    return table | matrices | {"embed.weight": Normal(1.0), "head.weight": Normal(config.width**-0.5)}


def deepseek_v2_lite() -> DeepSeekConfig:
    """DeepSeek-V2-Lite: 15.7B, 2.4B active."""
    return _v2(
        width=2048,
        layers=27,
        heads=16,
        q_rank=None,
        mlp_width=10944,
        expert_width=1408,
        routing=RoutingConfig(experts=64, chosen=6, normalise=False, balance_loss=0.001),
    )


def deepseek_v2() -> DeepSeekConfig:
    """DeepSeek-V2: 236B, 21B active. Of its balance losses the one over experts; those over devices depend on the layout."""
    routing = RoutingConfig(experts=160, chosen=6, normalise=False, scale=16.0, groups=8, chosen_groups=3, balance_loss=0.003)
    return _v2(width=5120, layers=60, heads=128, q_rank=1536, mlp_width=12288, expert_width=1536, routing=routing)


def deepseek_v3() -> DeepSeekConfig:
    """DeepSeek-V3: 671B, 37B active."""
    return DeepSeekConfig(
        vocab_size=129_280,
        width=7168,
        layers=61,
        dense_layers=3,
        heads=128,
        q_rank=1536,
        mlp_width=18432,
        expert_width=2048,
        routing=v3_routing(experts=256, chosen=8, scale=2.5, groups=8, chosen_groups=4),
        rope=YarnConfig(factor=40.0),
    )


def deepseek_v3_16b() -> DeepSeekConfig:
    """V3's kind of model at 16B, 3B active: the shape of Moonlight 16B-A3B."""
    return DeepSeekConfig(
        vocab_size=163_840,
        width=2048,
        layers=27,
        heads=16,
        mlp_width=11264,
        expert_width=1408,
        shared_experts=2,
        routing=v3_routing(experts=64, chosen=6, scale=2.446),
        norm_eps=1e-5,
        rope=YarnConfig(theta=50_000.0),
        max_seq_len=8192,
    )


def v3_routing(*, experts: int, chosen: int, scale: float, groups: int = 1, chosen_groups: int = 1) -> RoutingConfig:
    """How all of V3's kind route, with V3's speed of the selection bias and its balance loss (section 4.2)."""
    return RoutingConfig(
        experts=experts,
        chosen=chosen,
        gate="sigmoid",
        scale=scale,
        groups=groups,
        chosen_groups=chosen_groups,
        group_score="top2",
        biased=True,
        bias_rate=0.001,
        balance_loss=0.0001,
    )


def _v2(
    *, width: int, layers: int, heads: int, q_rank: int | None, mlp_width: int, expert_width: int, routing: RoutingConfig
) -> DeepSeekConfig:
    """What both V2 share: 102,400 tokens, two shared experts, and RoPE stretched from 4,096 to 163,840 positions."""
    return DeepSeekConfig(
        vocab_size=102_400,
        width=width,
        layers=layers,
        heads=heads,
        q_rank=q_rank,
        mlp_width=mlp_width,
        expert_width=expert_width,
        shared_experts=2,
        routing=routing,
        rope=YarnConfig(factor=40.0, mscale=0.707, mscale_all_dim=0.707),
    )
