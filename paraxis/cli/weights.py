"""Opening the CKPT of a command: a checkpoint of ours, the newest one of a run, or a Hugging Face folder.

Nothing in a checkpoint is run. A model that we know by name is built from its record; one that a recipe brought is built by the
recipe that the user names, because a checkpoint must never name code to run.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from paraxis.base.device import Device
from paraxis.base.errors import CheckpointError, ConfigError, DataError
from paraxis.base.keys import KeyTable
from paraxis.checkpoint.hf import MODEL, fill, matched
from paraxis.checkpoint.hf_source import ForeignWeights, HuggingFaceWeights, parse_config
from paraxis.checkpoint.inspect import checkpoint_in
from paraxis.checkpoint.load import Checkpoint
from paraxis.checkpoint.place import Location, location
from paraxis.checkpoint.torch_source import open_torch
from paraxis.checkpoint.weights_source import BUFFER
from paraxis.data.tokens import Tokenizer
from paraxis.models.buffers import buffer_names, fill_buffers, first_buffers, persistent_buffers
from paraxis.models.registry import from_hf, from_record
from paraxis.recipes.find import find

# How a checkpoint of ours names the files that it carries beside the tensors.
TOKENIZER = "tokenizer/"
HUGGING_FACE = "hugging_face/"
HF_CONFIG = f"{HUGGING_FACE}config.json"

# Those of a Hugging Face folder that are carried, where they are there.
_FROM_HF = {
    TOKENIZER: (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "added_tokens.json",
        "chat_template.jinja",
        "tokenizer.model",
        "vocab.json",
        "merges.txt",
    ),
    HUGGING_FACE: ("config.json", "generation_config.json"),
}


@dataclass(frozen=True)
class Weights:
    """A model on disk: where its tensors are, the configuration that builds it, and the files that came with it.

    `files` have the names that a checkpoint of ours gives them, whichever kind `source` is.
    """

    source: Checkpoint | ForeignWeights
    config: Any
    files: Mapping[str, bytes]

    @property
    def path(self) -> Location:
        return self.source.path if isinstance(self.source, Checkpoint) else self.source.source

    @cached_property
    def _blank(self) -> nn.Module:
        with torch.device("meta"):
            return self.config.build()

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by our name for it."""
        return {name: tuple(parameter.shape) for name, parameter in self._blank.named_parameters()}

    @property
    def exact(self) -> set[str]:
        """The parameters that no dtype is asked of: those that are not trained, such as the bias of a router's choice."""
        return {name for name, parameter in self._blank.named_parameters() if not parameter.requires_grad}

    @property
    def has_keys(self) -> bool:
        """Whether the model says what Hugging Face calls its parameters."""
        return isinstance(getattr(self._blank, "keys", None), Mapping)

    @property
    def keys(self) -> KeyTable:
        """Our names beside Hugging Face's. Raises ConfigError where a recipe's model does not say."""
        if not self.has_keys:
            raise ConfigError(
                f"{type(self._blank).__name__} has no key table, so its weights have no Hugging Face names; "
                "give the model an attribute keys, a dict from its parameters' names to theirs"
            )
        return cast(KeyTable, self._blank.keys)

    @property
    def trained_seq_len(self) -> int | None:
        """The tokens of a row that the model was trained with; None where that is not recorded."""
        return self.source.meta.get("data", {}).get("seq_len") if isinstance(self.source, Checkpoint) else None

    @property
    def hf_config(self) -> dict[str, Any]:
        """The config.json that came with the weights; empty where none did."""
        return parse_config(self.files.get(HF_CONFIG, b"{}"), self.path)

    def load(self, device: Device, dtype: torch.dtype) -> nn.Module:
        """The model on `device`, its weights (but the `exact`) rounded once to `dtype`, ready to predict.

        Raises CheckpointError where they do not fit.
        """
        read = self._reader()
        with torch.device("meta"):
            model = self.config.build()
        exact = self.exact
        for name, parameter in model.named_parameters():
            if name not in exact:
                parameter.data = parameter.data.to(dtype)
        model.to_empty(device=device.torch)
        if buffer_names(model):
            fill_buffers(model, first_buffers(self.config.build, seed=0))
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                read(name, parameter)
            for name, buffer in persistent_buffers(model).items():
                if isinstance(self.source, Checkpoint) and BUFFER + name in self.source.tensors:
                    self.source.read(BUFFER + name, out=buffer)
        return model.eval()

    def _reader(self) -> Callable[[str, Tensor], object]:
        """What fills a tensor with the parameter of a name."""
        source = self.source
        if not isinstance(source, Checkpoint):
            theirs = matched(source, self.keys, self.shapes)
            return lambda name, out: fill(out, source, theirs[name])
        check_fits(source, self.shapes)
        return lambda name, out: source.read(MODEL + name, out=out)

    def tokenizer(self, given: str | None) -> Tokenizer:
        """The tokenizer at the path `given`, or else the one that came with the weights.

        Raises DataError where there is none, and ConfigError for one with more entries than the model.
        """
        carried = {name.removeprefix(TOKENIZER): data for name, data in self.files.items() if name.startswith(TOKENIZER)}
        if given is not None:
            tokenizer = Tokenizer.load(given)
        elif "tokenizer.json" in carried:
            config = {"config.json": self.files[HF_CONFIG]} if HF_CONFIG in self.files else {}
            tokenizer = Tokenizer.from_files({**carried, **config}, name=f"the tokenizer of {self.path}")
        else:
            raise DataError(f"{self.path} holds no tokenizer (tokenizer.json); name one: --tokenizer=FOLDER")
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ConfigError(
                f"{tokenizer.name} has {tokenizer.vocab_size} entries, but the model in {self.path} only {self.config.vocab_size}, "
                "so they do not belong together; name the model's own: --tokenizer=FOLDER"
            )
        return tokenizer

    def stop_ids(self, tokenizer: Tokenizer) -> set[int]:
        """The tokens that end a text: the tokenizer's own, and those that config.json names."""
        named = self.hf_config.get("eos_token_id")
        ids = {tokenizer.eos_id, *(named if isinstance(named, list) else [named])}
        return {token for token in ids if isinstance(token, int)}


def check_fits(checkpoint: Checkpoint, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError where `checkpoint` does not hold every parameter of the model in its shape."""
    for name, shape in shapes.items():
        stored = checkpoint.tensors.get(MODEL + name)
        if stored is None or stored.shape != shape:
            found = "is not there" if stored is None else f"has shape {stored.shape}"
            raise CheckpointError(
                f"{checkpoint.path}: {name} {found}, but the model needs it in shape {shape}; give the recipe that it was trained "
                "with, as --recipe=my.py:function or, with the settings of the run, --recipe=RUN_DIR/config.toml"
            )


def recipe_model(recipe: str | None) -> Any:
    """The model's configuration in `recipe`; None where none is named."""
    return None if recipe is None else find(recipe)[0].model


def open_weights(path: str | Location, config: Any = None) -> Weights:
    """What `path` holds: a checkpoint of ours, a run's or its checkpoints folder (the newest), or Hugging Face weights.

    `config` builds the model where it is given, instead of what the weights say of themselves. Raises CheckpointError for what
    is missing, foreign or damaged, and ConfigError for a model that has to be given.
    """
    where = location(path)
    if (checkpoint := checkpoint_in(where)) is not None:
        files = {name: checkpoint.file(name) for name in checkpoint.manifest.files if name.startswith((TOKENIZER, HUGGING_FACE))}
        return Weights(checkpoint, _recorded(checkpoint) if config is None else config, files)
    assert isinstance(where, Path)  # what is at a URL is ours, or nothing
    return _described(HuggingFaceWeights(where), where, config)


def open_torch_weights(path: Path, config: Any = None) -> Weights:
    """What `path` holds: a file that torch.save wrote, or a folder of torch's distributed checkpoints. Their names are their writer's.

    As `open_weights` otherwise; a config.json and a tokenizer may stand beside them.
    """
    return _described(open_torch(path), path if path.is_dir() else path.parent, config)


def _described(weights: ForeignWeights, folder: Path, config: Any) -> Weights:
    """`weights` with the files in their `folder`, and the model that its config.json describes where `config` says nothing."""
    beside = {prefix + name: folder / name for prefix, names in _FROM_HF.items() for name in names}
    files = {name: file.read_bytes() for name, file in beside.items() if file.is_file()}
    if config is None:
        if HF_CONFIG not in files:
            raise CheckpointError(
                f"{folder} holds no config.json, which says what model it is; get it, or name a recipe: --recipe=my.py:function"
            )
        config = from_hf(parse_config(files[HF_CONFIG], folder))
    return Weights(weights, config, files)


def _recorded(checkpoint: Checkpoint) -> Any:
    """The model's configuration as the checkpoint records it."""
    record = checkpoint.meta.get("model")
    if not isinstance(record, Mapping):
        raise ConfigError(
            f"{checkpoint.path} holds the model of a recipe, and a checkpoint never names code to run; "
            "name the recipe: --recipe=my.py:function or, with the settings of the run, --recipe=RUN_DIR/config.toml"
        )
    return from_record(record)
