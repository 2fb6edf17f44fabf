"""Results of `paraxis bench` as tables: one for the terminal, and one in Markdown that documents carry between markers.

Rows of training steps have the columns below. Those of other benchmarks have their own keys for columns, in the order in which they
come: a key ends in its unit, as in `forward_tflops`.

<!-- table: step-2x-nvidia-h200-2026-01-31 -->
... made from bench/results/step-2x-nvidia-h200-2026-01-31.json ...
<!-- end of table -->
"""

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.table import Table

from paraxis.bench.results import Results, read_results

OURS = "paraxis"

Record = Mapping[str, Any]

_MARKED = re.compile(r"(?P<start><!-- table: (?P<name>\S+) -->\n)(?P<body>.*?)(?P<end><!-- end of table -->)", re.DOTALL)


def best_peer(row: Record, rows: Sequence[Record]) -> float | None:
    """The tokens/s of the fastest other system that did the same work: the same model, ranks, sequence and kind of precision."""

    def work(row: Record) -> tuple[Any, ...]:
        return row["model"], row["ranks"], row["seq_len"], re.sub("^float8_.*", "float8", row["precision"])

    rates = [
        other["tokens_per_s"]
        for other in rows
        if other["system"] != OURS and other["error"] is None and other["tokens_per_s"] and work(other) == work(row)
    ]
    return max(rates, default=None)


def _ratio(row: Record, rows: Sequence[Record]) -> str:
    best = best_peer(row, rows) if row["system"] == OURS and row["tokens_per_s"] else None
    return "" if best is None else f"{row['tokens_per_s'] / best:.2f} x"


def _range(row: Record) -> str:
    low, high = row["tokens_per_s_min"], row["tokens_per_s_max"]
    return "" if low is None else f"{low:,.0f} - {high:,.0f}"


def _known(name: str, form: str) -> Callable[[Record, Sequence[Record]], str]:
    return lambda row, rows: "" if row[name] is None else format(row[name], form)


# Title to what stands below it in a row of training steps among all rows. A column in which nothing stands is left out.
COLUMNS: dict[str, Callable[[Record, Sequence[Record]], str]] = {
    "system": lambda row, rows: row["system"],
    "row": lambda row, rows: row["name"],
    "model": lambda row, rows: row["model"],
    "layout": lambda row, rows: row["layout"],
    "precision": lambda row, rows: row["precision"],
    "seq": lambda row, rows: f"{row['seq_len']:,}",
    "batch": lambda row, rows: str(row["batch"]),
    "tokens/s/device": lambda row, rows: f"{row['tokens_per_s']:,.0f}" if row["tokens_per_s"] else "failed",
    "min - max": lambda row, rows: _range(row),
    "of best peer": _ratio,
    "step, s": _known("step_s", ".3f"),
    "peak GiB": _known("reserved_gib", ".1f"),
    "MFU": _known("mfu", ".1%"),
    "MFU (TorchTitan's)": _known("mfu_torchtitan", ".1%"),
    "to step 1, s": _known("first_step_s", ".1f"),
}


def cells(rows: Sequence[Record]) -> tuple[list[str], list[list[str]]]:
    """The titles of the columns that have something to say, and the text of each row's."""
    if any("tokens_per_s" in row for row in rows):
        filled = {title: [show(row, rows) for row in rows] for title, show in COLUMNS.items()}
    else:
        keys = dict.fromkeys(key for row in rows for key in row if key != "error")
        filled = {key.replace("_", " "): [said(row.get(key)) for row in rows] for key in keys}
    titles = [title for title, column in filled.items() if any(column)]
    return titles, [[filled[title][number] for title in titles] for number in range(len(rows))]


def said(value: object) -> str:
    """A value as a table shows it: numbers to four digits, nothing for None."""
    match value:
        case None:
            return ""
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    return ", ".join(map(said, value)) if isinstance(value, (list, tuple)) else str(value)


def notes(rows: Sequence[Record]) -> list[str]:
    """Why rows did not end well."""
    return [f"{row.get('system', '')} {row['name']}: {row['error']}".strip() for row in rows if row.get("error")]


def rich_table(results: Results) -> Table:
    """The table for a terminal."""
    titles, rows = cells(results.rows)
    table = Table(title=results.hardware, box=SIMPLE_HEAD, caption="\n".join(notes(results.rows)) or None, caption_justify="left")
    for number, title in enumerate(titles):
        numbers = all(re.match(r"-?[\d,.]", row[number]) for row in rows if row[number])
        table.add_column(title, justify="right" if numbers else "left")
    for row in rows:
        table.add_row(*row)
    return table


def markdown(results: Results) -> str:
    """The table for documents, with what it was measured on and by which command below it."""
    titles, rows = cells(results.rows)
    lines = ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in (titles, *rows)]
    lines.insert(1, "|" + "---|" * len(titles))
    versions = ", ".join(f"{name} {version}" for name, version in results.versions.items())
    said = [f"- {note}" for note in notes(results.rows)]
    about = f"{results.hardware}; {versions}; {results.date}. `{results.command}`"
    return "\n".join([*lines, "", *([*said, ""] if said else []), about]) + "\n"


def refreshed(page: str, results: Path) -> str:
    """A document with each marked table made again from the file of that name in the folder `results`."""

    def table(match: re.Match[str]) -> str:
        return match["start"] + "\n" + markdown(read_results(results / f"{match['name']}.json")) + "\n" + match["end"]

    return _MARKED.sub(table, page)
