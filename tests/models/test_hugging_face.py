"""transformers, given our weights and our config.json, computes our logits."""

import json

import pytest
import torch

from paraxis.base.errors import CheckpointError, ConfigError
from paraxis.base.keys import to_theirs
from paraxis.base.layout import Split, matching
from paraxis.models import llama, mistral, qwen2
from paraxis.models.init import Zeros, default_rule
from paraxis.models.llama import LlamaConfig
from paraxis.models.mistral import MistralConfig
from paraxis.models.qwen2 import Qwen2Config
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
        ({"model_type": "bloom"}, "model_type='bloom'"),
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


VARIANTS = {
    "qwen2": (Qwen2Config(**TINY), transformers.Qwen2Config, transformers.Qwen2ForCausalLM, qwen2.KEYS),
    "qwen2_tied": (Qwen2Config(**TINY, tied=True), transformers.Qwen2Config, transformers.Qwen2ForCausalLM, qwen2.KEYS),
    "mistral": (MistralConfig(**TINY), transformers.MistralConfig, transformers.MistralForCausalLM, llama.KEYS),
    "mistral_wide": (MistralConfig(**TINY, head_size=16), transformers.MistralConfig, transformers.MistralForCausalLM, llama.KEYS),
}
PRESETS = {
    qwen2.qwen2_5_0_5b: 494_032_768,
    qwen2.qwen2_5_1_5b: 1_543_714_304,
    qwen2.qwen2_5_3b: 3_085_938_688,
    qwen2.qwen2_5_7b: 7_615_616_512,
    mistral.mistral_7b: 7_248_023_552,
    mistral.mistral_nemo_12b: 12_247_782_400,
    mistral.mistral_small_24b: 23_572_403_200,
}


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_presets_of_variants_have_the_published_number_of_parameters(preset):
    with torch.device("meta"):
        model = preset().build()
    assert sum(p.numel() for p in model.parameters()) == preset().parameters_count == PRESETS[preset]


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_variant_s_logits_are_those_of_transformers(variant):
    config, their_config, their_model, keys = VARIANTS[variant]
    model = config.build()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    theirs = their_model(their_config.from_dict(to_hf(config))).eval()
    missing, unexpected = theirs.load_state_dict({to_theirs(keys, n): p for n, p in model.named_parameters()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"] if config.tied else [], [])
    theirs.tie_weights()
    tokens = torch.randint(97, (2, 300))
    with torch.no_grad():
        ours, judged = model.logits(tokens), theirs(tokens).logits
    assert (ours - judged).abs().max() <= 1e-4 * judged.abs().max()


@pytest.mark.parametrize("config", [*(row[0] for row in VARIANTS.values()), *(preset() for preset in PRESETS)])
def test_a_variant_s_config_json_and_record_give_the_same_configuration_back(config):
    written = json.loads(json.dumps(to_hf(config)))
    kind = transformers.Qwen2Config if isinstance(config, Qwen2Config) else transformers.MistralConfig
    for spelling in (written, kind.from_dict(written).to_dict()):
        again = from_hf(spelling)
        assert (type(again), to_hf(again)) == (type(config), to_hf(config))
    assert from_record(json.loads(json.dumps(to_record(config)))) == config


def test_sliding_windows_are_refused_where_a_position_would_notice_them():
    written = to_hf(VARIANTS["mistral"][0])
    for told in (written | {"sliding_window": 64}, {name: value for name, value in written.items() if name != "sliding_window"}):
        with pytest.raises(
            ConfigError, match=r"sliding_window=\d+ under max_position_embeddings=\d+ is not supported.*sliding_window=null"
        ):
            from_hf(told | {"max_position_embeddings": 8192})
    assert from_hf(written | {"sliding_window": 512}) == from_hf(written)
    written = to_hf(VARIANTS["qwen2"][0]) | {"use_sliding_window": True, "sliding_window": 64}
    assert from_hf(written) == from_hf(written | {"use_sliding_window": False})  # from layer 28 on, which it has not
    with pytest.raises(ConfigError, match=r"sliding_window=64 under .*use_sliding_window to false"):
        from_hf(written | {"max_window_layers": 1})


def test_biases_are_split_with_their_heads_and_start_at_zero():
    model = VARIANTS["qwen2"][0].build()
    names = [name for name, _ in model.named_parameters() if name.endswith("bias")]
    assert len(names) == 6
    for name in names:
        assert matching(model.layout, name) == Split("tp", 0)
        assert default_rule(name, (32,)) == Zeros()
        assert matching(model.init, name) is None


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
