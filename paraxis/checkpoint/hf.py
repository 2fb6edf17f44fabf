"""Hugging Face weights, in and out: safetensors files only, one tensor in memory at a time, bit for bit unless a dtype is asked for.

Parameters are renamed through a key table (base/keys.py), and experts, which we stack, are put together and taken apart one by one.
Our tensors that are a model's are named `model/<name>` in a checkpoint.
"""

import json
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from paraxis.base.errors import CheckpointError, StorageError
from paraxis.base.keys import KeyTable, Piece, Stacked, Theirs, to_theirs
from paraxis.base.layout import whole_box
from paraxis.checkpoint.hf_source import CONFIG, INDEX, SINGLE, ForeignWeights, HuggingFaceWeights
from paraxis.checkpoint.load import Checkpoint
from paraxis.checkpoint.local_store import sync_folder, sync_tree
from paraxis.checkpoint.manifest import checked_name
from paraxis.checkpoint.place import Location, step_in_name
from paraxis.checkpoint.save import Part, save_shares
from paraxis.checkpoint.store import open_store
from paraxis.checkpoint.tensor_file import DTYPES, Entry, shards, write_file, write_tensors

MODEL = "model/"
EXPORT_SHARD_BYTES = 5_000_000_000

# Tables that old files carry and that every model computes: frequencies, and GPT-2's causal masks.
_NOT_PARAMETERS = re.compile(r".*rotary_emb\.inv_freq|(transformer\.)?h\.\d+\.attn\.(masked_)?bias")
_HEADS, _EMBEDDING = {"lm_head.weight", "head.weight"}, "embed.weight"  # theirs or ours; ours
_OUTSIDE = "transformer."  # begins GPT-2's names, but not where the model was saved without its head


def import_hf(
    source: Path | ForeignWeights,
    keys: KeyTable,
    expected: Mapping[str, tuple[int, ...]],
    destination: Location,
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    dtype: torch.dtype | None = None,
    exact: Collection[str] = (),
) -> Location:
    """Writes the Hugging Face weights at `source`, or others, as the checkpoint `destination/step-0` and returns its path.

    `expected` is every parameter of our model with its shape. Tensors keep their dtype, or are rounded once to `dtype` unless they
    are among the `exact`. Raises CheckpointError where tensors are missing, left over or of another shape, StorageError where
    `destination` cannot be written.
    """
    if any(step_in_name(name) == 0 for name in open_store(destination).complete()):
        raise CheckpointError(f"{destination / 'step-0'} exists; import into another folder, or remove it first")
    weights = HuggingFaceWeights(source) if isinstance(source, Path) else source
    theirs = matched(weights, keys, expected)
    parts = []
    for name, shape in expected.items():
        target = _target(_stored_dtype(weights, theirs[name], shape), None if name in exact else dtype)
        load = partial(_read_as_ours, weights, theirs[name], shape, target)
        parts.append(Part(MODEL + name, shape, target, whole_box(shape), load))
    return save_shares(destination, 0, [parts], meta, files, layout="")


def matched(weights: ForeignWeights, keys: KeyTable, expected: Mapping[str, tuple[int, ...]]) -> dict[str, Theirs]:
    """What they call each of our parameters, once every tensor on either side has its counterpart of the same shape."""
    have = weights.tensors
    theirs = renamed(weights, keys, expected)
    needed = {name: shape for ours, other in theirs.items() for name, shape in _named(other, tuple(expected[ours]))}
    missing = [name for name in needed if name not in have]
    if missing:
        raise CheckpointError(f"{weights.source} lacks {some(missing)}; is it the model, and the size, that the recipe names?")
    if spare := left_over(weights, theirs, needed.keys()):
        raise CheckpointError(f"{weights.source} has {some(spare)}, which the recipe's model has not; are they of one kind?")
    shapes = {name: (have[name][0], here) for name, here in needed.items()}
    if wrong := [f"{name} {there} (the recipe's: {here})" for name, (there, here) in shapes.items() if there != here]:
        raise CheckpointError(f"{weights.source} has other shapes than the recipe's model: {some(wrong)}")
    return theirs


def renamed(weights: ForeignWeights, keys: KeyTable, names: Iterable[str]) -> dict[str, Theirs]:
    """What `weights` may call each of our parameters `names`; whether they are there is not looked at."""
    if not any(name.startswith(_OUTSIDE) for name in weights.tensors):
        keys = {ours: _without(_OUTSIDE, other) for ours, other in keys.items()}
    return _renamed(keys, names)


def their_names(keys: KeyTable, expected: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Every name by which one of our parameters, or a part of one, may go elsewhere; those that `keys` have no row for are left out."""
    found: set[str] = set()
    for name, shape in expected.items():
        if (theirs := to_theirs(keys, name)) is not None:
            found |= {other for other, _ in _named(theirs, shape)}
    return found | {name.removeprefix(_OUTSIDE) for name in found}


def left_over(weights: ForeignWeights, theirs: Mapping[str, Theirs], needed: Collection[str], skip: Collection[str] = ()) -> list[str]:
    """The tensors that are not among the `needed`, without tables that every model computes, and a head that repeats a tied embedding.

    Raises CheckpointError for a head that differs from the embedding, unless it is among those to `skip`.
    """
    spare = {name for name in weights.tensors if name not in needed and not _NOT_PARAMETERS.fullmatch(name)}
    embedding = theirs.get(_EMBEDDING)
    for head in (spare & _HEADS) - set(skip):
        if not isinstance(embedding, str) or embedding not in weights.tensors:
            continue
        if not _same_bits(weights.read(head), weights.read(embedding)):
            raise CheckpointError(
                f"{weights.source}: {head} differs from {embedding}, but the recipe's model ties them; set tied embeddings to false"
            )
        spare.remove(head)
    return sorted(spare)


def fill(out: Tensor, weights: ForeignWeights, theirs: Theirs) -> Tensor:
    """Fills one of our parameters from what they call `theirs`, with values rounded once to the dtype of `out`; returns it."""
    if isinstance(theirs, str):
        return out.copy_(weights.read(theirs))
    if isinstance(theirs, Piece):
        piece = weights.read(theirs.pattern).chunk(theirs.of, dim=-1)[theirs.number]
        return out.copy_(piece.mT if theirs.transpose else piece)
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
    # Not in the manifest's order, which is that of the layout that saved it: the same weights shall be the same bytes.
    names = sorted((name.removeprefix(MODEL) for name in checkpoint.tensors if name.startswith(MODEL)), key=_numbers_as_numbers)
    if not names:
        raise CheckpointError(f"{checkpoint.path} holds no model weights; its tensors do not begin with {MODEL!r}")
    entries: list[Entry] = []
    renamed = _renamed(keys, names)
    for name, theirs in renamed.items():
        if isinstance(theirs, Piece):
            pieces = {other.number: name for name, other in renamed.items() if isinstance(other, Piece) and other.pattern == theirs.pattern}
            entries += _put_together(checkpoint, name, pieces, theirs, None if name in exact else dtype)
        else:
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


def _put_together(
    checkpoint: Checkpoint, name: str, pieces: Mapping[int, str], theirs: Piece, dtype: torch.dtype | None
) -> Iterator[Entry]:
    """Theirs, of which our tensor `name` and others are the `pieces`: written once, when the turn of the first comes."""
    stored = checkpoint.tensors[MODEL + name]
    target = _target(DTYPES[stored.dtype], dtype)

    def read() -> Tensor:
        parts = [checkpoint.read(MODEL + pieces[number]).to(target) for number in range(theirs.of)]
        return torch.cat([part.mT if theirs.transpose else part for part in parts], dim=-1)

    if theirs.number == 0:
        yield Entry(theirs.pattern, target, theirs.their_shape(stored.shape), read)


def _read_one(checkpoint: Checkpoint, name: str, number: int, transpose: bool, dtype: torch.dtype) -> Tensor:
    """Entry `number` of our stacked tensor, as they keep it."""
    shape = checkpoint.tensors[name].shape
    one = checkpoint.read(name, whole_box(shape).cut(0, shape[0], number)).squeeze(0).to(dtype)
    return one.mT if transpose else one


def _read_as_ours(weights: ForeignWeights, theirs: Theirs, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return fill(torch.empty(shape, dtype=dtype), weights, theirs)


def _named(theirs: Theirs, shape: tuple[int, ...]) -> list[tuple[str, tuple[int, ...]]]:
    """Name and shape of their tensors that make up, or hold, ours of this shape."""
    if isinstance(theirs, Piece):
        return [(theirs.pattern, theirs.their_shape(shape))]
    return [(theirs, shape)] if isinstance(theirs, str) else [(name, theirs.their_shape(shape)) for name in theirs.names(shape[0])]


def _stored_dtype(weights: ForeignWeights, theirs: Theirs, shape: tuple[int, ...]) -> torch.dtype:
    """The dtype of what makes up one tensor of ours; several promote to the narrowest that holds them all exactly."""
    return reduce(torch.promote_types, (weights.tensors[name][1] for name, _ in _named(theirs, shape)))


def _without(prefix: str, theirs: Theirs) -> Theirs:
    return theirs.removeprefix(prefix) if isinstance(theirs, str) else replace(theirs, pattern=theirs.pattern.removeprefix(prefix))


def _renamed(keys: KeyTable, names: Iterable[str]) -> dict[str, Theirs]:
    theirs = {name: to_theirs(keys, name) for name in names}
    if unknown := [name for name, other in theirs.items() if other is None]:
        raise CheckpointError(f"the model's key table has no row for {some(unknown)}; add them, as in {dict(list(keys.items())[:1])}")
    return {name: other for name, other in theirs.items() if other is not None}


def _target(stored: torch.dtype, asked: torch.dtype | None) -> torch.dtype:
    return asked if asked is not None and stored.is_floating_point else stored


def _same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.contiguous().view(torch.uint8), b.contiguous().view(torch.uint8))


def _numbers_as_numbers(name: str) -> list[tuple[int, str]]:
    """A key by which layer 2 comes before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def some(names: list[str], shown: int = 5) -> str:
    return ", ".join(names[:shown]) + (f" and {len(names) - shown} more" if len(names) > shown else "")
