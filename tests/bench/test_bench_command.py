"""`paraxis bench` as a person meets it: a real run on the CPU, and one message for what is refused."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paraxis.base.errors import ConfigError
from paraxis.cli import main
from paraxis.cli.bench_rows import Variant, read_variants, shown

ROOT = Path(__file__).parents[2]


def paraxis(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run([sys.executable, "-m", "paraxis", *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=100)


def test_a_benchmark_measures_real_steps_and_records_a_row_that_fails(tmp_path: Path):
    rows = ("--row", "good: --layout=fsdp2 --train.micro_batch=3", "--row", "bad: --data.paths=nonesuch")
    done = paraxis("bench", "step", "debug", "--steps", "5", "--warmup", "2", *rows, "--logs", "logs", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    [file] = (tmp_path / "bench/results").iterdir()
    assert file.name.startswith("step-cpu-")
    results = json.loads(file.read_text())
    assert results["command"].startswith("paraxis bench step debug --steps 5 --warmup 2 --row 'good: ")
    good, bad = results["rows"]
    assert list(good["losses"]) == ["1", "2", "3", "4", "5"]
    assert (good["layout"], good["ranks"], good["precision"], good["batch"], good["error"]) == ("fsdp2", 2, "fp32", 3, None)
    # Both are of the middle one of three steps, on 3 rows of 64 tokens a rank.
    assert good["tokens_per_s"] * good["step_s"] == pytest.approx(3 * 64, rel=0.01)
    assert 0 < good["first_step_s"] < good["wall_s"]
    assert bad["error"].startswith("data.paths: no file at ")
    assert bad["tokens_per_s"] is None
    assert "failed" in done.stdout
    assert (tmp_path / "logs/1-1/run/metrics.jsonl").exists()
    assert not list((tmp_path / "logs").rglob("*.safetensors"))


def test_startup_is_measured_cold_and_warm_in_caches_of_its_own(tmp_path: Path):
    rows = ("--row", "good:", "--row", "bad: --data.paths=nonesuch")
    done = paraxis("bench", "startup", "debug", "--runs", "1", *rows, "--logs", "logs", "--json", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    good, bad = json.loads(done.stdout)["rows"]
    assert min(good["cold_s"], good["warm_s"]) > 0
    for when in ("cold", "warm"):
        parts = dict(part.rsplit(" ", 1) for part in good[f"{when}_apart_s"])
        assert list(parts) == ["imports", "joining", "data", "building", "reading", "first step"]
        assert sum(map(float, parts.values())) == pytest.approx(good[f"{when}_s"], abs=0.3)  # each is rounded
    assert good["error"] is None
    assert bad["error"].startswith("data.paths: no file at ")
    assert any((tmp_path / "logs/caches-1/paraxis").iterdir())  # what the first run prepared is there for the second
    assert len((tmp_path / "logs/1-1/run/metrics.jsonl").read_text().splitlines()) == 1


def test_help_does_not_wait_for_torch():
    code = "import sys; from paraxis.cli import main; main(['bench', 'step', '--help']); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "examples:\n  paraxis bench step debug" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["stp"], "there is no benchmark 'stp'; did you mean step?"),
        (["step"], "bench step takes one recipe"),
        (["step", "debug", "--steps=5"], "--warmup=5 leaves none of --steps=5 to measure"),
        (["step", "debug", "--runs=0"], "--runs=0 is not a whole number of 1 or more"),
        (["startup", "debug", "--steps=5"], "--steps is not for bench startup"),
        (["table"], "bench table takes results files, or --into PAGE"),
        (["table", "nonesuch.json"], "cannot read nonesuch.json"),
    ],
)
def test_what_cannot_be_done_is_refused_in_a_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", *arguments]) == 78
    said = capsys.readouterr().err
    assert words in said
    assert said.count("\n") == 1


def test_rows_are_read_with_their_names():
    found = read_variants("row", ["a: --x=1 --y", "b c:", "d: --z='1 : 2'"])
    assert found == [Variant("a", ["--x=1", "--y"]), Variant("b c", []), Variant("d", ["--z=1 : 2"])]
    for wrong, words in (
        (["--x=1"], "has no name"),
        ([": --x=1"], "has no name"),
        (["a: --x", "a: --y"], "two rows 'a'"),
        (["a: --x='"], "No closing quotation"),
    ):
        with pytest.raises(ConfigError, match=words):
            read_variants("row", wrong)


def test_the_recorded_command_can_be_pasted_and_holds_no_secret():
    assert shown(["step", "debug", "--row", "a: --x=1"]) == "paraxis bench step debug --row 'a: --x=1'"
    assert "hunter2" not in shown(
        ["step", "debug", "--data.paths=s3://me:hunter2@host/x", "--row", "a: --data.paths=s3://me:hunter2@host/x"]
    )
