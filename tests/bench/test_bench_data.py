"""`paraxis bench data` measures every way of reading rows, and tokenising beside the bare tokenizer."""

from pathlib import Path

from paraxis.bench.results import read_results
from paraxis.bench.table import markdown
from paraxis.cli import main


def test_the_data_benchmark_leaves_a_file_of_which_tables_are_made(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PARAXIS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 100)
    settings = ["--data.paths=a.txt", "--data.tokenizer=train:300", "--data.seq_len=16", "--rounds=1", "--processes=1"]
    assert main(["bench", "data", "debug", *settings]) == 0
    printed = capsys.readouterr()
    assert "times what two H200s need" in printed.err
    [file] = (tmp_path / "bench/results").iterdir()
    results = read_results(file)
    assert [(row["system"], row["model"], row["layout"]) for row in results.rows] == [("paraxis", "reading", "one reader")] * 5 + [
        ("tokenizers", "tokenising", ""),
        *[("tokenizers", "tokenising", "processes: 1")] * 2,
        *[("paraxis", "tokenising", "processes: 1")] * 2,
        ("paraxis", "tokenising", "processes: 2"),
    ]
    assert all(row["tokens_per_s"] > 0 for row in results.rows)
    assert "rows, best fit, masked" in markdown(results)
    assert main(["bench", "data", "debug", *settings]) == 78
    assert "exists; choose another --name" in capsys.readouterr().err
