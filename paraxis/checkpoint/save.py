"""Saving: every rank writes its share, and rank 0 makes all of it visible at once, or none of it.

The order is the safety: shards into a draft, each made durable while it is hashed; hashes to rank 0; the manifest, and with it or
right after it what makes the draft a checkpoint (of a folder: the rename that gives it its name, and its parent's fsync); then
`latest`; and only then are older checkpoints removed. Whatever breaks on one rank is told to all before that, and the draft is deleted.
"""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any
from zlib import crc32

import torch
from torch import Tensor

from paraxis.base.errors import StorageError
from paraxis.base.layout import Box, whole_box
from paraxis.checkpoint.load import committed
from paraxis.checkpoint.manifest import Manifest, StoredFile, StoredPiece, StoredTensor, checked_name
from paraxis.checkpoint.place import Draft, Location
from paraxis.checkpoint.ranks import OneProcess, Ranks
from paraxis.checkpoint.retain import KEEP, Candidate, Keep, candidate, unwanted
from paraxis.checkpoint.store import Store, open_store
from paraxis.checkpoint.tensor_file import DTYPE_NAMES, DTYPES, SHARD_BYTES, Entry, shards, write_file, write_tensors

SHARE_BYTES = 2**20  # replicas do not cut a tensor into parts smaller than this

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """The part `box` of the tensor `name` of global `shape`, which this rank holds as `tensor` (any device and strides).

    `replica` of `replicas` numbers the ranks that hold the same part: together they write it once.
    """

    name: str
    shape: tuple[int, ...]
    box: Box
    tensor: Tensor
    replica: int = 0
    replicas: int = 1

    def __post_init__(self) -> None:
        assert tuple(self.tensor.shape) == self.box.sizes, (self.name, tuple(self.tensor.shape), self.box)
        assert 0 <= self.replica < self.replicas, (self.name, self.replica, self.replicas)


@dataclass(frozen=True)
class Part:
    """What this rank writes of a tensor: `box`, or nothing where that is None.

    `load` is called when its turn comes, so that only one part has to be in memory.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    box: Box | None
    load: Callable[[], Tensor]


def save(
    folder: str | Location,
    step: int,
    pieces: Iterable[Piece],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    ranks: Ranks | None = None,
    *,
    layout: str = "",
    keep: Keep = KEEP,
) -> Location:
    """Saves the state of all `ranks` as `folder/step-N` and returns that path once it is durable and visible.

    `pieces` are this rank's; `meta` (anything JSON can say) and `files` (by relative name) are written as rank 0 gives them. A
    `step-N` that exists is replaced; then older checkpoints go that `keep` does not ask for. An object store calls each save
    `step-N.save-G` by its generation. Raises StorageError on every rank alike where any of them fails: then nothing new is visible.
    """
    parts = [share(piece) for piece in pieces]
    return save_parts(folder, step, parts, meta, files, ranks or OneProcess(), layout=layout, keep=keep)


def share(piece: Piece) -> Part:
    """What this replica writes of `piece`: a slice along its longest dimension, or all or nothing of a small one."""
    box = piece.box
    writers = max(1, min(piece.replicas, box.numel * piece.tensor.dtype.itemsize // SHARE_BYTES))
    # Each tensor begins at another replica; the many small ones would all fall to the first.
    turn = (piece.replica + crc32(piece.name.encode())) % piece.replicas
    part = box.cut(box.sizes.index(max(box.sizes)), writers, turn) if writers > 1 and turn < writers else box
    mine = part if turn < writers and part.numel else None
    return Part(piece.name, piece.shape, piece.tensor.dtype, mine, lambda: piece.tensor[part.slices_within(box)])


def save_parts(
    folder: str | Location,
    step: int,
    parts: Sequence[Part],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    ranks: Ranks,
    *,
    layout: str,
    keep: Keep = KEEP,
) -> Location:
    """`save`, of parts that are read when their turn comes, and again where a store fails for the moment."""
    store = open_store(folder)
    begun = _first_for_all(ranks, store, step, lambda: _begin(store, step))
    draft = Draft(**begun["draft"])
    reports = ranks.gather_json(_attempt(ranks.rank, lambda: _write(store, draft, ranks.rank, parts)))
    blank = Manifest(step, draft.generation, layout, {}, {}, meta)
    _first_for_all(ranks, store, step, lambda: _commit(store, draft, blank, reports or [], files))
    if ranks.rank == 0:
        _retire(store, draft, candidate(draft.final, step, meta), begun["older"], keep)
    return store.place / draft.final


def save_shares(
    folder: str | Location,
    step: int,
    shares: Sequence[Sequence[Part]],
    meta: Mapping[str, Any],
    files: Mapping[str, bytes],
    *,
    layout: str,
) -> Location:
    """`save_parts` by one process that writes what each of several ranks would: `shares` has the parts of each, in rank order.

    Raises StorageError where `folder` cannot be written, and lets through what reading the parts raises of ours.
    """
    store, alone = open_store(folder), OneProcess()
    begun = _first_for_all(alone, store, step, lambda: _begin(store, step))
    draft = Draft(**begun["draft"])
    try:
        reports = [{"done": _write(store, draft, rank, parts)} for rank, parts in enumerate(shares)]
    except BaseException as error:
        store.discard(draft)
        if isinstance(error, (OSError, ValueError)):
            raise StorageError(
                f"{store.place / draft.final} was not saved: {error}; see that {store.place} has space and can be written"
            ) from error
        raise
    blank = Manifest(step, draft.generation, layout, {}, {}, meta)
    _first_for_all(alone, store, step, lambda: _commit(store, draft, blank, reports, files))
    _retire(store, draft, candidate(draft.final, step, meta), begun["older"], KEEP)
    return store.place / draft.final


def _attempt(rank: int, action: Callable[[], Any]) -> dict[str, Any]:
    """What `action` returned, or why it failed: the other ranks wait to be told, whatever broke on this one."""
    try:
        return {"done": action()}
    except Exception as error:
        _log.debug("rank %d failed while saving", rank, exc_info=True)
        return {"failed": str(error) if isinstance(error, StorageError) else f"rank {rank}: {type(error).__name__}: {error}"}


def _first_for_all(ranks: Ranks, store: Store, step: int, action: Callable[[], Any]) -> Any:
    """What `action` returns on rank 0, on every rank; StorageError on every rank where it failed."""
    outcome = ranks.broadcast_json(_attempt(0, action) if ranks.rank == 0 else None)
    if "failed" in outcome:
        raise StorageError(
            f"{store.place / f'step-{step}'} was not saved: {outcome['failed']}. Earlier checkpoints are untouched; "
            f"see that {store.place} has space, can be written, and is shared by all hosts"
        )
    return outcome["done"]


def _begin(store: Store, step: int) -> dict[str, Any]:
    """Begins a draft. A newer generation than any before: a writer left over from an earlier launch cannot share it."""
    passing = store.sweep()
    older = committed(store.place)
    draft = store.begin(step, 1 + max(passing + [checkpoint.manifest.generation for checkpoint in older], default=0))
    candidates = [asdict(candidate(one.path.name, one.manifest.step, one.meta)) for one in older]
    return {"draft": asdict(draft), "older": candidates}


def _write(store: Store, draft: Draft, rank: int, parts: Sequence[Part]) -> dict[str, Any]:
    """Writes this rank's shards and says what is in them: JSON of tensors and files as the manifest has them."""
    tensors: dict[str, Any] = {}
    owners: dict[str, tuple[str, Box]] = {}
    entries: list[Entry] = []
    for part in parts:
        if part.dtype not in DTYPE_NAMES:
            raise ValueError(f"{part.name} is {part.dtype}, which safetensors cannot store; it can: {', '.join(DTYPES)}")
        tensors.setdefault(part.name, {"shape": list(part.shape), "dtype": DTYPE_NAMES[part.dtype], "pieces": []})
        if part.box is not None:
            key = part.name if part.box == whole_box(part.shape) else f"{part.name}[{_ranges(part.box)}]"
            owners[key] = (part.name, part.box)
            entries.append(Entry(key, part.dtype, part.box.sizes, part.load))
    files: dict[str, Any] = {}
    for k, shard in enumerate(shards(entries, SHARD_BYTES)):
        file = f"rank-{rank}-{k}.safetensors"
        files[file] = store.write(f"{draft.name}/{file}", partial(write_tensors, entries=shard)).to_json()
        for entry in shard:
            name, box = owners[entry.key]
            tensors[name]["pieces"].append(StoredPiece(file, entry.key, box).to_json())
    return {"tensors": tensors, "files": files}


def _ranges(box: Box) -> str:
    return ",".join(f"{start}:{start + size}" for start, size in zip(box.offsets, box.sizes, strict=True))


def _commit(store: Store, draft: Draft, blank: Manifest, reports: list[dict[str, Any]], files: Mapping[str, bytes]) -> None:
    """Completes the draft and makes it a checkpoint; deletes it where that fails."""
    try:
        tensors, stored = _merge(reports)
        for name, data in files.items():
            stored[name] = store.write(f"{draft.name}/{checked_name(name)}", partial(write_file, data=data))
        store.commit(draft, replace(blank, tensors=tensors, files=stored).to_bytes())
    except BaseException:
        store.discard(draft)
        raise


def _merge(reports: list[dict[str, Any]]) -> tuple[dict[str, StoredTensor], dict[str, StoredFile]]:
    """All ranks' reports as one. Raises StorageError where a rank failed or the parts do not make whole tensors."""
    if failed := [report["failed"] for report in reports if "failed" in report]:
        raise StorageError("; ".join(failed))
    files: dict[str, StoredFile] = {}
    merged: dict[str, dict[str, Any]] = {}
    for report in (report["done"] for report in reports):
        files |= {name: StoredFile.from_json(file) for name, file in report["files"].items()}
        for name, tensor in report["tensors"].items():
            known = merged.setdefault(name, {**tensor, "pieces": []})
            if (known["shape"], known["dtype"]) != (tensor["shape"], tensor["dtype"]):
                raise StorageError(f"ranks disagree on {name}: {known['dtype']} {known['shape']} and {tensor['dtype']} {tensor['shape']}")
            known["pieces"] += tensor["pieces"]
    tensors: dict[str, StoredTensor] = {}
    for name, tensor in merged.items():
        try:
            tensors[name] = StoredTensor.from_json(tensor)
        except ValueError as error:
            raise StorageError(f"tensor {name}: {error}") from error
    return tensors, files


def _retire(store: Store, draft: Draft, new: Candidate, older: Sequence[Mapping[str, Any]], keep: Keep) -> None:
    """Announces the new checkpoint and removes those no longer wanted. A failure here costs space, not state: it is only logged."""
    try:
        store.announce(new.name)
        previous = [Candidate(**one) for one in older if one["name"] != new.name]
        replaced = [one for one in previous if one.step == new.step]  # in a folder they had the same name
        for one in replaced + unwanted([new, *(one for one in previous if one not in replaced)], keep):
            store.remove(one.name)
        store.sweep(upto=draft.generation)  # a newer save may have begun
    except OSError as error:
        _log.warning("%s is saved, but what it replaces could not be tidied away: %s", store.place / new.name, error)
