"""Continuing a run from the newest checkpoint in its folder that every rank can read."""

import logging

from paraxis.base.errors import CheckpointError, ConfigError
from paraxis.checkpoint.load import committed, open_checkpoint
from paraxis.checkpoint.place import Location, checkpoints_of
from paraxis.checkpoint.store import complete_folders
from paraxis.observe.folder import RunFolder
from paraxis.parallel.world import World
from paraxis.train.run import Run
from paraxis.train.state import refuse_foreign, restore_run

log = logging.getLogger("paraxis")


def resume_run(run: Run, folder: RunFolder, resume: str) -> Location | None:
    """Continues from the newest checkpoint that reads whole on every rank, as `resume` allows; returns its path.

    A damaged one is passed over with a warning, and remembered as `run.damaged`. Raises ConfigError where `resume` forbids what is
    found, and CheckpointError where there are checkpoints but none can be read, or where the newest is not of this run.
    """
    place = checkpoints_of(run.config.checkpoint.folder, folder.path)
    whole, damaged = _found(run.world, place)
    names = whole + damaged
    if resume == "never" and names:
        raise ConfigError(f"--resume=never, but {place} already holds {names[0]}; choose another --run-dir, or --resume=auto to continue")
    if resume == "must" and not names:
        raise ConfigError(f"--resume=must, but {place} holds no checkpoint; check --run-dir, or use --resume=auto to start anew")
    for name in whole:
        path = place / name
        if (problem := _agreed(run.world, _problem(run, path))) is None:
            return path
        log.warning("%s is passed over: %s", name, problem)
        run.damaged = (*run.damaged, name)
    if names:
        raise CheckpointError(
            f"none of the checkpoints in {place} can be read ({', '.join(names)}); restore one from a copy, or start in another --run-dir"
        )
    return None


def _found(world: World, place: Location) -> tuple[list[str], list[str]]:
    """The checkpoints as rank 0 sees them, so that all try the same: those that look whole, newest first, and the others."""
    names: list[list[str]] = [[], []]
    if world.first:
        whole = [checkpoint.path.name for checkpoint in committed(place, log.warning)]
        names = [whole, sorted({path.name for path in complete_folders(place)} - set(whole))]
    whole, damaged = world.broadcast_json(names)
    return whole, damaged


def _problem(run: Run, path: Location) -> str | None:
    """Restores `run` from the checkpoint at `path`, or says why it cannot be read."""
    try:
        checkpoint = open_checkpoint(path)
    except CheckpointError as error:
        return str(error)
    refuse_foreign(run, checkpoint)
    try:
        restore_run(run, checkpoint)
    except CheckpointError as error:
        return str(error)
    return None


def _agreed(world: World, problem: str | None) -> str | None:
    """The first rank's problem, on every rank: what one of them cannot read, none continues from."""
    problems = world.gather_json(problem)
    return world.broadcast_json(next(filter(None, problems or []), None))
