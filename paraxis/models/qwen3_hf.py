"""Dense Qwen3's configuration from and to Hugging Face's `config.json`: a Llama's, with another type and its own defaults."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.models import llama_hf
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen3 import Qwen3Config

# What transformers' Qwen3Config takes where config.json is silent, and its LlamaConfig would take something else.
DEFAULTS = {"head_dim": 128, "max_position_embeddings": 32_768}


def config_from_hf(config: Mapping[str, Any]) -> Qwen3Config:
    """The Qwen3Config of a `config.json` whose model_type is "qwen3". Raises ConfigError for what this decoder does not compute."""
    if config.get("use_sliding_window", False):
        raise ConfigError("config.json: use_sliding_window=true is not supported; every layer here attends to the whole row")
    shape = llama_hf.config_from_hf(DEFAULTS | dict(config))
    return Qwen3Config(**{field.name: getattr(shape, field.name) for field in fields(LlamaConfig)})


def config_to_hf(config: Qwen3Config) -> dict[str, Any]:
    """A `config.json`, with RoPE in transformers 4's spelling, which 5 and the inference engines read too."""
    written = llama_hf.config_to_hf(config) | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
    del written["mlp_bias"]  # Qwen3's type has no such setting
    return written
