"""What stands in a checkpoints folder, for people: everything that its names and manifests say, without reading the tensors."""

from dataclasses import dataclass
from pathlib import Path

from paraxis.base.errors import CheckpointError
from paraxis.checkpoint.load import newest, open_checkpoint
from paraxis.checkpoint.manifest import MANIFEST
from paraxis.checkpoint.store import complete_folders, draft_folders, looks_like_checkpoint, read_latest, step_in_name


@dataclass(frozen=True)
class Listed:
    """One entry of a checkpoints folder. `saved_s` is in seconds since 1970, `size_bytes` is what its files take.

    `problem` is empty for a complete checkpoint; generation, layout and tensors are unknown where there is one.
    """

    path: Path
    step: int
    saved_s: float
    size_bytes: int
    latest: bool
    generation: int | None = None
    layout: str | None = None
    tensors: int | None = None
    problem: str = ""


def checkpoints_folder(path: Path) -> Path:
    """The folder with the checkpoints of a run's folder, or `path` where it is that folder itself. Raises CheckpointError for others."""
    if not path.is_dir():
        what = "is a file" if path.exists() else "does not exist"
        raise CheckpointError(f"{path} {what}; give a run's folder, such as runs/NAME, or the folder with its checkpoints")
    for folder in (path / "checkpoints", path):
        if complete_folders(folder) or draft_folders(folder):
            return folder
    raise CheckpointError(f"{path} holds no checkpoint; give a run's folder, such as runs/NAME, or the folder with its checkpoints")


def checkpoints_at(path: Path) -> list[Path]:
    """The checkpoint at `path`, or else every one in that folder of a run, by step. Raises CheckpointError where there is none."""
    if (path / MANIFEST).exists() or looks_like_checkpoint(path):
        return [path]
    folder = checkpoints_folder(path)
    if not (found := complete_folders(folder)):
        raise CheckpointError(f"{folder} holds no complete checkpoint, only what was being written")
    return sorted(found, key=lambda one: (step_in_name(one.name), one.name))


def newest_at(path: Path) -> Path:
    """The checkpoint at `path`, or else the newest in that folder of a run. Raises CheckpointError where there is none."""
    if (path / MANIFEST).exists() or looks_like_checkpoint(path):
        return path
    if (found := newest(folder := checkpoints_folder(path))) is None:
        raise CheckpointError(f"{folder} holds no complete checkpoint; `paraxis ckpt ls {folder}` says what is there")
    return found


def listed(folder: Path) -> list[Listed]:
    """Everything in a checkpoints folder by step, drafts too. Damage is noticed as far as manifests and the files' sizes tell."""
    latest = read_latest(folder)
    complete = [_complete(path, latest) for path in complete_folders(folder)]
    drafts = [_entry(path, latest, problem="unfinished: it is being written, or its save died") for path in draft_folders(folder)]
    return sorted(complete + drafts, key=lambda entry: (entry.step, entry.path.name))


def _complete(path: Path, latest: str) -> Listed:
    try:
        manifest = open_checkpoint(path).manifest
    except CheckpointError as error:
        return _entry(path, latest, problem=f"damaged: {error}")
    return _entry(path, latest, generation=manifest.generation, layout=manifest.layout, tensors=len(manifest.tensors))


def _entry(
    path: Path, latest: str, *, generation: int | None = None, layout: str | None = None, tensors: int | None = None, problem: str = ""
) -> Listed:
    """The entry of `path`, which another process may be writing to or removing meanwhile."""
    manifest = path / MANIFEST  # written last
    files = [file for file in path.rglob("*") if file.is_file()]
    try:
        saved_s = (manifest if manifest.is_file() else path).stat().st_mtime
        size = sum(file.lstat().st_size for file in files)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}; if a run is at work there, try again") from error
    return Listed(path, step_in_name(path.name), saved_s, size, path.name == latest, generation, layout, tensors, problem)
