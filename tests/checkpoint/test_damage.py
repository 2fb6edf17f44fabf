"""A checkpoint that is not what was written is refused with its name, and the one before it is used."""

import hashlib
import json
import os
import pickle
import random
import shutil
import struct
from dataclasses import replace

import pytest
import torch

from paraxis.base.errors import CheckpointError
from paraxis.checkpoint.load import newest, open_checkpoint
from paraxis.checkpoint.manifest import CHUNK_BYTES, MANIFEST, Manifest, StoredFile
from paraxis.checkpoint.save import save
from paraxis.checkpoint.tensor_file import write_file

SHARD = "rank-0-0.safetensors"


@pytest.fixture
def path(tmp_path, state, whole):
    save(tmp_path, 1, whole(state), {}, {})
    return save(tmp_path, 2, whole(state), {"cursor": 1e-05}, {"config.toml": b"x = 1\n"})


def read_all(path):
    checkpoint = open_checkpoint(path)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    return checkpoint.file("config.toml")


def rewrite(path, **changes):
    """Edits the manifest as a person who knows the format would: with its digest made right again."""
    manifest = Manifest.from_bytes((path / MANIFEST).read_bytes())
    (path / MANIFEST).write_bytes(replace(manifest, **changes).to_bytes())


@pytest.mark.parametrize("name", [MANIFEST, SHARD, "config.toml"])
def test_every_flipped_bit_is_refused_naming_the_file(path, name):
    data = bytearray((path / name).read_bytes())
    dice = random.Random(name)
    # The ends, the header, then anywhere.
    for bit in [0, 7, 63, 64, 100, len(data) * 8 - 1, *(dice.randrange(len(data) * 8) for _ in range(150))]:
        bit %= len(data) * 8
        data[bit // 8] ^= 1 << bit % 8
        (path / name).write_bytes(data)
        with pytest.raises(CheckpointError, match=name):
            read_all(path)
        data[bit // 8] ^= 1 << bit % 8
    (path / name).write_bytes(data)
    assert read_all(path) == b"x = 1\n"


def test_damage_names_the_tensor_it_was_read_for_and_leaves_the_others_readable(tmp_path, whole):
    large = torch.zeros(CHUNK_BYTES, dtype=torch.uint8)
    path = save(tmp_path, 1, whole({"first": torch.arange(3), "large": large}), {}, {})
    data = bytearray((path / SHARD).read_bytes())
    data[-1] ^= 1
    (path / SHARD).write_bytes(data)
    checkpoint = open_checkpoint(path)
    assert checkpoint.read("first").equal(torch.arange(3))
    with pytest.raises(CheckpointError, match=rf"{SHARD} is damaged: bytes {CHUNK_BYTES} to .*tensor large"):
        checkpoint.read("large")


@pytest.mark.parametrize("name", [MANIFEST, SHARD, "config.toml"])
@pytest.mark.parametrize("how", ["shorter", "longer", "empty", "missing"])
def test_a_file_of_another_length_is_refused_and_the_older_checkpoint_is_used(path, name, how):
    file = path / name
    data = file.read_bytes()
    file.unlink() if how == "missing" else file.write_bytes({"shorter": data[:-1], "longer": data + b"\0", "empty": b""}[how])
    with pytest.raises(CheckpointError, match=name):
        open_checkpoint(path)
    said = []
    assert newest(path.parent, said.append) == path.parent / "step-1"
    assert len(said) == 1
    assert "step-2" in said[0]
    assert name in said[0]


def test_files_of_two_steps_are_not_mixed(path, state, whole):
    other = save(path.parent, 3, whole({name: t.flip(0) if t.ndim else t + 1 for name, t in state.items()}), {}, {})
    shutil.copy(other / SHARD, path / SHARD)
    with pytest.raises(CheckpointError, match=SHARD):
        read_all(path)


def test_an_edited_manifest_is_refused(path):
    text = (path / MANIFEST).read_text()
    (path / MANIFEST).write_text(text.replace('"step": 2', '"step": 3'))
    with pytest.raises(CheckpointError, match="edited"):
        open_checkpoint(path)


@pytest.mark.parametrize("name", ["../step-1/config.toml", "/etc/hostname", "a/../../b", "a\\b", "..", ".hidden", "", "a//b", MANIFEST])
def test_a_name_that_leaves_the_folder_is_refused(path, name):
    rewrite(path, files={name: StoredFile(0, ())}, tensors={})
    with pytest.raises(CheckpointError, match=MANIFEST):
        open_checkpoint(path)


@pytest.mark.parametrize("link", [SHARD, "config.toml", MANIFEST])
def test_links_are_refused(path, tmp_path, link):
    outside = tmp_path / "outside"
    shutil.move(path / link, outside)
    (path / link).symlink_to(outside)
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(path)


def test_a_linked_folder_and_a_pipe_are_refused(tmp_path):
    path = save(tmp_path / "run", 1, [], {}, {"a/b": b"12"})
    shutil.move(path / "a", tmp_path / "a")
    (path / "a").symlink_to(tmp_path / "a")
    with pytest.raises(CheckpointError, match="is a link"):
        open_checkpoint(path)
    (path / "a").unlink()
    (path / "a").mkdir()
    os.mkfifo(path / "a" / "b")
    with pytest.raises(CheckpointError, match="plain file"):
        open_checkpoint(path)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -1, 1.0, True, "1", None, 2**64, [0]])
@pytest.mark.parametrize("field", ["offsets", "sizes", "shape"])
def test_a_number_that_is_no_size_or_offset_is_refused(path, number, field):
    body = {"digest": "0" * 64, **{k: v for k, v in json.loads((path / MANIFEST).read_text()).items() if k != "digest"}}
    tensor = body["tensors"]["model/norm.weight"]
    (tensor if field == "shape" else tensor["pieces"][0])[field] = [number]
    text = json.dumps(body)
    (path / MANIFEST).write_text(text.replace("0" * 64, hashlib.sha256(text.encode()).hexdigest()))
    with pytest.raises(CheckpointError, match=r"model/norm\.weight"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    "shard",
    [
        struct.pack("<Q", 2**62) + b"{}",
        struct.pack("<Q", 3) + b"{}",
        b"\1",
        b"",
        struct.pack("<Q", 2) + b"[]",
        struct.pack("<Q", 9) + b'{"t": 1}\n',
        struct.pack("<Q", 64) + json.dumps({"t": {"dtype": "F32", "shape": [2], "data_offsets": [0, 99]}}).encode().ljust(64) + b"\0" * 8,
        struct.pack("<Q", 64) + json.dumps({"t": {"dtype": "F32", "shape": [9], "data_offsets": [0, 8]}}).encode().ljust(64) + b"\0" * 8,
        struct.pack("<Q", 64) + json.dumps({"t": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(64) + b"\0" * 8,
        struct.pack("<Q", 64) + json.dumps({"u": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode().ljust(64) + b"\0" * 8,
        struct.pack("<Q", 10**5) + b"[" * 10**5,
    ],
)
def test_a_shard_whose_header_lies_is_refused(tmp_path, whole, shard):
    path = save(tmp_path, 1, whole({"t": torch.zeros(2)}), {}, {})
    (path / SHARD).unlink()
    rewrite(path, files={SHARD: write_file(path / SHARD, shard)})
    with pytest.raises(CheckpointError, match=SHARD):
        open_checkpoint(path).read("t")


class Canary:
    """Unpickling this leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("name", [".metadata", "model.pt", MANIFEST, "pytorch_model.bin"])
def test_pickles_are_refused_and_never_run(tmp_path, name):
    folder = tmp_path / "step-1"
    folder.mkdir()
    (folder / name).write_bytes(pickle.dumps(Canary(tmp_path / "ran")))
    with pytest.raises(CheckpointError, match="step-1"):
        open_checkpoint(folder)
    assert newest(tmp_path, lambda _: None) is None
    assert not (tmp_path / "ran").exists()
