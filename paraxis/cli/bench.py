"""`paraxis bench`: measures training steps, with another system beside them where it is installed, and makes tables of results."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraxis.base.config import suggestion
from paraxis.base.env import read_environment
from paraxis.base.errors import ConfigError, StorageError
from paraxis.cli import bench_collectives, bench_kernels, bench_memory, bench_placement, bench_planner, bench_search
from paraxis.cli.arguments import Arguments, parse, whole_number
from paraxis.cli.bench_checkpoint import bench as bench_checkpoint
from paraxis.cli.bench_peers import PEER_LISTS, PEER_OPTIONS, peers
from paraxis.cli.bench_rows import TABLE_WIDTH, Variant, measure_rows, read_variants, results_file, shown
from paraxis.cli.data import bench as bench_data

if TYPE_CHECKING:
    from paraxis.bench.machine import Machine
    from paraxis.bench.rows import Pace
    from paraxis.bench.step import Ours

HELP = """\
usage: paraxis bench step RECIPE [--field=value ...] [options]
       paraxis bench startup RECIPE [--field=value ...] [options, without --steps and --warmup]
       paraxis bench data RECIPE [--data.field=value ...] [--rounds N] [--processes N] [--name NAME] [--out FILE] [--json]
       paraxis bench checkpoint [--gib N] [--ranks N,N] [--runs N] [--folder DIR] [--no-dcp] [--name NAME] [--out FILE] [--json]
       paraxis bench memory RECIPE [--field=value ...] [--row ...] [--ranks N] [--steps N] [--name NAME] [--out FILE] [--json]
       paraxis bench attention RECIPE [--field=value ...] [--name NAME] [--out FILE] [--json]
       paraxis bench loss RECIPE [--field=value ...] [--name NAME] [--out FILE] [--json]
       paraxis bench collectives [--ranks N] [--quick] [--name NAME] [--out FILE] [--json]
       paraxis bench placement RECIPE [--field=value ...] [--cluster FILE] [--hosts N] [--matrices N] [--name NAME] [--out FILE] [--json]
       paraxis bench search RECIPE [--field=value ...] [--cluster FILE] [--gpus N,N] [--runs N] [--name NAME] [--out FILE] [--json]
       paraxis bench planner [--rows DIR] [--first N] [--calibrate] [--name NAME] [--out FILE] [--json]
       paraxis bench planner --measured FILE --cluster NAME [--name NAME] [--out FILE] [--json]
       paraxis bench table FILE ... | --into PAGE

step trains the recipe as `paraxis train` does, once for each row, and reports per device tokens/s (median over the steps after
the warm-up), step time, peak memory, MFU, losses, and the time from launch to the end of step 1. Settings hold for every row.

  --row "NAME: --field=value ..."  a row of its own with these settings on top, or --layout=LAYOUT; may be repeated (default: one row)
  --ranks N                        workers (default: as paraxis train chooses)
  --steps N                        steps of a run (default: 15), of which
  --warmup N                       the first are not measured (default: 5)
  --runs N                         runs of each row, in turns (default: 1)
  --limit SECONDS                  stop a run after this long, and record its row as failed (default: 600)
  --against titan --titan DIR      also run TorchTitan 0.2.2 from DIR, on its DIR/titan.toml; see docs/performance.md
  --titan-options="--section.field value ..."    options for it, in every row
  --titan-row "NAME: --section.field value ..."  a row of it with these options; may be repeated
  --against transformers           also run transformers' Trainer on the work of each row, where it and accelerate are installed
  --name NAME                      begins the name of the results file (default: step)
  --out FILE                       the results file (default: bench/results/NAME-HARDWARE-DATE.json)
  --logs DIR                       keep what each run printed and its run folder
  --json                           print the results as JSON, not as a table
  --debug                          show tracebacks of errors
  --help                           this

startup runs every row to the end of its first step: once with empty caches (compiled code, prepared data), then --runs times (default: 3)
with what the first has left; seconds from the launch of the command.

data measures, in tokens/s, the reading of training rows by one reader, for each kind of packing, and the making of shards in 1 and
in N processes (default: one for every four cores; no more than the data have parts) and of chunks as data.tokenize=live makes them, beside
the bare tokenizer: the median of N
rounds (default: 5).

checkpoint saves and loads a state of so many GiB (default: 1) on so many ranks (default: 1 and 2 CPU processes, or 1 and all GPUs) in a
folder made in DIR (default: that for temporary files): in the foreground, without hashing, in the background, and by torch's own DCP
(--no-dcp leaves that out), beside as many bare bytes written, synced and read, and hashed; medians of N runs (default: 3), reads from
the disk.

memory trains a few steps (default: 5, of which two are not timed) of every row on made data, without files, and reports the peaks of
allocated and reserved memory and the step time; a row with --limits=GIB,GIB runs again with so little memory each time, which shows what
it can do with, and one with --recipe=NAME is of another recipe. bench planner reads its results.

attention times every backend on the heads, sequence length and micro-batch of the recipe, with whole rows and with documents of 1,000
tokens; loss times the vocabulary projection with its cross-entropy in chunks of several sizes, beside the plain one and, on a GPU where
it is installed, Liger's. Both on one device: forward and backward in ms and TFLOP/s.

collectives makes the table of what paraxis probe measures of the links: microseconds and GB/s for each collective, group and size.

planner predicts step times and memory that others have published, on a laptop, and prints how far it is off, in percent and with sign,
beside two published equations. --rows is where the rows are (default: bench/published), --first takes the first N of each set;
--calibrate fits the constants of devices again, on the rows that are for that, and prints them. --measured predicts instead the runs of
a results file that has their recipe, options and ranks, on the cluster file NAME: memory allocated and reserved, step time, and whether
they fit. Rows named in the file beside it that ends in .calibration.txt are not scored.

placement places the recipe's ranks on N hosts (default: 16) like that of a cluster file (default: dgx_h100) whose links differ by 0 to
40 %, in N made matrices each (default: 3), and reports how much of the step's communication time is saved: of hosts in the order of
their numbers and in random ones, as measured and on a second snapshot of the same links. On a laptop.

search runs `paraxis plan` for a cluster (default: dgx_h100) of each number of devices (default: 64 and 1024) --runs times (default: 3),
and reports the median of the seconds that the command took, and what it searched and found. On a laptop.

table prints results files as Markdown; with --into, it makes the tables marked in a page again instead, from the files of
bench/results that the marks name: <!-- table: step-... --> to <!-- end of table -->.

examples:
  paraxis bench step debug --steps 6 --warmup 2
  paraxis bench step llama3_8b --ranks 2 --row "two: --train.micro_batch=2" --row "full: --train.micro_batch=4 --remat.mode=full"
  paraxis bench step llama3_8b --train.micro_batch=2 --data.paths=text.jsonl --data.tokenizer=titan/assets --against titan --titan titan
  paraxis bench checkpoint --gib 8 --folder /scratch
  paraxis bench memory llama3_8b --model.layers=8 --row "one: --train.micro_batch=1" --row "two: --train.micro_batch=2 --limits=60,58"
  paraxis bench placement llama3_70b --parallel.pp=4 --parallel.tp=8 --parallel.microbatches=16
  paraxis bench table --into docs/performance.md
"""

STEP_OPTIONS = ("ranks", "steps", "warmup", "runs", "limit", *PEER_OPTIONS, "name", "out", "logs")
STEP_LISTS = ("row", *PEER_LISTS)
STEP_FLAGS = ("json", "debug", "help")


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code: 1 where a row failed. Raises ParaxisError for what is refused."""
    benchmarks = {
        "step": _step,
        "startup": _startup,
        "data": bench_data,
        "checkpoint": bench_checkpoint,
        "memory": bench_memory.run,
        "attention": bench_kernels.run,
        "loss": bench_kernels.run,
        "collectives": bench_collectives.run,
        "planner": bench_planner.run,
        "placement": bench_placement.run,
        "search": bench_search.run,
        "table": _table,
    }
    name = next((word for word in arguments if not word.startswith("-")), None)
    if "--help" in arguments or "-h" in arguments or name is None:
        print(HELP, end="")
        return 0
    if name not in benchmarks:
        raise ConfigError(f"there is no benchmark {name!r}{suggestion(name, benchmarks)} See paraxis bench --help")
    return benchmarks[name](arguments)


def _step(arguments: list[str]) -> int:
    parsed = parse(arguments, STEP_OPTIONS, STEP_FLAGS, STEP_LISTS)
    if len(parsed.names) != 2:
        raise ConfigError("bench step takes one recipe, as in: paraxis bench step debug; a setting is written --field=value")
    if (launcher := read_environment().launcher) != "none":
        raise ConfigError(f"bench starts its own workers, so it cannot be one that {launcher} started; run it by itself")
    from rich.console import Console

    from paraxis.bench.compare import compare
    from paraxis.bench.machine import ask_machine
    from paraxis.bench.results import Results, write_results
    from paraxis.bench.table import rich_table

    pace, runs = _pace(parsed), whole_number("runs", parsed.options.get("runs", "1"), 1)
    machine, console = ask_machine(), Console(stderr=True, highlight=False)
    results = Results(hardware=machine.hardware, versions=machine.versions, date=f"{datetime.now(UTC):%Y-%m-%d}", command=shown(arguments))
    out = results_file(parsed, results, "step")

    def keep(rows: list[dict[str, Any]]) -> None:
        nonlocal results
        results = replace(results, rows=rows)
        write_results(out, results)

    with tempfile.TemporaryDirectory(prefix="paraxis-bench-", ignore_cleanup_errors=True) as scratch:
        logs = _empty_folder(parsed.options.get("logs", f"{scratch}/logs"))
        own = [*_ours(parsed, machine, pace)]
        versions, others = peers(parsed, own, Path(scratch), machine, pace)
        results = replace(results, versions={**results.versions, **versions})
        compare([*own, *others], runs, pace, logs, lambda text: console.print(text, soft_wrap=True), keep)
    if "json" in parsed.flags:
        print(results.json(), end="")
    else:
        Console(width=TABLE_WIDTH).print(rich_table(results))
    console.print(f"results: {out}", soft_wrap=True)
    return 1 if any(row["error"] for row in results.rows) else 0


def _startup(arguments: list[str]) -> int:
    parsed = parse(arguments, STEP_OPTIONS, STEP_FLAGS, STEP_LISTS)
    if len(parsed.names) != 2:
        raise ConfigError("bench startup takes one recipe, as in: paraxis bench startup debug; a setting is written --field=value")
    from paraxis.bench.rows import Pace
    from paraxis.bench.startup import startup_rows

    for name in ("steps", "warmup"):
        if name in parsed.options:
            raise ConfigError(f"--{name} is not for bench startup, whose runs end after their first step; leave it out")
    runs = whole_number("runs", parsed.options.get("runs", "3"), 1)
    pace = Pace(steps=1, warmup=0, limit_s=whole_number("limit", parsed.options.get("limit", "600"), 1))
    with tempfile.TemporaryDirectory(prefix="paraxis-bench-", ignore_cleanup_errors=True) as scratch:
        logs = _empty_folder(parsed.options.get("logs", f"{scratch}/logs"))

        def rows(machine: "Machine") -> Iterator[Mapping[str, Any]]:
            own = [*_ours(parsed, machine, pace)]
            _, others = peers(parsed, own, Path(scratch), machine, pace)
            return startup_rows([*own, *others], runs, logs)

        return measure_rows("startup", parsed, arguments, rows)


def _pace(parsed: Arguments) -> "Pace":
    from paraxis.bench.rows import Pace

    steps, warmup, limit = (
        whole_number(name, parsed.options.get(name, default), least)
        for name, default, least in (("steps", "15", 1), ("warmup", "5", 0), ("limit", "600", 1))
    )
    if warmup >= steps:
        raise ConfigError(f"--warmup={warmup} leaves none of --steps={steps} to measure; lower it, or raise --steps")
    return Pace(steps=steps, warmup=warmup, limit_s=limit)


def _ours(parsed: Arguments, machine: "Machine", pace: "Pace") -> Iterator["Ours"]:
    from paraxis.bench.step import ours

    recipe = parsed.names[1]
    ranks = whole_number("ranks", parsed.options["ranks"], 1) if "ranks" in parsed.options else None
    for variant in read_variants("row", parsed.lists.get("row", [])) or [Variant(recipe, ())]:
        own = parse(variant.options, (), ())
        if own.names:
            raise ConfigError(f"--row {variant.name!r}: {own.names[0]!r} is not a setting; write --field=value")
        yield ours(variant.name, recipe, {**parsed.settings, **own.settings}, ranks, machine, pace)


def _empty_folder(logs: str) -> Path:
    """The folder that keeps what the runs leave behind, made where it is not there yet."""
    folder = Path(logs).resolve()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise ConfigError(f"--logs={logs} is not empty; choose a new folder")
    except OSError as error:
        raise StorageError(f"--logs={logs} cannot be written: {error.strerror}; choose another folder") from error
    return folder


def _table(arguments: list[str]) -> int:
    parsed = parse(arguments, ("into",), STEP_FLAGS)
    files = parsed.names[1:]
    for name in parsed.settings:
        raise ConfigError(f"--{name} is not an option of bench table, which has --into PAGE")
    if bool(files) == ("into" in parsed.options):
        raise ConfigError("bench table takes results files, or --into PAGE; as in: paraxis bench table bench/results/step-*.json")
    from paraxis.bench.results import FOLDER, read_results
    from paraxis.bench.table import markdown, refreshed

    if files:
        print("\n".join(markdown(read_results(Path(file))) for file in files), end="")
        return 0
    page = Path(parsed.options["into"])
    try:
        page.write_text(refreshed(page.read_text(), FOLDER))
    except OSError as error:
        raise StorageError(f"--into={page}: {error.strerror}; check the path") from error
    return 0
