"""From the launch of a command to the end of its first step: with nothing compiled or prepared, and with what a run before left."""

from collections.abc import Iterator, Sequence
from math import inf
from pathlib import Path
from statistics import median
from typing import Any

from paraxis.base.env import private_caches
from paraxis.bench.rows import Measured, Subject


def startup_rows(subjects: Sequence[Subject], runs: int, folder: Path) -> Iterator[dict[str, Any]]:
    """A row for each subject, which is run once cold and then `runs` times warm; seconds. Its logs are kept in `folder`."""
    for number, subject in enumerate(subjects, 1):
        row = subject.row
        with private_caches(folder / f"caches-{number}"):
            done = [subject.measure(_made(folder / f"{number}-{run}")) for run in range(runs + 1)]
        error = next((run.error for run in done if run.first_step_s is None), None)
        warm = [run.first_step_s for run in done[1:] if run.first_step_s is not None]
        middle = min(done[1:], key=lambda run: abs((run.first_step_s or inf) - median(warm)) if warm else 0)
        yield {
            "system": row.system,
            "name": row.name,
            "model": row.model,
            "layout": done[0].layout,
            "precision": done[0].precision,
            "seq_len": row.seq_len,
            "batch": row.batch,
            "cold_s": done[0].first_step_s,
            "warm_s": median(warm) if warm else None,
            "warm_from_s": min(warm, default=None),
            "warm_to_s": max(warm, default=None),
            "cold_apart_s": apart(done[0]),
            "warm_apart_s": apart(middle),
            "error": error,
        }


def apart(run: Measured) -> list[str] | None:
    """What a run's way to the end of its first step is made of, in seconds; None where it does not say."""
    if not run.startup_s or run.first_step_s is None:
        return None
    parts = {**run.startup_s, "first step": run.first_step_s - sum(run.startup_s.values())}
    return [f"{name} {seconds:.1f}" for name, seconds in parts.items()]


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
