"""One process holds a run folder at a time, and a folder that cannot be used is refused in one message."""

import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from paraxis.base.errors import StorageError
from paraxis.observe.folder import RunFolder

HOLD = """
import sys
from pathlib import Path
from paraxis.observe.folder import RunFolder
lock = RunFolder(Path(sys.argv[1])).hold()
print("held", flush=True)
sys.stdin.read()
"""


def holder(path: Path) -> "subprocess.Popen[str]":
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    return process


def test_a_second_process_on_the_same_run_is_refused_with_the_holders_pid(tmp_path):
    with holder(tmp_path) as process:
        with pytest.raises(StorageError, match=rf"in use by process {process.pid} on .*--run-dir"):
            RunFolder(tmp_path).hold()
        process.kill()
    with RunFolder(tmp_path).hold():  # a killed holder leaves nothing behind
        assert (tmp_path / "lock").read_text().startswith(f"process {os.getpid()} on ")


def test_a_released_folder_can_be_held_again(tmp_path):
    lock = RunFolder(tmp_path / "new" / "run").hold()
    lock.release()
    lock.release()
    RunFolder(tmp_path / "new" / "run").hold().release()


def test_a_folder_that_cannot_be_made_is_refused_with_its_path(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StorageError, match=r"file/run cannot be written: .*--run-dir"):
        RunFolder(tmp_path / "file" / "run").hold()


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(StorageError, match="Permission denied"):
        RunFolder(tmp_path).hold()


def test_a_run_that_wrote_nothing_leaves_no_lock_and_no_folder_that_was_not_there(tmp_path):
    (tmp_path / "mine").mkdir()
    for name in ("mine", "new"):
        with RunFolder(tmp_path / name).hold():
            assert (tmp_path / name / "lock").exists()
    assert [path.name for path in tmp_path.rglob("*")] == ["mine"]
    with RunFolder(tmp_path / "used").hold():
        (tmp_path / "used" / "events.jsonl").write_text("{}")
    assert {path.name for path in (tmp_path / "used").iterdir()} == {"lock", "events.jsonl"}


def test_a_lock_that_cannot_be_written_is_not_left_empty(tmp_path, monkeypatch):
    def full(descriptor, data):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "write", full)
    with pytest.raises(StorageError, match="No space left"):
        RunFolder(tmp_path).hold()
    assert list(tmp_path.iterdir()) == []


def test_a_lock_whose_file_was_taken_away_meanwhile_holds_nothing(tmp_path, monkeypatch):
    """Otherwise two runs would hold the folder: this one by a file that nobody finds any more, the next by a new one."""
    original = fcntl.flock

    def late(descriptor, operation):
        (tmp_path / "lock").unlink()
        original(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", late)
    with pytest.raises(StorageError, match="start again"):
        RunFolder(tmp_path).hold()
