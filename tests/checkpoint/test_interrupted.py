"""A save that is killed, or that finds no room, leaves what was there before."""

import os
import shutil
import subprocess
import sys

import pytest
import torch

from paraxis.base.errors import StorageError
from paraxis.base.layout import whole_box
from paraxis.checkpoint import tensor_file
from paraxis.checkpoint.load import newest, open_checkpoint
from paraxis.checkpoint.save import Piece, save

KILLED_SAVES = """
import itertools, os, random, signal, sys, time, torch
from pathlib import Path
from paraxis.base.layout import whole_box
from paraxis.checkpoint.load import newest, open_checkpoint
from paraxis.checkpoint.save import Piece, save

folder, kills = Path(sys.argv[1]), int(sys.argv[2])
torch.set_num_threads(1)

def state(step):
    return {f"t{i}": torch.full((300, 40 + i), float(step * 8 + i)) for i in range(8)}

def save_for_ever(start, said):
    for step in itertools.count(start):
        pieces = [Piece(name, tuple(t.shape), whole_box(tuple(t.shape)), t) for name, t in state(step).items()]
        save(folder, step, pieces, {"step": step}, {"f": b"x"})
        os.write(said, b"%d " % step)

dice = random.Random(0)
step = 0
for _ in range(kills):
    listen, said = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(listen)
        save_for_ever(step, said)
    os.close(said)
    time.sleep(dice.uniform(0.01, 0.2))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    with os.fdopen(listen) as pipe:
        saved = [int(word) for word in pipe.read().split()] or [step - 1]
    warnings = []
    found = newest(folder, warnings.append)
    assert warnings == [], warnings
    # What it said was saved is there; one more may have been committed before it could say so.
    there = open_checkpoint(found).meta["step"] if found else -1
    assert there in (saved[-1], saved[-1] + 1), (there, saved)
    for name, tensor in state(there).items() if found else ():
        assert open_checkpoint(found).read(name).equal(tensor)
    step = there + 1
assert step > kills, step
print("survived", kills)
"""

FULL_DISK = """
import resource, sys, torch
from pathlib import Path
from paraxis.base.errors import StorageError
from paraxis.base.layout import whole_box
from paraxis.checkpoint.save import Piece, save
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    save(Path(sys.argv[1]), 2, [Piece("t", (50_000,), whole_box((50_000,)), torch.zeros(50_000))], {}, {})
except StorageError as error:
    sys.exit(f"refused: {error}")
"""


def test_a_save_killed_at_any_moment_leaves_the_last_committed_one(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED_SAVES, str(tmp_path), "20"], capture_output=True, text=True)
    assert done.stdout == "survived 20\n", done.stderr


@pytest.mark.parametrize("moment", range(1, 14))
def test_a_save_stopped_at_each_durable_operation_leaves_a_whole_checkpoint(tmp_path, state, whole, moment, monkeypatch):
    """As if the power went at the n-th fsync or rename: nothing after it happens."""
    for step in (1, 2):
        save(tmp_path, step, whole(state), {"try": 1}, {"a/b": b"c"})
    countdown = [moment]

    class PowerCut(BaseException):
        pass

    def until_the_cut(function):
        def counted(*args, **kwargs):
            countdown[0] -= 1
            if countdown[0] <= 0:
                raise PowerCut
            return function(*args, **kwargs)

        return counted

    with monkeypatch.context() as patch:
        for name in ("fsync", "rename", "replace"):
            patch.setattr(os, name, until_the_cut(getattr(os, name)))
        patch.setattr(shutil, "rmtree", until_the_cut(shutil.rmtree))
        try:
            save(tmp_path, 2, whole(state), {"try": 2}, {"a/b": b"c"})
            cut = False
        except PowerCut:
            cut = True
    found = newest(tmp_path)
    assert found is not None
    checkpoint = open_checkpoint(found)
    assert checkpoint.manifest.step == 2
    assert cut or checkpoint.meta == {"try": 2}
    assert all(checkpoint.read(name).equal(tensor) for name, tensor in state.items())
    save(tmp_path, 3, whole(state), {}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-2", "step-3"]


def test_a_full_disk_is_one_message_and_nothing_half_written(tmp_path):
    save(tmp_path, 1, [Piece("t", (3,), whole_box((3,)), torch.arange(3))], {}, {})
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == 1
    assert "refused:" in done.stderr
    assert "step-2 was not saved: rank 0" in done.stderr
    assert "Traceback" not in done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1"]
    assert open_checkpoint(tmp_path / "step-1").read("t").equal(torch.arange(3))


def test_a_failure_on_one_rank_reaches_all_of_them(tmp_path, on_ranks, monkeypatch):
    original = tensor_file.DiskFile.write

    def full(self, data):
        if "rank-2-" in self._file.name:
            raise OSError(28, "No space left on device", self._file.name)
        return original(self, data)

    monkeypatch.setattr(tensor_file.DiskFile, "write", full)

    def one(ranks):
        box = whole_box((8,)).cut(0, 4, ranks.rank)
        return save(tmp_path, 1, [Piece("t", (8,), box, torch.zeros(box.sizes))], {}, {}, ranks)

    outcomes = on_ranks(4, one)
    assert all(isinstance(outcome, StorageError) and "rank 2: OSError: [Errno 28]" in str(outcome) for outcome in outcomes)
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_made_is_one_message(tmp_path, on_ranks):
    (tmp_path / "file").write_text("in the way")
    for outcome in on_ranks(2, lambda ranks: save(tmp_path / "file", 1, [], {}, {}, ranks)):
        assert isinstance(outcome, StorageError)
        assert str(tmp_path / "file") in str(outcome)
