"""Runs of ours that were measured, beside what `paraxis.plan` says of them: memory allocated and reserved, the time of a step, and whether
they fit.

A results file of `paraxis bench memory` has a row for each run: its `recipe`, `options` as on the command line, `ranks`; what was
measured, `allocated_gib` and `reserved_gib` of the fullest rank and `step_s`; `limit_gib`, where the allocator was held below what the
device has; `out_of_memory`, where the run did not fit; `error`, where it ended otherwise. Rows that constants were fitted on are named in
a file beside it, one a line, and are not scored.
"""

import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.bench.percent import percent, summaries
from paraxis.bench.results import read_results
from paraxis.bench.step import configured
from paraxis.plan.hardware import Cluster
from paraxis.plan.predict import Prediction, predict, runs_in
from paraxis.train.config import RunConfig

GIB = 1 << 30


@dataclass(frozen=True, kw_only=True)
class MeasuredRun:
    """A row of the results file. GiB are those of the fullest rank; None is what was not measured."""

    name: str
    config: RunConfig
    ranks: int
    calibrates: bool
    allocated_gib: float | None
    reserved_gib: float | None
    step_s: float | None
    limit_gib: float | None
    out_of_memory: bool
    error: str | None


def measured_runs(path: Path) -> list[MeasuredRun]:
    """The rows of a results file. Raises ConfigError for what is no such file, and for settings that a recipe does not have."""
    rows = read_results(path).rows
    fitted_on = calibrating(path)
    if unknown := fitted_on - {str(row.get("name")) for row in rows}:
        raise ConfigError(f"{beside(path)} names {', '.join(sorted(unknown))}, which {path} has no row for; take them out")
    try:
        return [_run(row, str(row["name"]) in fitted_on) for row in rows]
    except KeyError as error:
        raise ConfigError(f"{path} has rows without {error}; give a file of measured runs, as bench/results/memory-*.json") from error


def beside(path: Path) -> Path:
    """The file that names the rows which calibrate."""
    return path.with_suffix(".calibration.txt")


def calibrating(path: Path) -> set[str]:
    """The names of rows that constants were fitted on; none without a file that says so."""
    if not beside(path).exists():
        return set()
    return {line.strip() for line in beside(path).read_text().splitlines() if line.strip() and not line.startswith("#")}


def _run(row: Mapping[str, Any], calibrates: bool) -> MeasuredRun:
    options = row["options"]
    words = shlex.split(options) if isinstance(options, str) else list(options)
    settings: dict[str, object] = {}
    for word in words:
        name, equals, value = word.removeprefix("--").partition("=")
        settings[name] = value if equals else True
    return MeasuredRun(
        name=row["name"],
        config=configured(row["recipe"], settings),
        ranks=row["ranks"],
        calibrates=calibrates,
        allocated_gib=row.get("allocated_gib"),
        reserved_gib=row.get("reserved_gib"),
        step_s=row.get("step_s"),
        limit_gib=row.get("limit_gib"),
        out_of_memory=bool(row.get("out_of_memory")),
        error=row.get("error"),
    )


def measured_rows(runs: Sequence[MeasuredRun], cluster: Cluster) -> Iterator[dict[str, Any]]:
    """A record of each run, then what is off in all of them. The calibrating rows have a summary of their own."""
    made: list[dict[str, Any]] = []
    known: dict[tuple[str, int], Prediction] = {}  # runs under several limits are one configuration
    for run in runs:
        key = repr(run.config), run.ranks
        try:
            if key not in known:
                known[key] = predict(run.config, cluster, run.ranks)
            limited = run.limit_gib is not None and runs_in(run.config, cluster, run.ranks, run.limit_gib * GIB)
            made.append(record(run, known[key], runs=limited if run.limit_gib is not None else known[key].runs))
        except ConfigError as error:
            made.append(record(run, None, str(error)))
        yield made[-1]
    yield from verdicts(made)


def record(run: MeasuredRun, said: Prediction | None, problem: str = "", *, runs: bool | None = None) -> dict[str, Any]:
    """A row of the table. Percents are how far predicted is from measured, with their sign.

    Under a limit the allocator gives back what it would have kept, and takes its time over it: what is reserved, and the step's time,
    are compared for runs without one.
    """
    ran = run.error is None and not run.out_of_memory
    free = ran and run.limit_gib is None
    allocated, reserved = (run.allocated_gib if ran else None), (run.reserved_gib if free else None)
    step_s = run.step_s if free else None
    return {
        "set": "calibrating" if run.calibrates else "scored",
        "row": run.name,
        "allocated_gib": allocated,
        "predicted_allocated_gib": round(said.allocated / GIB, 3) if said else None,
        "allocated_percent": percent(said and said.allocated / GIB, allocated),
        "reserved_gib": reserved,
        "predicted_reserved_gib": round(said.reserved / GIB, 3) if said else None,
        "reserved_percent": percent(said and said.reserved / GIB, reserved),
        "step_s": step_s,
        "predicted_step_s": round(said.step_s, 4) if said else None,
        "step_percent": percent(said and said.step_s, step_s),
        "limit_gib": run.limit_gib,
        "ran": None if run.error and not run.out_of_memory else not run.out_of_memory,
        "said_to_fit": runs,
        "problem": problem or (None if run.out_of_memory else run.error) or None,
    }


def verdicts(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """The summaries of each set, and how often it was wrong about whether a run fits, each way."""
    yield from summaries(records)
    for name in dict.fromkeys(record["set"] for record in records):
        told = [one for one in records if one["set"] == name and None not in (one["ran"], one["said_to_fit"])]
        accepted = sum(one["said_to_fit"] and not one["ran"] for one in told)
        refused = sum(one["ran"] and not one["said_to_fit"] for one in told)
        yield {"set": name, "row": f"of {len(told)}: {accepted} said to fit did not, {refused} said not to fit did"}
