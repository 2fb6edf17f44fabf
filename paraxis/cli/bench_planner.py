"""`paraxis bench planner`: published measurements beside what the planner, and others' equations, say of the same runs."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import Arguments, parse, whole_number
from paraxis.cli.bench_rows import ROWS_FLAGS, ROWS_OPTIONS, measure_rows, refuse_settings

if TYPE_CHECKING:
    from paraxis.bench.machine import Machine
    from paraxis.bench.published import Published

OPTIONS = ("rows", "first", *ROWS_OPTIONS)
FLAGS = ("calibrate", *ROWS_FLAGS)


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, OPTIONS, FLAGS)
    if len(parsed.names) != 1:
        raise ConfigError("bench planner takes no recipe: its runs are those of the published rows")
    refuse_settings("planner", parsed, (*OPTIONS, *FLAGS))
    first = whole_number("first", parsed.options["first"], 1) if "first" in parsed.options else None
    if "calibrate" in parsed.flags:
        return _calibrate(parsed, first)

    def rows(machine: "Machine") -> Iterator[dict[str, Any]]:
        # Here, so that help does not wait for torch.
        from paraxis.base.errors import ConfigError
        from paraxis.bench.planner import record, summaries, trace
        from paraxis.bench.published import clusters

        known, made = clusters(_folder(parsed)), []
        for row in _rows(parsed, "score", first):
            try:
                made.append(record(row, trace(row).said(known[row.cluster])))
            except ConfigError as error:
                made.append(record(row, None, str(error)))
            yield made[-1]
        yield from summaries(made)

    return measure_rows("planner", parsed, arguments, rows)


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
