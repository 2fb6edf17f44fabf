"""`paraxis convert` goes both ways bit for bit, with what belongs to the weights, in little memory."""

import json
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from paraxis.base.errors import ConfigError
from paraxis.base.keys import Stacked, to_theirs
from paraxis.checkpoint.load import open_checkpoint
from paraxis.cli.convert import size_bytes
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen3 import Qwen3MoEConfig
from paraxis.models.registry import from_record, to_hf, to_record
from paraxis.ops.routing import RoutingConfig
from tests.cli.folders import OWN_RECIPE, TEXT, checkpoint, help_of, hugging_face, refused, said, said_json, tokenizer

ROOT = Path(__file__).parents[2]
TINY = LlamaConfig(vocab_size=320, width=32, layers=2, heads=4, kv_heads=2, mlp_width=48)
MIB = 2**20


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(("dtype", "tied"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_folder_comes_back_bit_for_bit_with_its_config_and_tokenizer(tmp_path: Path, capsys, dtype: torch.dtype, tied: bool):
    folder = hugging_face(tmp_path / "hf", dtype, tie_word_embeddings=tied)
    assert said(capsys, "convert", "import", folder, tmp_path / "ours") == f"wrote {tmp_path / 'ours/step-0'}\n"
    said(capsys, "convert", "export", tmp_path / "ours", tmp_path / "back")
    assert same(tensors(tmp_path / "back"), tensors(folder))
    assert sorted(file.name for file in (tmp_path / "back").iterdir()) == sorted(file.name for file in folder.iterdir())
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / "back" / name).read_bytes() == (folder / name).read_bytes()
    assert json.loads((tmp_path / "back/config.json").read_text()) == json.loads((folder / "config.json").read_text())


def test_transformers_loads_what_a_run_exports_and_computes_and_encodes_the_same(tmp_path: Path, capsys):
    transformers = pytest.importorskip("transformers")
    weights = {name: torch.randn(p.shape) for name, p in TINY.build().named_parameters()}
    files = {"config.toml": b"", **{f"tokenizer/{name}": data for name, data in tokenizer().files.items()}}
    checkpoint(tmp_path / "run/checkpoints", weights, {"model": to_record(TINY)}, files)
    said(capsys, "convert", "export", tmp_path / "run", tmp_path / "out", "--shard-size", "10KB", "--dtype", "bf16")
    assert (tmp_path / "out/model.safetensors.index.json").is_file()
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert theirs.dtype == torch.bfloat16
    assert (theirs.config.bos_token_id, theirs.config.eos_token_id) == (None, 0)
    ours = TINY.build()
    ours.load_state_dict({name: tensor.bfloat16().float() for name, tensor in weights.items()})
    encode = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    inputs = encode(TEXT, return_tensors="pt")
    assert inputs.keys() == {"input_ids", "attention_mask"}
    ids = inputs.input_ids
    assert ids[0].tolist() == tokenizer().encode(TEXT)
    assert (len(encode), encode.eos_token) == (300, "<|endoftext|>")
    with torch.no_grad():
        logits, judged = ours.logits(ids[:, :60]), theirs.float()(ids[:, :60]).logits
    assert (logits - judged).abs().max() <= 1e-4 * judged.abs().max()
    # What was exported comes in again, and is the same model.
    said(capsys, "convert", "import", tmp_path / "out", tmp_path / "again", "--dtype", "fp32")
    again = open_checkpoint(tmp_path / "again/step-0")
    assert to_hf(from_record(again.meta["model"])) == to_hf(TINY)
    assert all(torch.equal(again.read(f"model/{name}"), tensor.bfloat16().float()) for name, tensor in weights.items())
    (tmp_path / "text.txt").write_text(TEXT)
    scores = [said_json(capsys, "eval", tmp_path / place, "--data", tmp_path / "text.txt") for place in ("out", "again")]
    assert scores[0] == scores[1]


def test_a_recipe_s_own_model_goes_both_ways_where_the_recipe_is_named(tmp_path: Path, capsys):
    (tmp_path / "my.py").write_text(OWN_RECIPE)
    files = {f"tokenizer/{name}": data for name, data in tokenizer().files.items()}
    path = checkpoint(tmp_path / "run", {"table.weight": torch.randn(300, 300)}, {"model": None}, files)
    recipe = ("--recipe", f"{tmp_path / 'my.py'}:bigrams")
    said(capsys, "convert", "export", path, tmp_path / "out", *recipe)
    table = open_checkpoint(path).read("model/table.weight")
    assert same(tensors(tmp_path / "out"), {"their.table": table})
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert config == {"vocab_size": 300, "bos_token_id": None, "eos_token_id": 0, "torch_dtype": "float32"}
    said(capsys, "convert", "import", tmp_path / "out", tmp_path / "again", *recipe)
    assert open_checkpoint(tmp_path / "again/step-0").read("model/table.weight").equal(table)
    assert "never names code" in refused(capsys, 78, "convert", "export", tmp_path / "again", tmp_path / "third")
    assert "model_type=None is not supported" in refused(capsys, 78, "convert", "import", tmp_path / "out", tmp_path / "third")
    (tmp_path / "my.py").write_text(OWN_RECIPE.replace("keys = ", "names = "))
    assert "has no key table" in refused(capsys, 78, "convert", "export", path, tmp_path / "third", *recipe)
    assert not (tmp_path / "third").exists()


def sparse_model(folder: Path, config: LlamaConfig) -> int:
    """A folder with a file of zeros as large as the model, which takes no room on the disk; returns its bytes."""
    folder.mkdir()
    with torch.device("meta"):
        model = config.build()
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parameter in model.named_parameters():
        theirs, shape = to_theirs(model.keys, name), tuple(parameter.shape)
        shapes |= dict.fromkeys(theirs.names(shape[0]), theirs.their_shape(shape)) if isinstance(theirs, Stacked) else {str(theirs): shape}
    header, at = {}, 0
    for name, shape in shapes.items():
        end = at + 4 * torch.Size(shape).numel()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with (folder / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + at)
    (folder / "config.json").write_text(json.dumps(to_hf(config)))
    return at


MEASURED = """
import resource, sys
import paraxis.cli.convert, paraxis.cli.weights
from paraxis.cli import main
unit = 1 if sys.platform == "darwin" else 1024
peaks = [resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit]
for way, source, destination in (("import", "hf", "ours"), ("export", "ours", "out")):
    assert main(["convert", way, source, destination]) == 0
    peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit)
print(peaks[1] - peaks[0], peaks[2] - peaks[0])
"""


SHAPE = {"vocab_size": 512, "width": 512, "layers": 11, "heads": 8, "kv_heads": 8}
LARGE = {
    "dense": LlamaConfig(**SHAPE, mlp_width=2048),
    "experts": Qwen3MoEConfig(**SHAPE, head_size=64, mlp_width=256, routing=RoutingConfig(experts=8, chosen=2)),
}


@pytest.mark.parametrize("kind", LARGE)
def test_neither_way_takes_the_memory_of_the_model(tmp_path: Path, kind: str):
    size = sparse_model(tmp_path / "hf", LARGE[kind])
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r})\n{MEASURED}"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    importing, exporting = map(int, done.stdout.split("\n")[-2].split())
    assert size > 160 * MIB
    assert importing < 32 * MIB  # the largest tensor has 4
    assert exporting < 128 * MIB  # each byte is verified in chunks of 16, a few of which are kept


def test_help_has_examples_and_needs_no_torch():
    printed = help_of("convert")
    assert "examples:\n  paraxis convert import" in printed
    assert help_of("convert", "import") == help_of("convert", "export") == printed
    assert all(f"  --{option} " in printed for option in ("dtype", "shard-size", "recipe", "debug"))


def test_what_cannot_be_converted_is_refused_in_one_line_and_leaves_nothing(tmp_path: Path, capsys):
    folder = hugging_face(tmp_path / "hf")
    said(capsys, "convert", "import", folder, tmp_path / "ours")
    there = sorted(tmp_path.iterdir())
    assert "one of two ways" in refused(capsys, 78, "convert")
    assert "one of two ways" in refused(capsys, 78, "convert", "imports", folder, tmp_path / "new")
    assert "takes a checkpoint and a new folder, not 1" in refused(capsys, 78, "convert", "export", tmp_path / "ours")
    assert "--shard-size is not an option of convert import" in refused(capsys, 78, "convert", "import", "a", "b", "--shard-size=5GB")
    assert "--dtype=fp8 is unknown" in refused(capsys, 78, "convert", "import", folder, tmp_path / "new", "--dtype=fp8")
    assert "--shard-size=lots is not a size" in refused(capsys, 78, "convert", "export", tmp_path / "ours", "new", "--shard-size=lots")
    for way, source in (("import", folder), ("export", tmp_path / "ours")):
        assert "is not an empty folder" in refused(capsys, 77, "convert", way, source, folder)
        assert "is not an empty folder" in refused(capsys, 77, "convert", way, source, folder / "config.json")
        assert "does not exist" in refused(capsys, 77, "convert", way, tmp_path / "none", tmp_path / "new")
        assert "was not" in refused(capsys, 74, "convert", way, source, folder / "config.json/below")
    assert "is a checkpoint of ours already" in refused(capsys, 77, "convert", "import", tmp_path / "ours", tmp_path / "new")
    assert "holds Hugging Face weights already" in refused(capsys, 77, "convert", "export", folder, tmp_path / "new")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pickle" in refused(capsys, 77, "convert", "import", folder, tmp_path / "new")
    assert sorted(tmp_path.iterdir()) == there


def test_sizes_are_written_as_people_write_them():
    assert [size_bytes(text) for text in ("5GB", "500 mb", "1.5K", "7")] == [5 * 10**9, 5 * 10**8, 1500, 7]
    for text in ("", "GB", "-1GB", "0", "5PB"):
        with pytest.raises(ConfigError, match="500MB"):
            size_bytes(text)
