"""DeepSeek-V2's and V3's configuration from and to Hugging Face's `config.json`, in transformers 4's spelling of RoPE and in 5's.

The two types differ in how tokens choose experts. `config.json` also names what no released model varies, which must be as released.
"""

from collections.abc import Mapping
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.models.deepseek import DeepSeekConfig
from paraxis.ops.rope import YarnConfig
from paraxis.ops.routing import RoutingConfig

# What this decoder computes, and `config.json` may be silent about.
FIXED = {
    "hidden_act": "silu",
    "attention_bias": False,
    "tie_word_embeddings": False,
    "moe_layer_freq": 1,
}
# The same, of one type only: V2's weights sum to what they are, V3's to 1 before they are scaled.
FIXED_V2 = FIXED | {"mlp_bias": False, "scoring_func": "softmax", "norm_topk_prob": False}
FIXED_V3 = FIXED | {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "norm_topk_prob": True, "rope_interleave": True}


def config_from_hf(config: Mapping[str, Any]) -> DeepSeekConfig:
    """The configuration of a `config.json` of type "deepseek_v2" or "deepseek_v3". Raises ConfigError for what we do not compute."""
    kind = config.get("model_type")
    fixed = FIXED_V3 if kind == "deepseek_v3" else FIXED_V2
    for name, supported in fixed.items():
        if (value := config.get(name, supported)) != supported:
            raise ConfigError(f"config.json: {name}={value!r} is not supported; this {kind} has {name}={supported!r} only")
    if config.get("num_key_value_heads", config.get("num_attention_heads")) != config.get("num_attention_heads"):
        raise ConfigError("config.json: num_key_value_heads differs from num_attention_heads; latent attention makes keys for every head")
    try:
        return DeepSeekConfig(
            vocab_size=config["vocab_size"],
            width=config["hidden_size"],
            layers=config["num_hidden_layers"],
            dense_layers=config["first_k_dense_replace"],
            heads=config["num_attention_heads"],
            q_rank=config["q_lora_rank"],
            kv_rank=config["kv_lora_rank"],
            nope_width=config["qk_nope_head_dim"],
            rope_width=config["qk_rope_head_dim"],
            value_width=config["v_head_dim"],
            mlp_width=config["intermediate_size"],
            expert_width=config["moe_intermediate_size"],
            shared_experts=config["n_shared_experts"],
            routing=_routing_v3(config) if kind == "deepseek_v3" else _routing_v2(config),
            norm_eps=config.get("rms_norm_eps", 1e-6),
            rope=_rope_from_hf(config),
            max_seq_len=config.get("max_position_embeddings", 4096 if kind == "deepseek_v3" else 2048),
            init_std=config.get("initializer_range", 0.02),
        )
    except KeyError as error:
        raise ConfigError(f"config.json has no {error}, which a DeepSeek needs; is it the config.json of a {kind}?") from None


def _routing_v2(config: Mapping[str, Any]) -> RoutingConfig:
    """Groups count only under the method that is limited to some of them."""
    method = config.get("topk_method", "greedy")
    if method not in ("greedy", "group_limited_greedy"):
        raise ConfigError(f"config.json: topk_method={method!r} is not supported; deepseek_v2 knows 'greedy' and 'group_limited_greedy'")
    limited = method == "group_limited_greedy"
    return RoutingConfig(
        experts=config["n_routed_experts"],
        chosen=config["num_experts_per_tok"],
        normalise=False,
        scale=config["routed_scaling_factor"],
        groups=config["n_group"] if limited else 1,
        chosen_groups=config["topk_group"] if limited else 1,
        balance_loss=config.get("aux_loss_alpha", 0.0),
    )


def _routing_v3(config: Mapping[str, Any]) -> RoutingConfig:
    """The speed of the selection bias is not in `config.json`: it stays where it is until a recipe says otherwise."""
    return RoutingConfig(
        experts=config["n_routed_experts"],
        chosen=config["num_experts_per_tok"],
        gate="sigmoid",
        scale=config["routed_scaling_factor"],
        groups=config["n_group"],
        chosen_groups=config["topk_group"],
        group_score="top2",
        biased=True,
        balance_loss=config.get("aux_loss_alpha", 0.0),
    )


def _rope_from_hf(config: Mapping[str, Any]) -> YarnConfig:
    """transformers 5 has everything in rope_parameters; 4 has rope_theta beside a rope_scaling that may be null."""
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    theta = rope.get("rope_theta", config.get("rope_theta", 10_000.0))
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return YarnConfig(theta=theta)
    if kind != "yarn":
        raise ConfigError(f"config.json: rope type {kind!r} is not supported; this DeepSeek knows 'default' and 'yarn'")
    for name in ("attention_factor", "truncate"):
        if rope.get(name) is not None:
            raise ConfigError(f"config.json: {name}={rope[name]!r} of yarn is not supported; DeepSeek derives it, leave it out")
    return YarnConfig(
        theta=theta,
        factor=rope["factor"],
        beta_fast=rope.get("beta_fast", 32.0),
        beta_slow=rope.get("beta_slow", 1.0),
        mscale=rope.get("mscale", 1.0),
        mscale_all_dim=rope.get("mscale_all_dim", 0.0),
        original_context=rope["original_max_position_embeddings"],
    )


def config_to_hf(config: DeepSeekConfig) -> dict[str, Any]:
    """A `config.json`, with RoPE in transformers 4's spelling, which 5 and the inference engines read too.

    Raises ConfigError for routing that neither type has.
    """
    rope, routing = config.rope, config.routing
    scaling = {
        "type": "yarn",
        "factor": rope.factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "original_max_position_embeddings": rope.original_context,
    }
    return _routing_to_hf(routing) | {
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "first_k_dense_replace": config.dense_layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.heads,
        "q_lora_rank": config.q_rank,
        "kv_lora_rank": config.kv_rank,
        "qk_nope_head_dim": config.nope_width,
        "qk_rope_head_dim": config.rope_width,
        "v_head_dim": config.value_width,
        "intermediate_size": config.mlp_width,
        "moe_intermediate_size": config.expert_width,
        "n_shared_experts": config.shared_experts,
        "n_routed_experts": routing.experts,
        "num_experts_per_tok": routing.chosen,
        "routed_scaling_factor": routing.scale,
        "n_group": routing.groups,
        "topk_group": routing.chosen_groups,
        "aux_loss_alpha": routing.balance_loss,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": rope.theta,
        "rope_scaling": scaling if rope.factor != 1 else None,
        "max_position_embeddings": config.max_seq_len,
        "initializer_range": config.init_std,
    }


def _routing_to_hf(routing: RoutingConfig) -> dict[str, Any]:
    """What tells the two types apart."""
    settings = (routing.gate, routing.normalise, routing.has_bias)
    if settings == ("softmax", False, False) and (routing.groups == 1 or routing.group_score == "max"):
        method = "greedy" if routing.groups == 1 else "group_limited_greedy"
        return {"architectures": ["DeepseekV2ForCausalLM"], "model_type": "deepseek_v2", "topk_method": method} | FIXED_V2
    if settings == ("sigmoid", True, True) and (routing.groups == 1 or routing.group_score == "top2"):
        # No multi-token prediction: without this, transformers would look for one such layer.
        return {"architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "num_nextn_predict_layers": 0} | FIXED_V3
    raise ConfigError(
        f"routing.gate={routing.gate!r} with normalise={routing.normalise}, a bias: {routing.has_bias} and "
        f"group_score={routing.group_score!r} has no Hugging Face form: deepseek_v2 is softmax, not normalised, without a bias, by max; "
        "deepseek_v3 is sigmoid, normalised, with a bias, by top2"
    )
