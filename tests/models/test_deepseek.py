"""DeepSeek-V2 and V3: published counts, transformers' logits with YaRN past its original context, round trips, splits that divide."""

import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from paraxis.base.axes import Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.keys import Stacked, to_theirs
from paraxis.base.layout import Gather, Partial, Split, matching, place
from paraxis.base.seams import Batch
from paraxis.generate.cache import cached
from paraxis.models import deepseek
from paraxis.models.deepseek import DeepSeekConfig, v3_routing
from paraxis.models.deepseek_hf import config_from_hf, config_to_hf
from paraxis.models.init import Normal
from paraxis.models.moe import MoE
from paraxis.models.registry import from_record, to_record
from paraxis.ops.attention import Reference
from paraxis.ops.rope import YarnConfig
from paraxis.ops.routing import RoutingConfig

TINY: dict[str, Any] = {
    "vocab_size": 96,
    "width": 32,
    "layers": 3,
    "heads": 4,
    "kv_rank": 16,
    "nope_width": 8,
    "rope_width": 8,
    "value_width": 12,
    "mlp_width": 48,
    "expert_width": 24,
    "shared_experts": 2,
    "max_seq_len": 512,
}
YARN = YarnConfig(factor=8.0, mscale=0.707, mscale_all_dim=0.707, original_context=64)
# Factors on queries and keys alike, and on the scores, differ from 1 here.
UNEVEN = replace(YARN, mscale=1.0, mscale_all_dim=0.5)
LITE = DeepSeekConfig(**TINY, rope=YARN, routing=RoutingConfig(experts=8, chosen=3, normalise=False, scale=1.5))
LIMITED = RoutingConfig(experts=16, chosen=3, normalise=False, scale=16.0, groups=8, chosen_groups=3)
V3 = v3_routing(experts=16, chosen=4, scale=2.5, groups=4, chosen_groups=2)
SHAPES = {
    "v2_lite": LITE,
    "v2": DeepSeekConfig(**TINY, q_rank=20, rope=YARN, routing=LIMITED),
    "v3": DeepSeekConfig(**TINY | {"dense_layers": 2}, q_rank=20, rope=UNEVEN, routing=V3),
    "v3_flat": DeepSeekConfig(**TINY, norm_eps=1e-5, routing=v3_routing(experts=8, chosen=3, scale=2.446)),
}
# In all, and as published, in billions: in all, and what a token is multiplied with.
PRESETS = {
    deepseek.deepseek_v2_lite: (15_706_484_224, "15.7", 2.4),
    deepseek.deepseek_v2: (235_741_434_880, "236", 21),
    deepseek.deepseek_v3: (671_026_419_200, "671", 37),
    deepseek.deepseek_v3_16b: (15_960_110_208, "16", 2.24 + 0.336),  # Moonlight's 2.24 are without the head
}


def built(config: DeepSeekConfig) -> deepseek.DeepSeek:
    """The model, told as a training step would tell it by what to divide its auxiliary losses."""
    model = config.build()
    for layer in model.modules():
        if isinstance(layer, MoE):
            layer.begin_step(torch.tensor(0.5))
    return model


def randomised(config: DeepSeekConfig) -> deepseek.DeepSeek:
    torch.manual_seed(0)
    model = built(config)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model


def batch() -> Batch:
    tokens = torch.randint(96, (2, 25), generator=torch.Generator().manual_seed(0))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(24).expand(2, 24))


def judge(config: DeepSeekConfig, model: deepseek.DeepSeek) -> torch.nn.Module:
    """transformers' model of our config.json, holding our weights: it keeps experts in one tensor, gate and up side by side."""
    transformers = pytest.importorskip("transformers")
    written = config_to_hf(config)
    kind = "V3" if written["model_type"] == "deepseek_v3" else "V2"
    theirs = getattr(transformers, f"Deepseek{kind}ForCausalLM")(getattr(transformers, f"Deepseek{kind}Config").from_dict(written))
    weights: dict[str, torch.Tensor] = {their: p for n, p in model.named_parameters() if isinstance(their := to_theirs(model.keys, n), str)}
    for number, block in enumerate(model.blocks()):
        if isinstance(block.mlp, MoE):
            experts, name = block.mlp.experts, f"model.layers.{number}.mlp.experts"
            weights[f"{name}.gate_up_proj"] = torch.cat([experts.gate_proj, experts.up_proj], -1).mT
            weights[f"{name}.down_proj"] = experts.down_proj.mT
    theirs.load_state_dict(weights)  # strict: each of theirs is one of ours, and the other way round
    return theirs.eval()


@pytest.mark.parametrize("shape", SHAPES)
def test_logits_are_those_of_transformers_past_the_original_context(shape):
    model = randomised(SHAPES[shape])
    tokens = torch.randint(96, (2, 200), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), judge(SHAPES[shape], model)(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.__name__)
def test_presets_have_the_published_number_of_parameters_built_on_meta(preset):
    config, (exact, published, active) = preset(), PRESETS[preset]
    with torch.device("meta"):
        model = config.build()
    assert sum(p.numel() for p in model.parameters()) == config.parameters_count == exact
    assert f"{exact / 1e9:.{len(published.partition('.')[2])}f}" == published
    assert config.flops_per_token(0) / 6e9 == pytest.approx(active, rel=0.03)


def test_flops_of_attention_know_that_values_are_narrower():
    assert LITE.flops_per_token(64) - LITE.flops_per_token(0) == 6 * 64 // 2 * LITE.layers * LITE.heads * (16 + 12)


@pytest.mark.parametrize("config", [*SHAPES.values(), *(preset() for preset in PRESETS)])
def test_config_json_survives_the_round_trip_in_either_spelling(config):
    transformers = pytest.importorskip("transformers")
    written = json.loads(json.dumps(config_to_hf(config)))
    theirs = transformers.DeepseekV3Config if written["model_type"] == "deepseek_v3" else transformers.DeepseekV2Config
    # Its speed is no part of config.json, but that there is a bias is.
    routing = replace(config.routing, bias_rate=0.0)
    for spelling in (written, theirs.from_dict(written).to_dict()):
        assert config_from_hf(spelling) == replace(config, routing=routing)


@pytest.mark.parametrize(
    ("shape", "change", "said"),
    [
        ("v2", {"norm_topk_prob": True}, "norm_topk_prob=True"),
        ("v2", {"topk_method": "noaux_tc"}, "topk_method='noaux_tc'"),
        ("v2", {"attention_bias": True}, "attention_bias=True"),
        ("v2", {"num_key_value_heads": 2}, "num_key_value_heads"),
        ("v3", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
        ("v3", {"rope_interleave": False}, "rope_interleave=False"),
        ("v3", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "linear"),
        ("v3", {"tie_word_embeddings": True}, "tie_word_embeddings=True"),
    ],
)
def test_what_we_do_not_compute_is_refused(shape, change, said):
    with pytest.raises(ConfigError, match=said):
        config_from_hf(config_to_hf(SHAPES[shape]) | change)


def test_routing_of_neither_type_is_not_exported():
    with pytest.raises(ConfigError, match="no Hugging Face form"):
        config_to_hf(replace(LITE, routing=replace(LITE.routing, normalise=True)))
    with pytest.raises(ConfigError, match="no Hugging Face form"):
        config_to_hf(replace(LITE, routing=replace(V3, group_score="max")))


@pytest.mark.parametrize("shape", SHAPES)
def test_records_give_the_same_configuration_back(shape):
    assert from_record(json.loads(json.dumps(to_record(SHAPES[shape])))) == SHAPES[shape]


def test_shapes_that_cannot_be_are_refused_by_name():
    for name, wrong in (("dense_layers", 4), ("rope_width", 7), ("q_rank", 0), ("value_width", 17)):
        with pytest.raises(ConfigError, match=f"model.{name}={wrong}"):
            replace(LITE, **{name: wrong})


@pytest.mark.parametrize("shape", SHAPES)
def test_each_parameter_has_a_key_and_each_matrix_a_first_value(shape):
    config = SHAPES[shape]
    model = built(config)
    for name, parameter in model.named_parameters():
        theirs = to_theirs(model.keys, name)
        assert theirs is not None, name
        assert isinstance(theirs, Stacked) == (parameter.ndim == 3), name
        rule = matching(model.init, name)
        if parameter.ndim == 1:
            assert rule is None, name
        elif name.startswith("layers."):
            narrow = "down_proj" in name or "o_proj" in name
            assert rule == Normal(0.02 / (2 * (int(name.split(".")[1]) + 1)) ** 0.5 if narrow else 0.02), name


def test_the_selection_bias_starts_at_zero_and_is_not_trained():
    (bias,) = (p for n, p in built(SHAPES["v3"]).named_parameters() if n.endswith("mlp.bias"))
    assert not bias.requires_grad
    assert not bias.any()


@pytest.mark.parametrize("shape", SHAPES)
def test_dense_layers_gather_and_expert_layers_sum_partial_outputs(shape):
    config = SHAPES[shape]
    model = built(config)
    for number in range(config.layers):
        rule = matching(model.layout, f"layers.{number}.mlp")
        assert isinstance(rule, Gather if number < config.dense_layers else Partial), number
        assert isinstance(matching(model.layout, f"layers.{number}.attention"), Gather)


@pytest.mark.parametrize("shape", SHAPES)
def test_splits_divide_over_two_tensor_parallel_ranks_and_two_of_experts(shape):
    degrees = Degrees(tp=2, fsdp=2, ep=2)
    at = {"pp": 0, "dp": 0, "fsdp": 1, "cp": 0, "tp": 1}
    model = built(SHAPES[shape])
    held = {}
    for name, parameter in model.named_parameters():
        where = place(name, tuple(parameter.shape), model.layout, degrees, at, frozen=not parameter.requires_grad)
        held[name.split(".", 2)[-1]] = parameter.numel() // where.computed.numel
    expected = {"attention.kv_b_proj.weight": 2, "attention.o_proj.weight": 2, "attention.kv_a_proj.weight": 1}
    if SHAPES[shape].q_rank is None:
        expected |= {"attention.q_proj.weight": 2}
    else:
        expected |= {"attention.q_a_proj.weight": 1, "attention.q_a_norm.weight": 1, "attention.q_b_proj.weight": 2}
    expected |= {"mlp.experts.gate_proj": 4, "mlp.experts.down_proj": 4, "mlp.shared.up_proj.weight": 2, "mlp.shared.down_proj.weight": 2}
    expected |= {"mlp.router.weight": 1, "mlp.up_proj.weight": 2, "attention.kv_a_norm.weight": 1}
    assert expected.items() <= held.items()


@pytest.mark.parametrize("shape", ["v2_lite", "v3"])
def test_halves_of_the_heads_add_up_to_the_whole(shape):
    """As two tensor-parallel ranks run it: outputs are summed, and so are the gradients of what both hold whole."""
    config = SHAPES[shape]
    x = torch.randn(2, 10, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    angles = torch.randn(2, 10, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)

    def parts(rank: int | None):
        attention = randomised(config).double().blocks()[0].attention
        for name, parameter in list(attention.named_parameters()):
            split = matching(built(config).layout, f"layers.0.attention.{name}")
            if rank is not None and isinstance(split, Split):
                half = parameter.detach().chunk(2, split.dim)[rank].clone()
                attention.get_submodule(name.removesuffix(".weight")).weight = torch.nn.Parameter(half)
        out = attention(x, angles.cos(), angles.sin(), None)
        (out * x).sum().backward()
        return out.detach(), {n: p.grad for n, p in attention.named_parameters() if p.grad is not None}

    (whole, gradients), (first, ones), (second, others) = (parts(rank) for rank in (None, 0, 1))
    torch.testing.assert_close(first + second, whole, rtol=1e-12, atol=1e-12)
    for name in ("kv_a_proj.weight", "kv_a_norm.weight"):
        torch.testing.assert_close(ones[name] + others[name], gradients[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", SHAPES)
def test_every_trained_parameter_gets_a_gradient_with_either_attention(shape):
    losses = []
    for attend in (None, Reference()):
        model = randomised(SHAPES[shape]).double()
        if attend is not None:
            model.use_attention(attend)
        loss = model(batch())
        loss.backward()
        assert loss.dtype == torch.float64
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
        losses.append(loss)
    torch.testing.assert_close(*losses, rtol=1e-12, atol=0)


@pytest.mark.parametrize("shape", ["v2_lite", "v3"])
def test_text_continued_from_kept_keys_has_the_logits_of_the_whole_text(shape):
    model = randomised(SHAPES[shape]).double()
    tokens = torch.randint(96, (1, 12), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model.logits(tokens)
        with cached(model, 12):
            parts = [model.logits(tokens[:, a:b], torch.arange(a, b)[None]) for a, b in ((0, 7), (7, 8), (8, 12))]
    torch.testing.assert_close(torch.cat(parts, 1), whole, rtol=1e-10, atol=1e-10)


def test_compiled_attention_is_one_graph_and_gives_the_same():
    attention, x = randomised(SHAPES["v3"]).double().blocks()[0].attention, torch.randn(2, 10, 32, dtype=torch.float64)
    angles = torch.randn(2, 10, 4, dtype=torch.float64)
    compiled = torch.compile(attention, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(*(f(x, angles.cos(), angles.sin(), None) for f in (compiled, attention)), rtol=1e-12, atol=1e-12)


def test_bf16_computes_its_loss_in_fp32():
    loss = built(SHAPES["v3"]).bfloat16()(batch())
    assert loss.dtype == torch.float32
    assert loss.isfinite()
