"""Llama's shapes, counts and seams."""

import pytest
import torch

from paraxis.base.dtypes import at_least_fp32
from paraxis.base.errors import ConfigError
from paraxis.base.layout import Gather, Split, matching
from paraxis.base.seams import IGNORE, Batch, HasAttention, HasHeadLoss
from paraxis.models import llama
from paraxis.models.llama import LlamaConfig, torchtitan_flops_per_token
from paraxis.ops.attention import Reference
from paraxis.ops.loss import reference_head_loss
from paraxis.ops.rope import RopeConfig


def tiny(**changes) -> LlamaConfig:
    shape = {"vocab_size": 97, "width": 32, "layers": 2, "heads": 4, "kv_heads": 2, "mlp_width": 48}
    return LlamaConfig(**(shape | changes))


def batch(vocabulary=97, masked=False) -> Batch:
    g = torch.Generator().manual_seed(0)
    tokens = torch.randint(vocabulary, (2, 24), generator=g)
    targets = torch.randint(vocabulary, (2, 24), generator=g)
    targets[0, 5] = IGNORE
    positions = torch.arange(24).expand(2, 24)
    if not masked:
        return Batch(tokens, targets, positions)
    documents = torch.tensor([[0] * 9 + [1] * 15, [0] * 1 + [1] * 3 + [2] * 20])
    starts = torch.tensor([[0] * 9 + [9] * 15, [0] + [1] * 3 + [4] * 20])
    return Batch(tokens, targets, positions - starts, documents)


@pytest.mark.parametrize(
    ("config", "count"),
    [
        (llama.llama3_1b(), 1_235_814_400),
        (llama.llama3_3b(), 3_212_749_824),
        (llama.llama3_8b(), 8_030_261_248),
        (llama.llama3_70b(), 70_553_706_496),
        (llama.llama3_405b(), 405_853_388_800),
    ],
)
def test_presets_have_the_published_number_of_parameters_built_on_meta(config, count):
    with torch.device("meta"):
        model = config.build()
    assert sum(p.numel() for p in model.parameters()) == config.parameters_count == count


def test_parameter_names_are_the_documented_ones_and_each_has_a_key():
    names = [name for name, _ in tiny(layers=1).build().named_parameters()]
    assert names == [
        "embed.weight",
        "layers.0.attention_norm.weight",
        "layers.0.attention.q_proj.weight",
        "layers.0.attention.k_proj.weight",
        "layers.0.attention.v_proj.weight",
        "layers.0.attention.o_proj.weight",
        "layers.0.mlp_norm.weight",
        "layers.0.mlp.gate_proj.weight",
        "layers.0.mlp.up_proj.weight",
        "layers.0.mlp.down_proj.weight",
        "norm.weight",
        "head.weight",
    ]
    assert {name.replace("layers.0", "layers.{i}") for name in names} == set(llama.KEYS)
    assert "head.weight" not in dict(tiny(tied=True).build().named_parameters())


def test_the_layout_splits_every_matrix_and_gathers_before_both_layers():
    model = tiny().build()
    for name, parameter in model.named_parameters():
        rule = matching(model.layout, name)
        if parameter.ndim == 1:
            assert rule is None, name
        else:
            assert rule == Split("tp", 1 if "o_proj" in name or "down_proj" in name else 0), name
    assert [name for name, _ in model.named_modules() if isinstance(matching(model.layout, name), Gather)] == [
        "layers.0.attention",
        "layers.0.mlp",
        "layers.1.attention",
        "layers.1.mlp",
    ]


def test_flops_of_the_8b_are_the_stated_formula_and_torchtitans():
    config = llama.llama3_8b()
    assert config.flops_per_token(8192) == pytest.approx(45.03e9 + 6.44e9, rel=1e-3)
    assert torchtitan_flops_per_token(config, 8192) == pytest.approx(57.9e9, rel=1e-3)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_fast_paths_give_the_reference_loss_and_gradients_in_fp64(masked, tied):
    model = tiny(tied=tied).build().double()
    data = batch(masked=masked)

    def outcome():
        model.zero_grad()
        loss = model(data)
        loss.backward()
        return [loss, *(p.grad.clone() for p in model.parameters())]

    fast = outcome()
    model.use_attention(Reference())
    model.use_head_loss(reference_head_loss)
    for ours, theirs in zip(fast, outcome(), strict=True):
        assert ours.dtype == torch.float64
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12 * theirs.abs().max().item())


def test_documents_kept_apart_lose_what_they_lose_alone():
    model = tiny().build().double()
    whole = batch(masked=True)
    alone = 0
    for row, start, end in ((0, 0, 9), (0, 9, 24), (1, 0, 1), (1, 1, 4), (1, 4, 24)):
        cut = slice(row, row + 1), slice(start, end)
        alone += model(Batch(whole.tokens_bt[cut], whole.targets_bt[cut], whole.positions_bt[cut]))
    torch.testing.assert_close(model(whole), alone, rtol=1e-12, atol=0)


def test_logits_and_loss_agree():
    model = tiny().build()
    data = batch()
    logits = at_least_fp32(model.logits(data.tokens_bt))
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), data.targets_bt.flatten(), reduction="sum", ignore_index=IGNORE)
    torch.testing.assert_close(model(data), expected)


def test_it_offers_both_seams():
    model = tiny().build()
    assert isinstance(model, HasAttention)
    assert isinstance(model, HasHeadLoss)
    attend = Reference()
    model.use_attention(attend)
    assert all(block.attention.attend is attend for block in model.blocks())


@pytest.mark.parametrize("masked", [False, True])
def test_a_compiled_block_is_one_graph_and_gives_the_same(masked):
    data = batch(masked=masked)
    model = tiny().build().double()
    expected = model(data)
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    loss = model(data)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


def test_heads_are_inferred_so_half_of_them_run_the_same_code():
    model = tiny().build()
    attention = model.blocks()[0].attention
    for name, rows in (("q_proj", 16), ("k_proj", 8), ("v_proj", 8)):
        layer = getattr(attention, name)
        layer.weight = torch.nn.Parameter(layer.weight[:rows])
    attention.o_proj.weight = torch.nn.Parameter(attention.o_proj.weight[:, :16])
    assert model(batch()).isfinite()


def test_bf16_computes_its_loss_in_fp32():
    loss = tiny().build().bfloat16()(batch())
    assert loss.dtype == torch.float32
    assert loss.isfinite()


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": 3}, "kv_heads=2"),
        ({"width": 30}, "model.width=30 is not a multiple of model.heads=4"),
        ({"layers": 0}, "model.layers=0"),
        ({"head_size": 7}, "head_size"),
        ({"norm_eps": 0.0}, "norm_eps"),
    ],
)
def test_nonsense_is_refused_by_name(wrong, said):
    with pytest.raises(ConfigError, match=said):
        tiny(**wrong)


def test_a_head_may_be_wider_than_its_share():
    model = tiny(head_size=16, rope=RopeConfig(factor=2.0)).build()
    assert model.blocks()[0].attention.q_proj.weight.shape == (64, 32)
    assert model(batch()).isfinite()
