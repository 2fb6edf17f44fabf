"""`paraxis bench checkpoint`: what saving and loading a state of a chosen size cost, beside the bare disk and torch's own checkpoints."""

import json
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraxis.base.errors import ConfigError, ParaxisError
from paraxis.cli.arguments import parse, whole_number
from paraxis.cli.bench_rows import ROWS_FLAGS, ROWS_OPTIONS, measure_rows, refuse_settings
from paraxis.resilience.launch import launch

if TYPE_CHECKING:
    from paraxis.bench.machine import Machine

OPTIONS = ("gib", "ranks", "runs", "folder", *ROWS_OPTIONS)
FLAGS = ("no-dcp", *ROWS_FLAGS)


def bench(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, OPTIONS, FLAGS)
    if len(parsed.names) != 1:
        raise ConfigError("bench checkpoint takes no recipe; the state it saves is as large as --gib says")
    refuse_settings("checkpoint", parsed, (*OPTIONS, *FLAGS))
    size, runs = _bytes(parsed.options.get("gib", "1")), whole_number("runs", parsed.options.get("runs", "3"), 1)

    def rows(machine: "Machine") -> Iterator[dict[str, Any]]:
        # Here, so that help does not wait for torch.
        from paraxis.bench.checkpoint import SYNC, middle, record

        for ranks in _worlds(parsed.options.get("ranks"), machine.devices):
            measured = _measure(size, runs, ranks, parsed.options.get("folder"), dcp="no-dcp" not in parsed.flags)
            [sync_s] = [middle(row, "save_s") for row in measured if (row["system"], row["name"]) == SYNC]
            yield from (record(row, sync_s) for row in measured)

    return measure_rows("checkpoint", parsed, arguments, rows)


def _bytes(gib: str) -> int:
    try:
        size = float(gib)
    except ValueError:
        size = math.nan
    if not 0 < size < 2**20:
        raise ConfigError(f"--gib={gib} must be a size in GiB above 0, such as 1 or 0.5")
    return int(size * 2**30)


def _worlds(asked: str | None, devices: int) -> list[int]:
    """The numbers of ranks to measure with: by default one and two CPU processes, or one GPU and all of them."""
    if asked is None:
        return sorted({1, devices or 2})
    worlds = [whole_number("ranks", number, 1) for number in asked.split(",")]
    if devices and max(worlds) > devices:
        raise ConfigError(f"--ranks={asked} needs as many GPUs, but this machine shows {devices}; lower it")
    return worlds


def _measure(size: int, runs: int, ranks: int, parent: str | None, *, dcp: bool) -> list[dict[str, Any]]:
    """Has so many processes measure, in a folder of their own under `parent`."""
    from paraxis.bench.checkpoint import Plan

    try:
        with tempfile.TemporaryDirectory(prefix="paraxis-bench-", dir=parent) as folder:
            out = Path(folder) / "times.json"
            plan = Plan(size_bytes=size, runs=runs, folder=folder, dcp=dcp)
            if code := launch([sys.executable, "-m", "paraxis.bench.checkpoint", json.dumps(asdict(plan)), str(out)], ranks):
                raise ParaxisError(f"the {ranks} ranks that were to be measured ended with exit code {code}; the reason is above")
            return json.loads(out.read_text())
    except OSError as error:
        raise ConfigError(f"--folder={parent or tempfile.gettempdir()} cannot be used: {error}; choose a folder with space") from error
