"""Hugging Face weights, in and out: safetensors files only, one tensor in memory at a time, bit for bit unless a dtype is asked for.

Parameters are renamed through a key table (base/keys.py). Our tensors that are a model's are named `model/<name>` in a checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Iterable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from paraxis.base.errors import CheckpointError, StorageError
from paraxis.base.keys import KeyTable, to_theirs
from paraxis.base.layout import whole_box
from paraxis.checkpoint.config import KEEP_LEAST
from paraxis.checkpoint.load import Checkpoint
from paraxis.checkpoint.manifest import checked_name
from paraxis.checkpoint.ranks import OneProcess
from paraxis.checkpoint.save import Part, save_parts
from paraxis.checkpoint.store import sync_folder, sync_tree
from paraxis.checkpoint.tensor_file import DTYPES, Entry, shards, write_file, write_tensors

MODEL = "model/"
EXPORT_SHARD_BYTES = 5_000_000_000

_INDEX = "model.safetensors.index.json"
_SINGLE = "model.safetensors"
_SHARD_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*\.safetensors")
_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_NOT_PARAMETERS = re.compile(r".*rotary_emb\.inv_freq")  # a table that old files carry and that every model computes
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


class HuggingFaceWeights:
    """The tensors of a Hugging Face folder (single file or sharded with an index) or of one safetensors file, by their own names.

    Links are followed: the hub's cache consists of them. Raises CheckpointError where files are missing, damaged, or pickled.
    """

    def __init__(self, source: Path) -> None:
        self.source = source
        self._files: dict[Path, Any] = {}
        self._where = self._find()

    @cached_property
    def tensors(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of every tensor."""
        found = {}
        for name, path in self._where.items():
            try:
                part = self._open(path).get_slice(name)
            except SafetensorError as error:
                raise CheckpointError(f"{path} holds no {name}, although {self.source / _INDEX} says so ({error})") from error
            if part.get_dtype() not in DTYPES:
                raise CheckpointError(f"{path}: {name} is {part.get_dtype()}; only {', '.join(DTYPES)} can be read")
            found[name] = (tuple(part.get_shape()), DTYPES[part.get_dtype()])
        return found

    def read(self, name: str) -> Tensor:
        """The tensor called `name`, on CPU. It has a mapping of its file to itself: what is resident of that goes when the tensor goes."""
        return _mapped(self._where[name]).get_tensor(name)

    def _open(self, path: Path) -> Any:
        if path not in self._files:
            self._files[path] = _mapped(path)
        return self._files[path]

    def _find(self) -> dict[str, Path]:
        if self.source.is_dir() and (self.source / _INDEX).is_file():
            return self._indexed()
        path = self.source / _SINGLE if self.source.is_dir() else self.source
        if path.suffix == ".safetensors" and path.is_file():
            return dict.fromkeys(self._open(path).keys(), path)
        present = sorted(self.source.iterdir()) if self.source.is_dir() else [self.source]
        if pickled := [file.name for file in present if file.suffix in _PICKLED and file.is_file()]:
            raise CheckpointError(
                f"{self.source} holds pickled weights only ({', '.join(pickled[:3])}); opening a pickle can run code, so it is never done. "
                f"Get the safetensors files of this model, or convert it where you trust its source"
            )
        raise CheckpointError(f"{self.source} holds no Hugging Face weights; expected {_SINGLE} or {_INDEX} there")

    def _indexed(self) -> dict[str, Path]:
        index = self.source / _INDEX
        try:
            weight_map = dict(json.loads(index.read_bytes())["weight_map"])
            foreign = [file for file in weight_map.values() if not _SHARD_NAME.fullmatch(file)]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{index} is not an index of safetensors files: {type(error).__name__}: {error}") from error
        if foreign:
            raise CheckpointError(f"{index} names {foreign[0]!r}; only safetensors files of the same folder are read")
        return {name: self.source / file for name, file in weight_map.items()}


def _mapped(path: Path) -> Any:
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} is missing or not a whole safetensors file: {error}") from error


def import_hf(
    source: Path,
    keys: KeyTable,
    expected: Mapping[str, tuple[int, ...]],
    destination: Path,
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    dtype: torch.dtype | None = None,
) -> Path:
    """Writes the Hugging Face weights at `source` as the checkpoint `destination/step-0` and returns its path.

    `expected` is every parameter of our model with its shape. Tensors keep their dtype, or are rounded once to `dtype`. Raises
    CheckpointError where tensors are missing, left over or of another shape, StorageError where `destination` cannot be written.
    """
    if (destination / "step-0").exists():
        raise CheckpointError(f"{destination / 'step-0'} exists; import into another folder, or remove it first")
    weights = HuggingFaceWeights(source)
    theirs = matched(weights, keys, expected)
    parts = []
    for name, shape in expected.items():
        stored = weights.tensors[theirs[name]][1]
        target = _target(stored, dtype)
        parts.append(Part(MODEL + name, shape, target, whole_box(shape), lambda n=theirs[name], d=target: weights.read(n).to(d)))
    return save_parts(destination, 0, parts, meta, files, OneProcess(), layout="", keep_last=KEEP_LEAST)


def matched(weights: HuggingFaceWeights, keys: KeyTable, expected: Mapping[str, tuple[int, ...]]) -> dict[str, str]:
    """Their name of each of our parameters, once every tensor on either side has its counterpart of the same shape."""
    theirs = _renamed(keys, expected)
    have = weights.tensors
    missing = [name for name in theirs.values() if name not in have]
    if missing:
        raise CheckpointError(f"{weights.source} lacks {_some(missing)}; is it the model, and the size, that the recipe names?")
    spare = [name for name in have.keys() - set(theirs.values()) if not _NOT_PARAMETERS.fullmatch(name)]
    if _HEAD in spare and _EMBEDDING in have:  # our model ties them, and a file may hold the head all the same
        if not _same_bits(weights.read(_HEAD), weights.read(_EMBEDDING)):
            raise CheckpointError(
                f"{weights.source}: {_HEAD} differs from {_EMBEDDING}, but the recipe's model ties them; set tied embeddings to false"
            )
        spare.remove(_HEAD)
    if spare:
        raise CheckpointError(f"{weights.source} has {_some(sorted(spare))}, which the recipe's model has not; are they of one kind?")
    shapes = {name: (have[name][0], tuple(expected[ours])) for ours, name in theirs.items()}
    if wrong := [f"{name} {there} (the recipe's: {here})" for name, (there, here) in shapes.items() if there != here]:
        raise CheckpointError(f"{weights.source} has other shapes than the recipe's model: {_some(wrong)}")
    return theirs


def export_hf(
    checkpoint: Checkpoint,
    keys: KeyTable,
    destination: Path,
    config_json: Mapping[str, Any],
    files: Mapping[str, bytes],
    shard_bytes: int = EXPORT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
) -> None:
    """Writes the model in `checkpoint` as a Hugging Face folder: safetensors, with an index where sharded, config.json and `files`.

    Tensors keep their dtype, or are rounded once to `dtype`. The folder appears complete or not at all. Raises CheckpointError
    where `destination` holds something or the checkpoint cannot be read, StorageError where the folder cannot be written.
    """
    destination = destination.absolute()  # "." has no name to draft beside
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists and is not an empty folder; export to another one")
    names = [name.removeprefix(MODEL) for name in checkpoint.tensors if name.startswith(MODEL)]
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no model weights; its tensors do not begin with {MODEL!r}")
    entries = []
    for name, theirs in _renamed(keys, names).items():
        stored = checkpoint.tensors[MODEL + name]
        target = _target(DTYPES[stored.dtype], dtype)
        entries.append(Entry(theirs, target, stored.shape, lambda n=name, d=target: checkpoint.read(MODEL + n).to(d)))
    contents = {**files, "config.json": json.dumps(config_json, indent=2).encode() + b"\n"}
    draft = destination.with_name(f".{destination.name}.tmp-{os.getpid()}")
    try:
        draft.mkdir(parents=True)
        _write_folder(draft, entries, contents, shard_bytes)
        sync_tree(draft)
        os.rename(draft, destination)
        sync_folder(destination.parent)
    except (OSError, ValueError) as error:
        raise StorageError(f"{destination} was not written: {error}; see that there is space and that it can be written") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _write_folder(folder: Path, entries: list[Entry], contents: Mapping[str, bytes], shard_bytes: int) -> None:
    groups = list(shards(entries, shard_bytes))
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        file = _SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / file, group)
        weight_map |= {entry.key: file for entry in group}
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(entry.size_bytes for entry in entries)}, "weight_map": weight_map}
        write_file(folder / _INDEX, json.dumps(index, indent=2).encode() + b"\n")
    for name, data in contents.items():
        (folder / checked_name(name)).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, data)


def _renamed(keys: KeyTable, names: Iterable[str]) -> dict[str, str]:
    theirs = {name: to_theirs(keys, name) for name in names}
    if unknown := [name for name, other in theirs.items() if other is None]:
        raise CheckpointError(f"the model's key table has no row for {_some(unknown)}; add them, as in {dict(list(keys.items())[:1])}")
    return {name: other for name, other in theirs.items() if other is not None}


def _target(stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and stored.is_floating_point else stored


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
