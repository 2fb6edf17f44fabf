"""transformers, given our weights and our config.json, computes our logits."""

import json

import pytest
import torch

from paraxis.base.errors import CheckpointError, ConfigError
from paraxis.base.keys import to_theirs
from paraxis.models import llama
from paraxis.models.llama import LlamaConfig
from paraxis.models.registry import from_hf, from_record, to_hf, to_record
from paraxis.ops.rope import RopeConfig

transformers = pytest.importorskip("transformers")

TINY = {"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48, "max_seq_len": 512}
SHAPES = {
    "grouped": LlamaConfig(**TINY),
    "whole": LlamaConfig(**TINY | {"kv_heads": 4}),
    "tied": LlamaConfig(**TINY, tied=True),
    "scaled": LlamaConfig(**TINY, rope=RopeConfig(factor=8.0, original_context=64)),
    "wide_heads": LlamaConfig(**TINY, head_size=16, norm_eps=1e-6, rope=RopeConfig(theta=10_000.0)),
}


def judge(config: LlamaConfig, weights: dict[str, torch.Tensor]) -> torch.nn.Module:
    """transformers' model of our config.json, holding our weights."""
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(to_hf(config))).eval()
    renamed = {to_theirs(llama.KEYS, name): tensor for name, tensor in weights.items()}
    missing, unexpected = model.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tied else [])
    model.tie_weights()
    return model


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers(shape):
    config = SHAPES[shape]
    model = config.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    tokens = torch.randint(97, (2, 300))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), judge(config, dict(model.named_parameters()))(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("config", [*SHAPES.values(), llama.llama3_8b(), llama.llama3_1b()])
def test_config_json_survives_the_round_trip_in_either_spelling(config):
    written = json.loads(json.dumps(to_hf(config)))
    assert from_hf(written).head_width == config.head_width
    for spelling in (written, transformers.LlamaConfig.from_dict(written).to_dict()):
        again = from_hf(spelling)
        assert to_hf(again) == to_hf(config)
        assert again.parameters_count == config.parameters_count


def test_transformers_5_spelling_is_read():
    config = to_hf(SHAPES["scaled"])
    rope = config.pop("rope_scaling") | {"rope_theta": config.pop("rope_theta")}
    assert from_hf(config | {"rope_parameters": rope}).rope == SHAPES["scaled"].rope


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"model_type": "gpt2"}, "model_type='gpt2'"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu'"),
        ({"rope_scaling": {"rope_type": "yarn", "factor": 2.0}}, "yarn"),
    ],
)
def test_what_we_do_not_compute_is_refused(change, said):
    with pytest.raises(ConfigError, match=said):
        from_hf(to_hf(SHAPES["grouped"]) | change)


def test_a_config_without_its_shape_is_refused_by_field():
    with pytest.raises(ConfigError, match="hidden_size"):
        from_hf({"model_type": "llama", "vocab_size": 3, "num_attention_heads": 1})


@pytest.mark.parametrize("shape", SHAPES)
def test_records_give_the_same_configuration_back(shape):
    record = json.loads(json.dumps(to_record(SHAPES[shape])))
    assert from_record(record) == SHAPES[shape]


def test_foreign_records_are_refused():
    assert to_record(object()) is None
    with pytest.raises(CheckpointError, match="kind 'mamba'"):
        from_record({"kind": "mamba", "fields": {}})
    with pytest.raises(CheckpointError, match="wings"):
        from_record({"kind": "llama", "fields": TINY | {"wings": 2}})
