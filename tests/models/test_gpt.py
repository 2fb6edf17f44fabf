"""GPT: published counts, transformers' logits, and refusals."""

import json

import pytest
import torch
from safetensors.torch import save_file

from paraxis.base.device import CPU
from paraxis.base.errors import ConfigError
from paraxis.base.seams import Batch, HasAttention, HasHeadLoss, Staged
from paraxis.cli.weights import open_weights
from paraxis.generate.engine import generate
from paraxis.generate.sample import SamplingConfig
from paraxis.models import gpt
from paraxis.models.gpt import GPTConfig
from paraxis.models.registry import from_hf, from_record, to_hf, to_record

TINY = GPTConfig(vocab_size=97, width=32, layers=2, heads=4, max_seq_len=64)
COUNTS = {gpt.gpt2_124m: 124_439_808, gpt.gpt2_355m: 354_823_168, gpt.gpt2_774m: 774_030_080, gpt.gpt2_1558m: 1_557_611_200}


def built_on_meta(config: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in config.build().parameters())


@pytest.mark.parametrize("preset", COUNTS, ids=lambda preset: preset.__name__)
def test_gpt2_has_the_published_number_of_parameters(preset):
    assert built_on_meta(preset()) == preset().parameters_count == COUNTS[preset]


@pytest.mark.parametrize("name", gpt.MEGATRON)
def test_megatrons_shapes_have_the_papers_number_of_parameters(name):
    """Equation 2 of arXiv:2104.04473, which leaves the last norm out: 12 l h^2 (1 + 13 / (12 h) + (V + s) / (12 l h))."""
    width, layers, heads = gpt.MEGATRON[name]
    config = gpt.megatron(width, layers, heads)
    expected = 12 * layers * width**2 + 13 * layers * width + (51_200 + 2048) * width
    assert built_on_meta(config) == config.parameters_count == expected + 2 * width
    assert expected / 1e9 == pytest.approx(float(name.removesuffix("b")), rel=0.03)


def test_flops_are_the_papers_with_half_the_attention_and_no_recomputation():
    """Equation 3 of arXiv:2104.04473 recomputes (a third more) and counts scores that the causal mask hides."""
    config = gpt.megatron(12288, 96, 96)
    theirs = 96 * 96 * 12288**2 * (1 + 2048 / (6 * 12288) + 51_200 / (16 * 96 * 12288))
    head = 6 * 51_200 * 12288
    attention = 96 * 96 * 12288 * 2048 / 6
    assert config.flops_per_token(2048) == pytest.approx((theirs - head - attention) * 3 / 4 + head + attention * 3 / 8, rel=1e-12)


@pytest.mark.parametrize("tied", [True, False])
def test_logits_are_those_of_transformers(tied):
    transformers = pytest.importorskip("transformers")
    shape = {"vocab_size": 97, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "tie_word_embeddings": tied}
    config = GPTConfig(vocab_size=97, width=32, layers=2, heads=4, max_seq_len=64, tied=tied)
    torch.manual_seed(0)
    model, judge = config.build(), transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if parameter.ndim == 1 else 0.0, std=0.2)
    judge.load_state_dict(as_gpt2(dict(model.named_parameters()), tied))
    tokens = torch.randint(97, (3, 50))
    with torch.no_grad():
        ours, theirs = model.logits(tokens), judge(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


def test_weights_saved_without_their_head_and_with_causal_masks_come_in(tmp_path):
    """As the hub has GPT-2: bare names, and a mask beside every layer."""
    transformers = pytest.importorskip("transformers")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=97, n_embd=32, n_layer=2, n_head=4, n_positions=64)).eval()
    bare = {name: x.detach().contiguous() for name, x in model.transformer.state_dict().items() if not name.endswith(".attn.bias")}
    masks = {f"h.{n}.attn.bias": torch.ones(1, 1, 64, 64) for n in range(2)} | {"h.0.attn.masked_bias": torch.tensor(-1e4)}
    save_file(bare | masks, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(model.config.to_dict()))
    tokens = torch.randint(97, (2, 30))
    with torch.no_grad():
        ours, theirs = open_weights(tmp_path).load(CPU, torch.float32).logits(tokens), model(tokens).logits
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "relu"}, "activation_function='relu' is not supported"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
    ],
)
def test_what_it_does_not_compute_is_refused(change, said):
    assert from_hf(to_hf(TINY)) == TINY
    with pytest.raises(ConfigError, match=said):
        from_hf(to_hf(TINY) | change)


def as_gpt2(ours: dict[str, torch.Tensor], tied: bool) -> dict[str, torch.Tensor]:
    """Our weights by GPT-2's names: matrices turned, queries, keys and values in one."""
    theirs = {"wte.weight": ours["embed.weight"], "wpe.weight": ours["positions.weight"]}
    theirs |= {f"ln_f.{kind}": ours[f"norm.{kind}"] for kind in ("weight", "bias")}
    for n in range(2):
        for kind in ("weight", "bias"):
            block = {name.removeprefix(f"layers.{n}."): x for name, x in ours.items() if name.startswith(f"layers.{n}.")}
            made = {
                "ln_1": block[f"attention_norm.{kind}"],
                "ln_2": block[f"mlp_norm.{kind}"],
                "attn.c_attn": torch.cat([block[f"attention.{letter}_proj.{kind}"] for letter in "qkv"]).t(),
                "attn.c_proj": block[f"attention.o_proj.{kind}"].t(),
                "mlp.c_fc": block[f"mlp.up_proj.{kind}"].t(),
                "mlp.c_proj": block[f"mlp.down_proj.{kind}"].t(),
            }
            theirs |= {f"h.{n}.{name}.{kind}": x for name, x in made.items()}
    return {f"transformer.{name}": x for name, x in theirs.items()} | {"lm_head.weight": ours["embed.weight" if tied else "head.weight"]}


def test_it_offers_every_seam_and_its_record_gives_it_back():
    model = TINY.build()
    assert isinstance(model, HasAttention)
    assert isinstance(model, HasHeadLoss)
    assert isinstance(model, Staged)
    record = to_record(TINY)
    assert record is not None
    assert from_record(record) == TINY


def test_more_tokens_than_positions_are_refused():
    model = TINY.build()
    with pytest.raises(ConfigError, match="rows of 65 tokens are longer than the model's 64 positions"):
        model.logits(torch.zeros(1, 65, dtype=torch.int64))
    prompt = torch.zeros(1, 60, dtype=torch.int64)
    with pytest.raises(ConfigError, match=r"65 tokens, .* the model's 64 positions"):
        next(generate(model, prompt, SamplingConfig(max_tokens=5)))
    assert len(list(generate(model, prompt, SamplingConfig(max_tokens=4)))) == 4


def test_documents_do_not_see_each_other():
    torch.manual_seed(0)
    model = TINY.build().double()
    first, second = torch.randint(97, (1, 9)), torch.randint(97, (1, 14))
    tokens = torch.cat([first, second], dim=1)
    positions = torch.cat([torch.arange(9), torch.arange(14)])[None]
    documents = torch.tensor([[0] * 9 + [1] * 14])
    together = model.logits(tokens, positions, documents)
    torch.testing.assert_close(together, torch.cat([model.logits(first), model.logits(second)], dim=1), rtol=1e-10, atol=1e-12)


def test_a_compiled_block_is_one_graph_and_gives_the_same():
    tokens = torch.randint(97, (2, 24))
    batch = Batch(tokens, tokens, torch.arange(24).expand(2, 24))
    model = TINY.build().double()
    expected = model(batch)
    for block in model.blocks():
        block.forward = torch.compile(block.forward, backend="aot_eager", fullgraph=True)
    loss = model(batch)
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"heads": 3}, "model.width=32 is not a multiple of model.heads=3"),
        ({"layers": 0}, "model.layers=0"),
        ({"max_seq_len": 0}, "model.max_seq_len=0"),
        ({"mlp_width": 0}, "model.mlp_width=0"),
        ({"norm_eps": 0.0}, "model.norm_eps"),
    ],
)
def test_nonsense_is_refused_by_name(wrong, said):
    with pytest.raises(ConfigError, match=said):
        GPTConfig(**{"vocab_size": 97, "width": 32, "layers": 2, "heads": 4} | wrong)
