"""Files of torch come in bit for bit, whatever was put around the model's names; programs hidden in them are refused, and not run."""

import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.tensor import Shard, distribute_tensor, init_device_mesh

from paraxis.base.errors import CheckpointError
from paraxis.checkpoint.dcp_metadata import METADATA
from paraxis.checkpoint.load import open_checkpoint
from paraxis.checkpoint.torch_source import open_torch, unwrap
from paraxis.models.llama import LlamaConfig
from paraxis.models.registry import to_hf
from tests.cli.folders import OWN_RECIPE, refused, said
from tests.worlds import run_world

TINY = LlamaConfig(vocab_size=64, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24)
RECIPE = """
from paraxis.models.llama import LlamaConfig
from paraxis.train.config import RunConfig
def tiny():
    return RunConfig(model=LlamaConfig(vocab_size=64, width=16, layers=2, heads=4, kv_heads=2, mlp_width=24))
"""


@pytest.fixture
def recipe(tmp_path: Path) -> tuple[str, str]:
    (tmp_path / "my.py").write_text(RECIPE)
    return "--recipe", f"{tmp_path / 'my.py'}:tiny"


@pytest.fixture(scope="module")
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(p.shape, generator=generator) for name, p in TINY.build().named_parameters()}


def by_hugging_face(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from paraxis.base.keys import to_theirs

    return {str(to_theirs(TINY.build().keys, name)): tensor for name, tensor in weights.items()}


def imported(path: Path) -> dict[str, torch.Tensor]:
    checkpoint = open_checkpoint(path / "step-0")
    return {name.removeprefix("model/"): checkpoint.read(name) for name in checkpoint.tensors}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def with_optimizer(weights: dict[str, torch.Tensor]) -> dict[str, Any]:
    state = {number: {"step": torch.tensor(3.0), "exp_avg": tensor} for number, tensor in enumerate(weights.values())}
    return {"model": weights, "optimizer": {"state": state, "param_groups": [{"lr": 0.1}]}, "step": 3, "args": {"name": "x"}}


WAYS: dict[str, Callable[[dict[str, torch.Tensor]], Any]] = {
    "plain": lambda w: w,
    "parameters": lambda w: {name: torch.nn.Parameter(tensor) for name, tensor in w.items()},
    "in a run's state": with_optimizer,
    "compiled and wrapped": lambda w: {"state_dict": {f"module._orig_mod.{name}": tensor for name, tensor in w.items()}},
    "compiled blocks": lambda w: {name.replace("layers.0.", "layers.0._orig_mod."): tensor for name, tensor in w.items()},
    "Hugging Face": by_hugging_face,
    "Hugging Face, wrapped": lambda w: {f"module.{name}": tensor for name, tensor in by_hugging_face(w).items()},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("form", ["pt", "legacy", "dcp"])
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_model_comes_in_bit_for_bit(
    way: str, form: str, weights: dict[str, torch.Tensor], recipe: tuple[str, str], tmp_path: Path, capsys
):
    state, source = WAYS[way](weights), tmp_path / ("old" if form == "dcp" else "old.pt")
    if form == "dcp":
        dcp.save(state, checkpoint_id=source, no_dist=True)
    else:
        torch.save(state, source, _use_new_zipfile_serialization=form == "pt")
    printed = said(capsys, "convert", "import", source, tmp_path / "ours", *recipe)
    assert f"names are {'Hugging Face' if 'Hugging' in way else 'ours'}" in printed
    assert ("left out" in printed) == (way == "in a run's state")
    assert same(imported(tmp_path / "ours"), weights)


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_the_parts_of_several_ranks_are_put_together(weights: dict[str, torch.Tensor], recipe: tuple[str, str], tmp_path: Path, capsys):
    def body() -> None:
        mesh = init_device_mesh("cpu", (2,))
        state = {name: distribute_tensor(tensor.bfloat16(), mesh, [Shard(0)]) for name, tensor in weights.items()}
        dcp.save({"model": state}, checkpoint_id=tmp_path / "old")

    run_world(body, 2)
    assert len(list((tmp_path / "old").glob("*.distcp"))) == 2
    said(capsys, "convert", "import", tmp_path / "old", tmp_path / "ours", *recipe)
    assert same(imported(tmp_path / "ours"), {name: tensor.bfloat16() for name, tensor in weights.items()})
    said(capsys, "convert", "import", tmp_path / "old", tmp_path / "wide", *recipe, "--dtype", "fp32")
    assert same(imported(tmp_path / "wide"), {name: tensor.bfloat16().float() for name, tensor in weights.items()})


def test_a_config_json_beside_says_what_model_it_is(weights: dict[str, torch.Tensor], tmp_path: Path, capsys):
    import json

    torch.save(by_hugging_face(weights), tmp_path / "pytorch_model.bin")
    assert "holds no config.json" in refused_after_warning(capsys, tmp_path / "pytorch_model.bin", tmp_path / "ours")
    (tmp_path / "config.json").write_text(json.dumps(to_hf(TINY)))
    said(capsys, "convert", "import", tmp_path / "pytorch_model.bin", tmp_path / "ours")
    assert same(imported(tmp_path / "ours"), weights)
    said(capsys, "convert", "export", tmp_path / "ours", tmp_path / "hf")
    assert "pickled weights only" in refused(capsys, 77, "convert", "import", moved(tmp_path), tmp_path / "other")


def moved(tmp_path: Path) -> Path:
    """A Hugging Face folder with pickled weights in it alone: what is not named is not opened."""
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("pytorch_model.bin", "config.json"):
        shutil.copy(tmp_path / name, folder / name)
    return folder


def refused_after_warning(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The message of an import that is refused, after the warning about where the file came from."""
    from paraxis.cli import main

    capsys.readouterr()
    assert main(["convert", "import", *map(str, arguments)]) == 77
    warning, message = capsys.readouterr().err.splitlines()
    assert warning.startswith("warning: ")
    assert "is a pickle, a format that can hold programs" in warning
    return message


class Canary:
    """Unpickled by a reader that runs what it reads, it writes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


class Quiet:
    """The same by way of a class of ours, as a state that is set."""

    def __setstate__(self, state: Any) -> None:
        Path(state["path"]).touch()


def test_a_program_in_a_pt_file_is_refused_and_does_not_run(
    weights: dict[str, torch.Tensor], recipe: tuple[str, str], tmp_path: Path, capsys
):
    canary, source, quiet = tmp_path / "canary", tmp_path / "old.pt", Quiet()
    quiet.path = str(canary)  # type: ignore[attr-defined]
    for zipped in (True, False):
        for payload in (Canary(canary), quiet, print):
            torch.save({**weights, "more": payload}, source, _use_new_zipfile_serialization=zipped)
            message = refused_after_warning(capsys, source, tmp_path / "ours", *recipe)
            assert "nothing of it was run" in message
            assert any(name in message for name in ("posix.system", "Quiet", "print"))
    source.write_bytes(pickle.dumps(Canary(canary)))
    assert "refused" in refused_after_warning(capsys, source, tmp_path / "ours", *recipe)
    source.write_bytes(b"nonsense")
    assert "refused" in refused_after_warning(capsys, source, tmp_path / "ours", *recipe)
    assert not canary.exists()
    assert not (tmp_path / "ours").exists()


def test_classes_that_other_code_has_declared_safe_are_not(tmp_path: Path):
    canary = tmp_path / "canary"
    torch.serialization.add_safe_globals([Quiet])
    try:
        quiet = Quiet()
        quiet.path = str(canary)  # type: ignore[attr-defined]
        torch.save({"a": quiet}, tmp_path / "old.pt")
        torch.load(tmp_path / "old.pt", weights_only=True)
        assert canary.exists(), "the canary sings where it is let"
        canary.unlink()
        with pytest.raises(CheckpointError, match="Quiet"):
            open_torch(tmp_path / "old.pt")
        assert Quiet in torch.serialization.get_safe_globals()
    finally:
        torch.serialization.clear_safe_globals()
    assert not canary.exists()


@pytest.fixture
def folder(weights: dict[str, torch.Tensor], tmp_path: Path) -> Path:
    path = tmp_path / "old"
    with pytest.warns(UserWarning, match=r"torch\.distributed"):
        dcp.save({"model": weights, "step": {"of": 3}}, checkpoint_id=path, no_dist=True)
    return path


def edited(folder: Path, edit: Callable[[Metadata], Any]) -> None:
    metadata = pickle.loads((folder / METADATA).read_bytes())
    (folder / METADATA).write_bytes(pickle.dumps(edit(metadata) or metadata))


@pytest.mark.parametrize("protocol", range(6))
def test_a_program_in_the_metadata_is_refused_and_does_not_run(
    protocol: int, folder: Path, recipe: tuple[str, str], tmp_path: Path, capsys
):
    canary = tmp_path / "canary"
    metadata = pickle.loads((folder / METADATA).read_bytes())
    for payload in (Canary(canary), {"x": Canary(canary)}, eval, os.path.join, torch.nn.Linear, dist.init_process_group):
        metadata.planner_data = payload
        (folder / METADATA).write_bytes(pickle.dumps(metadata, protocol))
        message = refused_after_warning(capsys, folder, tmp_path / "ours", *recipe)
        assert "no metadata of a checkpoint needs; nothing of it was run" in message
    assert not canary.exists()


def test_a_program_in_place_of_a_tensor_is_refused_and_one_that_is_no_tensor_is_not_opened(
    folder: Path, weights: dict[str, torch.Tensor], recipe: tuple[str, str], tmp_path: Path, capsys
):
    canary, stored = tmp_path / "canary", {}
    edited(folder, lambda metadata: stored.update(metadata.storage_data))
    torch.save(Canary(canary), tmp_path / "evil")
    evil = (tmp_path / "evil").read_bytes()
    with open(folder / "__0_0.distcp", "ab") as file:
        at = file.tell()
        file.write(evil)

    def planted(name: str) -> Callable[[Metadata], None]:
        def edit(metadata: Metadata) -> None:
            for index, info in metadata.storage_data.items():
                if index.fqn == name:
                    info.offset, info.length = at, len(evil)

        return edit

    edited(folder, planted("step.of"))
    said(capsys, "convert", "import", folder, tmp_path / "ours", *recipe)
    assert same(imported(tmp_path / "ours"), weights)
    edited(folder, planted("model.layers.1.mlp.up_proj.weight"))
    message = refused_after_warning(capsys, folder, tmp_path / "other", *recipe)
    assert "__0_0.distcp (tensor model.layers.1.mlp.up_proj.weight) is refused: it names posix.system" in message
    assert not canary.exists()
    assert not (tmp_path / "other/step-0").exists()


def first_of(metadata: Metadata) -> tuple[TensorStorageMetadata, Any]:
    index = next(index for index in metadata.storage_data if index.fqn == "model.embed.weight")
    held = metadata.state_dict_metadata["model.embed.weight"]
    assert isinstance(held, TensorStorageMetadata)
    return held, metadata.storage_data[index]


EDITS: dict[str, Callable[[Metadata], Any]] = {
    "only .distcp files of the same folder": lambda m: setattr(first_of(m)[1], "relative_path", "../../secret.distcp"),
    "are not sizes or offsets": lambda m: setattr(first_of(m)[1], "offset", -5),
    "is compressed": lambda m: setattr(first_of(m)[1], "transform_descriptors", ["zstd"]),
    "do not make up its shape": lambda m: setattr(first_of(m)[0], "chunks", []),
    "reaches beyond its shape": lambda m: setattr(first_of(m)[0].chunks[0], "offsets", torch.Size([60, 0])),
    "does not hold what .metadata says": lambda m: setattr(first_of(m)[0].properties, "dtype", torch.float64),
    "is refused": lambda m: setattr(first_of(m)[1], "length", 100),
    "is not the metadata of a checkpoint": lambda m: {"a": 1},
    "lacks embed.weight": lambda m: m.state_dict_metadata.update({"model.embed.weight": BytesStorageMetadata()}),
}


@pytest.mark.parametrize("says", EDITS)
def test_metadata_that_says_what_cannot_be_is_refused(says: str, folder: Path, recipe: tuple[str, str], tmp_path: Path, capsys):
    edited(folder, EDITS[says])
    assert says in refused_after_warning(capsys, folder, tmp_path / "ours", *recipe)


def test_names_that_fit_no_model_or_twice_are_refused(weights: dict[str, torch.Tensor], recipe: tuple[str, str], tmp_path: Path, capsys):
    source = tmp_path / "old.pth"
    torch.save({"a.b": torch.zeros(2), "lr": 0.1}, source)
    assert "holds nothing of the recipe's model; it has a.b" in refused_after_warning(capsys, source, tmp_path / "ours", *recipe)
    twice = {**weights, "_orig_mod.embed.weight": weights["embed.weight"]}
    torch.save(twice, source)
    assert "which would both be embed.weight" in refused_after_warning(capsys, source, tmp_path / "ours", *recipe)
    torch.save({**weights, "extra": torch.zeros(1)}, source)
    assert "has extra, which the recipe's model has not" in refused_after_warning(capsys, source, tmp_path / "ours", *recipe)
    torch.save({name: tensor.to_sparse() for name, tensor in weights.items()}, source)
    assert "save it plain" in refused_after_warning(capsys, source, tmp_path / "ours", *recipe)


def test_a_model_without_a_key_table_comes_in_by_its_own_names(tmp_path: Path, capsys):
    (tmp_path / "own.py").write_text(OWN_RECIPE.replace("keys = ", "other = "))
    torch.save({"model": {"table.weight": torch.ones(300, 300)}}, tmp_path / "old.ckpt")
    said(capsys, "convert", "import", tmp_path / "old.ckpt", tmp_path / "ours", "--recipe", f"{tmp_path / 'own.py'}:bigrams")
    assert same(imported(tmp_path / "ours"), {"table.weight": torch.ones(300, 300)})


def test_the_longest_match_of_prefix_and_naming_wins(tmp_path: Path):
    torch.save({"model": {"model.a": torch.zeros(1), "b": torch.zeros(1)}, "a": torch.zeros(1)}, tmp_path / "old.pt")
    weights, way = unwrap(open_torch(tmp_path / "old.pt"), {"ours": ["a", "c"], "theirs": ["model.a", "b"]})
    assert (way, weights.prefix, sorted(weights.tensors)) == ("theirs", "model.", ["b", "model.a"])
