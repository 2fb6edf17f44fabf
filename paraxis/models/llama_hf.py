"""Llama's configuration from and to Hugging Face's `config.json`, in transformers 4's spelling of RoPE and in 5's."""

from collections.abc import Mapping
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.models.llama import LlamaConfig
from paraxis.ops.rope import RopeConfig


def config_from_hf(config: Mapping[str, Any]) -> LlamaConfig:
    """The LlamaConfig of a `config.json` whose model_type is "llama". Raises ConfigError for what this decoder does not compute."""
    for name, supported in (("attention_bias", False), ("mlp_bias", False), ("hidden_act", "silu")):
        if (value := config.get(name, supported)) != supported:
            raise ConfigError(f"config.json: {name}={value!r} is not supported; this decoder has {name}={supported!r} only")
    try:
        heads = config["num_attention_heads"]
        return LlamaConfig(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            mlp_width=config["intermediate_size"],
            head_size=config.get("head_dim"),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(config),
            tied=config.get("tie_word_embeddings", False),
            max_seq_len=config.get("max_position_embeddings", 2048),
            init_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConfigError(f"config.json has no {error}, which a decoder like Llama needs; is it the config.json of one?") from None


def _rope_from_hf(config: Mapping[str, Any]) -> RopeConfig:
    """transformers 5 has everything in rope_parameters; 4 has rope_theta beside a rope_scaling that may be null."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return RopeConfig(theta=theta)
    if kind != "llama3":
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; this decoder knows 'default' and 'llama3'")
    return RopeConfig(
        theta=theta,
        factor=rope["factor"],
        low_frequency_factor=rope["low_freq_factor"],
        high_frequency_factor=rope["high_freq_factor"],
        original_context=rope["original_max_position_embeddings"],
    )


def refuse_window(config: Mapping[str, Any], window: int | None, known: str) -> None:
    """Raises ConfigError for a sliding window that positions within max_position_embeddings would notice. `known` is a next move."""
    positions = config["max_position_embeddings"]
    if window is not None and window < positions:
        raise ConfigError(
            f"config.json: sliding_window={window} under max_position_embeddings={positions} is not supported; every layer here attends "
            f"to the whole row, which is the same only for rows of up to {window}. {known}; or, for such rows, lower "
            f"max_position_embeddings to {window}"
        )


def config_to_hf(config: LlamaConfig) -> dict[str, Any]:
    """A `config.json`, with RoPE in transformers 4's spelling, which 5 and the inference engines read too."""
    rope = config.rope
    scaling = {
        "rope_type": "llama3",
        "factor": rope.factor,
        "low_freq_factor": rope.low_frequency_factor,
        "high_freq_factor": rope.high_frequency_factor,
        "original_max_position_embeddings": rope.original_context,
    }
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "intermediate_size": config.mlp_width,
        "head_dim": config.head_width,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling if rope.factor != 1 else None,
        "tie_word_embeddings": config.tied,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
        "attention_bias": False,
        "mlp_bias": False,
    }
