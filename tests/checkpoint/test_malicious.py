"""Files that were made to do harm are refused in one message, by every command, and nothing in them is run.

Where each kind is tried at the reader itself: test_damage.py (names that leave the folder, links, headers that lie), test_torch_source.py
(programs in torch's own files), test_hf.py (indexes), test_object_store.py (keys, and what `latest` says).
"""

import json
import os
import pickle
import struct
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from paraxis.base.errors import CheckpointError, DataError
from paraxis.base.layout import whole_box
from paraxis.checkpoint.hf_source import HuggingFaceWeights
from paraxis.checkpoint.load import open_checkpoint
from paraxis.checkpoint.manifest import MANIFEST, Manifest
from paraxis.checkpoint.save import Piece, save
from paraxis.data.config import DataConfig
from paraxis.data.prepare import prepare
from tests.data.corpus import sentences, tokenizer
from tests.runs import RECIPES, paraxis, refusal, succeeded


class Canary:
    """Unpickling this leaves a file behind."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def rewritten(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Changes the manifest as somebody would who knows the format: its digest is right."""
    manifest = Manifest.from_bytes((path / MANIFEST).read_bytes())
    meta = json.loads(json.dumps(manifest.meta))
    change(meta)
    (path / MANIFEST).write_bytes(replace(manifest, meta=meta).to_bytes())


def test_a_canary_sings_where_a_pickle_is_run(tmp_path: Path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


NAMES = (
    MANIFEST,
    ".metadata",
    "__0_0.distcp",
    "model.pt",
    "pytorch_model.bin",
    "optimizer.bin",
    "rank-0-0.safetensors",
    "latest",
    "rng.pkl",
)


@pytest.mark.parametrize(
    "command",
    [
        ["train", f"{RECIPES}:run", "--run-dir=run", "--resume=must"],
        ["train", f"{RECIPES}:run", "--run-dir=other", "--train.init_from=run"],
        ["ckpt", "verify", "run"],
        ["ckpt", "diff", "run", "run"],
        ["ckpt", "prune", "run", "--keep-last=2"],
        ["ckpt", "reshard", "run", "out"],
        ["generate", "run", "--prompt=a"],
        ["eval", "run", "--data=text.txt"],
        ["convert", "export", "run", "out"],
        ["convert", "import", "run/checkpoints/step-1", "out"],
        ["convert", "import", "run/checkpoints/step-1/model.pt", "out"],
    ],
    ids=lambda command: " ".join(command[:2]).replace(str(RECIPES), "planted"),
)
def test_no_command_runs_a_pickle_whatever_it_is_called(command: list[str], tmp_path: Path):
    for folder in (tmp_path / "run" / "checkpoints" / "step-1", tmp_path / "run" / "checkpoints" / "step-2"):
        folder.mkdir(parents=True)
        for name in NAMES:
            (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    (tmp_path / "text.txt").write_text("a text")
    ended = paraxis(*command, folder=tmp_path)
    pruned_nothing = command[1] == "prune"
    assert (ended.code == 0) == pruned_nothing, ended
    assert "Traceback" not in ended.err
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.clear(),
        lambda meta: meta.pop("seed"),
        lambda meta: meta.update(step="1"),
        lambda meta: meta.update(row=None),
        lambda meta: meta.update(tokens=[1]),
        lambda meta: meta.update(optimizer="adamw"),
        lambda meta: meta.update(optimizer={"name": "adamw", "counters": 3}),
        lambda meta: meta.update(data={}),
    ],
)
def test_a_manifest_that_records_no_run_is_refused_in_a_message(change: Callable[[dict[str, Any]], object], tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--run-dir=run"]
    succeeded(paraxis(*run, "--train.steps=1", folder=tmp_path))
    rewritten(tmp_path / "run" / "checkpoints" / "step-1", change)
    words = refusal(paraxis(*run, "--train.steps=2", folder=tmp_path), CheckpointError.exit_code)
    assert "run/checkpoints/step-1" in words


@pytest.mark.parametrize("shape", [(0, 2**62, 2**62), (2**62, 0), (2**32, 2**32, 0)])
def test_a_shape_beyond_what_can_be_counted_is_refused(shape: tuple[int, ...], tmp_path: Path):
    path = save(tmp_path, 1, [Piece("t", (3,), whole_box((3,)), torch.arange(3))], {}, {})
    manifest = Manifest.from_bytes((path / MANIFEST).read_bytes())
    text = manifest.to_bytes().replace(b'"shape": [3]', f'"shape": {list(shape)}'.encode())
    body = json.loads(text)
    body["tensors"]["t"]["pieces"] = []
    forged = replace(manifest, tensors={"t": _Forged(body["tensors"]["t"])})
    (path / MANIFEST).write_bytes(forged.to_bytes())
    with pytest.raises(CheckpointError, match=r"tensor t: .* is no shape of a tensor"):
        open_checkpoint(path)


class _Forged:
    """A tensor's entry that no check has seen."""

    def __init__(self, entry: dict[str, Any]) -> None:
        self.to_json = lambda: entry


@pytest.mark.parametrize(
    "header", [struct.pack("<Q", 2**63), struct.pack("<Q", 200_000_000) + b"{", struct.pack("<Q", 10**5) + b"[" * 10**5]
)
def test_a_hugging_face_file_with_an_oversized_or_endless_header_is_refused(header: bytes, tmp_path: Path):
    (tmp_path / "model.safetensors").write_bytes(header)
    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        _ = HuggingFaceWeights(tmp_path).tensors


def test_a_pickle_in_an_array_of_token_ids_is_refused_and_does_not_run(tmp_path: Path):
    np.save(tmp_path / "ids.npy", np.array([Canary(tmp_path / "ran")], dtype=object), allow_pickle=True)
    with pytest.raises(DataError, match=r"ids\.npy cannot be read as token ids"):
        prepare(DataConfig(paths=(str(tmp_path / "ids.npy"),)), tmp_path / "cache", tokenizer=tokenizer())
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "change",
    [
        lambda meta: meta.update(dtype="O"),
        lambda meta: meta.update(dtype="../x"),
        lambda meta: meta.update(shard_ends=[-5]),
        lambda meta: meta.update(shard_ends=[2**62]),
        lambda meta: meta.update(shard_ends="../../etc/passwd"),
        lambda meta: meta.update(documents=2**62),
        lambda meta: meta.update(documents="all"),
        lambda meta: meta.pop("tokens"),
        lambda meta: meta.update(files=3),
        lambda meta: meta.update(settings=None),
    ],
)
def test_a_prepared_folder_whose_metadata_lie_is_refused(change: Callable[[dict[str, Any]], object], tmp_path: Path):
    (tmp_path / "text.txt").write_text("\n".join(sentences(40)))
    config = DataConfig(paths=(str(tmp_path / "text.txt"),), tokenizer="train:300")
    prepare(config, tmp_path / "cache", out=tmp_path / "shards")
    meta = json.loads((tmp_path / "shards" / "meta.json").read_text())
    change(meta)
    (tmp_path / "shards" / "meta.json").write_text(json.dumps(meta))
    taken = replace(config, paths=(str(tmp_path / "shards"),), tokenizer=str(tmp_path / "shards"))
    with pytest.raises(DataError, match="shards"):
        prepare(taken, tmp_path / "cache")
    assert os.listdir(tmp_path / "shards")
