"""One rank of a training run, from joining the others to leaving them."""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from paraxis.base.config import to_toml
from paraxis.base.env import Environment, allow_deterministic_kernels, prefer_expandable_segments, read_environment
from paraxis.base.errors import CheckpointError, ConfigError
from paraxis.checkpoint.load import committed
from paraxis.observe.folder import RunFolder
from paraxis.observe.trace import Profile
from paraxis.parallel.world import World, join, leave
from paraxis.train.config import RunConfig
from paraxis.train.data import open_data
from paraxis.train.loop import StopRequest, train
from paraxis.train.record import Record
from paraxis.train.run import Run, assemble
from paraxis.train.state import restore_run, save_run

log = logging.getLogger("paraxis")


def run_worker(config: RunConfig, *, base: str, run_dir: Path, resume: str) -> None:
    """Trains as the rank that the environment says this process is.

    `base` names the recipe, for the saved configuration. `resume`: auto continues where the run folder holds a checkpoint,
    must refuses where it does not, never refuses where it does. Raises ParaxisError for what a person can mend.
    """
    environment = read_environment()
    prefer_expandable_segments()
    if config.train.deterministic:
        allow_deterministic_kernels()
        torch.use_deterministic_algorithms(True)
    world = join(environment)
    folder = RunFolder(run_dir)
    try:
        lock = folder.hold() if world.first else None
        try:
            _train(config, base, folder, resume, environment, world)
        finally:
            if lock is not None:
                lock.release()
    finally:
        leave()


def _train(config: RunConfig, base: str, folder: RunFolder, resume: str, environment: Environment, world: World) -> None:
    data = open_data(config, environment.cache_dir)
    run = assemble(config, world, data.rows, data.held_out)
    run.skipped_records = data.skipped
    resumed = resume_run(run, folder, resume)
    text = to_toml(config, base)
    if world.first:
        folder.config_file.write_text(text)
    files = {"config.toml": text.encode(), **data.files}
    record = Record(folder, world, config.metrics, total=config.train.steps, done=run.step)
    profile = Profile(config.profile, folder.trace, world.rank, world.device)
    record.event("resume" if resumed else "start", str(resumed or base), step=run.step, layout=str(run.mesh.degrees), ranks=world.size)
    try:
        with stop_on_signals() as stop:
            train(run, record, profile, partial(save_run, run, folder.checkpoints, files), stop)
    except Exception as error:
        record.event("failure", f"{type(error).__name__}: {error}", step=run.step)
        raise
    finally:
        profile.close()
        record.close()


def resume_run(run: Run, folder: RunFolder, resume: str) -> Path | None:
    """Continues from the newest checkpoint that reads whole, as `resume` allows; returns its path.

    A damaged one is passed over with a warning. Raises ConfigError where `resume` forbids what is found.
    """
    found = committed(folder.checkpoints, log.warning)
    if resume == "never" and found:
        raise ConfigError(f"--resume=never, but {folder.path} already holds {found[0].path.name}; "
                          f"choose another --run-dir, or --resume=auto to continue")
    for number, checkpoint in enumerate(found):
        try:
            restore_run(run, checkpoint)
        except CheckpointError as error:
            if number + 1 == len(found):
                raise
            log.warning("%s is passed over: %s", checkpoint.path.name, error)
        else:
            return checkpoint.path
    if resume == "must":
        raise ConfigError(f"--resume=must, but {folder.path} holds no checkpoint; check --run-dir, or use --resume=auto to start anew")
    return None


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """While inside, SIGTERM and Ctrl-C ask the loop to save and stop; a second one ends the process as usual."""
    stop = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def ask(number: int, frame: object) -> None:
        stop.reason = signal.Signals(number).name
        signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
