"""Qwen2's configuration from and to Hugging Face's `config.json`: a Llama's, with another type and its own defaults."""

from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from paraxis.models import llama_hf
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen2 import Qwen2Config

# What transformers' Qwen2Config takes where config.json is silent, and its LlamaConfig would take something else.
DEFAULTS = {"max_position_embeddings": 32_768}


def config_from_hf(config: Mapping[str, Any]) -> Qwen2Config:
    """The Qwen2Config of a `config.json` whose model_type is "qwen2". Raises ConfigError for what this decoder does not compute."""
    config = DEFAULTS | dict(config)
    refuse_late_windows(config)
    shape = llama_hf.config_from_hf(config)
    return Qwen2Config(**{field.name: getattr(shape, field.name) for field in fields(LlamaConfig)})


def refuse_late_windows(config: Mapping[str, Any]) -> None:
    """Raises ConfigError where layers from max_window_layers on attend to a sliding window, as Qwen's can."""
    late = config.get("max_window_layers", 28) < config.get("num_hidden_layers", 0)
    if config.get("use_sliding_window", False) and late:
        llama_hf.refuse_window(config, config.get("sliding_window", 4096), "set use_sliding_window to false")


def config_to_hf(config: Qwen2Config) -> dict[str, Any]:
    """A `config.json`, with RoPE in transformers 4's spelling, which 5 and the inference engines read too."""
    written = llama_hf.config_to_hf(config) | {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "use_sliding_window": False}
    del written["attention_bias"], written["mlp_bias"]  # Qwen2's type has no such settings: its biases are part of it
    return written
