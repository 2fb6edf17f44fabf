"""`paraxis bench planner`: measurements, published or our own, beside what the planner, and others' equations, say of the same runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import Arguments, parse, whole_number
from paraxis.cli.bench_rows import ROWS_FLAGS, ROWS_OPTIONS, measure_rows, refuse_settings

if TYPE_CHECKING:
    from paraxis.bench.machine import Machine
    from paraxis.bench.published import Published

OPTIONS = ("rows", "first", "measured", "cluster", *ROWS_OPTIONS)
FLAGS = ("calibrate", *ROWS_FLAGS)


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, OPTIONS, FLAGS)
    if len(parsed.names) != 1:
        raise ConfigError("bench planner takes no recipe: its runs are those of the rows")
    refuse_settings("planner", parsed, (*OPTIONS, *FLAGS))
    first = whole_number("first", parsed.options["first"], 1) if "first" in parsed.options else None
    if "measured" in parsed.options:
        return _measured(parsed, arguments)
    if "cluster" in parsed.options:
        raise ConfigError("--cluster is for --measured FILE; published rows have clusters of their own")
    if "calibrate" in parsed.flags:
        return _calibrate(parsed, first)

    def rows(machine: "Machine") -> Iterator[dict[str, Any]]:
        # Here, so that help does not wait for torch.
        from paraxis.base.errors import ConfigError
        from paraxis.bench.percent import summaries
        from paraxis.bench.planner import record, trace
        from paraxis.bench.published import clusters

        known, made, pieces = clusters(_folder(parsed)), [], {}
        for row in _rows(parsed, "score", first):
            try:
                made.append(record(row, trace(row, pieces).said(known[row.cluster])))
            except ConfigError as error:
                made.append(record(row, None, str(error)))
            yield made[-1]
        yield from summaries(made)

    return measure_rows("planner", parsed, arguments, rows)


def _measured(parsed: Arguments, arguments: list[str]) -> int:
    """Runs of ours, predicted on the cluster they were measured on."""
    from paraxis.bench.measured import measured_rows, measured_runs
    from paraxis.plan.cluster_file import read_cluster

    if "cluster" not in parsed.options:
        raise ConfigError("--measured needs --cluster NAME: the machine that the runs were measured on, a file or one of those ready")
    for other in ("rows", "first"):
        if other in parsed.options:
            raise ConfigError(f"--{other} is for published rows; leave it out beside --measured")
    runs, cluster = measured_runs(Path(parsed.options["measured"])), read_cluster(parsed.options["cluster"])
    if "calibrate" in parsed.flags:
        from paraxis.bench.calibrated import calibrated

        calibrated(runs, cluster, print)
        return 0
    return measure_rows("planner-own", parsed, arguments, lambda machine: measured_rows(runs, cluster))


def _calibrate(parsed: Arguments, first: int | None) -> int:
    """Fits the device constants on the calibration rows again, and prints them."""
    from paraxis.bench.planner import calibrations
    from paraxis.bench.published import clusters

    calibrations(_rows(parsed, "calibrate", first), clusters(_folder(parsed)), print)
    return 0


def _folder(parsed: Arguments) -> Path:
    from paraxis.bench.published import FOLDER

    return Path(parsed.options.get("rows", str(FOLDER)))


def _rows(parsed: Arguments, use: str, first: int | None) -> "list[Published]":
    """The rows of one use, the first of each set where only those are wanted."""
    from paraxis.bench.published import published

    wanted = [row for row in published(_folder(parsed)) if row.use == use]
    counted: dict[str, int] = {}
    for row in wanted:
        counted[row.set] = counted.get(row.set, 0) + 1
    seen = dict.fromkeys(counted, 0)
    kept = []
    for row in wanted:
        seen[row.set] += 1
        if first is None or seen[row.set] <= first:
            kept.append(row)
    return kept
