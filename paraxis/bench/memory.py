"""What training steps of a configuration take, in memory and in time, without all that is around them: made rows, a few steps, no files.

Every row runs on workers of its own, so that nothing of one is left for the next and one that runs out of memory takes nothing with it.
A row may be run again with less and less memory until it fails, which shows what it can do with.
"""

import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch

from paraxis.base.config import redact
from paraxis.base.env import prefer_expandable_segments, read_environment
from paraxis.base.errors import ConfigError
from paraxis.bench.step import configured, words
from paraxis.observe.memory import limit_memory, read_memory
from paraxis.parallel.world import can_be_copied, join, leave, visible_devices
from paraxis.resilience.launch import launch
from paraxis.train.check import check
from paraxis.train.config import RunConfig
from paraxis.train.run import Run, assemble
from paraxis.train.step import train_step
from paraxis.verify.rows import MadeRows

WARM_UP = 2  # steps that are not timed: kernels are compiled in the first, the optimizer's state is made
GIB = 2**30


@dataclass(frozen=True, kw_only=True)
class Trial:
    """A row to run: `settings` on top of `recipe`, on `ranks` ranks; then once for each of `limits_gib`, the largest first."""

    name: str
    recipe: str
    settings: Mapping[str, object]
    ranks: int
    steps: int
    limits_gib: Sequence[float] = ()

    @property
    def config(self) -> RunConfig:
        """Raises ConfigError for settings that the recipe does not have."""
        return configured(self.recipe, self.settings)


@dataclass(frozen=True, kw_only=True)
class Taken:
    """What a rank's steps took under a limit (0: none). Peaks in GiB; `step_s` is the median step after the warm-up, None where there was
    none."""

    limit_gib: float
    allocated_gib: float = 0.0
    reserved_gib: float = 0.0
    step_s: float | None = None
    out_of_memory: bool = False


def memory_rows(trials: Sequence[Trial]) -> Iterator[dict[str, Any]]:
    """A record of each trial, and one more for each of its limits. Raises ConfigError for a trial that cannot run, before any does."""
    for trial in trials:
        try:
            check(trial.config, trial.ranks)
        except ConfigError as error:
            raise ConfigError(f"row {trial.name!r}: {error}") from error
        if trial.limits_gib and not visible_devices():
            raise ConfigError(f"row {trial.name!r} has limits, but on a CPU no process can be held to so much memory; leave them out")
    for trial in trials:
        for limit_gib, by_rank, error in _run(trial):
            yield _record(trial, limit_gib, by_rank, error)


def _run(trial: Trial) -> Iterator[tuple[float, list[Taken], str | None]]:
    """What every rank took under each limit. Workers end with the first limit that is too low; new ones begin with the next."""
    left = [0.0, *sorted(trial.limits_gib, reverse=True)]
    while left:
        with TemporaryDirectory(prefix="paraxis-bench-") as folder:
            plan = json.dumps(asdict(replace(trial, limits_gib=left)))
            work = partial(_work, plan, folder) if can_be_copied() else None
            code = launch([sys.executable, "-m", "paraxis.bench.memory", plan, folder], trial.ranks, work=work)
            told = [_read(Path(folder) / f"{rank}.json") for rank in range(trial.ranks)]
        done = max(len(ends) for ends in told)
        for place in range(min(done, len(left))):
            ranks = [ends[place] for ends in told if place < len(ends)]
            whole = len(ranks) == trial.ranks or any(one.out_of_memory for one in ranks)
            yield left[place], ranks, None if whole else f"the workers ended with exit code {code}"
        if code and not done:
            yield left[0], [], f"the workers ended with exit code {code}"
        if not code or not done or not any(ends and ends[-1].out_of_memory for ends in told) or (done == 1 and left[0] == 0.0):
            return  # all is done; or it failed for another reason, or even without a limit
        left = left[done:]


def _read(path: Path) -> list[Taken]:
    return [Taken(**json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def _record(trial: Trial, limit_gib: float, by_rank: Sequence[Taken], error: str | None) -> dict[str, Any]:
    config = trial.config
    out = any(one.out_of_memory for one in by_rank)
    times = [one.step_s for one in by_rank if one.step_s is not None]
    return {
        "name": trial.name,
        "recipe": trial.recipe,
        "options": " ".join(words({path: redact(path, value) for path, value in trial.settings.items()})),
        "layout": str(config.parallel.degrees.filling(trial.ranks)),
        "ranks": trial.ranks,
        "precision": config.precision,
        "compile": config.compile,
        "remat": config.remat.mode,
        "micro_batch": config.train.micro_batch,
        "seq_len": config.data.seq_len,
        "limit_gib": limit_gib or None,
        "allocated_gib": _most(one.allocated_gib for one in by_rank) if not out else None,
        "reserved_gib": _most(one.reserved_gib for one in by_rank) if not out else None,
        "step_s": round(max(times), 4) if times and not out else None,
        "out_of_memory": out,
        "error": error,
    }


def _most(values: Iterator[float]) -> float | None:
    return max((round(value, 3) for value in values), default=None)


def _work(plan: str, folder: str) -> int:
    """One rank of a trial. Its exit code is 0 where every limit was enough."""
    trial = Trial(**json.loads(plan))
    prefer_expandable_segments()
    world = join(read_environment())
    config = trial.config
    rows = MadeRows(config.model.vocab_size, config.data.seq_len, documents=bool(getattr(config.data, "document_mask", False)))
    run: Run | None = None
    with open(Path(folder) / f"{world.rank}.json", "w") as out:
        for limit_gib in trial.limits_gib:
            limit_memory(world.device, int(limit_gib * GIB))
            try:
                run = run or assemble(config, world, rows, None)
                taken = _steps(run, trial.steps, limit_gib)
            except torch.OutOfMemoryError:
                taken = Taken(limit_gib=limit_gib, out_of_memory=True)
            print(json.dumps(asdict(taken)), file=out, flush=True)
            if taken.out_of_memory:  # the others wait for this rank, and the launcher ends them
                return 1
    leave()
    return 0


def _steps(run: Run, steps: int, limit_gib: float) -> Taken:
    loader, device = run.loader(), run.world.device
    times: list[float] = []
    try:
        for step in range(steps):
            batches = [run.take(batch) for batch in next(loader)]
            _wait(run)
            started_s = time.perf_counter()
            train_step(run, batches, lr=1e-5)
            _wait(run)
            if step >= WARM_UP:
                times.append(time.perf_counter() - started_s)
    finally:
        loader.close()
    memory = read_memory(device)
    return Taken(
        limit_gib=limit_gib,
        allocated_gib=memory.allocated_gib,
        reserved_gib=memory.reserved_gib,
        step_s=median(times) if times else None,
    )


def _wait(run: Run) -> None:
    if run.world.device.is_cuda:
        torch.cuda.synchronize(run.world.device.torch)


if __name__ == "__main__":
    code = _work(*sys.argv[1:])
    sys.stdout.flush()
    os._exit(code)
