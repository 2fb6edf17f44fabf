"""What a save, and pruning by hand, keep of older checkpoints."""

from pathlib import Path

import pytest
import torch

from paraxis.base.errors import CheckpointError, ConfigError
from paraxis.checkpoint.config import CheckpointConfig
from paraxis.checkpoint.load import newest, open_checkpoint
from paraxis.checkpoint.manifest import CHUNK_BYTES
from paraxis.checkpoint.retain import HELD_OUT, Candidate, Keep, candidate, held_out, prune, unwanted
from paraxis.checkpoint.save import save
from paraxis.checkpoint.verify import verify
from paraxis.train.config import EvalConfig, RunConfig
from tests.runs import SMALL, events, paraxis, succeeded

ALL = Keep(last=99)


@pytest.fixture
def saved(tmp_path, whole):
    """Saves small checkpoints of these steps, with these held-out losses, and returns their folder."""

    def make(steps, losses=None, keep=ALL):
        for step in steps:
            meta = {HELD_OUT: held_out((losses or {}).get(step), "rows")}
            save(tmp_path, step, whole({"t": torch.full((30,), float(step))}), meta, {"config.toml": b"a = 1\n"}, keep=keep)
        return tmp_path

    return make


def names(folder: Path) -> list[str]:
    return sorted((path.name for path in folder.iterdir() if path.is_dir()), key=lambda name: int(name.split("-")[1].split(".")[0]))


def flip(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def test_a_save_keeps_every_kth_besides_the_last(saved):
    folder = saved(range(1, 11), keep=Keep(last=2, every=4))
    assert names(folder) == ["step-4", "step-8", "step-9", "step-10"]


def test_a_save_keeps_the_best_until_there_is_a_better_one(saved):
    losses = {1: 5.0, 2: 3.0, 4: 3.5, 5: 4.0}
    assert names(saved(range(1, 7), losses, Keep(best=1))) == ["step-2", "step-5", "step-6"]
    assert names(saved([7, 8, 9], {7: 2.0}, Keep(best=1))) == ["step-7", "step-8", "step-9"]
    assert names(saved([10, 11], {}, Keep(best=1))) == ["step-7", "step-10", "step-11"]
    assert names(saved([12, 13], {}, Keep(best=0))) == ["step-12", "step-13"]


def test_equal_losses_keep_the_newer_and_losses_over_other_rows_do_not_count():
    scored = [Candidate("step-3", 3, 2.0, "new"), Candidate("step-2", 2, 2.0, "new"), Candidate("step-1", 1, 1.0, "old")]
    of = [Candidate("step-5", 5), Candidate("step-4", 4), *scored]
    assert [one.name for one in unwanted(of, Keep(best=1))] == ["step-2", "step-1"]
    assert [one.name for one in unwanted(of, Keep(best=5))] == ["step-1"]


@pytest.mark.parametrize("loss", [float("nan"), float("inf"), None])
def test_a_loss_that_is_no_number_is_none(loss):
    assert held_out(loss, "rows") is None


@pytest.mark.parametrize("entry", [None, 3, {"loss": "low", "rows": "r"}, {"loss": 1.0}, [1.0]])
def test_a_foreign_entry_of_the_meta_is_no_score(entry):
    assert candidate("step-1", 1, {HELD_OUT: entry}) == Candidate("step-1", 1)


def test_pruning_by_hand_keeps_what_a_save_would(saved):
    folder = saved(range(1, 8), {3: 1.0})
    would = prune(folder, Keep(last=2, every=5, best=1), dry_run=True)
    assert names(folder) == [f"step-{n}" for n in range(1, 8)]
    assert prune(folder, Keep(last=2, every=5, best=1)) == would
    assert would.removed == ("step-4", "step-2", "step-1")
    assert (names(folder), would.verified) == (["step-3", "step-5", "step-6", "step-7"], ("step-7", "step-6"))
    assert newest(folder) == folder / "step-7"
    assert prune(folder, Keep(last=9)).removed == ()


def test_the_last_two_that_verify_stay_and_so_do_damaged_ones(saved):
    folder = saved(range(1, 7))
    flip(folder / "step-6/rank-0-0.safetensors")
    flip(folder / "step-4/rank-0-0.safetensors")
    (folder / "step-2/manifest.json").unlink()
    done = prune(folder, Keep(last=2))
    assert names(folder) == ["step-2", "step-3", "step-4", "step-5", "step-6"]
    assert (done.verified, done.removed, done.damaged) == (("step-5", "step-3"), ("step-1",), ("step-2", "step-4", "step-6"))


def test_where_fewer_than_two_verify_nothing_is_removed(saved):
    folder = saved(range(1, 5))
    for step in (1, 2, 4):
        flip(folder / f"step-{step}/config.toml")
    with pytest.raises(CheckpointError, match=r"only 1 of the 4 checkpoints .* nothing was removed"):
        prune(folder, Keep(last=2))
    assert len(names(folder)) == 4


def test_a_draft_is_not_pruned(saved):
    folder = saved(range(1, 5))
    (folder / "step-5.tmp-9").mkdir()
    prune(folder, Keep(last=2))
    assert names(folder) == ["step-3", "step-4", "step-5.tmp-9"]


def test_verify_names_only_tensors_with_a_byte_in_what_is_damaged(tmp_path, whole):
    numel = CHUNK_BYTES // 8
    path = save(tmp_path, 1, whole({f"t{n}": torch.zeros(numel, dtype=torch.float64) for n in range(3)}), {}, {})
    assert verify(path).whole
    file = path / "rank-0-0.safetensors"
    with open(file, "r+b") as stream:  # the header comes first, so the second chunk ends shortly before the second tensor does
        stream.seek(CHUNK_BYTES + 7)
        stream.write(b"\1")
    (damage,) = verify(path).damage
    assert (damage.file, damage.tensors) == (file.name, ("t0", "t1"))
    assert f"bytes {CHUNK_BYTES} to {2 * CHUNK_BYTES} do not match" in damage.why
    flip(file, 20)  # in the header: nobody knows any more where tensors are, or whether they are
    assert {name for damage in verify(path).damage for name in damage.tensors} >= {"t0", "t1"}


def test_every_flipped_byte_is_found_in_the_file_that_has_it(saved):
    folder = saved([1])
    path = folder / "step-1"
    for file in sorted(path.iterdir()):
        for at in range(0, file.stat().st_size, 41):
            flip(file, at)
            assert [damage.file for damage in verify(path).damage] == [file.name], (file, at)
            flip(file, at)
    assert verify(path).whole


def test_the_config_refuses_what_it_cannot_keep():
    for setting in ("keep_every", "keep_best"):
        with pytest.raises(ConfigError, match=rf"checkpoint\.{setting}=-1 must be 0 \(none\) or more"):
            CheckpointConfig(**{setting: -1})
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_best=1 goes by the held-out loss"):
        RunConfig(model=None, checkpoint=CheckpointConfig(keep_best=1))
    RunConfig(model=None, checkpoint=CheckpointConfig(keep_best=1), eval=EvalConfig(every=1, paths=("a.txt",)))


def test_what_a_pruned_folder_still_holds_reads_back(saved):
    folder = saved(range(1, 6))
    prune(folder, Keep(last=2))
    assert open_checkpoint(folder / "step-4").read("t").equal(torch.full((30,), 4.0))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_and_its_continuation_keep_the_last_every_kth_and_the_best(tmp_path, monkeypatch, ranks):
    monkeypatch.setenv("PARAXIS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}. " for n in range(300)))
    data = ["--data.paths=text.txt", "--data.tokenizer=train:300", "--data.seq_len=16", "--eval.paths=text.txt", *SMALL]
    scored = ["--eval.every=1", "--checkpoint.every=1", "--checkpoint.keep_best=1", "--checkpoint.keep_every=4"]
    rough = ["--optim.lr=1", "--optim.schedule=constant", "--optim.warmup=0"]  # it gets worse
    run = ["train", "debug", *data, *scored, *rough, f"--parallel.fsdp={ranks}", "--metrics.tensorboard=false", "--run-dir=run"]
    losses = {}
    for steps in (3, 7):
        succeeded(paraxis(*run, f"--train.steps={steps}", folder=tmp_path))
        losses = {event["step"]: event["loss"] for event in events(tmp_path / "run", "evaluation")}
        best = min(losses, key=lambda step: losses[step])
        kept = {steps, steps - 1, best} | {step for step in losses if step % 4 == 0}
        assert names(tmp_path / "run/checkpoints") == [f"step-{step}" for step in sorted(kept)]
    assert best < 4  # kept for its loss alone
    assert open_checkpoint(tmp_path / f"run/checkpoints/step-{best}").meta[HELD_OUT]["loss"] == losses[best]
