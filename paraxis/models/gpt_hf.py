"""GPT's configuration from and to Hugging Face's `config.json` of a GPT-2."""

from collections.abc import Mapping
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.models.gpt import GPTConfig

# What this decoder computes, and transformers' GPT2Config takes where config.json is silent.
COMPUTED = {
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def config_from_hf(config: Mapping[str, Any]) -> GPTConfig:
    """The GPTConfig of a `config.json` whose model_type is "gpt2". Raises ConfigError for what this decoder does not compute."""
    for name, (first, *others) in COMPUTED.items():
        if (value := config.get(name, first)) not in (first, *others):
            raise ConfigError(f"config.json: {name}={value!r} is not supported; this decoder has {name}={first!r} only")
    try:
        return GPTConfig(
            vocab_size=config["vocab_size"],
            width=config["n_embd"],
            layers=config["n_layer"],
            heads=config["n_head"],
            mlp_width=config.get("n_inner"),
            norm_eps=config.get("layer_norm_epsilon", 1e-5),
            tied=config.get("tie_word_embeddings", True),
            max_seq_len=config.get("n_positions", 1024),
            init_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConfigError(f"config.json has no {error}, which a GPT-2 needs; is it the config.json of one?") from None


def config_to_hf(config: GPTConfig) -> dict[str, Any]:
    """A `config.json`. Dropout is none: this decoder was trained without."""
    return {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": config.vocab_size,
        "n_embd": config.width,
        "n_layer": config.layers,
        "n_head": config.heads,
        "n_inner": config.mlp_width,
        "n_positions": config.max_seq_len,
        "layer_norm_epsilon": config.norm_eps,
        "initializer_range": config.init_std,
        "tie_word_embeddings": config.tied,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
        "resid_pdrop": 0.0,
    } | {name: first for name, (first, *_) in COMPUTED.items()}
