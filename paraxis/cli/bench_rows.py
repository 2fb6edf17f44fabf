"""What every benchmark of `paraxis bench` does around its rows: the machine, the results file, the table."""

import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraxis.base.config import redact, suggestion
from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import Arguments

if TYPE_CHECKING:
    from paraxis.bench.machine import Machine
    from paraxis.bench.results import Results

TABLE_WIDTH = 200  # at most; a row reads better broken by the terminal than with its cells cut short

ROWS_OPTIONS = ("name", "out")
ROWS_FLAGS = ("json", "debug", "help")

Rows = Callable[["Machine"], Iterator[Mapping[str, Any]]]


@dataclass(frozen=True)
class Variant:
    """A row as it is asked for: its name and the words of its options."""

    name: str
    options: Sequence[str]


def read_variants(option: str, texts: Sequence[str]) -> list[Variant]:
    """Rows given as "NAME: options". Raises ConfigError for one that is written otherwise, and for a name given twice."""
    found: list[Variant] = []
    for text in texts:
        name, colon, options = (part.strip() for part in text.partition(":"))
        if not name or not colon or name.startswith("-"):
            raise ConfigError(f'--{option}={text!r} has no name; write "NAME: --field=value ..."')
        if name in [variant.name for variant in found]:
            raise ConfigError(f"--{option}: there are two rows {name!r}; give each a name of its own")
        found.append(Variant(name, split(option, options)))
    return found


def split(option: str, text: str) -> list[str]:
    """The words of an option's value, as a shell splits them. Raises ConfigError where a quotation does not end."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise ConfigError(f"--{option}={text!r} cannot be read: {error}") from None


def measure_rows(benchmark: str, parsed: Arguments, arguments: Sequence[str], rows: Rows) -> int:
    """Runs a benchmark whose `rows` come one after another, each a record of JSON values under names that end in their units.

    The file is written after every row, so that none is lost. Understands ROWS_OPTIONS and ROWS_FLAGS. Returns the exit code: 1 where
    a row says `error`.
    """
    from rich.console import Console

    from paraxis.bench.machine import ask_machine
    from paraxis.bench.results import Results, write_results
    from paraxis.bench.table import rich_table, said

    machine, console = ask_machine(), Console(stderr=True, highlight=False)
    results = Results(hardware=machine.hardware, versions=machine.versions, date=f"{datetime.now(UTC):%Y-%m-%d}", command=shown(arguments))
    out = results_file(parsed, results, benchmark)
    for row in rows(machine):
        results = replace(results, rows=[*results.rows, row])
        write_results(out, results)
        console.print("  ".join(f"{key} {said(value)}" for key, value in row.items() if value is not None), soft_wrap=True)
    if "json" in parsed.flags:
        print(results.json(), end="")
    else:
        Console(width=TABLE_WIDTH).print(rich_table(results))
    console.print(f"results: {out}", soft_wrap=True)
    return 1 if any(row.get("error") for row in results.rows) else 0


def refuse_settings(benchmark: str, parsed: Arguments, options: Sequence[str]) -> None:
    """Raises ConfigError for an option that a benchmark without a recipe does not have, with the nearest of its `options`."""
    for name in parsed.settings:
        hint = suggestion(f"--{name}", [f"--{option}" for option in options])
        raise ConfigError(f"--{name} is not an option of bench {benchmark}{hint} See paraxis bench --help")


def results_file(parsed: Arguments, results: "Results", name: str) -> Path:
    """Where the results go: what --out says, or a file of the benchmark's `name` that is not there yet."""
    from paraxis.bench.results import FOLDER

    if given := parsed.options.get("out"):
        return Path(given)
    out = FOLDER / results.file_name(parsed.options.get("name", name))
    if out.exists():
        raise ConfigError(f"{out} exists; choose another --name, or write over it with --out={out}")
    return out


def shown(arguments: Sequence[str]) -> str:
    """The command, fit to be pasted, without the secrets it may hold."""
    words = []
    for word in arguments:
        name, equals, value = word.partition("=") if word.startswith("--") else ("", "", word)
        words.append(f"{name}{equals}{redact(name.removeprefix('--'), value)}")
    return shlex.join(["paraxis", "bench", *words])
