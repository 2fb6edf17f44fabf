"""Experts are put together and taken apart bit for bit, fp8 weights come in with their scales, and what is left out is named."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from paraxis.base.errors import CheckpointError
from paraxis.base.keys import Stacked
from paraxis.checkpoint.hf import export_hf, fill, import_hf, matched
from paraxis.checkpoint.hf_source import HuggingFaceWeights
from paraxis.checkpoint.load import open_checkpoint

KEYS = {
    "norm.weight": "model.norm.weight",
    "layers.{i}.up": Stacked("model.layers.{i}.experts.{e}.up.weight", transpose=True),
    "layers.{i}.rows": Stacked("model.layers.{i}.experts.{e}.rows.weight"),
}
EXPECTED = {"norm.weight": (5,), "layers.0.up": (3, 5, 7), "layers.0.rows": (3, 5, 7)}


def experts(dtype=torch.bfloat16, count=3):
    g = torch.Generator().manual_seed(0)
    made = {"model.norm.weight": torch.randn(5, generator=g).to(dtype)}
    for e in range(count):
        made[f"model.layers.0.experts.{e}.up.weight"] = torch.randn(7, 5, generator=g).to(dtype)
        made[f"model.layers.0.experts.{e}.rows.weight"] = torch.randn(5, 7, generator=g).to(dtype)
    return made


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def folder(path, tensors, config=None):
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    if config is not None:
        (path / "config.json").write_text(json.dumps(config))
    return path


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_bytes", [10**9, 200])
def test_experts_are_stacked_on_the_way_in_and_single_again_on_the_way_out(tmp_path, dtype, shard_bytes):
    theirs = experts(dtype)
    path = import_hf(folder(tmp_path / "hf", theirs), KEYS, EXPECTED, tmp_path / "ours", {}, {})
    ours = open_checkpoint(path)
    for e in range(3):
        assert ours.read("model/layers.0.up")[e].equal(theirs[f"model.layers.0.experts.{e}.up.weight"].T)
        assert ours.read("model/layers.0.rows")[e].equal(theirs[f"model.layers.0.experts.{e}.rows.weight"])
    export_hf(ours, KEYS, tmp_path / "out", {}, {}, shard_bytes=shard_bytes)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert same({name: t for file in files for name, t in load_file(file).items()}, theirs)
    assert (len(files) > 1) == (shard_bytes == 200)  # an expert of a stack may stand in another file than the next


def test_a_dtype_is_one_rounding_of_each_expert_and_mixed_ones_are_kept_exactly(tmp_path):
    theirs = experts(torch.float32)
    source = folder(tmp_path / "hf", theirs)
    ours = open_checkpoint(import_hf(source, KEYS, EXPECTED, tmp_path / "rounded", {}, {}, torch.bfloat16))
    assert ours.read("model/layers.0.up")[1].equal(theirs["model.layers.0.experts.1.up.weight"].bfloat16().T)
    mixed = theirs | {"model.layers.0.experts.1.up.weight": torch.full((7, 5), 1.5, dtype=torch.bfloat16)}
    path = import_hf(folder(tmp_path / "mixed", mixed), KEYS, EXPECTED, tmp_path / "kept", {}, {})
    assert open_checkpoint(path).read("model/layers.0.up")[1].equal(torch.full((5, 7), 1.5))
    assert open_checkpoint(path).read("model/layers.0.up")[0].equal(theirs["model.layers.0.experts.0.up.weight"].T)


def test_what_must_stay_exact_is_not_rounded_either_way(tmp_path):
    theirs = experts(torch.float32)
    ours = open_checkpoint(
        import_hf(folder(tmp_path / "hf", theirs), KEYS, EXPECTED, tmp_path / "ours", {}, {}, torch.bfloat16, {"norm.weight"})
    )
    assert (ours.tensors["model/norm.weight"].dtype, ours.tensors["model/layers.0.up"].dtype) == ("F32", "BF16")
    export_hf(ours, KEYS, tmp_path / "out", {}, {}, dtype=torch.float16, exact={"norm.weight"})
    out = load_file(tmp_path / "out/model.safetensors")
    assert out["model.norm.weight"].equal(theirs["model.norm.weight"])
    assert out["model.layers.0.experts.2.rows.weight"].dtype == torch.float16


def test_too_few_too_many_or_other_experts_are_refused_by_name(tmp_path):
    few, many = folder(tmp_path / "few", experts(count=2)), folder(tmp_path / "many", experts(count=4))
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.0\.experts\.2\.up\.weight, model\.layers\.0\.experts\.2\.rows"):
        import_hf(few, KEYS, EXPECTED, tmp_path / "a", {}, {})
    with pytest.raises(CheckpointError, match=r"has model\.layers\.0\.experts\.3\.rows\.weight, model\.layers\.0\.experts\.3\.up"):
        import_hf(many, KEYS, EXPECTED, tmp_path / "a", {}, {})
    turned = experts() | {"model.layers.0.experts.1.up.weight": torch.zeros(5, 7)}
    with pytest.raises(CheckpointError, match=r"experts\.1\.up\.weight \(5, 7\) \(the recipe's: \(7, 5\)\)"):
        import_hf(folder(tmp_path / "turned", turned), KEYS, EXPECTED, tmp_path / "a", {}, {})
    assert not (tmp_path / "a").exists()


FP8 = {"num_hidden_layers": 1, "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]}}
LINEAR = {"up.weight": "model.layers.0.up.weight", "experts": Stacked("model.layers.0.experts.{e}.weight", transpose=True)}
SHAPES = {"up.weight": (300, 130), "experts": (2, 130, 300)}


def quantised(seed=0):
    """fp8 matrices of 3 by 2 blocks, whose last row and column of blocks are cut short, with a scale for each."""
    g = torch.Generator().manual_seed(seed)
    made = {}
    for name in ("model.layers.0.up.weight", "model.layers.0.experts.0.weight", "model.layers.0.experts.1.weight"):
        made[name] = torch.randn(300, 130, generator=g).mul(100).to(torch.float8_e4m3fn)
        made[f"{name}_scale_inv"] = torch.rand(3, 2, generator=g) * 1e-3
    return made


def by_hand(tensors, name):
    """The definition, one entry at a time where it matters: entry (r, c) times the scale of block (r // 128, c // 128)."""
    weight, scale = tensors[name].float(), tensors[f"{name}_scale_inv"]
    return torch.stack([weight[r] * scale[r // 128, torch.arange(130) // 128] for r in range(300)])


def test_fp8_blocks_come_in_as_bf16_or_as_the_dtype_asked_for_rounded_once(tmp_path):
    tensors = quantised()
    source = folder(tmp_path / "hf", tensors, FP8)
    assert HuggingFaceWeights(source).tensors["model.layers.0.up.weight"] == ((300, 130), torch.bfloat16)
    for asked, stored in ((None, torch.bfloat16), (torch.float32, torch.float32)):
        ours = open_checkpoint(import_hf(source, LINEAR, SHAPES, tmp_path / str(asked), {}, {}, asked))
        assert ours.read("model/up.weight").equal(by_hand(tensors, "model.layers.0.up.weight").to(stored))
        for e in range(2):
            assert ours.read("model/experts")[e].equal(by_hand(tensors, f"model.layers.0.experts.{e}.weight").T.to(stored))
    # Read straight into a model, it is the same.
    weights = HuggingFaceWeights(source)
    out = fill(torch.empty(2, 130, 300), weights, matched(weights, LINEAR, SHAPES)["experts"])
    assert out.equal(open_checkpoint(tmp_path / "torch.float32/step-0").read("model/experts"))


def test_scales_that_are_missing_or_of_another_grid_are_refused_by_name(tmp_path):
    scale = "model.layers.0.up.weight_scale_inv"
    lacking = {name: tensor for name, tensor in quantised().items() if name != scale}
    changes = {"none": lacking, "grid": lacking | {scale: torch.ones(2, 2)}, "dtype": lacking | {scale: torch.ones(3, 2).half()}}
    for name, said in (("none", f"lacks {scale}"), ("grid", r"needs \(3, 2\)"), ("dtype", r"in torch\.float16")):
        with pytest.raises(CheckpointError, match=said):
            _ = HuggingFaceWeights(folder(tmp_path / name, changes[name], FP8)).tensors
    plain = folder(tmp_path / "plain", quantised(), {"num_hidden_layers": 1})
    with pytest.raises(CheckpointError, match=r"_scale_inv, .*which the recipe's model has not"):
        import_hf(plain, LINEAR, SHAPES, tmp_path / "a", {}, {})


@pytest.mark.parametrize(
    "settings",
    [
        {"quant_method": "gptq", "bits": 4},
        {"quant_method": "fp8"},
        {"quant_method": "fp8", "weight_block_size": None},
        {"quant_method": "fp8", "weight_block_size": [128, 0]},
        {"quant_method": "fp8", "weight_block_size": [128, 128], "fmt": "e5m2"},
        "fp8",
    ],
)
def test_any_other_quantisation_is_refused(tmp_path, settings):
    source = folder(tmp_path / "hf", quantised(), {"quantization_config": settings})
    with pytest.raises(CheckpointError, match=r"quantization_config=.*quant_method='fp8'.*unquantised"):
        import_hf(source, LINEAR, SHAPES, tmp_path / "a", {}, {})


def mtp(layer, count):
    names = ["eh_proj.weight", *(f"mlp.experts.{e}.up_proj.weight" for e in range(count - 1))]
    return {f"model.layers.{layer}.{name}": torch.zeros(2) for name in names}


def test_layers_of_multi_token_prediction_are_left_out_and_named(tmp_path):
    config = {"num_hidden_layers": 1}
    tensors = {"model.layers.0.up.weight": torch.ones(2, 3)} | mtp(1, 4) | mtp(2, 3)
    for name, told in (("known", config), ("declared", config | {"num_nextn_predict_layers": 2})):
        weights = HuggingFaceWeights(folder(tmp_path / name, tensors, told))
        assert weights.left_out == {"model.layers.1.*": 4, "model.layers.2.*": 3}
        assert weights.tensors.keys() == {"model.layers.0.up.weight"}
        import_hf(tmp_path / name, LINEAR, {"up.weight": (2, 3)}, tmp_path / f"{name}-in", {}, {})


def test_a_layer_too_many_that_predicts_no_further_token_is_not_left_out(tmp_path):
    tensors = {f"model.layers.{k}.up.weight": torch.ones(2, 3) for k in (0, 1)}
    source = folder(tmp_path / "hf", tensors, {"num_hidden_layers": 1})
    assert HuggingFaceWeights(source).left_out == {}
    with pytest.raises(CheckpointError, match=r"has model\.layers\.1\.up\.weight, which the recipe's model has not"):
        import_hf(source, LINEAR, {"up.weight": (2, 3)}, tmp_path / "a", {}, {})


def test_what_is_read_of_a_stack_to_export_it_grows_with_an_expert_and_not_with_the_stack(tmp_path):
    """Each expert is read alone: the largest tensor that is ever made has an expert's size."""
    path = import_hf(folder(tmp_path / "hf", experts()), KEYS, EXPECTED, tmp_path / "ours", {}, {})
    checkpoint = open_checkpoint(path)
    sizes, read = [], checkpoint.read
    checkpoint.read = lambda name, box=None, out=None: sizes.append(math.prod(box.sizes) if box else 0) or read(name, box, out)
    export_hf(checkpoint, KEYS, tmp_path / "out", {}, {})
    assert sorted(sizes) == [0, *[35] * 6]
