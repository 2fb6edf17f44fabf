"""`paraxis bench checkpoint` measures every way of saving on real ranks, and leaves a file of which tables are made."""

from pathlib import Path

import pytest
import torch

from paraxis.base.layout import whole_box
from paraxis.bench.checkpoint import SUBJECTS, record, without_hashing
from paraxis.bench.results import read_results
from paraxis.bench.table import markdown
from paraxis.checkpoint.load import open_checkpoint
from paraxis.checkpoint.save import Piece, save
from paraxis.cli import main


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.full)])
def test_the_checkpoint_benchmark_leaves_a_row_for_each_way_and_nothing_else(ranks: int, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "results.json"
    (tmp_path / "place").mkdir()
    arguments = ["--gib=0.002", f"--ranks={ranks}", "--runs=2", f"--folder={tmp_path / 'place'}", f"--out={out}"]
    assert main(["bench", "checkpoint", *arguments]) == 0, capsys.readouterr().err
    rows = read_results(out).rows
    assert [(row["system"], row["name"]) for row in rows] == list(SUBJECTS)
    assert all(row["ranks"] == ranks and row["runs"] == 2 and row["state_gib"] == 0.002 for row in rows)
    assert all(row["save_s"] > 0 for row in rows if row["system"] != "SHA-256")
    assert all(row["load_gib_per_s"] > 0 for row in rows if row["name"] in ("bytes", "sync", "save") or row["system"] == "SHA-256")
    assert all(row["stall_s"] > 0 for row in rows if row["system"] not in ("disk", "SHA-256"))
    assert f"| paraxis | async | {ranks} |" in markdown(read_results(out))
    assert list((tmp_path / "place").iterdir()) == []


def test_torch_s_own_checkpoints_can_be_left_out(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    out = tmp_path / "results.json"
    arguments = ["--gib=0.002", "--ranks=1", "--runs=1", f"--folder={tmp_path}", "--no-dcp", f"--out={out}"]
    assert main(["bench", "checkpoint", *arguments]) == 0, capsys.readouterr().err
    assert {row["system"] for row in read_results(out).rows} == {"disk", "SHA-256", "paraxis"}


def test_nothing_is_hashed_where_the_benchmark_leaves_hashing_out(tmp_path: Path):
    piece = Piece("a", (8,), whole_box((8,)), torch.ones(8))
    with without_hashing():
        save(tmp_path, 1, [piece], {}, {})
    save(tmp_path, 2, [piece], {}, {})
    [[none], [hashed]] = (
        [file.chunks[0] for name, file in open_checkpoint(tmp_path / f"step-{step}").manifest.files.items()] for step in (1, 2)
    )
    assert set(none) == {"0"} != set(hashed)


def test_a_row_has_medians_and_its_share_of_the_synchronous_save():
    runs = [{"save_s": save_s, "stall_s": 0.1, "load_s": None} for save_s in (2.0, 4.0, 9.0)]
    row = record({"system": "paraxis", "name": "async", "ranks": 2, "device": "cpu", "size_bytes": 2**31, "runs": runs}, sync_s=4.0)
    assert (row["save_s"], row["save_s_min"], row["save_s_max"], row["save_gib_per_s"]) == (4.0, 2.0, 9.0, 0.5)
    assert (row["stall_share"], row["load_s"], row["load_gib_per_s"], row["runs"]) == (0.025, None, None, 3)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gib=0"], "--gib=0 must be a size in GiB above 0"),
        (["--gib=much"], "--gib=much must be a size in GiB above 0"),
        (["--ranks=0", "--out=x"], "--ranks=0"),
        (["debug"], "bench checkpoint takes no recipe"),
        (["--gbi=1"], "--gib"),
        (["--folder=/nowhere/at/all", "--out=x"], "--folder=/nowhere/at/all cannot be used"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments: list[str], words: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "checkpoint", *arguments]) == 78
    assert words in capsys.readouterr().err
