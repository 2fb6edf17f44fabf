"""Hugging Face weights come in and go out bit for bit, and what does not fit is refused by name."""

import json
import os
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file

from paraxis.base.errors import CheckpointError, StorageError
from paraxis.checkpoint import hf, tensor_file
from paraxis.checkpoint.hf import export_hf, import_hf
from paraxis.checkpoint.hf_source import HuggingFaceWeights
from paraxis.checkpoint.load import open_checkpoint

KEYS = {
    "embed.weight": "model.embed_tokens.weight",
    "layers.{i}.attention.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    "norm.weight": "model.norm.weight",
    "head.weight": "lm_head.weight",
}


def weights(dtype=torch.bfloat16):
    g = torch.Generator().manual_seed(0)
    shapes = {
        "model.embed_tokens.weight": (16, 8),
        "model.layers.0.self_attn.q_proj.weight": (8, 8),
        "model.layers.1.self_attn.q_proj.weight": (8, 8),
        "model.norm.weight": (8,),
        "lm_head.weight": (16, 8),
    }
    return {name: torch.randn(shape, generator=g).to(dtype) for name, shape in shapes.items()}


EXPECTED = {
    "embed.weight": (16, 8),
    "layers.0.attention.q_proj.weight": (8, 8),
    "layers.1.attention.q_proj.weight": (8, 8),
    "norm.weight": (8,),
    "head.weight": (16, 8),
}
TIED = {name: shape for name, shape in EXPECTED.items() if name != "head.weight"}


def same(a, b):
    return a.keys() == b.keys() and all(a[n].dtype == b[n].dtype and torch.equal(a[n], b[n]) for n in a)


def export_and_read(path, destination, **options):
    export_hf(open_checkpoint(path), KEYS, destination, {"model_type": "llama"}, {"tokenizer.json": b"{}"}, **options)
    return {name: t for file in sorted(destination.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("shard_bytes", [10**9, 300])
def test_a_round_trip_is_bitwise(tmp_path, dtype, shard_bytes):
    (tmp_path / "hf").mkdir()
    save_file(weights(dtype), tmp_path / "hf/model.safetensors")
    path = import_hf(tmp_path / "hf", KEYS, EXPECTED, tmp_path / "ours", {"a": 1}, {"config.toml": b""})
    assert path == tmp_path / "ours/step-0"
    assert open_checkpoint(path).tensors.keys() == {"model/" + name for name in EXPECTED}
    assert same(export_and_read(path, tmp_path / "out", shard_bytes=shard_bytes), weights(dtype))
    assert json.loads((tmp_path / "out/config.json").read_text()) == {"model_type": "llama"}
    assert (tmp_path / "out/tokenizer.json").read_bytes() == b"{}"
    assert (tmp_path / "out/model.safetensors").exists() == (shard_bytes == 10**9)
    again = import_hf(tmp_path / "out", KEYS, EXPECTED, tmp_path / "again", {}, {})
    assert same(export_and_read(again, tmp_path / "third"), weights(dtype))


def test_transformers_loads_a_sharded_export(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1
    )
    theirs = transformers.LlamaForCausalLM(config)
    theirs.save_pretrained(tmp_path / "hf", max_shard_size="1KB")
    table = {"x." + name: name for name in theirs.state_dict()}
    expected = {"x." + name: tuple(t.shape) for name, t in theirs.state_dict().items()}
    path = import_hf(tmp_path / "hf", table, expected, tmp_path / "ours", {}, {})
    export_hf(open_checkpoint(path), table, tmp_path / "out", json.loads((tmp_path / "hf/config.json").read_text()), {}, shard_bytes=1000)
    back = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert same(dict(back.state_dict()), dict(theirs.state_dict()))


def test_only_the_models_tensors_are_exported_and_a_dtype_is_one_rounding(tmp_path, whole):
    from paraxis.checkpoint.save import save

    exact = torch.randn(16, 8)
    path = save(tmp_path / "run", 5, whole({"model/embed.weight": exact, "optim/exp_avg/embed.weight": exact * 2, "other": exact}), {}, {})
    assert same(export_and_read(path, tmp_path / "out", dtype=torch.bfloat16), {"model.embed_tokens.weight": exact.bfloat16()})
    up = import_hf(tmp_path / "out", KEYS, {"embed.weight": (16, 8)}, tmp_path / "up", {}, {}, dtype=torch.float64)
    assert open_checkpoint(up).read("model/embed.weight").equal(exact.bfloat16().double())


def test_a_tied_head_is_left_out_where_it_equals_the_embedding_and_refused_where_not(tmp_path):
    tied = weights()
    tied["lm_head.weight"] = tied["model.embed_tokens.weight"].clone()
    save_file(tied, tmp_path / "tied.safetensors")
    path = import_hf(tmp_path / "tied.safetensors", KEYS, TIED, tmp_path / "a", {}, {})
    assert "model/head.weight" not in open_checkpoint(path).tensors
    save_file(weights(), tmp_path / "untied.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head\.weight differs"):
        import_hf(tmp_path / "untied.safetensors", KEYS, TIED, tmp_path / "b", {}, {})
    del tied["lm_head.weight"]
    save_file(tied, tmp_path / "without.safetensors")
    import_hf(tmp_path / "without.safetensors", KEYS, TIED, tmp_path / "c", {}, {})
    with pytest.raises(CheckpointError, match=r"lacks lm_head\.weight"):
        import_hf(tmp_path / "without.safetensors", KEYS, EXPECTED, tmp_path / "d", {}, {})


def test_rotary_tables_are_ignored(tmp_path):
    save_file({**weights(), "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "w.safetensors")
    path = import_hf(tmp_path / "w.safetensors", KEYS, EXPECTED, tmp_path / "a", {}, {})
    assert len(open_checkpoint(path).tensors) == len(EXPECTED)


def test_tensors_that_do_not_match_are_listed_five_at_most(tmp_path):
    save_file(weights(), tmp_path / "w.safetensors")
    more = {**EXPECTED, **{f"layers.{i}.attention.q_proj.weight": (8, 8) for i in range(2, 10)}}
    with pytest.raises(CheckpointError, match=r"lacks model\.layers\.2\..*model\.layers\.6\.self_attn\.q_proj\.weight and 3 more"):
        import_hf(tmp_path / "w.safetensors", KEYS, more, tmp_path / "a", {}, {})
    with pytest.raises(CheckpointError, match=r"has model\.norm\.weight, which"):
        import_hf(tmp_path / "w.safetensors", KEYS, {k: v for k, v in EXPECTED.items() if k != "norm.weight"}, tmp_path / "a", {}, {})
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight \(8,\) \(the recipe's: \(9,\)\)"):
        import_hf(tmp_path / "w.safetensors", KEYS, {**EXPECTED, "norm.weight": (9,)}, tmp_path / "a", {}, {})
    with pytest.raises(CheckpointError, match=r"no row for bias"):
        import_hf(tmp_path / "w.safetensors", KEYS, {**EXPECTED, "bias": (9,)}, tmp_path / "a", {}, {})
    assert not (tmp_path / "a").exists()


def test_pickled_weights_are_refused_unopened(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    for source in (tmp_path, tmp_path / "pytorch_model.bin"):
        with pytest.raises(CheckpointError, match="pickle"):
            HuggingFaceWeights(source)
    with pytest.raises(CheckpointError, match="no Hugging Face weights"):
        HuggingFaceWeights(tmp_path / "nothing")


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/secret.safetensors", "a/b.safetensors", "model.bin", 7, ""])
def test_an_index_that_leaves_its_folder_is_refused(tmp_path, file):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(CheckpointError, match=r"index\.json"):
        HuggingFaceWeights(tmp_path)


def test_a_broken_index_or_shard_is_refused_by_name(tmp_path):
    index = tmp_path / "model.safetensors.index.json"
    for text in ("", "[]", '{"weight_map": 3}', "{"):
        index.write_text(text)
        with pytest.raises(CheckpointError, match=r"index\.json"):
            HuggingFaceWeights(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        _ = HuggingFaceWeights(tmp_path).tensors
    save_file({"b": torch.zeros(300)}, tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match=r"one\.safetensors holds no a"):
        _ = HuggingFaceWeights(tmp_path).tensors
    os.truncate(tmp_path / "one.safetensors", 400)
    with pytest.raises(CheckpointError, match=r"one\.safetensors"):
        _ = HuggingFaceWeights(tmp_path).tensors


def test_nothing_is_overwritten_and_a_failed_export_leaves_nothing(tmp_path, monkeypatch):
    save_file(weights(), tmp_path / "w.safetensors")
    path = import_hf(tmp_path / "w.safetensors", KEYS, EXPECTED, tmp_path / "ours", {}, {})
    with pytest.raises(CheckpointError, match="exists"):
        import_hf(tmp_path / "w.safetensors", KEYS, EXPECTED, tmp_path / "ours", {}, {})
    with pytest.raises(CheckpointError, match="not an empty folder"):
        export_hf(open_checkpoint(path), KEYS, tmp_path / "ours", {}, {})
    with pytest.raises(CheckpointError, match="no row for norm"):
        export_hf(open_checkpoint(path), {k: v for k, v in KEYS.items() if k != "norm.weight"}, tmp_path / "out", {}, {})

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(tensor_file.HashingWriter, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        export_hf(open_checkpoint(path), KEYS, tmp_path / "out", {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ours", "w.safetensors"]
    monkeypatch.undo()
    (tmp_path / "out").mkdir()
    assert same(export_and_read(path, tmp_path / "out"), weights())


def test_reading_a_folder_directly_gives_shapes_dtypes_and_values(tmp_path):
    save_file(weights(), tmp_path / "model.safetensors")
    source = HuggingFaceWeights(tmp_path)
    assert source.tensors["model.norm.weight"] == ((8,), torch.bfloat16)
    assert source.read("model.norm.weight").equal(weights()["model.norm.weight"])
    assert hf.MODEL == "model/"
