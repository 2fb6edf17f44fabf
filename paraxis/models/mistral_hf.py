"""Mistral's configuration from and to Hugging Face's `config.json`: a Llama's, with another type and its own defaults."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from paraxis.models import llama_hf
from paraxis.models.llama import LlamaConfig
from paraxis.models.mistral import MistralConfig

# What transformers' MistralConfig takes where config.json is silent, and its LlamaConfig would take something else.
DEFAULTS = {"num_key_value_heads": 8, "max_position_embeddings": 131_072, "sliding_window": 4096}


def config_from_hf(config: Mapping[str, Any]) -> MistralConfig:
    """The MistralConfig of a `config.json` whose model_type is "mistral". Raises ConfigError for what this decoder does not compute."""
    config = DEFAULTS | dict(config)
    llama_hf.refuse_window(config, config["sliding_window"], "Mistral 7B v0.2 and later have sliding_window=null")
    shape = llama_hf.config_from_hf(config)
    return MistralConfig(**{field.name: getattr(shape, field.name) for field in fields(LlamaConfig)})


def config_to_hf(config: MistralConfig) -> dict[str, Any]:
    """A `config.json`, with RoPE in transformers 4's spelling, which 5 and the inference engines read too."""
    written = llama_hf.config_to_hf(config) | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": None}
    del written["attention_bias"], written["mlp_bias"]  # Mistral's type has no such settings
    return written
