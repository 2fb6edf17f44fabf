"""Every command that takes a checkpoint takes the URL of one, and a run trains, fails and continues with its checkpoints there."""

import json
from pathlib import Path

import pytest
import torch

from paraxis.base.layout import whole_box
from paraxis.checkpoint import objects
from paraxis.checkpoint.load import committed, newest, open_checkpoint
from paraxis.checkpoint.retain import Keep
from paraxis.checkpoint.save import Piece, save
from paraxis.cli import main
from paraxis.cli import train as cli_train
from tests.cli.folders import refused, said, said_json
from tests.objects import Fault, served
from tests.runs import SMALL, events, metrics, paraxis, refusal, succeeded

PLACE = "faulty://bucket/demo"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.001)
    with served(tmp_path / "bench") as bench:
        yield bench


@pytest.fixture
def train(tmp_path, monkeypatch):
    """The arguments of a small run whose checkpoints go to `folder`."""
    monkeypatch.setenv("PARAXIS_CACHE", str(tmp_path / "cache"))
    (tmp_path / "text.txt").write_text("".join(f"{n} times {n} is {n * n}. " for n in range(300)))

    def arguments(run_dir: str, folder: str, *more: str) -> list[str]:
        data = ["--data.paths=text.txt", "--data.tokenizer=train:300", "--data.seq_len=16", "--metrics.tensorboard=false", *SMALL]
        kept = ["--checkpoint.every=1", f"--checkpoint.folder={folder}", "--optim.schedule=constant"]
        return ["train", "debug", *data, *kept, f"--run-dir={run_dir}", *more]

    return arguments


def write(step: int, value: float = 0.0) -> None:
    tensors = {"model/a": torch.full((6, 4), value), "optim/b": torch.arange(9)}
    pieces = [Piece(name, tuple(t.shape), whole_box(tuple(t.shape)), t) for name, t in tensors.items()]
    save(PLACE, step, pieces, {"step": step}, {"config.toml": b"x\n"}, layout="fsdp1", keep=Keep(last=99))


def test_ckpt_lists_verifies_compares_prunes_and_rewrites_at_urls(bench, tmp_path: Path, capsys):
    for step in (1, 2, 10):
        write(step)
    entries = said_json(capsys, "ckpt", "ls", PLACE)
    assert [(e["step"], e["generation"], e["latest"], e["problem"]) for e in entries] == [
        (1, 1, False, None),
        (2, 2, False, None),
        (10, 3, True, None),
    ]
    assert entries[2]["path"] == f"{PLACE}/step-10.save-3"
    assert entries[2]["saved"].startswith("20")
    assert said(capsys, "ckpt", "ls", PLACE).splitlines()[3].endswith("complete, latest")
    assert [found["ok"] for found in said_json(capsys, "ckpt", "verify", PLACE)] == [True, True, True]
    said(capsys, "ckpt", "reshard", PLACE, "faulty://bucket/other", "--ranks", 2)
    assert "2 of the 2 tensors" in said(capsys, "ckpt", "diff", f"{PLACE}/step-10.save-3", "faulty://bucket/other")
    assert said_json(capsys, "ckpt", "prune", PLACE, "--keep-last", 2)["removed"] == ["step-1.save-1"]
    shard = bench.path("bucket/demo/step-10.save-3/rank-0-0.safetensors")
    shard.write_bytes(shard.read_bytes()[:-1] + b"\7")
    capsys.readouterr()
    assert main(["ckpt", "verify", PLACE]) == 77
    assert "tensors there: model/a, optim/b" in capsys.readouterr().out


def test_what_a_url_cannot_be_is_refused_in_one_line(bench, capsys):
    assert "holds no checkpoint" in refused(capsys, 77, "ckpt", "ls", PLACE)
    write(1)
    bench.path("bucket/demo/step-1.save-1/manifest.json").unlink()
    assert "holds no complete checkpoint" in refused(capsys, 77, "ckpt", "diff", PLACE, PLACE)
    said_of = refused(capsys, 78, "ckpt", "ls", "s3://me:hunter2@bucket/x")
    assert "credentials" in said_of
    assert "hunter2" not in said_of
    assert "holds no complete paraxis checkpoint" in refused(capsys, 77, "generate", PLACE, "--prompt", "a")
    write(1)
    bench.expect(Fault("", "", "permission"))
    assert "PermissionError" in refused(capsys, 74, "ckpt", "verify", PLACE)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_saves_at_a_url_survives_its_faults_and_continues_there(bench, train, tmp_path: Path, ranks: int):
    """The second save fails for good; all else of the run is as if nothing had been."""
    split = f"--parallel.fsdp={ranks}"
    succeeded(paraxis(*train("local", "", split, "--train.steps=4"), folder=tmp_path))
    bench.expect(Fault("complete", "step-2"), Fault("read", "", short=True, skip=3, times=2), late_listings=2)
    first = succeeded(paraxis(*train("remote", PLACE, split, "--train.steps=3"), folder=tmp_path))
    assert f"{PLACE}/step-2 was not saved" in first.out + first.err
    (warning,) = [event for event in events(tmp_path / "remote", "warning") if "could not be saved" in event["reason"]]
    assert "step 2" in warning["reason"]
    assert [event["step"] for event in events(tmp_path / "remote", "checkpoint") if event["reason"] == "saved"] == [1, 3]
    assert not (tmp_path / "remote/checkpoints").exists()
    bench.expect(late_listings=2)
    second = succeeded(paraxis(*train("remote", PLACE, split, "--train.steps=4"), folder=tmp_path))
    assert [event["step"] for event in events(tmp_path / "remote", "resume")] == [3]
    assert f"checkpoint: {PLACE}/step-4.save-" in second.out
    bench.expect()
    assert [one.manifest.step for one in committed(PLACE)] == [4, 3]
    curves = [[(line["step"], line["loss"], line["grad_norm"]) for line in metrics(tmp_path / run)] for run in ("local", "remote")]
    assert curves[0] == curves[1]
    here, there = (open_checkpoint(newest(place)) for place in (tmp_path / "local/checkpoints", PLACE))
    assert here.meta == there.meta
    assert all(torch.equal(here.read(name), there.read(name)) for name in here.tensors | there.tensors)


def test_the_last_save_failing_ends_the_run_and_the_next_start_goes_on_from_the_one_before(bench, train, tmp_path: Path):
    bench.expect(Fault("part", "step-2"))
    ended = paraxis(*train("run", PLACE, "--train.steps=2"), folder=tmp_path)
    assert ended.code == 74
    assert f"{PLACE}/step-2 was not saved" in ended.err.splitlines()[-1]
    assert "Traceback" not in ended.err
    bench.expect()
    succeeded(paraxis(*train("run", PLACE, "--train.steps=2"), folder=tmp_path))
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [1]


def test_a_run_whose_checkpoints_are_elsewhere_is_found_by_its_folder_and_its_weights_are_used(bench, train, tmp_path: Path, capsys):
    for folder in (PLACE, "elsewhere"):
        run = f"run-{folder[:4]}"
        succeeded(paraxis(*train(run, folder, "--train.steps=2"), folder=tmp_path))
        for place in (run, folder):
            listed = json.loads(succeeded(paraxis("ckpt", "ls", place, "--json", folder=tmp_path)).out)
            assert [entry["step"] for entry in listed] == [1, 2]
            succeeded(paraxis("eval", place, "--data=text.txt", folder=tmp_path))
        out = succeeded(paraxis("generate", run, "--prompt=3 times", "--max-tokens=3", "--json", folder=tmp_path)).out
        assert json.loads(out)["tokens"] == 3
        succeeded(paraxis("convert", "export", folder, f"hf-{run}", folder=tmp_path))
        imported = f"{folder}-imported"
        succeeded(paraxis("convert", "import", f"hf-{run}", imported, folder=tmp_path))
        assert f"{imported} exists" in refusal(paraxis("convert", "import", f"hf-{run}", imported, folder=tmp_path), 77)
        assert json.loads(succeeded(paraxis("ckpt", "verify", imported, "--json", folder=tmp_path)).out)[0]["ok"]
    assert "is no local folder" in refusal(paraxis("convert", "export", PLACE, PLACE, folder=tmp_path), 78)


def test_credentials_in_checkpoint_folder_are_refused_and_not_repeated(train, tmp_path: Path):
    ended = paraxis(*train("run", "s3://me:hunter2@bucket/x"), folder=tmp_path)
    assert "credentials" in refusal(ended, 78)
    assert "hunter2" not in ended.out + ended.err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("fault", [Fault("list"), Fault("read", "rank-1-0"), Fault("read", "rank-1-0", "permission")])
def test_a_store_that_does_not_answer_ends_a_start_in_one_message_and_older_state_is_not_taken(bench, train, tmp_path: Path, fault: Fault):
    run = train("run", PLACE, "--parallel.fsdp=2", "--train.steps=3")
    succeeded(paraxis(*train("run", PLACE, "--parallel.fsdp=2", "--train.steps=2"), folder=tmp_path))
    bench.expect(fault)
    ended = paraxis(*run, folder=tmp_path)
    assert ended.code == 74, ended.err
    assert ended.err.count("paraxis: error") == 1, ended.err
    assert ended.seconds < 30
    bench.expect()
    succeeded(paraxis(*run, folder=tmp_path))
    assert [event["step"] for event in events(tmp_path / "run", "resume")] == [2]


def test_a_run_that_ended_well_says_so_where_the_store_does_not_answer_afterwards(bench, train, tmp_path: Path):
    def fail_at_the_end():
        show_end = cli_train.show_end

        def late(*arguments):
            bench.expect(Fault("list"))
            show_end(*arguments)

        cli_train.show_end = late

    ended = succeeded(paraxis(*train("run", PLACE, "--train.steps=1"), folder=tmp_path, before=fail_at_the_end))
    assert f"checkpoint: listing {PLACE}" in ended.out
