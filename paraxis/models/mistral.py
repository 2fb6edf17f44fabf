"""Mistral: Llama's decoder under another name, and some of the published shapes, which are those of each release's config.json.

Mistral 7B v0.1 attended to a sliding window (arXiv:2310.06825); from v0.2 on every layer attends to the whole row, as here.
"""

from dataclasses import dataclass, field
from typing import Annotated

from paraxis.models.llama import LlamaConfig
from paraxis.ops.rope import RopeConfig


@dataclass(frozen=True, kw_only=True)
class MistralConfig(LlamaConfig):
    """The shape of a Mistral, and how its parameters start."""

    rope: Annotated[RopeConfig, "rotary position embedding"] = field(default_factory=lambda: RopeConfig(theta=1_000_000.0))
    max_seq_len: Annotated[int, "positions the model is made for; written into Hugging Face's config"] = 32_768


def mistral_7b() -> MistralConfig:
    """Mistral 7B v0.3."""
    return MistralConfig(vocab_size=32_768, width=4096, layers=32, heads=32, kv_heads=8, mlp_width=14_336)


def mistral_nemo_12b() -> MistralConfig:
    """Mistral Nemo 12B (2407): heads narrower than width / heads."""
    return MistralConfig(
        vocab_size=131_072, width=5120, layers=40, heads=32, kv_heads=8, mlp_width=14_336, head_size=128, max_seq_len=131_072
    )


def mistral_small_24b() -> MistralConfig:
    """Mistral Small 24B (2501)."""
    rope = RopeConfig(theta=100_000_000.0)
    return MistralConfig(vocab_size=131_072, width=5120, layers=40, heads=32, kv_heads=8, mlp_width=32_768, head_size=128, rope=rope)
