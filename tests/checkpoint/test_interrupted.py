"""A save that is killed, or that finds no room, leaves what was there before."""

import os
import random
import subprocess
import sys
import time

import pytest
import torch

from paraxis.base.errors import StorageError
from paraxis.base.layout import whole_box
from paraxis.checkpoint import tensor_file
from paraxis.checkpoint.load import newest, open_checkpoint
from paraxis.checkpoint.save import Piece, save

SAVES_FOR_EVER = """
import itertools, sys, torch
from pathlib import Path
from paraxis.base.layout import whole_box
from paraxis.checkpoint.save import Piece, save
torch.set_num_threads(1)
start = int(sys.argv[2])
for step in itertools.count(start):
    state = {f"t{i}": torch.full((300, 40 + i), float(step * 8 + i)) for i in range(8)}
    pieces = [Piece(name, tuple(t.shape), whole_box(tuple(t.shape)), t) for name, t in state.items()]
    save(Path(sys.argv[1]), step, pieces, {"step": step}, {"f": b"x"})
    print(step, flush=True)
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
    dice = random.Random(0)
    step = 0
    for _ in range(4):
        process = subprocess.Popen([sys.executable, "-c", SAVES_FOR_EVER, str(tmp_path), str(step)], stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        said = [int(process.stdout.readline())]
        time.sleep(dice.uniform(0, 0.15))
        process.kill()
        said += [int(line) for line in process.stdout.read().split()]
        process.wait()
        warnings = []
        found = newest(tmp_path, warnings.append)
        assert found is not None
        assert warnings == []
        checkpoint = open_checkpoint(found)
        # What it said was saved is there; one more may have been committed before it could say so.
        assert checkpoint.meta["step"] in (said[-1], said[-1] + 1)
        step = checkpoint.meta["step"]
        for i in range(8):
            assert checkpoint.read(f"t{i}").equal(torch.full((300, 40 + i), float(step * 8 + i)))
        step += 1


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
        for name in ("fsync", "rename", "replace", "rmdir"):
            patch.setattr(os, name, until_the_cut(getattr(os, name)))
        patch.setattr("shutil.rmtree", until_the_cut(__import__("shutil").rmtree))
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
    original = tensor_file.HashingWriter.write

    def full(self, data):
        if "rank-2-" in self._file.name:
            raise OSError(28, "No space left on device", self._file.name)
        return original(self, data)

    monkeypatch.setattr(tensor_file.HashingWriter, "write", full)

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
