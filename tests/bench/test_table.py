"""Tables say what the results say, compare like with like, and the documents carry the tables of their files."""

from pathlib import Path
from typing import Any

import pytest

from paraxis.base.errors import ConfigError
from paraxis.bench.results import Results, read_results, write_results
from paraxis.bench.rows import Measured, Pace, Row, record
from paraxis.bench.table import best_peer, cells, markdown, refreshed

ROOT = Path(__file__).parents[2]


def row(system: str, name: str, *rates: float, precision: str = "bf16", seq_len: int = 8192, **measured: Any) -> dict[str, Any]:
    what = Row(system=system, name=name, options="", model="llama3_8b", seq_len=seq_len, batch=2)
    run = Measured(layout="fsdp2", ranks=2, precision=precision, tokens_per_s=rates, **measured)
    return record(what, [run], Pace(steps=15, warmup=5, limit_s=60))


ROWS = [
    row("paraxis", "two", 12000, 11000, 13000, mfu=0.61),
    row("paraxis", "fp8", 18000, precision="float8_rowwise"),
    row("paraxis", "six", error="torch.OutOfMemoryError: a | b"),
    row("torchtitan", "two", 9330),
    row("torchtitan", "three", 10000),
    row("torchtitan", "fp8", 12000, precision="float8"),
    row("torchtitan", "long", 50000, seq_len=32768),
    row("torchtitan", "dead", 90000, error="stopped after 600 s"),
]


def results(rows: list[dict[str, Any]]) -> Results:
    return Results(hardware="2 x NVIDIA H200", versions={"torch": "2.11.0"}, date="2026-01-31", command="paraxis bench step", rows=rows)


def test_a_row_is_compared_with_the_best_peer_that_did_the_same_work():
    assert best_peer(ROWS[0], ROWS) == 10000
    assert best_peer(ROWS[1], ROWS) == 12000
    titles, shown = cells(ROWS)
    ratios = [line[titles.index("of best peer")] for line in shown]
    assert ratios == ["1.20 x", "1.50 x", "", "", "", "", "", ""]


def test_a_column_in_which_nothing_stands_is_left_out():
    titles, shown = cells(ROWS[:1])
    assert "of best peer" not in titles
    assert "peak GiB" not in titles
    assert shown[0][titles.index("MFU")] == "61.0%"
    assert shown[0][titles.index("min - max")] == "11,000 - 13,000"


def test_markdown_names_the_failures_and_what_it_was_measured_on():
    text = markdown(results(ROWS))
    assert "| paraxis | two | llama3_8b | fsdp2 | bf16 | 8,192 | 2 | 12,000 | 11,000 - 13,000 | 1.20 x | 61.0% |" in text
    assert "| failed |" in text
    assert "- paraxis six: torch.OutOfMemoryError: a | b\n" in text
    assert text.endswith("\n2 x NVIDIA H200; torch 2.11.0; 2026-01-31. `paraxis bench step`\n")


def test_results_survive_their_file_and_are_named_for_their_hardware(tmp_path: Path):
    kept = results(ROWS)
    path = tmp_path / "deep" / kept.file_name("step")
    write_results(path, kept)
    assert path.name == "step-2x-nvidia-h200-2026-01-31.json"
    assert read_results(path) == kept
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("text", ["no json", "[1]", '{"hardware": "x"}'])
def test_a_file_that_holds_something_else_is_refused(tmp_path: Path, text: str):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ConfigError, match="holds no benchmark results"):
        read_results(tmp_path / "a.json")


def test_marked_tables_of_a_page_are_made_again(tmp_path: Path):
    write_results(tmp_path / "a.json", results(ROWS[:1]))
    page = "# Title\n\n<!-- table: a -->\nold\n<!-- end of table -->\n\nText.\n"
    made = refreshed(page, tmp_path)
    assert made == f"# Title\n\n<!-- table: a -->\n\n{markdown(results(ROWS[:1]))}\n<!-- end of table -->\n\nText.\n"
    assert refreshed(made, tmp_path) == made


@pytest.mark.parametrize("name", ["performance", "planner-accuracy"])
def test_the_tables_of_a_page_are_those_of_their_results(name: str):
    page = (ROOT / f"docs/{name}.md").read_text()
    assert "\n<!-- table: " in page
    assert refreshed(page, ROOT / "bench/results") == page, f"run: paraxis bench table --into docs/{name}.md"
