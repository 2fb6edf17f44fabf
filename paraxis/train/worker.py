"""One rank of a training run, from joining the others to leaving them."""

import logging
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch

from paraxis.base.config import to_toml
from paraxis.base.env import Environment, allow_deterministic_kernels, keep_freed_memory, prefer_expandable_segments, read_environment
from paraxis.base.errors import ParaxisError, Preempted, StorageError, TrainingError
from paraxis.base.loading import loading
from paraxis.checkpoint.place import checkpoints_of
from paraxis.data.open import Live
from paraxis.observe.folder import RunFolder
from paraxis.observe.startup import StartUp
from paraxis.observe.trace import Profile
from paraxis.parallel.world import World, join, leave, peer_is_lost, visible_devices
from paraxis.train.config import RunConfig
from paraxis.train.data import open_data
from paraxis.train.loop import StopRequest, train
from paraxis.train.record import Record
from paraxis.train.run import assemble
from paraxis.train.saving import Saving
from paraxis.train.start import begin

log = logging.getLogger("paraxis")

LOST_A_RANK = "another rank has ended, so this one cannot go on; what that rank or its launcher says is the cause"
LAUNCHER_NOTICES_S = 5.0  # local launchers look twenty times a second, torchrun ten times


def run_worker(config: RunConfig, *, base: str, run_dir: Path, resume: str) -> None:
    """Trains as the rank that the environment says this process is.

    `base` names the recipe, for the saved configuration. `resume`: auto continues where the run folder holds a checkpoint,
    must refuses where it does not, never refuses where it does. Raises ParaxisError for what a person can mend; `said` tells
    those that another rank has already raised alike, so that a person reads each message once.
    """
    startup = StartUp()
    startup.ends("imports")
    environment = read_environment()
    prefer_expandable_segments()
    if config.train.deterministic:
        allow_deterministic_kernels()
        torch.use_deterministic_algorithms(True)
    stop = StopRequest()
    world: World | None = None
    try:
        with loading(lambda: _compiler(config)):  # joining waits for drivers and peers, and imports nothing
            world = join(environment)
        if not world.device.is_cuda:
            keep_freed_memory()
        _choose_who_logs(world)
        startup.ends("joining")
        folder = RunFolder(run_dir)
        with folder.hold() if world.first else nullcontext():
            _train(config, base, folder, resume, environment, world, stop, startup)
    except ParaxisError as error:
        if world is not None:
            # All ranks stop on request: one that gets no answer knows that the store's own rank has spoken, and left.
            error.said = not world.claim(str(error), unanswered=not isinstance(error, Preempted))
        raise
    except Exception as error:
        if not peer_is_lost(error):
            raise
        _await_launcher(stop)
        lost = TrainingError(LOST_A_RANK)
        lost.said = bool(stop.reason) or (world is not None and not world.claim(LOST_A_RANK))
        raise lost from error
    finally:
        leave()


def _compiler(config: RunConfig) -> list[str]:
    """The module that takes longest to load where blocks will be compiled by it."""
    wanted = config.compile == "inductor" or (config.compile == "auto" and visible_devices() > 0)
    return ["torch._inductor.compile_fx"] if wanted else []


def _choose_who_logs(world: World) -> None:
    """Rank 0 says what was chosen and what is odd. Others meet the same, so they keep to errors."""
    log.setLevel(logging.INFO if world.first else logging.ERROR)
    # Broken records are met by the one rank that happens to tokenise.
    logging.getLogger("paraxis.data.documents").setLevel(logging.WARNING)
    if not log.hasHandlers():
        log.addHandler(logging.StreamHandler())


def _await_launcher(stop: StopRequest) -> None:
    """Gives the launcher time to learn which rank was lost, and to end this one before it complains of the consequence."""
    deadline_s = time.monotonic() + LAUNCHER_NOTICES_S
    while not stop.reason and time.monotonic() < deadline_s:
        time.sleep(0.05)


def _train(
    config: RunConfig,
    base: str,
    folder: RunFolder,
    resume: str,
    environment: Environment,
    world: World,
    stop: StopRequest,
    startup: StartUp,
) -> None:
    live = Live(owner=str(folder.path.resolve()), leads=environment.local_rank == 0)
    data = open_data(config, environment.cache_dir, world.size, live=live)
    startup.ends("data")
    run = assemble(config, world, data.rows, data.held_out)
    run.optimizer.counters()  # waits for the device, so that the first values are there
    startup.ends("building")
    resumed = begin(run, folder, resume)
    startup.ends("reading")
    text = to_toml(config, base)
    if world.first:
        folder.write_config(text)
    files = {"config.toml": text.encode(), **data.files}
    record = Record(folder, world, config.metrics, total=config.train.steps, done=run.step)
    profile = Profile(config.profile, folder.trace, world.rank, world.device)
    start = {"layout": str(run.mesh.degrees), "ranks": world.size, "startup_s": startup.seconds}
    start |= {"init_from": config.train.init_from} if config.train.init_from and not resumed else {}
    record.event("resume" if resumed else "start", str(resumed or base), step=run.step, **start)
    try:
        with stop_on_signals(stop), Saving(run, record, checkpoints_of(config.checkpoint.folder, folder.path), files) as saving:
            train(run, record, profile, saving, stop)
    except Preempted:
        raise
    except Exception as error:
        lost = peer_is_lost(error)
        shared = lost or isinstance(error, (TrainingError, StorageError))  # rank 0 raises these too
        record.failure(LOST_A_RANK if lost else f"{type(error).__name__}: {error}", run.step, shared=shared)
        raise
    finally:
        profile.close()
        record.close()
        data.close()


@contextmanager
def stop_on_signals(stop: StopRequest) -> Iterator[None]:
    """While inside, SIGTERM, Ctrl-C and SIGUSR1 ask the loop to save and stop.

    A second SIGTERM or Ctrl-C ends the process as usual. SIGUSR1 is a scheduler's early notice, which it may well give twice.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: object) -> None:
        stop.reason = stop.reason or signal.Signals(number).name
        if number != signal.SIGUSR1:
            signal.signal(number, before[number])

    before: dict[int, Any] = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
