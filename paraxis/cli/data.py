"""`paraxis data prepare`: tokenises and packs what a recipe reads, ahead of training; and `paraxis bench data`."""

import json
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraxis.base.config import suggestion
from paraxis.base.env import cores, read_environment
from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import Arguments, parse, whole_number

if TYPE_CHECKING:
    from paraxis.data.config import DataConfig
    from paraxis.data.packing import PackedRows
    from paraxis.data.prepare import Progress
    from paraxis.data.rows import TrainingRows

HELP = """\
usage: paraxis data prepare RECIPE [--data.field=value ...] [options]

prepare tokenises the data of a recipe into the cache, where training then finds them, or into a folder to keep. Large data are
made in parts; interrupted, the same command goes on with the part it was at. Any `data` setting of the recipe is an option.

  --out DIR      make a folder of shards, to be used as --data.paths=DIR --data.tokenizer=DIR, on any machine
  --processes N  tokenise with so many processes (default: one for every four cores, since each uses several)
  --json         print what was made as JSON
  --debug        show tracebacks of errors
  --help         this

examples:
  paraxis data prepare demo
  paraxis data prepare llama3_8b --data.paths="web/*.jsonl.gz" --data.tokenizer=llama --out shards
  paraxis data prepare debug --data.packing=best_fit --json
"""

OPTIONS = ("out", "processes")
FLAGS = ("json", "debug", "help")
BENCH_OPTIONS = ("rounds", "processes", "name", "out")
NEEDED = 40_000  # tokens/s: what two H200s at 20,000 each take


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, OPTIONS, FLAGS)
    if "help" in parsed.flags or not parsed.names:
        print(HELP, end="")
        return 0
    if parsed.names[0] != "prepare":
        raise ConfigError(f"there is no command data {parsed.names[0]!r}{suggestion(parsed.names[0], ['prepare'])} See paraxis data --help")
    config, seed = _data_of(parsed, "data prepare")
    made = _prepare(parsed, config, seed)
    if "json" in parsed.flags:
        print(json.dumps(made, indent=1))
        return 0
    for name, source in made.items():
        empty = f", {source['waste']:.2%} of their places empty" if source["waste"] else ""
        skipped = f", {source['skipped']} broken records left out" if source["skipped"] else ""
        print(
            f"{f'{name}: ' if name else ''}{source['tokens']:,} tokens in {source['documents']:,} documents{skipped}; "
            f"{source['rows']:,} rows of {config.seq_len}{empty}; {source['folder']}"
        )
    return 0


def _data_of(parsed: Arguments, command: str) -> "tuple[DataConfig, int]":
    """The data of the one recipe that is named, and the seed of its order."""
    # Here, so that help does not wait for torch.
    from paraxis.data.config import DataConfig
    from paraxis.recipes.find import find

    if len(parsed.names) != 2:
        raise ConfigError(f"{command} takes one recipe, as in: paraxis {command} demo; a setting is written --data.field=value")
    for name in parsed.settings:
        if not name.startswith("data."):
            known = [f"--{option}" for option in (*OPTIONS, *BENCH_OPTIONS, *FLAGS)]
            raise ConfigError(f"--{name} is neither an option of {command} nor one of the recipe's data{suggestion(f'--{name}', known)}")
    config, _ = find(parsed.names[1], parsed.settings)
    if not isinstance(config.data, DataConfig):
        raise ConfigError(f"{parsed.names[1]} brings data of its own, which need no preparing")
    return config.data, config.train.seed


def _prepare(parsed: Arguments, config: "DataConfig", seed: int) -> dict[str, dict[str, Any]]:
    """Makes what the recipe reads, and describes it by source."""
    from paraxis.data.mixture import MixtureRows
    from paraxis.data.open import open_training
    from paraxis.data.prepare import load_tokenizer, prepare

    if config.tokenize == "live":
        raise ConfigError("data.tokenize=live leaves nothing to prepare; prepare the data and train with data.tokenize=ahead")
    processes = whole_number("processes", parsed.options.get("processes", str(_usual_processes())), 1)
    cache = read_environment().cache_dir
    with _progress() as progress:
        if out := parsed.options.get("out"):
            if config.mixture:
                raise ConfigError("--out takes the data of one source; prepare each source of data.mixture into a folder of its own")
            if Path(out).exists():
                raise ConfigError(f"--out={out} exists; choose another folder, or delete it")
            tokenizer = load_tokenizer(config, cache, progress=progress)
            made = prepare(config, cache, tokenizer=tokenizer, progress=progress, processes=processes, out=Path(out))
            config = replace(config, paths=(str(made.folder),), tokenizer=str(made.folder))
        rows = open_training(config, cache, seed=seed, rows_per_step=lambda: 1, progress=progress, processes=processes).rows
    sources: Any = rows.sources if isinstance(rows, MixtureRows) else {"": rows}
    return {name: _described(source) for name, source in sources.items()}


def _described(rows: "TrainingRows | PackedRows") -> dict[str, Any]:
    data = rows.data
    return {
        "folder": str(data.folder),
        "fingerprint": data.fingerprint,
        "documents": data.documents,
        "tokens": data.tokens,
        "skipped": data.skipped,
        "rows": rows.length,
        "waste": getattr(rows, "waste", 0.0),
    }


def _usual_processes() -> int:
    # The tokenizer in each works on all cores; what is read and written around it takes one.
    return max(1, cores() // 4)


@contextmanager
def _progress() -> "Iterator[Progress | None]":
    """A bar on the terminal; nothing where standard error is none."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True)) as bars:
        tasks: dict[str, Any] = {}

        def show(what: str, done: int, total: int) -> None:
            if what not in tasks:
                tasks[what] = bars.add_task(what)
            bars.update(tasks[what], completed=done, total=total)

        yield show


def bench(arguments: list[str]) -> int:
    """Runs `paraxis bench data`, and returns its exit code. Raises ParaxisError for what is refused."""
    parsed = parse(arguments, BENCH_OPTIONS, FLAGS)
    config, _ = _data_of(parsed, "bench data")
    from rich.console import Console

    from paraxis.bench.data import readers, tokenisers
    from paraxis.bench.machine import ask_machine
    from paraxis.bench.results import Results, write_results
    from paraxis.bench.rows import Pace, record
    from paraxis.bench.table import rich_table
    from paraxis.cli.bench_rows import TABLE_WIDTH, results_file, shown

    rounds = whole_number("rounds", parsed.options.get("rounds", "5"), 1)
    most = whole_number("processes", parsed.options.get("processes", str(_usual_processes())), 1)
    machine, console, cache = ask_machine(), Console(stderr=True, highlight=False), read_environment().cache_dir
    results = Results(hardware=machine.hardware, versions=machine.versions, date=f"{datetime.now(UTC):%Y-%m-%d}", command=shown(arguments))
    out = results_file(parsed, results, "data")
    rows, pace = [], Pace(steps=rounds, warmup=0, limit_s=0)
    for subject in [*readers(config, cache), *tokenisers(config, cache, most)]:
        with tempfile.TemporaryDirectory(prefix="paraxis-bench-") as scratch:
            rows.append(record(subject.row, [subject.measure(Path(scratch), rounds)], pace))
        rate = rows[-1]["tokens_per_s"]
        console.print(
            f"{subject.row.system} {subject.row.name}: {rate:,.0f} tokens/s, {rate / NEEDED:.1f} times what two H200s need", soft_wrap=True
        )
    results = replace(results, rows=rows)
    write_results(out, results)
    if "json" in parsed.flags:
        print(results.json(), end="")
    else:
        Console(width=TABLE_WIDTH).print(rich_table(results))
    console.print(f"results: {out}", soft_wrap=True)
    return 0
