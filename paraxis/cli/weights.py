"""Opening the CKPT of a command: a checkpoint of ours, the newest of a run, or a Hugging Face folder.

Nothing in a checkpoint is run. A model that we know by name is built from its record; one that a recipe brought is built by the
recipe that the user names, because a checkpoint must never name code to run.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from paraxis.base.device import Device
from paraxis.base.errors import CheckpointError, ConfigError, DataError
from paraxis.base.keys import KeyTable
from paraxis.checkpoint.hf import MODEL, HuggingFaceWeights, matched
from paraxis.checkpoint.load import Checkpoint, newest, open_checkpoint
from paraxis.checkpoint.manifest import MANIFEST
from paraxis.data.tokens import Tokenizer, read_json
from paraxis.models.registry import from_hf, from_record
from paraxis.recipes.find import find

# How a checkpoint of ours names what it carries beside the tensors.
TOKENIZER = "tokenizer/"
HUGGING_FACE = "hugging_face/"
HF_CONFIG = HUGGING_FACE + "config.json"

# What a Hugging Face folder may say about its tokenizer and about generation; all of it is carried unread.
_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
)
_MODEL_FILES = ("config.json", "generation_config.json")


@dataclass(frozen=True)
class Weights:
    """A model on disk. `config` builds it; `files` stand under the names that a checkpoint of ours gives them, for either kind."""

    source: Checkpoint | HuggingFaceWeights
    config: Any
    files: Mapping[str, bytes]

    @property
    def path(self) -> Path:
        return self.source.path if isinstance(self.source, Checkpoint) else self.source.source

    @cached_property
    def parameters(self) -> dict[str, tuple[int, ...]]:
        """The shape of every parameter, by our name."""
        return {name: tuple(parameter.shape) for name, parameter in self._blank().named_parameters()}

    @property
    def keys(self) -> KeyTable:
        """Our names beside Hugging Face's. Raises ConfigError where the recipe's model has no such table."""
        keys = getattr(self._blank(), "keys", None)
        if not isinstance(keys, Mapping):
            raise ConfigError(
                f"{type(self.config).__name__} builds a model without a key table, so its weights have no Hugging Face names; "
                "give the model an attribute `keys` (see paraxis/base/keys.py)"
            )
        return keys

    @property
    def hf_config(self) -> dict[str, Any]:
        """The `config.json` that came with the weights; empty where none did."""
        return read_json(self.files.get(HF_CONFIG), f"{self.path}: {HF_CONFIG}")

    def load(self, device: Device, dtype: torch.dtype) -> nn.Module:
        """The model on `device`, its floating-point weights rounded once to `dtype`, ready to predict."""
        model = self._blank().to(dtype).to_empty(device=device.torch)
        parameters = dict(model.named_parameters())
        with torch.no_grad():
            for name, tensor in self._tensors(parameters):
                parameters[name].copy_(tensor) if isinstance(tensor, Tensor) else None
        return model.eval()

    def tokenizer(self, given: str | None = None) -> Tokenizer:
        """The tokenizer that the weights came with, or the one at `given`. Raises DataError where there is none."""
        if given is not None:
            tokenizer = Tokenizer.load(given)
        else:
            carried = {name.removeprefix(TOKENIZER): data for name, data in self.files.items() if name.startswith(TOKENIZER)}
            if "tokenizer.json" not in carried:
                raise DataError(f"{self.path} holds no tokenizer.json; name its tokenizer with --tokenizer=FOLDER")
            known = {"config.json": self.files[HF_CONFIG]} if HF_CONFIG in self.files else {}
            tokenizer = Tokenizer.from_files({**known, **carried}, name=f"{self.path}: tokenizer.json")
        if tokenizer.vocab_size > self.config.vocab_size:
            raise ConfigError(
                f"the tokenizer {tokenizer.name} has {tokenizer.vocab_size} entries, but the model in {self.path} only "
                f"{self.config.vocab_size}: they do not belong together; name the right one with --tokenizer=FOLDER"
            )
        return tokenizer
