"""Hugging Face weights, in and out: safetensors files only, one tensor in memory at a time, bit for bit unless a dtype is asked for.

Parameters are renamed through a key table (base/keys.py), and experts, which we stack, are put together and taken apart one by one.
Our tensors that are a model's are named `model/<name>` in a checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paraxis.base.errors import CheckpointError, StorageError
from paraxis.base.keys import KeyTable, Stacked, to_theirs
from paraxis.base.layout import whole_box
from paraxis.checkpoint.hf_source import CONFIG, INDEX, SINGLE, HuggingFaceWeights
from paraxis.checkpoint.load import Checkpoint
from paraxis.checkpoint.manifest import checked_name
from paraxis.checkpoint.ranks import OneProcess
from paraxis.checkpoint.save import Part, save_parts
from paraxis.checkpoint.store import sync_folder, sync_tree
from paraxis.checkpoint.tensor_file import DTYPES, Entry, shards, write_file, write_tensors

MODEL = "model/"
EXPORT_SHARD_BYTES = 5_000_000_000

_NOT_PARAMETERS = re.compile(r".*rotary_emb\.inv_freq")  # a table that old files carry and that every model computes
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def import_hf(
    source: Path,
    keys: KeyTable,
    expected: Mapping[str, tuple[int, ...]],
    destination: Path,
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    dtype: torch.dtype | None = None,
    exact: Collection[str] = (),
) -> Path:
    """Writes the Hugging Face weights at `source` as the checkpoint `destination/step-0` and returns its path.

    `expected` is every parameter of our model with its shape. Tensors keep their dtype, or are rounded once to `dtype` unless they
    are among the `exact`. Raises CheckpointError where tensors are missing, left over or of another shape, StorageError where
    `destination` cannot be written.
    """
    if (destination / "step-0").exists():
        raise CheckpointError(f"{destination / 'step-0'} exists; import into another folder, or remove it first")
    weights = HuggingFaceWeights(source)
    theirs = matched(weights, keys, expected)
    parts = []
    for name, shape in expected.items():
        target = _target(_stored_dtype(weights, theirs[name], shape), None if name in exact else dtype)
        load = partial(_read_as_ours, weights, theirs[name], shape, target)
        parts.append(Part(MODEL + name, shape, target, whole_box(shape), load))
    return save_parts(destination, 0, parts, meta, files, OneProcess(), layout="")


def matched(weights: HuggingFaceWeights, keys: KeyTable, expected: Mapping[str, tuple[int, ...]]) -> dict[str, str | Stacked]:
    """What they call each of our parameters, once every tensor on either side has its counterpart of the same shape."""
    theirs = _renamed(keys, expected)
    needed = {name: shape for ours, other in theirs.items() for name, shape in _named(other, tuple(expected[ours]))}
    have = weights.tensors
    missing = [name for name in needed if name not in have]
    if missing:
        raise CheckpointError(f"{weights.source} lacks {_some(missing)}; is it the model, and the size, that the recipe names?")
    spare = [name for name in have.keys() - needed.keys() if not _NOT_PARAMETERS.fullmatch(name)]
    if _HEAD in spare and _EMBEDDING in have:  # our model ties them, and a file may hold the head all the same
        if not _same_bits(weights.read(_HEAD), weights.read(_EMBEDDING)):
            raise CheckpointError(
                f"{weights.source}: {_HEAD} differs from {_EMBEDDING}, but the recipe's model ties them; set tied embeddings to false"
            )
        spare.remove(_HEAD)
    if spare:
        raise CheckpointError(f"{weights.source} has {_some(sorted(spare))}, which the recipe's model has not; are they of one kind?")
    shapes = {name: (have[name][0], here) for name, here in needed.items()}
    if wrong := [f"{name} {there} (the recipe's: {here})" for name, (there, here) in shapes.items() if there != here]:
        raise CheckpointError(f"{weights.source} has other shapes than the recipe's model: {_some(wrong)}")
    return theirs


def fill(out: Tensor, weights: HuggingFaceWeights, theirs: str | Stacked) -> Tensor:
    """Fills one of our parameters from what they call `theirs`, with values rounded once to the dtype of `out`; returns it."""
    if isinstance(theirs, str):
        return out.copy_(weights.read(theirs))
    for one, name in zip(out, theirs.names(len(out)), strict=True):
        tensor = weights.read(name)
        one.copy_(tensor.mT if theirs.transpose else tensor)
    return out


def export_hf(
    checkpoint: Checkpoint,
    keys: KeyTable,
    destination: Path,
    config_json: Mapping[str, Any],
    files: Mapping[str, bytes],
    shard_bytes: int = EXPORT_SHARD_BYTES,
    dtype: torch.dtype | None = None,
    exact: Collection[str] = (),
) -> None:
    """Writes the model in `checkpoint` as a Hugging Face folder: safetensors, with an index where sharded, config.json and `files`.

    Tensors keep their dtype, or are rounded once to `dtype` unless they are among the `exact` (our names). The folder appears complete
    or not at all. Raises CheckpointError where `destination` holds something or the checkpoint cannot be read, StorageError where the
    folder cannot be written.
    """
    destination = destination.absolute()  # "." has no name to draft beside
    if destination.exists() and (not destination.is_dir() or any(destination.iterdir())):
        raise CheckpointError(f"{destination} exists and is not an empty folder; export to another one")
    names = [name.removeprefix(MODEL) for name in checkpoint.tensors if name.startswith(MODEL)]
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no model weights; its tensors do not begin with {MODEL!r}")
    entries: list[Entry] = []
    for name, theirs in _renamed(keys, names).items():
        entries += _entries(checkpoint, MODEL + name, theirs, None if name in exact else dtype)
    contents = {**files, CONFIG: json.dumps(config_json, indent=2).encode() + b"\n"}
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
        file = SINGLE if len(groups) == 1 else f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        write_tensors(folder / file, group)
        weight_map |= {entry.key: file for entry in group}
    if len(groups) > 1:
        index = {"metadata": {"total_size": sum(entry.size_bytes for entry in entries)}, "weight_map": weight_map}
        write_file(folder / INDEX, json.dumps(index, indent=2).encode() + b"\n")
    for name, data in contents.items():
        (folder / checked_name(name)).parent.mkdir(parents=True, exist_ok=True)
        write_file(folder / name, data)


def _entries(checkpoint: Checkpoint, name: str, theirs: str | Stacked, dtype: torch.dtype | None) -> Iterator[Entry]:
    """What is written of our tensor `name`: itself, or what they keep apart of it, each read when its turn comes."""
    stored = checkpoint.tensors[name]
    target = _target(DTYPES[stored.dtype], dtype)
    if isinstance(theirs, str):
        yield Entry(theirs, target, stored.shape, lambda: checkpoint.read(name).to(target))
        return
    for number, (other, shape) in enumerate(_named(theirs, stored.shape)):
        yield Entry(other, target, shape, partial(_read_one, checkpoint, name, number, theirs.transpose, target))


def _read_one(checkpoint: Checkpoint, name: str, number: int, transpose: bool, dtype: torch.dtype) -> Tensor:
    """Entry `number` of our stacked tensor, as they keep it."""
    shape = checkpoint.tensors[name].shape
    one = checkpoint.read(name, whole_box(shape).cut(0, shape[0], number)).squeeze(0).to(dtype)
    return one.mT if transpose else one


def _read_as_ours(weights: HuggingFaceWeights, theirs: str | Stacked, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return fill(torch.empty(shape, dtype=dtype), weights, theirs)


def _named(theirs: str | Stacked, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of their tensors that make up ours of this shape."""
    return [(theirs, shape)] if isinstance(theirs, str) else [(name, theirs.their_shape(shape)) for name in theirs.names(shape[0])]


def _stored_dtype(weights: HuggingFaceWeights, theirs: str | Stacked, shape: tuple[int, ...]) -> torch.dtype:
    """The dtype of what makes up one tensor of ours; several promote to the narrowest that holds them all exactly."""
    return reduce(torch.promote_types, (weights.tensors[name][1] for name, _ in _named(theirs, shape)))


def _renamed(keys: KeyTable, names: Iterable[str]) -> dict[str, str | Stacked]:
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
