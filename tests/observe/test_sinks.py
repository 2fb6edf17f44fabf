"""Metrics and events are whole JSON lines, each step once, and a full disk never ends a run."""

import json
import logging
import subprocess
import sys
from pathlib import Path

import pytest

from paraxis.base.errors import ConfigError, StorageError
from paraxis.observe.config import MetricsConfig
from paraxis.observe.folder import RunFolder
from paraxis.observe.metrics import MetricsLog
from paraxis.observe.sinks import EventLog, JsonLines, cut_after

PLAIN = MetricsConfig(tensorboard=False)


def lines(path: Path) -> list[dict]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def write_steps(path: Path, first: int, last: int, done: int = 0) -> None:
    metrics = MetricsLog(RunFolder(path), PLAIN, done)
    for step in range(first, last + 1):
        metrics.write(step, {"loss": 1.0 / step, "attempt": first})
    metrics.close()


def test_a_resumed_run_has_each_step_once(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 5, 9, done=4)
    written = lines(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in written] == list(range(1, 10))
    assert [line["attempt"] for line in written] == [1] * 4 + [5] * 5


def test_a_run_that_starts_over_has_each_step_once(tmp_path):
    write_steps(tmp_path, 1, 7)
    write_steps(tmp_path, 1, 2)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2]


def test_half_a_line_left_by_a_crash_is_cut(tmp_path):
    write_steps(tmp_path, 1, 3)
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "lo')
    write_steps(tmp_path, 4, 4, done=3)
    assert [line["step"] for line in lines(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]


def test_cutting_a_file_that_is_not_there_does_nothing(tmp_path):
    cut_after(tmp_path / "metrics.jsonl", 3)
    assert list(tmp_path.iterdir()) == []


def test_values_that_json_cannot_say_become_null_and_are_named(tmp_path):
    metrics = MetricsLog(RunFolder(tmp_path), PLAIN)
    metrics.write(1, {"loss": float("nan"), "grad_norm": float("inf"), "lr": 0.1, "mfu": None})
    (line,) = lines(tmp_path / "metrics.jsonl")
    assert line == {"step": 1, "loss": None, "grad_norm": None, "lr": 0.1, "mfu": None, "nonfinite": {"loss": "nan", "grad_norm": "inf"}}


def test_events_say_when_what_where_and_why(tmp_path):
    first, second = EventLog(tmp_path / "events.jsonl", rank=0), EventLog(tmp_path / "events.jsonl", rank=3)
    first.write("start", "asked to", layout="fsdp2")
    second.write("failure", "lost a rank", step=7)
    started, failed = lines(tmp_path / "events.jsonl")
    assert {name: started[name] for name in ("kind", "rank", "reason", "step", "layout")} == {
        "kind": "start",
        "rank": 0,
        "reason": "asked to",
        "step": None,
        "layout": "fsdp2",
    }
    assert (failed["kind"], failed["rank"], failed["step"]) == ("failure", 3, 7)
    assert started["time"] <= failed["time"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs the device that is always full")
def test_a_full_disk_is_one_warning(caplog):
    sink = JsonLines(Path("/dev/full"))
    with caplog.at_level(logging.WARNING):
        for step in range(3):
            sink.write({"step": step})
    (warning,) = caplog.messages
    assert "/dev/full" in warning
    assert "No space left" in warning


FILL_UP = """
import resource, sys
from pathlib import Path
from paraxis.observe.config import MetricsConfig
from paraxis.observe.folder import RunFolder
from paraxis.observe.metrics import MetricsLog
metrics = MetricsLog(RunFolder(Path(sys.argv[1])), MetricsConfig(tensorboard=sys.argv[2] == "tensorboard"))
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
metrics.write(1, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
for step in range(2, 40):
    metrics.write(step, {"loss": 1.0})
resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
metrics.write(40, {"loss": 1.0})
metrics.close()
"""


@pytest.mark.parametrize("board", ["plain", "tensorboard"])
def test_when_the_disk_fills_up_training_goes_on_and_no_half_line_is_left(tmp_path, board):
    ended = subprocess.run([sys.executable, "-c", FILL_UP, str(tmp_path), board], capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr.count("metrics.jsonl could not be written") == 1
    assert ended.stderr.count("TensorBoard curves stop here") == (board == "tensorboard")
    steps = [line["step"] for line in lines(tmp_path / "metrics.jsonl")]
    assert steps == [*range(1, len(steps)), 40]
    assert 2 < len(steps) < 10


def test_a_metrics_file_that_cannot_be_opened_is_refused(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(StorageError, match=r"metrics\.jsonl cannot be"):
        MetricsLog(RunFolder(tmp_path), PLAIN)


def test_every_nth_step_is_due(tmp_path):
    metrics = MetricsLog(RunFolder(tmp_path), MetricsConfig(every=3, tensorboard=False))
    assert [step for step in range(1, 10) if metrics.due(step)] == [3, 6, 9]
    with pytest.raises(ConfigError, match=r"metrics\.every=0"):
        MetricsConfig(every=0)


def test_tensorboard_shows_the_steps_of_the_last_attempt(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for first, last in ((1, 5), (4, 6)):
        metrics = MetricsLog(RunFolder(tmp_path), MetricsConfig(), done=first - 1)
        for step in range(first, last + 1):
            metrics.write(step, {"loss": float(first), "mfu": None})
        metrics.close()
    curves = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(point.step, point.value) for point in curves.Scalars("loss")] == [(1, 1), (2, 1), (3, 1), (4, 4), (5, 4), (6, 4)]


def test_tensorboard_is_not_imported_where_it_is_off(tmp_path):
    code = f"""
import sys
from pathlib import Path
from paraxis.observe.config import MetricsConfig
from paraxis.observe.folder import RunFolder
from paraxis.observe.metrics import MetricsLog
MetricsLog(RunFolder(Path({str(tmp_path)!r})), MetricsConfig(tensorboard=False)).write(1, {{"loss": 1.0}})
sys.exit("tensorboard" in sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    assert not (tmp_path / "tensorboard").exists()
