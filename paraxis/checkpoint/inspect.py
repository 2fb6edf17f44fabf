"""What stands in a place for checkpoints, for people: everything that its names and manifests say, without reading the tensors."""

import tomllib
from dataclasses import dataclass
from pathlib import Path

from paraxis.base.errors import CheckpointError
from paraxis.checkpoint.load import Checkpoint, newest, open_checkpoint, open_listed
from paraxis.checkpoint.local_store import looks_like_checkpoint
from paraxis.checkpoint.manifest import MANIFEST
from paraxis.checkpoint.place import Location, Url, checkpoints_of, location, step_in_name
from paraxis.checkpoint.store import Store, open_files, open_store

CONFIG = "config.toml"  # of a run's folder


@dataclass(frozen=True)
class Listed:
    """One entry of a checkpoints folder. `saved_s` is in seconds since 1970, `size_bytes` is what its files take.

    `problem` is empty for a complete checkpoint; generation, layout and tensors are unknown where there is one.
    """

    path: Location
    step: int
    saved_s: float | None
    size_bytes: int
    latest: bool
    generation: int | None = None
    layout: str | None = None
    tensors: int | None = None
    problem: str = ""


def checkpoints_folder(path: str | Location) -> Location:
    """Where the checkpoints are of a run's folder, or `path` where that is the place itself. Raises CheckpointError for others.

    A run's folder is one with its checkpoints in it, or whose configuration says that they are elsewhere.
    """
    where = location(path)
    if isinstance(where, Path) and not where.is_dir():
        what = "is a file" if where.exists() else "does not exist"
        raise CheckpointError(f"{where} {what}; give a run's folder, such as runs/NAME, or the folder with its checkpoints")
    for folder in candidate_folders(where):
        store = open_store(folder)
        if store.complete() or store.unfinished():
            return folder
    raise CheckpointError(f"{where} holds no checkpoint; give a run's folder, such as runs/NAME, or the folder with its checkpoints")


def candidate_folders(where: Location) -> list[Location]:
    """Where checkpoints may be if `where` is a run's folder or a place for checkpoints, the likeliest first."""
    return [where / "checkpoints", where, *_elsewhere(where)]


def checkpoints_at(path: str | Location) -> list[Location]:
    """The checkpoint at `path`, or else every one in that folder of a run, by step. Raises CheckpointError where there is none."""
    where = location(path)
    if is_checkpoint(where):
        return [where]
    folder = checkpoints_folder(where)
    if not (found := open_store(folder).complete()):
        raise CheckpointError(f"{folder} holds no complete checkpoint, only what was being written")
    return [folder / name for name in sorted(found, key=lambda name: (step_in_name(name), name))]


def newest_at(path: str | Location) -> Location:
    """The checkpoint at `path`, or else the newest in that folder of a run. Raises CheckpointError where there is none."""
    where = location(path)
    if is_checkpoint(where):
        return where
    if (found := newest(folder := checkpoints_folder(where))) is None:
        raise CheckpointError(f"{folder} holds no complete checkpoint; `paraxis ckpt ls {folder}` says what is there")
    return found


def is_checkpoint(where: Location) -> bool:
    """Whether a checkpoint is at `where` itself; it may be damaged."""
    return open_files(where).has(MANIFEST) or (isinstance(where, Path) and looks_like_checkpoint(where))


def checkpoint_in(path: Location) -> Checkpoint | None:
    """The checkpoint of ours that `path` stands for, or None where it holds Hugging Face weights instead."""
    if isinstance(path, Path) and not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(
            f"{path} {what}; give a checkpoint such as runs/NAME/checkpoints/step-100, a run's folder, or a Hugging Face folder"
        )
    if open_files(path).has(MANIFEST):
        return open_checkpoint(path)
    for folder in candidate_folders(path):
        if (found := newest(folder)) is not None:
            return open_checkpoint(found)
    if isinstance(path, Url):
        raise CheckpointError(f"{path} holds no complete paraxis checkpoint; `paraxis ckpt ls {path}` says what is there")
    if any(file.name.startswith(("config.json", "model.", "model-", "pytorch_model")) for file in path.iterdir()):
        return None
    raise CheckpointError(
        f"{path} holds neither a complete paraxis checkpoint ({MANIFEST}) nor a Hugging Face model (config.json, model.safetensors); "
        "give a checkpoint such as runs/NAME/checkpoints/step-100, a run's folder, or a Hugging Face folder"
    )


def listed(folder: str | Location) -> list[Listed]:
    """Everything in a checkpoints folder by step, drafts too. Damage is noticed as far as manifests and the files' sizes tell."""
    store = open_store(folder)
    latest = store.latest()
    complete = [_complete(store, name, latest) for name in store.complete()]
    unfinished = "unfinished: it is being written, or its save died"
    drafts = [_entry(store, name, latest, problem=unfinished) for name in store.unfinished()]
    return sorted(complete + drafts, key=lambda entry: (entry.step, entry.path.name))


def _complete(store: Store, name: str, latest: str) -> Listed:
    try:
        manifest = open_listed(store.place / name).manifest
    except CheckpointError as error:
        return _entry(store, name, latest, problem=f"damaged: {error}")
    return _entry(store, name, latest, generation=manifest.generation, layout=manifest.layout, tensors=len(manifest.tensors))


def _entry(
    store: Store,
    name: str,
    latest: str,
    *,
    generation: int | None = None,
    layout: str | None = None,
    tensors: int | None = None,
    problem: str = "",
) -> Listed:
    """The entry of a checkpoint, which another process may be writing or removing meanwhile."""
    files = store.files(name)
    size = sum(files.listing().values())
    return Listed(files.path, step_in_name(name), files.saved_s(), size, name == latest, generation, layout, tensors, problem)


def _elsewhere(where: Location) -> list[Location]:
    """Where the configuration in a run's folder says that its checkpoints are, if it says so."""
    if not isinstance(where, Path) or not (where / CONFIG).is_file():
        return []
    try:
        folder = tomllib.loads((where / CONFIG).read_text(encoding="utf-8")).get("checkpoint", {}).get("folder", "")
    except (OSError, ValueError, AttributeError):
        return []  # for `train` to complain of; here it is a folder without checkpoints
    return [checkpoints_of(folder, where)] if isinstance(folder, str) and folder else []
