"""Every model family: what transformers saved comes in, computes transformers' logits, and goes out again bit for bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from paraxis.base.device import CPU
from paraxis.cli.weights import open_weights
from paraxis.models.registry import FROM_HF
from tests.cli.folders import TEXT, refused, said, said_json, tokenizer

transformers = pytest.importorskip("transformers")

SHAPE = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
SHAPE |= {"num_key_value_heads": 2, "max_position_embeddings": 128, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 0}
MOE = {"head_dim": 16, "moe_intermediate_size": 24, "num_experts": 8, "num_experts_per_tok": 3}
LATENT = {"kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "moe_intermediate_size": 24}
LATENT |= {"num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
V2 = LATENT | {"topk_method": "greedy", "norm_topk_prob": False, "n_group": None, "topk_group": None}
FAMILIES = {
    "gpt2": ("gpt2", {}),
    "gpt2 free": ("gpt2", {"tie_word_embeddings": False}),
    "llama": ("llama", {}),
    "llama tied": ("llama", {"tie_word_embeddings": True}),
    "mistral": ("mistral", {"sliding_window": None, "head_dim": 16}),
    "qwen2": ("qwen2", {}),
    "qwen2 tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "qwen3_moe": ("qwen3_moe", MOE | {"norm_topk_prob": True}),
    "qwen3_moe sums free": ("qwen3_moe", MOE | {"norm_topk_prob": False}),
    "deepseek_v2 lite": ("deepseek_v2", V2 | {"q_lora_rank": None}),
    "deepseek_v3": ("deepseek_v3", LATENT | {"q_lora_rank": 24, "n_group": 4, "topk_group": 2}),
}


def judge(family: str) -> torch.nn.Module:
    """transformers' model of a tiny shape, every parameter away from its first value."""
    kind, changes = FAMILIES[family]
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind, **SHAPE | changes)).eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith(("norm.weight", "bias")):
                tensor.add_(torch.randn_like(tensor) * 0.1)
    return model


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_are_those_of_transformers_before_and_after_a_round_trip(tmp_path: Path, capsys, family: str):
    model = judge(family)
    model.save_pretrained(tmp_path / "hf")
    tokens = torch.randint(320, (2, 100))
    with torch.no_grad():
        theirs = model(tokens).logits
        for source in ("hf", "ours", "out"):
            ours = open_weights(tmp_path / source).load(CPU, torch.float32)
            assert (ours.logits(tokens) - theirs).abs().max() <= 1e-4 * theirs.abs().max(), source
            if source == "hf":
                said(capsys, "convert", "import", tmp_path / "hf", tmp_path / "ours")
                said(capsys, "convert", "export", tmp_path / "ours", tmp_path / "out")
        assert transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")(tokens).logits.equal(theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_sharded_folder_comes_back_bit_for_bit_with_its_config(tmp_path: Path, capsys, family: str, dtype: torch.dtype):
    judge(family).to(dtype).save_pretrained(tmp_path / "hf", max_shard_size="20KB")
    assert (tmp_path / "hf/model.safetensors.index.json").is_file()
    said(capsys, "convert", "import", tmp_path / "hf", tmp_path / "ours")
    said(capsys, "convert", "export", tmp_path / "ours", tmp_path / "out", "--shard-size", "10KB")
    assert same(tensors(tmp_path / "out"), tensors(tmp_path / "hf"))
    came, went = (json.loads((tmp_path / place / "config.json").read_text()) for place in ("hf", "out"))
    assert went == came | ({"num_nextn_predict_layers": 0} if "num_nextn_predict_layers" in came else {})


def test_a_selection_bias_keeps_its_width_where_weights_are_rounded(tmp_path: Path, capsys):
    judge("deepseek_v3").save_pretrained(tmp_path / "hf")
    said(capsys, "convert", "import", tmp_path / "hf", tmp_path / "ours", "--dtype", "bf16")
    said(capsys, "convert", "export", tmp_path / "ours", tmp_path / "out", "--dtype", "fp16")
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert {name for name, tensor in tensors(tmp_path / "out").items() if tensor.dtype == torch.float32} == {bias}
    assert tensors(tmp_path / "out")[bias].equal(tensors(tmp_path / "hf")[bias])
    assert json.loads((tmp_path / "out/config.json").read_text())["dtype"] == "float16"
    said(capsys, "convert", "export", tmp_path / "ours", tmp_path / "kept")
    assert json.loads((tmp_path / "kept/config.json").read_text())["dtype"] == "bfloat16"
    model = open_weights(tmp_path / "kept").load(CPU, torch.bfloat16)
    assert {name for name, p in model.named_parameters() if p.dtype != torch.bfloat16} == {"layers.1.mlp.bias"}
    assert model.logits(torch.randint(320, (1, 9))).isfinite().all()


def test_every_family_that_can_be_imported_is_here():
    assert {kind for kind, _ in FAMILIES.values()} == FROM_HF.keys()


def test_eval_and_generate_take_a_folder_of_experts(tmp_path: Path, capsys):
    judge("qwen3_moe").save_pretrained(tmp_path / "hf")
    for name, data in tokenizer().files.items():
        (tmp_path / "hf" / name).write_bytes(data)
    (tmp_path / "text.txt").write_text(TEXT)
    said(capsys, "convert", "import", tmp_path / "hf", tmp_path / "ours")
    scores = [said_json(capsys, "eval", tmp_path / place, "--data", tmp_path / "text.txt") for place in ("hf", "ours")]
    assert scores[0] == scores[1]
    words = [said(capsys, "generate", tmp_path / place, "--prompt", "the", "--max-tokens", "4") for place in ("hf", "ours")]
    assert words[0] == words[1]


def test_fp8_experts_and_extra_layers_come_in_said_and_go_out_as_what_they_became(tmp_path: Path, capsys):
    judge("qwen3_moe").save_pretrained(tmp_path / "hf")
    stored = tensors(tmp_path / "hf")
    expert = "model.layers.1.mlp.experts.5.down_proj.weight"
    quantised, scale = (stored[expert] * 100).to(torch.float8_e4m3fn), torch.full((2, 3), 0.01)
    more = {
        expert: quantised,
        f"{expert}_scale_inv": scale,
        "model.layers.2.eh_proj.weight": torch.ones(3),
        "model.layers.2.a": torch.ones(1),
    }
    save_file(stored | more, tmp_path / "hf/model.safetensors")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    told = {"quantization_config": {"quant_method": "fp8", "weight_block_size": [16, 8]}, "num_nextn_predict_layers": 1}
    (tmp_path / "hf/config.json").write_text(json.dumps(config | told))
    printed = said(capsys, "convert", "import", tmp_path / "hf", tmp_path / "ours", "--dtype", "fp32")
    assert printed.startswith("left out: model.layers.2.* (multi-token prediction, 2 tensors)\nwrote ")
    said(capsys, "convert", "export", tmp_path / "ours", tmp_path / "out")
    assert same(tensors(tmp_path / "out"), stored | {expert: quantised.float() * 0.01})
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == config | {"num_nextn_predict_layers": 0}
    (tmp_path / "hf/config.json").write_text(json.dumps(config | {"num_experts_per_tok": 2, "num_local_experts": 7}))
    assert "which the recipe's model has not" in refused(capsys, 77, "convert", "import", tmp_path / "hf", tmp_path / "again")
