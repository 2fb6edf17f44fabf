"""TorchTitan beside ours: its log is read, its options are understood, and a folder that cannot run it is refused."""

from pathlib import Path

import pytest

from paraxis.base.errors import ConfigError
from paraxis.bench.rows import Pace
from paraxis.bench.titan import layout_of, measured_windows, open_site, precision_of, read_log, read_options, titan

HEAD = "[default1]:[titan] 2026-01-31 10:00:{:06.3f} - root - INFO - "
LINE = (
    "\x1b[31mstep: {step:2}  \x1b[32mloss: {loss:8.5f}  \x1b[38;2;180;60;0mgrad_norm:  7.1250  "
    "\x1b[38;2;54;234;195mmemory: 100.10GiB(71.70%)  "
    "\x1b[34mtps: {tps:,}  \x1b[36mtflops: 1,540.25  \x1b[35mmfu: 54.60%\x1b[39m\n"
)
LOG = (
    HEAD.format(0).replace(".", ",")
    + "Training starts at step 1\n"
    + "".join(
        HEAD.format(seconds).replace(".", ",") + LINE.format(step=step, loss=loss, tps=tps)
        for seconds, step, loss, tps in [(9.5, 1, 12.25, 900), (17.5, 5, 11.0, 4100), (27.5, 10, 9.5, 8192), (37.0, 15, 8.75, 8623)]
    )
    + HEAD.format(40).replace(".", ",")
    + "\x1b[33mvalidate step: 15  \x1b[32mloss:  9.0000  \x1b[38;2;54;234;195mmemory: 101.00GiB(71.90%)  \x1b[34mtps: 20,000\x1b[39m\n"
)


def test_the_measurements_of_a_log_are_read_and_those_of_validation_are_not():
    lines = read_log(LOG)
    assert [line.step for line in lines] == [1, 5, 10, 15]
    assert [line.loss for line in lines] == [12.25, 11.0, 9.5, 8.75]
    assert lines[2].tokens_per_s == 8192
    assert (lines[2].reserved_gib, lines[2].mfu) == (100.1, pytest.approx(0.546))


def test_a_line_that_averages_over_a_warm_up_step_is_left_out():
    lines = read_log(LOG)
    assert [(before.step, line.step) for before, line in measured_windows(lines, 5)] == [(5, 10), (10, 15)]
    assert [line.step for _, line in measured_windows(lines, 6)] == [15]
    assert [line.step for _, line in measured_windows(lines, 0)] == [5, 10, 15]


def test_options_are_read_however_they_are_written():
    words = ["--a.b_c", "1", "--a.d=x", "--model.converters", "one", "two", "--compile.no-enable"]
    assert read_options(words) == {"a.b_c": "1", "a.d": "x", "model.converters": "one two", "compile.no_enable": ""}
    with pytest.raises(ConfigError, match="'stray' is not an option"):
        read_options(["stray"])


@pytest.mark.parametrize(
    ("settings", "ranks", "layout"),
    [
        ({}, 1, "one rank"),
        ({}, 8, "fsdp8"),
        ({"parallelism.tensor_parallel_degree": "2"}, 8, "fsdp4 x tp2"),
        ({"parallelism.data_parallel_replicate_degree": 2, "parallelism.context_parallel_degree": "2"}, 8, "dp2 x fsdp2 x cp2"),
        ({"parallelism.data_parallel_shard_degree": 1, "parallelism.pipeline_parallel_degree": 2}, 2, "pp2"),
    ],
)
def test_its_layout_is_told_in_our_grammar(settings: dict[str, object], ranks: int, layout: str):
    assert layout_of(settings, ranks) == layout


def test_its_precision_is_what_it_computes_in():
    assert precision_of({}, LOG) == "bf16"
    assert precision_of({}, "... INFO - Mixed precision training is disabled\n") == "fp32"
    assert precision_of({"training.dtype": "bfloat16"}, "Mixed precision training is disabled") == "bf16_weights"
    assert precision_of({"model.converters": ["quantize.linear.float8"]}, LOG) == "float8"
    assert precision_of({"training.mixed_precision_param": "float32"}, LOG) == "fp32"


CONFIG = '[model]\nname = "llama3"\nflavor = "8B"\n[training]\nlocal_batch_size = 2\nseq_len = 8192\n'
PACE = Pace(steps=15, warmup=5, limit_s=60)


def stand_in(folder: Path, program: str) -> None:
    """A folder set up for TorchTitan, in which a program stands in for it that prints what it would."""
    (folder / "torchtitan").mkdir()
    (folder / "torchtitan" / "__init__.py").touch()
    (folder / "torchtitan" / "train.py").write_text(program)
    (folder / "titan.toml").write_text(CONFIG)


def test_a_row_runs_its_command_and_reads_what_it_logs(tmp_path: Path):
    stand_in(tmp_path, f"import sys\nprint({LOG!r}, end='', flush=True)\nopen('arguments', 'w').write(' '.join(sys.argv[1:]))\n")
    site = open_site(tmp_path, tmp_path / "site")
    subject = titan("three", ["--training.local_batch_size", "3"], site, 1, PACE)
    assert (subject.row.model, subject.row.seq_len, subject.row.batch) == ("llama3_8b", 8192, 3)
    logs = tmp_path / "logs"
    logs.mkdir()
    run = subject.measure(logs)
    assert run.error is None
    assert (list(run.tokens_per_s), list(run.step_s)) == ([8192, 8623], [2.0, 1.9])
    assert run.losses == [(1, 12.25), (5, 11.0), (10, 9.5), (15, 8.75)]
    assert (run.layout, run.precision, run.reserved_gib) == ("one rank", "bf16", 100.1)
    assert run.first_step_s is not None
    given = (tmp_path / "arguments").read_text()
    assert given == f"--job.config_file titan.toml --training.local_batch_size 3 --training.steps 15 --job.dump_folder {logs / 'dump'}"


def test_a_row_that_fails_tells_the_exception_of_the_rank_that_did(tmp_path: Path):
    stand_in(tmp_path, "import os, time\nif os.environ['RANK'] == '0':\n    raise ValueError('no such flavor')\ntime.sleep(100)\n")
    logs = tmp_path / "logs"
    logs.mkdir()
    run = titan("two", [], open_site(tmp_path, tmp_path / "site"), 2, PACE).measure(logs)
    assert run.error == "ValueError: no such flavor"
    assert (run.layout, run.tokens_per_s) == ("fsdp2", [])


def test_a_folder_that_is_not_set_up_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"holds no titan.toml; docs/performance.md says"):
        open_site(tmp_path, tmp_path / "site")
    (tmp_path / "titan.toml").write_text(CONFIG)
    with pytest.raises(ConfigError, match="Python finds no torchtitan"):
        open_site(tmp_path, tmp_path / "site")
    stand_in(tmp_path, "")
    with pytest.raises(ConfigError, match="set --steps"):
        titan("a", ["--training.steps=3"], open_site(tmp_path, tmp_path / "site"), 1, PACE)


def test_a_version_that_takes_other_options_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = tmp_path / "elsewhere" / "torchtitan"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    information = package.parent / "torchtitan-0.3.0.dist-info"
    information.mkdir()
    (information / "METADATA").write_text("Metadata-Version: 2.4\nName: torchtitan\nVersion: 0.3.0\n")
    (tmp_path / "titan.toml").write_text(CONFIG)
    monkeypatch.syspath_prepend(str(package.parent))
    with pytest.raises(ConfigError, match=r"torchtitan 0\.3\.0 takes other options than 0\.2\.2"):
        open_site(tmp_path, tmp_path / "site")
