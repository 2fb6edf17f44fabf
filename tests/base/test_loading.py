"""Modules are loaded beside what needs no Python meanwhile."""

import sys
import threading
from pathlib import Path

import pytest

from paraxis.base.loading import loading


def test_a_module_is_loaded_beside_the_body_and_is_there_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "slow_to_load.py").write_text("there = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    begun = threading.Event()

    def names() -> list[str]:
        assert begun.wait(10)  # the body runs while this waits
        return ["slow_to_load"]

    with loading(names):
        assert "slow_to_load" not in sys.modules
        begun.set()
    assert sys.modules.pop("slow_to_load").there


def test_a_module_that_is_not_there_and_a_body_that_fails_leave_no_thread_behind():
    with pytest.raises(ZeroDivisionError), loading(lambda: ["no_such_module"]):
        _ = 1 / 0
    assert "loading" not in [thread.name for thread in threading.enumerate()]
