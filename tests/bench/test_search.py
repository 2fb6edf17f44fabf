"""`paraxis bench search` times the command that plans, and says what it found."""

from pathlib import Path

import pytest

from paraxis.bench.results import read_results
from paraxis.cli import main


def test_planning_is_timed_for_each_size_of_a_cluster(tmp_path: Path, capsys):
    out = tmp_path / "search.json"
    arguments = ["debug", "--parallel.pp=1", "--remat.mode=none", "--gpus=1,2", "--runs=1", f"--out={out}"]
    assert main(["bench", "search", *arguments]) == 0, capsys.readouterr().err
    rows = read_results(out).rows
    assert [row["devices"] for row in rows] == [1, 2]
    for row in rows:
        assert 0 < row["seconds_min"] <= row["seconds"] <= row["seconds_max"]
        assert row["best"]
        assert row["candidates"] >= row["simulated"] > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ([], "bench search takes one recipe"),
        (["debug", "--gpus=none"], "--gpus=none"),
        (["no_recipe_of_this_name", "--gpus=1", "--runs=1"], "no_recipe_of_this_name"),
    ],
)
def test_what_cannot_be_planned_is_refused(arguments: list[str], words: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "search", *arguments]) != 0
    assert words in capsys.readouterr().err
