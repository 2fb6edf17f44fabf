"""Qwen3: published counts, transformers' logits, round trips, and one graph a block."""

import json
from dataclasses import replace

import pytest
import torch

from paraxis.base.axes import Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.keys import to_theirs
from paraxis.base.layout import Box, Partial, matching, place
from paraxis.base.seams import Batch
from paraxis.models import qwen3
from paraxis.models.init import Normal
from paraxis.models.moe import MoE
from paraxis.models.qwen3 import Qwen3Config, Qwen3MoEConfig
from paraxis.models.registry import from_hf, from_record, to_hf, to_record
from paraxis.ops.routing import RoutingConfig

TINY = {"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48, "head_size": 16, "max_seq_len": 512}
DENSE = {"free": Qwen3Config(**TINY), "tied": Qwen3Config(**TINY, tied=True)}
MOE = Qwen3MoEConfig(**TINY, routing=RoutingConfig(experts=8, chosen=2, balance_loss=0.01, z_loss=0.001))
PRESETS = {
    qwen3.qwen3_0_6b: 596_049_920,
    qwen3.qwen3_1_7b: 1_720_574_976,
    qwen3.qwen3_4b: 4_022_468_096,
    qwen3.qwen3_8b: 8_190_735_360,
    qwen3.qwen3_14b: 14_768_307_200,
    qwen3.qwen3_32b: 32_762_123_264,
    qwen3.qwen3_30b_a3b: 30_532_122_624,
    qwen3.qwen3_235b_a22b: 235_093_634_560,
}


def built(config):
    """The model, told as a training step would tell it by what to divide its auxiliary losses."""
    model = config.build()
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.begin_step(torch.tensor(0.5))
    return model


def randomised(config):
    torch.manual_seed(0)
    model = built(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    return model


def batch() -> Batch:
    tokens = torch.randint(97, (2, 25), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(24).expand(2, 24))


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_presets_have_the_published_number_of_parameters_built_on_meta(preset):
    config = preset()
    with torch.device("meta"):
        model = built(config)
    assert sum(p.numel() for p in model.parameters()) == config.parameters_count == PRESETS[preset]


def test_flops_count_the_experts_a_token_goes_to_and_no_others():
    assert qwen3.qwen3_30b_a3b().flops_per_token(0) / 6 == pytest.approx(3.35e9 - 151_936 * 2048, rel=0.01)
    assert qwen3.qwen3_235b_a22b().flops_per_token(0) / 6 == pytest.approx(22e9, rel=0.02)
    assert MOE.flops_per_token(64) == DENSE["free"].flops_per_token(64) + 6 * 2 * (32 * 8 + 3 * 32 * 48)


@pytest.mark.parametrize("config", DENSE.values(), ids=DENSE)
def test_logits_are_those_of_transformers(config):
    transformers = pytest.importorskip("transformers")
    model = randomised(config)
    judge = transformers.Qwen3ForCausalLM(transformers.Qwen3Config.from_dict(to_hf(config))).eval()
    missing, unexpected = judge.load_state_dict({to_theirs(qwen3.KEYS, n): p for n, p in model.named_parameters()}, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tied else [])
    judge.tie_weights()
    tokens = torch.randint(97, (2, 100))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), judge(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_moe_logits_are_those_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = randomised(MOE)
    judge = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig.from_dict(to_hf(MOE))).eval()
    weights = {theirs: p for n, p in model.named_parameters() if isinstance(theirs := to_theirs(qwen3.MOE_KEYS, n), str)}
    for number, block in enumerate(model.blocks()):
        experts, name = block.mlp.experts, f"model.layers.{number}.mlp.experts"
        weights[f"{name}.gate_up_proj"] = torch.cat([experts.gate_proj, experts.up_proj], -1).mT
        weights[f"{name}.down_proj"] = experts.down_proj.mT
    judge.load_state_dict(weights)
    tokens = torch.randint(97, (2, 100))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), judge(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("config", [*DENSE.values(), qwen3.qwen3_0_6b(), qwen3.qwen3_8b()])
def test_config_json_survives_the_round_trip_in_either_spelling(config):
    transformers = pytest.importorskip("transformers")
    written = json.loads(json.dumps(to_hf(config)))
    for spelling in (written, transformers.Qwen3Config.from_dict(written).to_dict()):
        assert from_hf(spelling) == config


def test_moe_config_json_survives_the_round_trip_in_either_spelling():
    transformers = pytest.importorskip("transformers")
    for config in (replace(MOE, routing=replace(MOE.routing, z_loss=0.0)), qwen3.qwen3_30b_a3b(), qwen3.qwen3_235b_a22b()):
        written = json.loads(json.dumps(to_hf(config)))
        for spelling in (written, transformers.Qwen3MoeConfig.from_dict(written).to_dict()):
            assert from_hf(spelling) == config


def test_what_qwen3_does_not_have_or_we_do_not_compute_is_refused():
    windows = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1}
    with pytest.raises(ConfigError, match="sliding_window=16 under max_position_embeddings=512"):
        from_hf(to_hf(DENSE["free"]) | windows)
    assert from_hf(to_hf(DENSE["free"]) | windows | {"max_window_layers": 2}) == DENSE["free"]
    assert from_hf(to_hf(DENSE["free"]) | windows | {"sliding_window": 512}) == DENSE["free"]
    for change in ({"decoder_sparse_step": 2}, {"mlp_only_layers": [0]}):
        with pytest.raises(ConfigError, match="every layer here is a mixture"):
            from_hf(to_hf(MOE) | change)
    with pytest.raises(ConfigError, match="num_experts_per_tok"):
        from_hf({name: value for name, value in to_hf(MOE).items() if name != "num_experts_per_tok"})
    for change in ({"gate": "sigmoid"}, {"scale": 2.0}, {"groups": 2}, {"biased": True}):
        with pytest.raises(ConfigError, match="no Hugging Face form"):
            to_hf(replace(MOE, routing=replace(MOE.routing, **change)))


@pytest.mark.parametrize("config", [*DENSE.values(), MOE])
def test_records_give_the_same_configuration_back(config):
    assert from_record(json.loads(json.dumps(to_record(config)))) == config


@pytest.mark.parametrize(("config", "keys"), [(DENSE["free"], qwen3.KEYS), (MOE, qwen3.MOE_KEYS)], ids=["dense", "moe"])
def test_each_parameter_has_a_key(config, keys):
    names = {name.replace("layers.1.", "layers.{i}.") for name, _ in config.build().named_parameters() if "layers.0." not in name}
    assert names == set(keys)


def test_every_matrix_starts_by_its_table_and_what_joins_the_residual_stream_starts_narrower():
    for config in (DENSE["free"], MOE):
        model = built(config)
        for name, parameter in model.named_parameters():
            rule = matching(model.init, name)
            if parameter.ndim == 1:
                assert rule is None, name
            elif "layers" in name:
                layer = int(name.split(".")[1])
                narrow = "down_proj" in name or "o_proj" in name
                assert rule == Normal(0.02 / (2 * (layer + 1)) ** 0.5 if narrow else 0.02), name


def test_experts_are_cut_by_expert_and_along_their_hidden_features_and_routers_are_whole():
    model = built(MOE)
    partial = [name for name, _ in model.named_modules() if isinstance(matching(model.layout, name), Partial)]
    assert partial == ["layers.0.mlp", "layers.1.mlp"]
    degrees, at = Degrees(fsdp=2, tp=2, ep=2), {"pp": 0, "dp": 0, "fsdp": 1, "cp": 0, "tp": 1}
    mlp = {name: p for name, p in model.named_parameters() if name.startswith("layers.1.mlp.")}
    boxes = {name: place(name, tuple(p.shape), model.layout, degrees, at).computed for name, p in mlp.items()}
    assert boxes == {
        "layers.1.mlp.router.weight": Box((0, 0), (8, 32)),
        "layers.1.mlp.experts.gate_proj": Box((4, 0, 24), (4, 32, 24)),
        "layers.1.mlp.experts.up_proj": Box((4, 0, 24), (4, 32, 24)),
        "layers.1.mlp.experts.down_proj": Box((4, 24, 0), (4, 24, 32)),
    }


@pytest.mark.parametrize("config", [DENSE["free"], MOE], ids=["dense", "moe"])
def test_half_the_heads_run_the_same_code(config):
    model = built(config)
    attention = model.blocks()[0].attention
    for name, rows in (("q_proj", 32), ("k_proj", 16), ("v_proj", 16)):
        layer = getattr(attention, name)
        layer.weight = torch.nn.Parameter(layer.weight[:rows])
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :32])
    assert model(batch()).isfinite()


@pytest.mark.parametrize(("config", "dtype"), [(DENSE["free"], torch.float64), (MOE, torch.float64), (MOE, torch.bfloat16)])
def test_a_compiled_block_is_one_graph_and_gives_the_same(config, dtype):
    model = randomised(config).to(dtype)
    expected = model(batch())
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    loss = model(batch())
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12 if dtype == torch.float64 else 1e-2, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_bf16_computes_its_loss_in_fp32_and_fp64_stays_fp64():
    for dtype, loss_dtype in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        loss = built(MOE).to(dtype)(batch())
        assert loss.dtype == loss_dtype
        assert loss.isfinite()
