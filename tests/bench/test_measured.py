"""Measured runs of ours beside predictions: read, left out, compared, with sign."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paraxis.base.errors import ConfigError
from paraxis.bench import calibrated, measured
from paraxis.bench.measured import measured_rows, measured_runs
from paraxis.cli import main
from paraxis.plan.cluster_file import read_cluster

GIB = 1 << 30
ROW = {
    "name": "a", "recipe": "debug", "options": "--train.micro_batch=2 --remat.mode=full", "layout": "fsdp2", "ranks": 2,
    "precision": "bf16", "compile": "none", "remat": "full", "micro_batch": 2, "seq_len": 256,
    "allocated_gib": 4.0, "reserved_gib": 5.0, "step_s": 0.5, "error": None, "out_of_memory": False, "limit_gib": None,
}  # fmt: skip


def write(folder: Path, *rows: dict[str, Any], calibrating: str | None = None) -> Path:
    path = folder / "memory-2-x-some-gpu.json"
    path.write_text(json.dumps({"hardware": "some", "versions": {}, "date": "2026-01-31", "command": "paraxis", "rows": rows}))
    if calibrating is not None:
        (folder / "memory-2-x-some-gpu.calibration.txt").write_text(calibrating)
    return path


def said(monkeypatch: pytest.MonkeyPatch, allocated: float, reserved: float, step_s: float, usable: float) -> None:
    """Has every run predicted to take so much."""
    prediction = SimpleNamespace(allocated=allocated * GIB, reserved=reserved * GIB, step_s=step_s, runs=reserved <= usable)
    monkeypatch.setattr(measured, "predict", lambda config, cluster, ranks: prediction)
    monkeypatch.setattr(measured, "runs_in", lambda config, cluster, ranks, bytes: reserved * GIB <= bytes)


def records(path: Path) -> list[dict[str, Any]]:
    return list(measured_rows(measured_runs(path), read_cluster("two_h200")))


def test_a_row_is_the_run_that_its_recipe_and_options_make(tmp_path: Path):
    [run] = measured_runs(write(tmp_path, {**ROW, "options": f"{ROW['options']} --layout=tp2"}))
    assert (run.config.train.micro_batch, run.config.remat.mode, run.config.parallel.tp, run.ranks) == (2, "full", 2, 2)


def test_errors_have_their_sign_and_a_summary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said(monkeypatch, 4.4, 5.0, 0.4, 100)
    one, two, mean, signed, worst, _ = records(write(tmp_path, ROW, {**ROW, "name": "b", "allocated_gib": 5.5}))
    assert (one["allocated_percent"], one["reserved_percent"], one["step_percent"]) == (10.0, 0.0, -20.0)
    assert two["allocated_percent"] == -20.0
    assert (mean["allocated_percent"], signed["allocated_percent"], worst["allocated_percent"]) == (15.0, -5.0, -20.0)


def test_rows_that_constants_were_fitted_on_are_not_scored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said(monkeypatch, 4.4, 5.0, 0.4, 100)
    rows = records(write(tmp_path, ROW, {**ROW, "name": "b", "allocated_gib": 5.5}, calibrating="# fitted on\nb\n"))
    scored = [row for row in rows if row["set"] == "scored"]
    assert [row["row"] for row in scored[:2]] == ["a", "mean of 1"]
    assert scored[1]["allocated_percent"] == 10.0


def test_a_calibrating_row_that_is_not_there_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"calibration.txt names c, which .* has no row for"):
        measured_runs(write(tmp_path, ROW, calibrating="c"))


def test_runs_that_ended_for_want_of_memory_or_otherwise_have_no_errors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said(monkeypatch, 4.4, 5.0, 0.4, 100)
    full, failed, *_ = records(write(tmp_path, {**ROW, "out_of_memory": True, "error": "out of memory"}, {**ROW, "error": "a rank died"}))
    for row in (full, failed):
        assert row["allocated_percent"] is row["reserved_percent"] is row["step_percent"] is None
    assert (full["ran"], full["problem"], failed["ran"], failed["problem"]) == (False, None, None, "a rank died")


def test_what_fits_is_judged_by_the_limit_and_wrong_either_way_is_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    said(monkeypatch, 4.4, 5.0, 0.4, 100)
    rows = [
        {**ROW, "name": "fits", "limit_gib": 5.5},
        {**ROW, "name": "refused", "limit_gib": 4.9},
        {**ROW, "name": "accepted", "limit_gib": 6.0, "out_of_memory": True},
    ]
    found = records(write(tmp_path, *rows))
    assert [row["said_to_fit"] for row in found[:3]] == [True, False, True]
    assert found[0]["reserved_percent"] is None  # under a limit the allocator gives back
    assert found[0]["allocated_percent"] == 10.0
    assert found[-1]["row"] == "of 3: 1 said to fit did not, 1 said not to fit did"


def test_a_file_of_something_else_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"rows without 'options'; give a file of measured runs"):
        measured_runs(write(tmp_path, {"name": "a", "recipe": "debug"}))


def test_the_command_predicts_a_file_s_runs_and_writes_the_table(tmp_path: Path):
    path, out = write(tmp_path, {**ROW, "options": "--compile=none --layout=fsdp2 --train.micro_batch=32"}), tmp_path / "out.json"
    assert main(["bench", "planner", "--measured", str(path), "--cluster", "two_h200", "--out", str(out)]) == 0
    row = json.loads(out.read_text())["rows"][0]
    assert 0 < row["predicted_allocated_gib"] <= row["predicted_reserved_gib"] < 4
    assert row["allocated_percent"] == pytest.approx(100 * (row["predicted_allocated_gib"] / 4 - 1), abs=0.3)
    assert row["said_to_fit"]


def test_constants_are_fitted_on_the_rows_that_are_named_for_it_and_on_no_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    path = write(tmp_path, ROW)
    words = ["bench", "planner", "--measured", str(path), "--cluster", "two_h200", "--calibrate"]
    assert main(words) != 0
    assert "FILE.calibration.txt; write it first" in capsys.readouterr().err
    write(tmp_path, ROW, {**ROW, "name": "b", "step_s": 9.0}, calibrating="a")
    def predict(config, cluster, ranks):
        return SimpleNamespace(step_s=cluster.accelerator_of(0).host_eager_s * 1e4)

    monkeypatch.setattr(calibrated, "predict", predict)
    assert main(words) == 0
    printed = capsys.readouterr().out
    assert 'fitted = "on 1 rows: a"' in printed
    host_us = float(next(line for line in printed.splitlines() if line.startswith("host_eager_us")).split("=")[1])
    assert host_us * 1e-6 * 1e4 == pytest.approx(ROW["step_s"], rel=0.02)


@pytest.mark.parametrize(
    ("words", "refusal"),
    [
        (["--measured", "x.json"], "--measured needs --cluster NAME"),
        (["--cluster", "two_h200"], "--cluster is for --measured FILE"),
        (["--measured", "x.json", "--cluster", "two_h200", "--first", "2"], "--first is for published rows"),
        (["--measured", "x.json", "--cluster", "two_h200"], "cannot read x.json"),
    ],
)
def test_options_that_do_not_go_together_are_refused(words: list[str], refusal: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "planner", *words]) == ConfigError.exit_code
    assert refusal in capsys.readouterr().err
