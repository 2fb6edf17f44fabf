"""A row's record: medians over all of its runs, and its error where one failed."""

from pathlib import Path
from typing import Any

import pytest

from paraxis.base.errors import ConfigError
from paraxis.bench.compare import compare
from paraxis.bench.machine import Machine
from paraxis.bench.rows import Measured, Pace, Row, record
from paraxis.bench.step import ours, read_json_lines, words

ROW = Row(system="paraxis", name="one", options="", model="debug", seq_len=64, batch=2)
PACE = Pace(steps=4, warmup=1, limit_s=60)
MACHINE = Machine(0, "x86_64", 2, {})


def measured(*rates: float, **more: Any) -> Measured:
    return Measured(layout="tp2", ranks=2, precision="fp32", tokens_per_s=rates, step_s=[100 / rate for rate in rates], **more)


def test_a_record_holds_the_median_and_the_spread_over_the_steps_of_all_runs():
    runs = [
        measured(10, 20, 40, reserved_gib=1.5, losses=[(1, 6.25), (2, None)], wall_s=5.0),
        measured(50, 60, reserved_gib=2.0, wall_s=7.0),
    ]
    found = record(ROW, runs, PACE)
    assert (found["tokens_per_s"], found["tokens_per_s_min"], found["tokens_per_s_max"]) == (40, 10, 60)
    assert (found["step_s"], found["reserved_gib"], found["wall_s"], found["mfu"]) == (2.5, 2.0, 6.0, None)
    assert (found["layout"], found["ranks"], found["runs"], found["error"]) == ("tp2", 2, 2, None)
    assert found["losses"] == {"1": 6.25, "2": None}


def test_a_run_that_failed_leaves_its_error_and_what_was_measured():
    found = record(ROW, [measured(10, 30), measured(error="out of memory")], PACE)
    assert (found["tokens_per_s"], found["error"]) == (20, "out of memory")
    assert record(ROW, [measured(error="out of memory")], PACE)["tokens_per_s"] is None


class Steady:
    """A subject that measures the same every time, and remembers where."""

    def __init__(self, name: str, rate: float) -> None:
        self.row = Row(system="paraxis", name=name, options="", model="debug", seq_len=64, batch=2)
        self.rate = rate
        self.places: list[str] = []

    def measure(self, folder: Path) -> Measured:
        self.places.append(folder.name)
        return measured(self.rate) if self.rate else measured(error="no")


def test_rows_run_in_turns_and_are_kept_after_each(tmp_path: Path):
    one, two, said, kept = Steady("one", 10), Steady("two", 0), [], []
    compare([one, two], 2, PACE, tmp_path, said.append, kept.append)
    assert (one.places, two.places) == (["1-1", "1-2"], ["2-1", "2-2"])
    assert [[row["name"] for row in rows] for rows in kept] == [["one"], *[["one", "two"]] * 3]
    assert [row["error"] for row in kept[-1]] == [None, "no"]
    assert said[2:4] == ["paraxis two (row 2 of 2, run 1 of 2)", "  failed: no"]


def test_a_row_of_ours_says_what_its_settings_change():
    subject = ours("a", "debug", {"model.layers": "1", "train.micro_batch": "3", "data.seq_len": "32"}, None, MACHINE, PACE)
    assert (subject.row.model, subject.row.batch, subject.row.seq_len) == ("debug --model.layers=1", 3, 32)
    assert subject.row.options == "--model.layers=1 --train.micro_batch=3 --data.seq_len=32"


def test_settings_that_the_recipe_lacks_or_the_benchmark_owns_are_refused():
    with pytest.raises(ConfigError, match=r"did you mean train\.micro_batch"):
        ours("a", "debug", {"train.microbatch": "1"}, None, MACHINE, PACE)
    with pytest.raises(ConfigError, match="set --steps"):
        ours("a", "debug", {"train.steps": "1"}, None, MACHINE, PACE)


def test_settings_are_spelled_as_on_the_command_line():
    assert words({"a.b": 1, "c": "x y", "d": True, "e": ""}) == ["--a.b=1", "--c=x y", "--d", "--e="]


def test_a_line_that_is_still_being_written_is_not_read(tmp_path: Path):
    path = tmp_path / "metrics.jsonl"
    assert read_json_lines(path) == []
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_json_lines(path) == [{"step": 1}, {"step": 2}]
