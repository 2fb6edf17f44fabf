"""Programs are timed, ended at their limit, and their failure is told in one line."""

import signal
import sys
import time
from pathlib import Path

import pytest

from paraxis.bench.program import Timing, reason, run_program


def test_a_program_is_timed_to_its_first_step_and_to_its_end(tmp_path: Path):
    mark = tmp_path / "step"
    code = f"import time; print('hello', flush=True); open({str(mark)!r}, 'w').close(); time.sleep(0.3)"
    timing = run_program([sys.executable, "-c", code], tmp_path / "log", first_step_done=mark.exists, limit_s=60)
    assert timing.code == 0
    assert timing.first_step_s is not None
    assert 0 < timing.first_step_s < timing.wall_s
    assert (tmp_path / "log").read_text() == "hello\n"


def test_a_program_is_ended_at_its_limit(tmp_path: Path):
    command = [sys.executable, "-c", "import time; time.sleep(1000)"]
    timing = run_program(command, tmp_path / "log", first_step_done=lambda: False, limit_s=1)
    assert (timing.code, timing.first_step_s) == (None, None)
    assert reason(timing, "", 1) == "stopped after 1 s"


@pytest.mark.parametrize("how", ["interrupted", "asked to end"])
def test_a_program_does_not_outlive_its_benchmark(tmp_path: Path, how: str):
    beats = tmp_path / "beats"
    code = f"import time\nwhile True:\n open({str(beats)!r}, 'a').write('x')\n time.sleep(0.05)"

    def stop() -> bool:
        if beats.exists():
            if how == "interrupted":
                raise KeyboardInterrupt
            signal.raise_signal(signal.SIGTERM)
        return False

    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt if how == "interrupted" else SystemExit):
        run_program([sys.executable, "-c", code], tmp_path / "log", first_step_done=stop, limit_s=60)
    assert signal.getsignal(signal.SIGTERM) is before
    count = beats.stat().st_size
    time.sleep(0.3)
    assert beats.stat().st_size == count


@pytest.mark.parametrize(
    ("output", "told"),
    [
        (
            "loading\n[rank1]: Traceback (most recent call last):\n[rank1]:   File 'x'\n"
            "[default1]:\x1b[31m[rank1]: torch.OutOfMemoryError: CUDA out of memory\x1b[0m\n"
            "[rank0]: torch.distributed.DistBackendError: peer is gone\ndone",
            "torch.OutOfMemoryError: CUDA out of memory",
        ),
        ("step 1\nparaxis: error: data.paths: no file at x\n", "data.paths: no file at x"),
        ("torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \nsome words\n=====\n", "some words"),
        (
            "terminate called\nE1126 18:40:59.016 1083 api.py:1002] failed (exitcode: -6) local_rank: 1 (pid: 1088) of binary: python\n"
            "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n=====\n",
            "rank 1 was ended by SIGABRT",
        ),
        ("", "exit code 3"),
    ],
    ids=["the first exception", "our message", "the last words", "a signal", "nothing"],
)
def test_a_failure_is_told_in_the_line_that_names_its_cause(output: str, told: str):
    assert reason(Timing(3, None, 1.0), output, 60) == told


def test_a_program_that_ended_well_has_no_reason():
    assert reason(Timing(0, 1.0, 2.0), "ValueError: only logged", 60) is None
