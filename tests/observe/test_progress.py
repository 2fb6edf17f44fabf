"""Progress is a redrawn line in a terminal, and a few plain lines elsewhere."""

import contextlib
import io
import os
import pty

import pytest

from paraxis.observe.progress import LiveProgress, PlainProgress, TimeLeft, duration, show_progress


def test_elsewhere_than_in_a_terminal_the_first_and_last_step_are_plain_lines():
    stream = io.StringIO()
    progress = show_progress(50, stream=stream)
    assert isinstance(progress, PlainProgress)
    for step in range(1, 51):
        progress.update(step, loss=4.0 / step, tokens_per_s=12345.6, memory_gib=2.0)
    progress.close()
    first, *_, last = stream.getvalue().splitlines()
    assert first.startswith("step 1/50  loss 4.0000  12,346 tokens/s  2.0 GiB  left ")
    assert last.startswith("step 50/50  loss 0.0800")
    assert last.endswith("left 0:00")
    assert "\x1b" not in stream.getvalue()


def everything_written(terminal: int) -> str:
    shown = b""
    with contextlib.suppress(OSError), os.fdopen(terminal, "rb", buffering=0) as file:  # its end, on Linux, is an error
        while part := file.read(4096):
            shown += part
    return shown.decode()


def test_in_a_terminal_the_line_is_live_and_what_is_said_stays(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    parent, child = pty.openpty()
    with os.fdopen(child, "w") as terminal:
        progress = show_progress(10, done=4, stream=terminal)
        assert isinstance(progress, LiveProgress)
        progress.update(5, loss=3.5, tokens_per_s=1000.0, memory_gib=1.0)
        progress.say("[saved] checkpoint 5")
        progress.close()
    shown = everything_written(parent)
    assert "[saved] checkpoint 5" in shown
    assert "5/10" in shown
    assert "loss 3.5000" in shown


def test_time_left_forgets_a_slow_first_step(monkeypatch):
    clock = iter([0.0, 100.0, *(100.0 + step for step in range(1, 31))])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    left = TimeLeft(total=41, done=0)
    assert left.after(1) == 40 * 100.0
    for step in range(2, 32):
        estimate = left.after(step)
    assert estimate == 10.0


@pytest.mark.parametrize(("seconds", "text"), [(0.2, "0:00"), (65, "1:05"), (7384, "2:03:04")])
def test_durations_read_like_a_clock(seconds, text):
    assert duration(seconds) == text
