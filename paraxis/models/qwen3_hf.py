"""Qwen3's configuration from and to Hugging Face's `config.json`: a Llama's, with other types and their own defaults."""

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.models import llama_hf
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen2_hf import refuse_late_windows
from paraxis.models.qwen3 import Qwen3Config, Qwen3MoEConfig
from paraxis.ops.routing import RoutingConfig

# What transformers' configurations take where config.json is silent, and its LlamaConfig would take something else.
DEFAULTS = {"head_dim": 128, "max_position_embeddings": 32_768}
MOE_DEFAULTS = {"num_key_value_heads": 4, "max_position_embeddings": 32_768, "norm_topk_prob": False, "router_aux_loss_coef": 0.001}


def config_from_hf(config: Mapping[str, Any]) -> Qwen3Config:
    """The Qwen3Config of a `config.json` whose model_type is "qwen3". Raises ConfigError for what this decoder does not compute."""
    return Qwen3Config(**_shape(DEFAULTS | dict(config)))


def moe_config_from_hf(config: Mapping[str, Any]) -> Qwen3MoEConfig:
    """The Qwen3MoEConfig of a `config.json` whose model_type is "qwen3_moe". Raises ConfigError for what this decoder does not compute."""
    config = MOE_DEFAULTS | dict(config)
    for name, everywhere in (("decoder_sparse_step", 1), ("mlp_only_layers", [])):
        if (value := config.get(name) or everywhere) != everywhere:
            raise ConfigError(f"config.json: {name}={value!r} is not supported; every layer here is a mixture of experts ({everywhere!r})")
    try:
        routing = RoutingConfig(
            experts=config["num_experts" if "num_experts" in config else "num_local_experts"],  # transformers 4's spelling, and 5's
            chosen=config["num_experts_per_tok"],
            normalise=config["norm_topk_prob"],
            balance_loss=config["router_aux_loss_coef"],
        )
        return Qwen3MoEConfig(**_shape(config | {"intermediate_size": config["moe_intermediate_size"]}), routing=routing)
    except KeyError as error:
        raise ConfigError(f"config.json has no {error}, which a Qwen3 MoE needs; is it the config.json of one?") from None


def _shape(config: Mapping[str, Any]) -> dict[str, Any]:
    refuse_late_windows(config)
    shape = llama_hf.config_from_hf(config)
    return {field.name: getattr(shape, field.name) for field in fields(LlamaConfig)}


def config_to_hf(config: Qwen3Config) -> dict[str, Any]:
    """A `config.json`, with RoPE in transformers 4's spelling, which 5 and the inference engines read too."""
    written = llama_hf.config_to_hf(config) | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "use_sliding_window": False}
    del written["mlp_bias"]  # Qwen3's type has no such setting
    return written


def moe_config_to_hf(config: Qwen3MoEConfig) -> dict[str, Any]:
    """A `config.json` in the spelling of transformers 4. Raises ConfigError for routing that Qwen3's type does not have."""
    routing = config.routing
    told = RoutingConfig(experts=routing.experts, chosen=routing.chosen, normalise=routing.normalise, balance_loss=routing.balance_loss)
    if replace(routing, z_loss=0.0) != told:  # the z-loss is training's alone
        raise ConfigError(f"model.routing={routing} has no Hugging Face form; a Qwen3 MoE has a softmax gate without groups, scale or bias")
    return config_to_hf(config) | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "intermediate_size": routing.chosen * config.mlp_width,  # of dense layers, of which there are none
        "moe_intermediate_size": config.mlp_width,
        "num_experts": routing.experts,
        "num_experts_per_tok": routing.chosen,
        "norm_topk_prob": routing.normalise,
        "router_aux_loss_coef": routing.balance_loss,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
    }
