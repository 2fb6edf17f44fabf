"""`paraxis convert`: weights of others to a checkpoint of ours, and back, one tensor in memory at a time."""

import json
import re
import sys
from collections import Counter
from dataclasses import asdict
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from paraxis.base.errors import CheckpointError, ConfigError
from paraxis.cli.arguments import Arguments, one_of, parse_strictly

if TYPE_CHECKING:
    import torch

    from paraxis.checkpoint.load import Checkpoint
    from paraxis.checkpoint.place import Location
    from paraxis.cli.weights import Weights

DTYPES = {"fp64": "float64", "fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # ours to torch's name and Hugging Face's
UNITS = {"": 1, "K": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}

HELP = """\
usage: paraxis convert import SOURCE CKPT [options]
       paraxis convert export CKPT HF_DIR [options]

Weights to a checkpoint of ours, and back. SOURCE is a Hugging Face folder (safetensors; never a pickle), which comes and goes with
config.json and the tokenizer; or, of other training code, a .pt, .pth or .bin file of torch.save or a folder of torch's distributed
checkpoints (DCP). These are pickles: they are read without running anything in them, or refused. Only the model is taken, by our
names or by Hugging Face's, whatever stands in front of them (model., module., ...); --recipe, or a config.json beside, says which.

Tensors are renamed and copied bit for bit, one at a time: neither way needs the memory that the model needs. Experts, which we
stack, are one tensor each there. Weights in fp8 with a scale for each block come in as bf16, or as --dtype says; layers of
multi-token prediction, which our models do not have, are left out, and import says which.

import writes CKPT/step-0, which eval and generate take. export writes what transformers' AutoModelForCausalLM and
AutoTokenizer load; its CKPT is a checkpoint, or a run's folder (its newest checkpoint). What is written to must be new or empty.

  --dtype NAME       round floating-point weights once to fp32, bf16, fp16 or fp64 (default: as they are); what is not trained,
                     such as the bias by which a router chooses experts, stays as it is
  --shard-size SIZE  of export: split the weights into files of at most this size, such as 500MB (default: 5GB)
  --recipe RECIPE    the recipe whose model this is, for a model that is not built in
  --debug            show tracebacks of errors

examples:
  paraxis convert import path/to/Llama-3.2-1B runs/llama
  paraxis convert import old/step-1000.pt runs/mine --recipe my.py:small
  paraxis convert export runs/demo exported/demo --dtype bf16
  paraxis convert export runs/demo/checkpoints/step-100 exported/demo --shard-size 500MB
  paraxis convert export runs/mine exported/mine --recipe my.py:small
"""


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused or fails."""
    way = arguments[0] if arguments else ""
    if way in ("import", "export"):
        names = ["weights of others", "a new checkpoint folder"] if way == "import" else ["a checkpoint", "a new folder"]
        options = ("dtype", "recipe") if way == "import" else ("dtype", "recipe", "shard-size")
        parsed = parse_strictly(f"convert {way}", arguments[1:], names, options, ("debug", "help"))
        if "help" not in parsed.flags:
            return _import(parsed) if way == "import" else _export(parsed)
    elif not {"-h", "--help"} & set(arguments):
        raise ConfigError("convert goes one of two ways: convert import SOURCE CKPT, or convert export CKPT HF_DIR")
    print(HELP, end="")
    return 0


def _import(parsed: Arguments) -> int:
    # Here, so that help does not wait for torch.
    from paraxis.checkpoint.hf import import_hf
    from paraxis.checkpoint.hf_source import HuggingFaceWeights
    from paraxis.checkpoint.place import location
    from paraxis.checkpoint.torch_source import is_torch_checkpoint
    from paraxis.cli.weights import open_weights, recipe_model
    from paraxis.models.registry import to_record

    source, destination = Path(parsed.names[0]), location(parsed.names[1])
    dtype = _dtype(parsed)
    _refuse_taken(destination)
    if is_torch_checkpoint(source):
        return _import_torch(source, destination, recipe_model(parsed.options.get("recipe")), dtype)
    weights = open_weights(source, recipe_model(parsed.options.get("recipe")))
    if not isinstance(weights.source, HuggingFaceWeights):
        raise CheckpointError(f"{source} is a checkpoint of ours already; import takes a Hugging Face folder")
    meta = {"step": 0, "model": to_record(weights.config)}
    written = import_hf(source, weights.keys, weights.shapes, destination, meta, weights.files, dtype, weights.exact)
    for prefix, count in weights.source.left_out.items():
        print(f"left out: {prefix} (multi-token prediction, {count:,} tensors)")
    print(f"wrote {written}")
    return 0


def _import_torch(source: Path, destination: "Location", config: Any, dtype: "torch.dtype | None") -> int:
    """Imports the model in a file or a folder of torch's; without `config` it is the one that a config.json beside it describes."""
    from paraxis.checkpoint.hf import import_hf, their_names
    from paraxis.checkpoint.hf_source import ForeignWeights
    from paraxis.checkpoint.torch_source import unwrap
    from paraxis.cli.weights import open_torch_weights
    from paraxis.models.registry import to_record

    print(
        f"warning: {source} is a pickle, a format that can hold programs. Nothing in it is run, but what it says is taken as it is: "
        "import only what you know the source of",
        file=sys.stderr,
    )
    weights = open_torch_weights(source, config)
    held = cast("ForeignWeights", weights.source)
    tables = {"ours": {name: name for name in weights.shapes}, "Hugging Face's": weights.keys if weights.has_keys else {}}
    model, way = unwrap(held, {way: their_names(table, weights.shapes) for way, table in tables.items()})
    meta = {"step": 0, "model": to_record(weights.config)}
    written = import_hf(model, tables[way], weights.shapes, destination, meta, weights.files, dtype, weights.exact)
    print(f"names are {way}" + (f", after {model.prefix!r}" if model.prefix else ""))
    if left := len(held.tensors) - len(model.tensors):
        print(f"left out: {left:,} other tensors")
    print(f"wrote {written}")
    return 0


def _export(parsed: Arguments) -> int:
    from paraxis.checkpoint.hf import EXPORT_SHARD_BYTES, export_hf
    from paraxis.checkpoint.load import Checkpoint
    from paraxis.checkpoint.place import location
    from paraxis.cli.weights import check_fits, open_weights, recipe_model

    source, destination = parsed.names[0], location(parsed.names[1])
    if not isinstance(destination, Path):
        raise ConfigError(f"{destination} is no local folder; export to one, and copy it there")
    dtype = _dtype(parsed)
    shard_bytes = size_bytes(parsed.options["shard-size"]) if "shard-size" in parsed.options else EXPORT_SHARD_BYTES
    weights = open_weights(source, recipe_model(parsed.options.get("recipe")))
    if not isinstance(weights.source, Checkpoint):
        raise CheckpointError(f"{source} holds Hugging Face weights already; export takes a checkpoint of ours")
    check_fits(weights.source, weights.shapes)
    config = hf_config(weights, dtype or stored_dtype(weights.source))
    export_hf(weights.source, weights.keys, destination, config, hf_files(weights), shard_bytes, dtype, weights.exact)
    print(f"wrote {destination}")
    return 0


def _dtype(parsed: Arguments) -> "torch.dtype | None":
    import torch

    name = parsed.options.get("dtype")
    return None if name is None else getattr(torch, DTYPES[one_of("dtype", name, list(DTYPES))])


def _refuse_taken(destination: "Location") -> None:
    """A folder in use may be a run's, whose checkpoints would be retired after the one that is written."""
    from paraxis.checkpoint.store import open_store

    if not open_store(destination).is_empty():
        raise CheckpointError(f"{destination} exists and is not an empty folder; name a new one")


def size_bytes(text: str) -> int:
    """A size such as 500MB or 5GB (powers of ten) in bytes. Raises ConfigError for any other text, and for nothing."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.upper())
    if match is None or not (size := int(float(match[1]) * UNITS[match[2]])):
        raise ConfigError(f"--shard-size={text} is not a size; write it like 500MB or 5GB")
    return size


def stored_dtype(checkpoint: "Checkpoint") -> "torch.dtype":
    """The dtype of most of the model's entries: for the config.json of an export, which has room for one."""
    from paraxis.checkpoint.hf import MODEL
    from paraxis.checkpoint.tensor_file import DTYPES as BY_NAME

    entries: Counter[str] = Counter()
    for name, tensor in checkpoint.tensors.items():
        if name.startswith(MODEL):
            entries[tensor.dtype] += prod(tensor.shape)
    return BY_NAME[entries.most_common(1)[0][0]]


def hf_config(weights: "Weights", dtype: "torch.dtype") -> dict[str, Any]:
    """The config.json of an export: the one that the weights came with, or else one that describes the model and its tokenizer.

    For a recipe's model, which Hugging Face has no type for, it holds the settings of the model.
    """
    from paraxis.cli.weights import TOKENIZER
    from paraxis.models.registry import to_hf, to_record

    config = dict(weights.hf_config)
    config.pop("quantization_config", None)  # what import dequantised is exported so
    if "num_nextn_predict_layers" in config:
        config["num_nextn_predict_layers"] = 0  # import left them out
    if not config:
        config = asdict(weights.config) if to_record(weights.config) is None else to_hf(weights.config)
        if f"{TOKENIZER}tokenizer.json" in weights.files:
            # Both are written, if only as null: transformers takes what is not there for Llama 2's.
            tokenizer = weights.tokenizer(None)
            config |= {"bos_token_id": tokenizer.bos_id, "eos_token_id": tokenizer.eos_id}
    # transformers 5 writes `dtype`, and reads either.
    return {**config, "dtype" if "dtype" in config else "torch_dtype": str(dtype).removeprefix("torch.")}


def hf_files(weights: "Weights") -> dict[str, bytes]:
    """What stands beside the weights of an export, by name: the tokenizer's files, and those that came from Hugging Face."""
    from paraxis.cli.weights import HF_CONFIG

    files = {name.partition("/")[2]: data for name, data in weights.files.items() if name != HF_CONFIG}
    name = "tokenizer_config.json"
    if HF_CONFIG not in weights.files and name in files:
        # Where it is not told, transformers takes the class of the model's type, and Llama's adds tokens of its own; and the
        # tokenizer gives an input that Llama does not take.
        told = {"tokenizer_class": "PreTrainedTokenizerFast", "model_input_names": ["input_ids", "attention_mask"]}
        files[name] = json.dumps({**told, **json.loads(files[name])}, indent=2).encode()
    return files
