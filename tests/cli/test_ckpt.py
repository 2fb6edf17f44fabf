"""`paraxis ckpt` says what checkpoints there are, whether they are whole, how two differ; it prunes and rewrites them."""

import json
from pathlib import Path

import pytest
import torch

from paraxis.base.layout import whole_box
from paraxis.checkpoint.load import open_checkpoint
from paraxis.checkpoint.retain import HELD_OUT, Keep, held_out
from paraxis.checkpoint.save import Piece, save
from paraxis.cli import ckpt, main
from paraxis.observe.folder import RunFolder
from tests.cli.folders import help_of, refused, said, said_json

TENSORS = {
    "model/a": torch.arange(24.0).reshape(6, 4),
    "model/b": torch.linspace(-1, 1, 9).bfloat16(),
    "model/c": torch.randn(3, 40, generator=torch.Generator().manual_seed(0), dtype=torch.float64),
    "optim/step": torch.tensor(3, dtype=torch.int64),
    "empty": torch.empty(0, 2),
}


def write(folder: Path, step: int = 1, tensors: dict[str, torch.Tensor] = TENSORS, meta: dict | None = None, text: bytes = b"x\n") -> Path:
    pieces = [Piece(name, tuple(t.shape), whole_box(tuple(t.shape)), t) for name, t in tensors.items()]
    files = {"config.toml": text, "tokenizer/tokenizer.json": b"{}"}
    return save(folder, step, pieces, {"step": step} if meta is None else meta, files, layout="fsdp2", keep=Keep(last=99))


def flip(file: Path, at: int = -3) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def ended(capsys: pytest.CaptureFixture[str], code: int, *arguments: object) -> str:
    """What a command prints that ends with `code`, having answered."""
    capsys.readouterr()
    assert main([str(word) for word in arguments]) == code
    printed = capsys.readouterr()
    assert printed.err == ""
    return printed.out


def test_ls_says_what_is_there_and_what_is_wrong_with_it(tmp_path: Path, capsys):
    folder = tmp_path / "run/checkpoints"
    for step in (1, 2, 10):
        write(folder, step)
    (folder / "step-2/config.toml").unlink()
    (folder / "step-11.tmp-4").mkdir()
    for place in (folder, tmp_path / "run"):
        entries = said_json(capsys, "ckpt", "ls", place)
        assert [(e["step"], e["generation"], e["layout"], e["tensors"], e["latest"]) for e in entries] == [
            (1, 1, "fsdp2", 5, False),
            (2, None, None, None, False),
            (10, 3, "fsdp2", 5, True),
            (11, None, None, None, False),
        ]
        assert [(e["problem"] or "").partition(":")[0] for e in entries] == ["", "damaged", "", "unfinished"]
    assert entries[0]["bytes"] == sum(file.stat().st_size for file in (folder / "step-1").rglob("*") if file.is_file())
    lines = said(capsys, "ckpt", "ls", folder).splitlines()
    assert [line.split()[0] for line in lines] == ["name", "step-1", "step-2", "step-10", "step-11.tmp-4"]
    assert lines[3].endswith("complete, latest")
    assert "config.toml cannot be read" in lines[2]


def test_verify_names_damaged_files_their_tensors_and_files_that_are_not_listed(tmp_path: Path, capsys):
    path, other = write(tmp_path, 1), write(tmp_path, 2)
    assert "every byte as it was written" in said(capsys, "ckpt", "verify", path)
    assert [found["ok"] for found in said_json(capsys, "ckpt", "verify", tmp_path)] == [True, True]
    flip(path / "rank-0-0.safetensors")
    (other / "tokenizer/extra.json").write_text("{}")
    (other / "link").symlink_to(tmp_path)
    printed = ended(capsys, 77, "ckpt", "verify", tmp_path)
    assert "step-1: rank-0-0.safetensors is damaged: bytes 0 to" in printed
    assert "tensors there: model/a, model/b, model/c, optim/step\n" in printed
    damaged, spare = json.loads(ended(capsys, 77, "ckpt", "verify", tmp_path, "--json"))
    assert (damaged["ok"], damaged["unlisted"], [one["file"] for one in damaged["damage"]]) == (False, [], ["rank-0-0.safetensors"])
    assert (spare["ok"], spare["unlisted"], spare["damage"]) == (False, ["link", "tokenizer/extra.json"], [])


@pytest.mark.parametrize("harm", ["missing", "truncated", "longer", "link", "manifest", "no manifest"])
def test_verify_finds_every_kind_of_harm_and_goes_on_with_other_files(tmp_path: Path, capsys, harm: str):
    path = write(tmp_path / "checkpoints")
    shard = path / "rank-0-0.safetensors"
    if harm in ("missing", "link"):
        shard.rename(tmp_path / "elsewhere")
    if harm == "link":
        shard.symlink_to(tmp_path / "elsewhere")
    if harm in ("truncated", "longer"):
        shard.write_bytes(shard.read_bytes()[:-1] if harm == "truncated" else shard.read_bytes() + b"x")
    if harm == "manifest":
        flip(path / "manifest.json")
    if harm == "no manifest":
        (path / "manifest.json").unlink()
    flip(path / "config.toml", 0)
    (found,) = json.loads(ended(capsys, 77, "ckpt", "verify", path, "--json"))
    files = {one["file"]: one["tensors"] for one in found["damage"]}
    if "manifest" in harm:
        assert files == {"manifest.json": []}
    else:
        assert files == {"config.toml": [], shard.name: [name for name in TENSORS if name != "empty"]}


def test_diff_of_the_same_state_in_other_files_is_nothing(tmp_path: Path, capsys):
    write(tmp_path / "a")
    said(capsys, "ckpt", "reshard", tmp_path / "a", tmp_path / "b", "--ranks", 3)
    assert said_json(capsys, "ckpt", "diff", tmp_path / "a", tmp_path / "b") == {
        "same": True,
        "compared": 5,
        "tensors": [],
        "meta": [],
        "files": [],
    }
    assert "5 of the 5 tensors that both have are equal bit for bit" in said(capsys, "ckpt", "diff", tmp_path / "a/step-1", tmp_path / "b")


def test_diff_says_how_far_tensors_are_apart_and_what_else_differs(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.setattr("paraxis.checkpoint.compare.PART", 7)
    changed = {**TENSORS, "new": torch.zeros(1), "model/b": TENSORS["model/b"].float(), "model/c": torch.zeros(3, 4)}
    changed["model/a"] = TENSORS["model/a"].clone()
    changed["model/a"][5, 2] += 0.5
    changed["optim/step"] = torch.tensor(4)
    del changed["empty"]
    a = write(tmp_path / "a", meta={"step": 1, "data": {"row": 3, "seed": 0}, "old": [1]})
    b = write(tmp_path / "b", tensors=changed, meta={"step": 1, "data": {"row": 4, "seed": 0}}, text=b"y\n")
    found = json.loads(ended(capsys, ckpt.DIFFERENT, "ckpt", "diff", a, b, "--json"))
    tensors = {one["name"]: one for one in found["tensors"]}
    assert tensors.keys() == {"model/a", "model/b", "model/c", "optim/step", "empty", "new"}
    assert tensors["model/a"]["relative"] == pytest.approx(0.5 / 23)
    assert tensors["optim/step"]["relative"] == 0.25
    assert (tensors["model/b"]["relative"], tensors["model/b"]["a"]["dtype"], tensors["model/b"]["b"]["dtype"]) == (0.0, "BF16", "F32")
    assert (tensors["model/c"]["relative"], tensors["model/c"]["b"]["shape"]) == (None, [3, 4])
    assert (tensors["new"]["a"], tensors["empty"]["b"]) == (None, None)
    assert [(one["name"], one["a"], one["b"]) for one in found["meta"]] == [("data.row", 3, 4), ("old", [1], "(absent)")]
    assert (found["files"], found["compared"], found["same"]) == (["config.toml"], 4, False)
    lines = ended(capsys, ckpt.DIFFERENT, "ckpt", "diff", a, b).splitlines()
    assert "model/a: max|a - b| / max|b| = 0.022" in lines
    assert "new: only in b" in lines
    assert "meta data.row: 3 in a, 4 in b" in lines
    assert lines[-1] == "0 of the 4 tensors that both have are equal bit for bit"


@pytest.mark.parametrize(
    ("a", "b", "relative"),
    [
        ([1.0, float("nan")], [1.0, float("nan")], None),
        ([1.0, float("nan")], [2.0, float("nan")], 0.5),
        ([1.0, float("nan")], [1.0, 1.0], "inf"),
        ([1.0, float("inf")], [2.0, float("inf")], 0.5),
        ([1.0, 1.0], [0.0, 0.0], "inf"),
        ([0.0, 1.0], [-0.0, 1.0], 0.0),
    ],
)
def test_diff_of_what_is_not_finite_is_honest(tmp_path: Path, capsys, a: list[float], b: list[float], relative: object):
    left, right = (write(tmp_path / name, tensors={"t": torch.tensor(values)}) for name, values in (("a", a), ("b", b)))
    found = json.loads(ended(capsys, 0 if relative is None else 1, "ckpt", "diff", left, right, "--json"))
    assert [one["relative"] for one in found["tensors"]] == ([] if relative is None else [relative])


def test_prune_removes_what_it_said_it_would(tmp_path: Path, capsys):
    folder = tmp_path / "run/checkpoints"
    for step in range(1, 7):
        write(folder, step, meta={HELD_OUT: held_out(1.0 + abs(step - 2), "rows")})
    asked = ["ckpt", "prune", tmp_path / "run", "--keep-last", 2, "--keep-every", 4, "--keep-best", 1]
    would = said_json(capsys, *asked, "--dry-run")
    assert (would["removed"], would["kept"], would["dry_run"]) == (["step-3", "step-1"], ["step-6", "step-5", "step-4", "step-2"], True)
    assert len(list(folder.glob("step-*"))) == 6
    printed = said(capsys, *asked)
    assert printed.splitlines()[:2] == ["step-3: removed", "step-1: removed"]
    assert "2 removed, 4 kept, of which step-6 and step-5 were read in full" in printed
    assert sorted(path.name for path in folder.glob("step-*")) == ["step-2", "step-4", "step-5", "step-6"]


def test_prune_is_refused_while_a_run_holds_the_folder(tmp_path: Path, capsys):
    folder = RunFolder(tmp_path / "run")
    for step in range(1, 5):
        write(folder.checkpoints, step)
    with folder.hold():
        for place in (folder.path, folder.checkpoints):
            assert "a run is using" in refused(capsys, 74, "ckpt", "prune", place, "--keep-last", 2)
        assert said_json(capsys, "ckpt", "prune", folder.path, "--keep-last", 2, "--dry-run")["removed"] == ["step-2", "step-1"]
    said(capsys, "ckpt", "prune", folder.path, "--keep-last", 2)
    assert len(list(folder.checkpoints.glob("step-*"))) == 2


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
def test_reshard_gives_each_rank_files_of_its_own_with_the_same_bits(tmp_path: Path, capsys, ranks: int):
    source = write(tmp_path / "a", 7)
    said(capsys, "ckpt", "reshard", source, tmp_path / "b", "--ranks", ranks)
    a, b = open_checkpoint(source), open_checkpoint(tmp_path / "b/step-7")
    assert (b.meta, list(b.tensors), b.manifest.layout) == (a.meta, list(a.tensors), f"fsdp{ranks}")
    for name, tensor in TENSORS.items():
        assert b.read(name).reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
        assert (b.tensors[name].shape, b.tensors[name].dtype) == (a.tensors[name].shape, a.tensors[name].dtype)
    assert b.file("tokenizer/tokenizer.json") == b"{}"
    assert [name for name in b.manifest.files if name.startswith("rank-")] == [f"rank-{rank}-0.safetensors" for rank in range(ranks)]
    for rank in range(ranks):
        box = whole_box((6, 4)).cut(0, ranks, rank)
        files = {piece.file for piece in b.tensors["model/a"].pieces if piece.box.overlap(box)}
        assert ranks > 6 or files <= {f"rank-{rank}-0.safetensors"}
    assert said_json(capsys, "ckpt", "verify", tmp_path / "b")[0]["ok"]


def test_reshard_of_a_damaged_checkpoint_leaves_nothing(tmp_path: Path, capsys):
    source = write(tmp_path / "a")
    flip(source / "rank-0-0.safetensors")
    assert "is damaged" in refused(capsys, 77, "ckpt", "reshard", source, tmp_path / "b", "--ranks", 2)
    assert list((tmp_path / "b").iterdir()) == []


def test_what_cannot_be_done_is_refused_in_one_line(tmp_path: Path, capsys):
    path = write(tmp_path / "run/checkpoints")
    assert "there is no command ckpt 'verfy'" in refused(capsys, 78, "ckpt", "verfy", path)
    assert "ckpt needs to be told what to do: ls, verify," in refused(capsys, 78, "ckpt")
    assert "prune needs to be told" in refused(capsys, 78, "ckpt", "prune", tmp_path / "run")
    assert "--keep-last=1 is not a whole number of 2 or more" in refused(capsys, 78, "ckpt", "prune", tmp_path / "run", "--keep-last", 1)
    assert "ckpt diff takes one checkpoint and another, not 1" in refused(capsys, 78, "ckpt", "diff", path)
    assert "--ranks is not an option of ckpt ls" in refused(capsys, 78, "ckpt", "ls", path, "--ranks", 2)
    assert "does not exist" in refused(capsys, 77, "ckpt", "ls", tmp_path / "none")
    assert "holds no checkpoint" in refused(capsys, 77, "ckpt", "verify", tmp_path)
    assert "is not an empty folder" in refused(capsys, 77, "ckpt", "reshard", path, tmp_path / "run")
    (path / "manifest.json").unlink()
    assert "has no manifest.json" in refused(capsys, 77, "ckpt", "diff", path, path)


def test_help_has_examples_and_needs_no_torch():
    printed = help_of("ckpt")
    assert "examples:\n  paraxis ckpt ls runs/demo" in printed
    options = {name for _, options, flags, _ in ckpt._ACTIONS.values() for name in (*options, *flags)}
    assert all(f"--{option} " in printed for option in options)
