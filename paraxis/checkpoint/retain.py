"""Which checkpoints of a folder are kept, and the removal of the others by hand.

A run removes what it no longer wants after each save (save.py). What a person removes is guarded by more: two checkpoints of
which every byte was read must remain.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from paraxis.base.errors import CheckpointError, StorageError
from paraxis.checkpoint.config import KEEP_LEAST
from paraxis.checkpoint.load import committed
from paraxis.checkpoint.place import Location
from paraxis.checkpoint.store import open_store
from paraxis.checkpoint.verify import no_progress, verify

HELD_OUT = "held_out"  # where a checkpoint's meta has the loss at its step


@dataclass(frozen=True)
class Keep:
    """The `last` so many checkpoints (at least two), those whose step is a multiple of `every`, and the `best` so many.

    Those in `damaged`, by name, are known to be that: they count for none of these, and stay for a person to look at.
    """

    last: int = KEEP_LEAST
    every: int = 0
    best: int = 0
    damaged: Sequence[str] = ()


KEEP = Keep()


@dataclass(frozen=True)
class Candidate:
    """A complete checkpoint: its folder's name, its step, and its held-out loss over `rows` (a fingerprint) where it was scored."""

    name: str
    step: int
    loss: float | None = None
    rows: str = ""


@dataclass(frozen=True)
class Pruned:
    """What stayed and what went, newest first; `verified` are those of which every byte was read, `damaged` stay too, wherever they are."""

    kept: tuple[str, ...]
    removed: tuple[str, ...]
    verified: tuple[str, ...]
    damaged: tuple[str, ...]


def held_out(loss: float | None, rows: str) -> dict[str, Any] | None:
    """What a checkpoint's meta says under HELD_OUT of a step that was scored over the rows of this fingerprint, or of one that was not."""
    return {"loss": loss, "rows": rows} if loss is not None and math.isfinite(loss) else None


def candidate(name: str, step: int, meta: Mapping[str, Any]) -> Candidate:
    """The checkpoint `name` of `step` as retention sees it."""
    match meta.get(HELD_OUT):
        case {"loss": float(loss), "rows": str(rows)}:
            return Candidate(name, step, loss, rows)
    return Candidate(name, step)


def unwanted(candidates: Sequence[Candidate], keep: Keep) -> list[Candidate]:
    """Those of `candidates`, which come newest first, that `keep` does not ask for.

    Losses are compared over the rows of the newest that was scored: over others they are of another kind.
    """
    candidates = [one for one in candidates if one.name not in keep.damaged]
    wanted = {one.name for one in candidates[: max(keep.last, KEEP_LEAST)]}
    wanted |= {one.name for one in candidates if keep.every and one.step % keep.every == 0}
    rows = next((one.rows for one in candidates if one.loss is not None), "")
    scored = [(one.loss, order, one.name) for order, one in enumerate(candidates) if one.loss is not None and one.rows == rows]
    wanted |= {name for _, _, name in sorted(scored)[: keep.best]}
    return [one for one in candidates if one.name not in wanted]


def prune(folder: str | Location, keep: Keep, *, dry_run: bool = False, progress: Callable[[str, int, int], None] | None = None) -> Pruned:
    """Removes what `keep` does not ask for from the checkpoints folder `folder`; with `dry_run`, only says what that is.

    The newest two of which every byte verifies stay whatever `keep` says, and so do damaged ones, for a person to look at. Drafts
    are not touched. Nobody else may write to the folder meanwhile. `progress` is told the name of what is read, and bytes. Raises
    CheckpointError, with everything still there, where fewer than two verify; StorageError where one cannot be removed.
    """
    store = open_store(folder)
    whole = committed(folder, lambda _: None)
    damaged = set(store.complete()) - {checkpoint.path.name for checkpoint in whole}
    names = [checkpoint.path.name for checkpoint in whole]
    candidates = [candidate(one.path.name, one.manifest.step, one.meta) for one in whole]
    doomed = {one.name for one in unwanted(candidates, keep)}
    verified: list[str] = []
    for name in names if doomed else ():
        if len(verified) < KEEP_LEAST:
            report = partial(progress, name) if progress is not None else no_progress
            if verify(store.place / name, report).damage:
                damaged.add(name)
            else:
                verified.append(name)
    if doomed and len(verified) < KEEP_LEAST:
        raise CheckpointError(
            f"only {len(verified)} of the {len(names)} checkpoints in {folder} verifies, and {KEEP_LEAST} have to remain; nothing was "
            f"removed. `paraxis ckpt verify {folder}` names what is damaged"
        )
    removed = [name for name in names if name in doomed - damaged - set(verified)]
    for name in () if dry_run else reversed(removed):
        try:
            store.remove(name)
        except OSError as error:
            why = error.strerror or error
            raise StorageError(f"{store.place / name} cannot be removed: {why}; see that {folder} can be written") from error
    kept = tuple(name for name in names if name not in removed)
    return Pruned(kept, tuple(removed), tuple(verified), tuple(sorted(damaged)))
