"""What cannot be trained is refused in one message that says what to do, with an exit code, leaving nothing in the way."""

import os
import resource
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from paraxis.checkpoint.save import save
from tests.runs import RECIPES, SMALL, events, lines, metrics, paraxis, refusal, saved, succeeded

CONFIG, DATA, CHECKPOINT, STORAGE = 78, 65, 77, 74

Train = Callable[..., list[str]]


@pytest.fixture
def train(text: Path) -> Train:
    def arguments(*more: str) -> list[str]:
        data = [f"--data.paths={text}", "--data.tokenizer=train:300", "--data.seq_len=16"]
        return ["train", "debug", *data, *SMALL, "--metrics.tensorboard=false", "--train.steps=3", "--run-dir=run", *more]

    return arguments


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        ("--parallel.pp=2 --model.layers=1", ["1 layers cannot be cut into 2 pipeline stages", "lower parallel.pp"]),
        (
            "--parallel.pp=2 --model.layers=4 --parallel.schedule=interleaved --parallel.microbatches=3",
            ["parallel.schedule=interleaved takes micro-batches in groups of pp=2, and 3 is no multiple", "use 2 or 4"],
        ),
        (
            "--parallel.pp=2 --model.layers=4 --parallel.schedule=zbv --parallel.microbatches=2",
            ["parallel.schedule=zbv needs at least 3 micro-batches on 2 ranks, not 2"],
        ),
        (
            "--parallel.pp=2 --model.layers=4 --parallel.schedule=dualpipev --parallel.microbatches=3",
            ["parallel.schedule=dualpipev needs at least 4 micro-batches on 2 ranks, not 3"],
        ),
        (
            "--parallel.pp=2 --model.layers=4 --parallel.cuts=1,2",
            ["parallel.cuts=1,2 gives 2 stages 3 layers in all", "1f1b on pp=2 has 2 stages, and the model 4 layers"],
        ),
        (
            "--parallel.pp=2 --model.layers=4 --parallel.cuts=1,2,1",
            ["parallel.cuts=1,2,1 gives 3 stages 4 layers in all", "1f1b on pp=2 has 2 stages"],
        ),
        ("--parallel.pp=2 --model.layers=4 --parallel.cuts=0,4", ["parallel.cuts=0,4: every stage needs a layer at least"]),
        ("--parallel.pp=2 --model.layers=4 --parallel.schedule=1b1f", ["parallel.schedule='1b1f' is unknown", "1f1b", "CSV file"]),
        (
            "--parallel.pp=2 --model.layers=4 --parallel.schedule=no.csv",
            ["parallel.schedule=no.csv: the file cannot be read: No such file"],
        ),
        ("--parallel.schedule=zbv", ["parallel.schedule=zbv says nothing while parallel.pp=1"]),
        ("--parallel.stages_a_rank=2", ["parallel.stages_a_rank=2 says nothing while parallel.pp=1"]),
        ("--parallel.cp_kind=ring", ["parallel.cp_kind=ring says nothing while parallel.cp=1"]),
        (
            "--parallel.pp=2 --model.layers=4 --parallel.schedule=zbv --compile=inductor",
            ["compile=inductor cannot split a backward in two, which parallel.schedule=zbv does", "compile=none", "1f1b"],
        ),
        (
            "--parallel.pp=2 --model.layers=4 --parallel.schedule=zbv --parallel.reduce=micro_batch",
            ["parallel.reduce=micro_batch", "which parallel.schedule=zbv splits in two", "parallel.reduce=step", "1f1b"],
        ),
        ("--parallel.cp=2 --data.seq_len=18", ["data.seq_len=18 is not a multiple of 4", "parallel.cp=2", "use 16 or 20"]),
        ("--parallel.cp=2 --parallel.tp=2 --data.seq_len=2", ["data.seq_len=2 is not a multiple of 4", "parallel.tp=2", "use 4, "]),
        (
            "--parallel.cp=4 --parallel.cp_kind=ulysses --model.heads=6 --model.width=36",
            ["4 context ranks exchange heads", "a rank's 6 query heads", "parallel.cp_kind=ring"],
        ),
        (
            "--parallel.cp=2 --parallel.tp=2 --parallel.cp_kind=ulysses --model.heads=2",
            ["2 context ranks exchange heads", "a rank's 1 query heads", "parallel.cp_kind=ring"],
        ),
        (
            "--parallel.cp=4 --parallel.cp_kind=usp --parallel.cp_ulysses=3",
            ["parallel.cp_ulysses=3 does not divide parallel.cp=4; choose one that does"],
        ),
        ("--parallel.cp=4 --parallel.cp_kind=usp", ["parallel.cp_kind=usp needs parallel.cp_ulysses"]),
        ("--parallel.ep=2", ["parallel.ep=2 does not divide fsdp x cp = 1", "raise fsdp"]),
        ("--parallel.fsdp=2 --parallel.ep=2", ["parallel.ep=2 shares out experts, but Decoder has none; use ep=1"]),
        ("--parallel.tp=2 --ranks=3", ["tp2 needs 2 ranks but 3 were started", "start 2"]),
        ("--parallel.fsdp=-1 --parallel.tp=2 --ranks=3", ["3 ranks are not a multiple of 2", "lower a degree"]),
        ("--parallel.tp=0", ["parallel.tp=0", "use 1 or more"]),
        ("--parallel.tp=4", ["model.kv_heads=2 is not divisible by parallel.tp=4", "1, 2"]),
        ("--parallel.tp=2 --data.seq_len=15", ["data.seq_len=15 is not a multiple of 2", "parallel.tp=2", "use 14 or 16"]),
        ("--parallel.tp=2 --model.vocab_size=321", ["parallel.tp=2 does not divide", "321"]),
        ("--parallel.tp=2 --model.mlp_width=65", ["parallel.tp=2 does not divide", "65"]),
        ("--parallel.fsdp=2 --train.global_tokens=100", ["train.global_tokens=100 is not a multiple of 64", "use 64 or 128"]),
        ("--train.steps=0", ["train.steps=0 must be 1 or more"]),
        ("--train.stepz=1", ["train.stepz is not a setting", "did you mean train.steps?"]),
        ("--train.steps=many", ["train.steps expects int, not 'many'"]),
        ("--precision=fp8", ["precision='fp8' is unknown", "bf16"]),
        ("--attention=flash", ["attention", "flash", "CUDA"]),
        ("--eval.every=2", ["eval.every=2 needs held-out data", "set eval.paths"]),
    ],
)
def test_a_setting_that_cannot_be_met_is_refused_before_anything_is_written(arguments: str, parts: list[str], train: Train, tmp_path: Path):
    words = refusal(paraxis(*train(*arguments.split()), folder=tmp_path), CONFIG)
    assert all(part in words for part in parts), words
    assert {path.name for path in tmp_path.glob("run/*")} <= {"lock"}


@pytest.mark.parametrize(
    ("recipe", "arguments", "parts"),
    [
        ("bigrams", "--parallel.pp=2", ["parallel.pp=2 cuts a model into stages, but Bigrams has no keep(layers)", "how-to-add-a-model"]),
        ("bigrams", "--parallel.cp=2", ["parallel.cp=2 spreads every row over ranks, but Bigrams has neither use_attention", "use cp=1"]),
        ("experts", "--parallel.fsdp=3 --parallel.ep=3", ["parallel.ep=3 does not divide layers.0.mlp.experts.gate_proj", "8 entries"]),
    ],
)
def test_a_model_that_cannot_be_spread_so_is_refused(recipe: str, arguments: str, parts: list[str], tmp_path: Path):
    words = refusal(paraxis("train", f"{RECIPES}:{recipe}", "--run-dir=run", *arguments.split(), folder=tmp_path), CONFIG)
    assert all(part in words for part in parts), words


@pytest.mark.parametrize(
    ("lists", "parts"),
    [
        (["0F0,0B0", "1F0,1B0", "2F0,2B0"], ["schedule.csv is for 3 pipeline ranks and 1 micro-batches", "parallel.pp=2 and 2"]),
        (["0F0,0F1,0B0", "1F0,1B0,1F1,1B1"], ["stage 0 has 1 F, 0 B, 0 I, 0 W of micro-batch 1", "it needs one F, and one B"]),
        (["0F0,0B0,0F1,0B1", "1F1,1B1,1F0,1B0"], ["never ends", "rank 0 at 0B0", "rank 1 at 1F1"]),
        (["0F0,0F1,0B0,0B1", "1F0,1G0,1F1,1B1"], ["schedule.csv, line 2: '1G0' is no action; write stage, one of F, B, I, W"]),
    ],
    ids=["of other ranks", "a backward is missing", "waits for ever", "no action"],
)
def test_a_schedule_in_a_file_is_proved_before_it_runs(lists: list[str], parts: list[str], tmp_path: Path):
    (tmp_path / "schedule.csv").write_text("\n".join(lists))
    run = ["train", f"{RECIPES}:layers", "--parallel.pp=2", "--parallel.schedule=schedule.csv", "--parallel.microbatches=2"]
    words = refusal(paraxis(*run, "--run-dir=run", folder=tmp_path), CONFIG)
    assert all(part in words for part in parts), words


def test_an_unknown_recipe_is_refused_with_the_nearest(tmp_path: Path):
    assert "there is no recipe 'debgu'; did you mean debug?" in refusal(paraxis("train", "debgu", folder=tmp_path), CONFIG)


def test_dropout_is_refused_on_more_than_one_rank_and_trains_on_one(tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--model.dropout=0.5", "--train.steps=2", "--run-dir=run"]
    words = refusal(paraxis(*run, "--parallel.fsdp=2", folder=tmp_path), CONFIG)
    assert "dropout drops out at random, which differs between layouts; set its probability to 0 or train on one rank" in words
    succeeded(paraxis(*run, folder=tmp_path))


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("content", "parts"),
    [
        (None, ["no file at", "data.paths", "check the path"]),
        ("", ["no text in", "give files that hold text"]),
        ('{"text": "one"}\n{"text": "two"\n', ["bad.jsonl, line 2: not valid JSON", "data.on_bad_record=skip"]),
        ('{"text": "one"}\n', ["too few for one row of data.seq_len=16"]),
        ('{"other": "one"}\n', ["bad.jsonl, line 1: no field 'text' (data.text_field) among 'other'"]),
    ],
    ids=["missing", "empty", "broken line", "too little", "no such field"],
)
def test_data_that_cannot_be_trained_on_is_refused(
    ranks: int, content: str | None, parts: list[str], train: Train, tmp_path: Path, text: Path
):
    bad = tmp_path / "bad.jsonl"
    if content is not None:
        bad.write_text(content)
    arguments = train(f"--data.paths={bad}", "--data.tokenizer=train:257", f"--parallel.fsdp={ranks}")
    words = refusal(paraxis(*arguments, folder=tmp_path), DATA)
    assert all(part in words for part in parts), words
    shutil.copy(text, bad)  # once mended, the same command trains
    succeeded(paraxis(*arguments, folder=tmp_path))


def test_broken_lines_may_be_skipped_and_are_counted_in_the_metrics(train: Train, tmp_path: Path, text: Path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text(text.read_text() + '{"text": \n[]\n')
    ended = succeeded(paraxis(*train(f"--data.paths={bad}", "--data.on_bad_record=skip", "--parallel.fsdp=2"), folder=tmp_path))
    assert [step["skipped_records"] for step in metrics(tmp_path / "run")] == [2, 2, 2]
    assert all(f"skipped {bad}, line {line}: " in ended.err for line in (61, 62))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused(ranks: int, train: Train, tmp_path: Path):
    words = refusal(paraxis(*train("--model.vocab_size=288", f"--parallel.fsdp={ranks}"), folder=tmp_path), CONFIG)
    assert "the tokenizer has 300 entries but the model's vocabulary only 288; set model.vocab_size to 300 or more" in words


def test_a_run_folder_that_cannot_be_made_is_refused(tmp_path: Path):
    (tmp_path / "file").touch()
    for ranks in (1, 2):
        run = ["train", f"{RECIPES}:run", f"--parallel.fsdp={ranks}", "--run-dir=file/run"]
        words = refusal(paraxis(*run, folder=tmp_path), STORAGE)
        assert "run folder file/run cannot be written: Not a directory" in words
        assert "choose another --run-dir" in words


def small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_checkpoint_that_cannot_be_written_ends_the_run_and_leaves_no_half_of_it(ranks: int, tmp_path: Path):
    """The size limit of a process stands for a full disk: small files are written, shards are not."""
    run = ["train", f"{RECIPES}:run", f"--parallel.fsdp={ranks}", "--run-dir=run", "--train.steps=3"]
    words = refusal(paraxis(*run, "--checkpoint.every=2", folder=tmp_path, before=small_files), STORAGE)
    assert "run/checkpoints/step-3 was not saved" in words
    assert "File too large" in words
    [warning] = events(tmp_path / "run", "warning")
    assert warning["step"] == 2
    assert "the checkpoint of step 2 could not be saved, training goes on" in warning["reason"]
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3]
    assert not list((tmp_path / "run" / "checkpoints").iterdir())
    succeeded(paraxis(*run, folder=tmp_path))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of a few pages. Only root may make one."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24k", "tmpfs", folder], capture_output=True, check=False).returncode:
        pytest.skip("needs to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("free", [0, 8192])
def test_a_full_disk_ends_the_run_with_a_message(free: int, small_disk: Path, tmp_path: Path):
    filler = small_disk / "filler"
    with filler.open("wb") as file:
        file.write(bytes(24 * 1024 - 4096 - free))
    run = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", f"--run-dir={small_disk}/run", "--train.steps=3"]
    words = refusal(paraxis(*run, folder=tmp_path), STORAGE)
    assert "No space left on device" in words
    filler.unlink()
    succeeded(paraxis(*run, "--checkpoint.at_end=false", folder=tmp_path))


def damage(checkpoint: Path) -> None:
    shard = checkpoint / "rank-1-0.safetensors"
    data = bytearray(shard.read_bytes())
    data[-5] ^= 1
    shard.write_bytes(data)


def test_a_damaged_checkpoint_is_passed_over_aloud_by_all_ranks(tmp_path: Path):
    """Only rank 1 reads the damaged shard: rank 0 must not go on from what its peer could not read."""
    run = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", "--checkpoint.every=2"]
    succeeded(paraxis(*run, "--train.steps=4", "--run-dir=run", folder=tmp_path))
    succeeded(paraxis(*run, "--train.steps=6", "--run-dir=whole", folder=tmp_path))
    damage(tmp_path / "run" / "checkpoints" / "step-4")
    ended = succeeded(paraxis(*run, "--train.steps=6", "--run-dir=run", folder=tmp_path))
    [words] = [line for line in ended.err.splitlines() if "passed over" in line]
    assert "step-4 is passed over" in words
    assert "rank-1-0.safetensors is damaged" in words
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2]
    assert [m["step"] for m in metrics(tmp_path / "run")] == [1, 2, 3, 4, 5, 6]
    assert saved(tmp_path / "run")[0]["step"] == 6


@pytest.mark.parametrize("harm", ["a byte", "the manifest", "another tool's"])
def test_a_run_folder_whose_checkpoints_are_all_unreadable_is_refused_and_left_as_it_is(harm: str, tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--parallel.fsdp=2", "--train.steps=2", "--run-dir=run"]
    checkpoint = tmp_path / "run" / "checkpoints" / "step-2"
    succeeded(paraxis(*run, folder=tmp_path))
    if harm == "a byte":
        damage(checkpoint)
    elif harm == "the manifest":
        (checkpoint / "manifest.json").write_text("{")
    else:
        shutil.rmtree(checkpoint)
        checkpoint.mkdir()
        (checkpoint / "model.pt").write_bytes(b"\x80\x02")
    before = sorted(os.listdir(checkpoint))
    ended = paraxis(*run, "--train.steps=4", folder=tmp_path)
    assert "none of the checkpoints in run/checkpoints can be read (step-2)" in ended.err.splitlines()[-1]
    assert ended.code == CHECKPOINT
    assert "step-2 is passed over" in ended.err
    assert sorted(os.listdir(checkpoint)) == before
    assert [line["step"] for line in lines(tmp_path / "run" / "metrics.jsonl")] == [1, 2]


@pytest.mark.parametrize(
    ("change", "parts"),
    [
        ("--train.seed=1", ["saved with train.seed = 0, but this run has 1"]),
        ("--optim.name=sgd", ["optim.name = adamw, but this run has sgd"]),
        ("--data.seq_len=12", ["data.seq_len = 8, but this run has 12"]),
        ("--model.llama.width=32", ["which this model needs in shape (32, 32)"]),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(change: str, parts: list[str], tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--train.steps=2", "--run-dir=run"]
    succeeded(paraxis(*run, folder=tmp_path))
    words = refusal(paraxis(*run, change, folder=tmp_path), CHECKPOINT)
    assert all(part in words for part in [*parts, "start in another --run-dir"]), words


def test_imported_weights_are_no_run_to_resume(tmp_path: Path):
    save(tmp_path / "run" / "checkpoints", 0, [], {"model": None}, {})
    words = refusal(paraxis("train", f"{RECIPES}:run", "--run-dir=run", folder=tmp_path), CHECKPOINT)
    assert "run/checkpoints/step-0 holds weights but no state of a run" in words
