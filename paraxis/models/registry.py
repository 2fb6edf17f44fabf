"""The models we know by name: for records in checkpoints, and for Hugging Face's `config.json`."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, is_dataclass
from typing import Any, get_type_hints

from paraxis.base.errors import CheckpointError, ConfigError
from paraxis.models import deepseek_hf, gpt_hf, llama_hf, mistral_hf, qwen2_hf, qwen3_hf
from paraxis.models.deepseek import DeepSeekConfig
from paraxis.models.gpt import GPTConfig
from paraxis.models.llama import LlamaConfig
from paraxis.models.mistral import MistralConfig
from paraxis.models.qwen2 import Qwen2Config
from paraxis.models.qwen3 import Qwen3Config, Qwen3MoEConfig

Known = LlamaConfig | DeepSeekConfig | GPTConfig

MODELS: dict[str, type[Known]] = {
    "deepseek": DeepSeekConfig,
    "gpt": GPTConfig,
    "llama": LlamaConfig,
    "mistral": MistralConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "qwen3_moe": Qwen3MoEConfig,
}

# By Hugging Face's model_type.
FROM_HF: dict[str, Callable[[Mapping[str, Any]], Known]] = {
    "deepseek_v2": deepseek_hf.config_from_hf,
    "deepseek_v3": deepseek_hf.config_from_hf,
    "gpt2": gpt_hf.config_from_hf,
    "llama": llama_hf.config_from_hf,
    "mistral": mistral_hf.config_from_hf,
    "qwen2": qwen2_hf.config_from_hf,
    "qwen3": qwen3_hf.config_from_hf,
    "qwen3_moe": qwen3_hf.moe_config_from_hf,
}
TO_HF: dict[type, Callable[[Any], dict[str, Any]]] = {
    DeepSeekConfig: deepseek_hf.config_to_hf,
    GPTConfig: gpt_hf.config_to_hf,
    LlamaConfig: llama_hf.config_to_hf,
    MistralConfig: mistral_hf.config_to_hf,
    Qwen2Config: qwen2_hf.config_to_hf,
    Qwen3Config: qwen3_hf.config_to_hf,
    Qwen3MoEConfig: qwen3_hf.moe_config_to_hf,
}


def to_record(config: Any) -> dict[str, Any] | None:
    """`config` as JSON-able {"kind", "fields"}, or None for a model that a recipe brought and only the recipe can build."""
    for kind, known in MODELS.items():
        if type(config) is known:
            return {"kind": kind, "fields": asdict(config)}
    return None


def from_record(record: Mapping[str, Any]) -> Known:
    """The configuration that `to_record` wrote down. Raises CheckpointError for a kind or field unknown here."""
    kind = record.get("kind")
    if kind not in MODELS:
        raise CheckpointError(f"the checkpoint holds a model of kind {kind!r}; this version knows {', '.join(MODELS)}")
    try:
        return _rebuild(MODELS[kind], record["fields"])
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"the checkpoint's record of its {kind} model does not fit this version: {error}") from None


def _rebuild(kind: type, values: Mapping[str, Any]) -> Any:
    types = get_type_hints(kind)
    return kind(**{name: _rebuild(types[name], value) if is_dataclass(types.get(name)) else value for name, value in values.items()})


def from_hf(config_json: Mapping[str, Any]) -> Known:
    """The configuration of a Hugging Face `config.json`. Raises ConfigError for a model_type or a feature we do not have."""
    model_type = config_json.get("model_type")
    if model_type not in FROM_HF:
        raise ConfigError(f"config.json: model_type={model_type!r} is not supported; choose a model of type {', '.join(FROM_HF)}")
    return FROM_HF[model_type](config_json)


def to_hf(config: Any) -> dict[str, Any]:
    """`config` as a Hugging Face `config.json`. Raises ConfigError for a model that Hugging Face has no type for."""
    if type(config) not in TO_HF:
        raise ConfigError(f"a {type(config).__name__} has no Hugging Face form here; only {', '.join(FROM_HF)} can be exported")
    return TO_HF[type(config)](config)
