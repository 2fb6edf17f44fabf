"""What was saved is what is read, for any cut of the tensors on either side."""

import json
import random

import pytest
import torch
from safetensors import safe_open

from paraxis.base.errors import CheckpointError, ConfigError, StorageError
from paraxis.base.layout import Box, whole_box
from paraxis.checkpoint import load, tensor_file
from paraxis.checkpoint import save as saving
from paraxis.checkpoint.config import CheckpointConfig
from paraxis.checkpoint.load import committed, newest, open_checkpoint
from paraxis.checkpoint.local_store import LocalFiles
from paraxis.checkpoint.manifest import CHUNK_BYTES
from paraxis.checkpoint.retain import Keep
from paraxis.checkpoint.save import Piece, save


def bitwise(a, b):
    return a.dtype == b.dtype and a.shape == b.shape and a.reshape(-1).view(torch.uint8).equal(b.reshape(-1).view(torch.uint8))


def cut(state, ranks, rank, dim):
    """This rank's pieces when every tensor is cut along `dim` (or its last) among `ranks`; scalars are on all."""
    pieces = []
    for name, tensor in state.items():
        box = whole_box(tuple(tensor.shape))
        if not tensor.ndim:
            pieces.append(Piece(name, (), box, tensor, rank, ranks))
        else:
            box = box.cut(min(dim, tensor.ndim - 1), ranks, rank)
            pieces.append(Piece(name, tuple(tensor.shape), box, tensor[box.slices_within(whole_box(tuple(tensor.shape)))]))
    return pieces


@pytest.mark.parametrize(("ranks", "dim"), [(1, 0), (3, 0), (4, 1), (2, 2), (5, 0)])
def test_any_cut_is_read_back_bitwise_as_any_box(tmp_path, state, on_ranks, ranks, dim):
    meta = {"step": 3, "cursor": 2**60, "loss": 0.1, "nan": float("nan"), "text": "é"}
    files = {"config.toml": b"a = 1\n", "tokenizer/tokenizer.json": b"{}", "empty": b""}
    paths = on_ranks(ranks, lambda r: save(tmp_path, 3, cut(state, ranks, r.rank, dim), meta, files, r, layout=f"fsdp{ranks}"))
    assert paths == [tmp_path / "step-3"] * ranks
    checkpoint = open_checkpoint(paths[0])
    assert repr(dict(checkpoint.meta)) == repr(meta)
    assert {name: checkpoint.file(name) for name in files} == files
    assert (checkpoint.manifest.step, checkpoint.manifest.generation, checkpoint.manifest.layout) == (3, 1, f"fsdp{ranks}")
    assert checkpoint.tensors.keys() == state.keys()
    assert checkpoint.tensors["model/embed.weight"].dtype == "BF16"
    dice = random.Random(ranks)
    for name, tensor in state.items():
        assert bitwise(checkpoint.read(name), tensor)
        for _ in range(10):
            starts = [dice.randint(0, n) for n in tensor.shape]
            box = Box(tuple(starts), tuple(dice.randint(0, n - a) for a, n in zip(starts, tensor.shape, strict=True)))
            assert bitwise(checkpoint.read(name, box), tensor[box.slices_within(whole_box(tuple(tensor.shape)))].clone())


def test_a_box_read_in_small_spans_is_the_same(tmp_path, state, whole, monkeypatch):
    monkeypatch.setattr(load, "SPAN_BYTES", 16)
    checkpoint = open_checkpoint(save(tmp_path, 0, whole(state), {}, {}))
    assert all(bitwise(checkpoint.read(name), tensor) for name, tensor in state.items())
    assert bitwise(checkpoint.read("model/cube", Box((1, 1, 1), (3, 4, 2))), state["model/cube"][1:4, 1:5, 1:3].contiguous())


def test_a_tensor_larger_than_chunks_and_shards_is_read_back(tmp_path, monkeypatch):
    monkeypatch.setattr(saving, "SHARD_BYTES", CHUNK_BYTES)
    big = torch.arange(2 * CHUNK_BYTES // 8 + 12345, dtype=torch.int64).view(-1, 1)
    small = {f"small{i}": torch.full((3,), i) for i in range(3)}
    pieces = [Piece(name, tuple(t.shape), whole_box(tuple(t.shape)), t) for name, t in {"big": big, **small}.items()]
    path = save(tmp_path, 1, pieces, {}, {})
    checkpoint = open_checkpoint(path)
    assert sorted(checkpoint.manifest.files) == ["rank-0-0.safetensors", "rank-0-1.safetensors"]
    assert len(checkpoint.manifest.files["rank-0-0.safetensors"].chunks) == 3
    assert bitwise(checkpoint.read("big"), big)
    box = Box((CHUNK_BYTES // 8 - 5, 0), (10, 1))
    assert bitwise(checkpoint.read("big", box), big[box.offsets[0] : box.offsets[0] + 10])
    assert all(bitwise(checkpoint.read(name), t) for name, t in small.items())


def test_out_is_filled_whatever_its_strides_and_cast_once(tmp_path, state, whole):
    checkpoint = open_checkpoint(save(tmp_path, 1, whole(state), {}, {}))
    out = torch.zeros(10, 12, dtype=torch.bfloat16).t()
    assert checkpoint.read("model/up.weight", out=out) is out
    assert out.equal(state["model/up.weight"].bfloat16())
    parameter = torch.nn.Parameter(torch.zeros(4, 10))
    checkpoint.read("model/up.weight", Box((2, 0), (4, 10)), parameter)
    assert parameter.detach().equal(state["model/up.weight"][2:6])


def test_replicas_write_each_byte_once_and_share_the_work(tmp_path, on_ranks):
    large = {f"t{i}": torch.randn(1 << 9, 3 << 8) for i in range(4)}  # 1.5 MB each: one writer, spread by name
    large["wide"] = torch.randn(3, 1 << 20)  # 12 MB: cut among all
    pieces = lambda rank: [Piece(n, tuple(t.shape), whole_box(tuple(t.shape)), t, rank, 4) for n, t in large.items()]  # noqa: E731
    path = on_ranks(4, lambda r: save(tmp_path, 1, pieces(r.rank), {}, {}, r))[0]
    checkpoint = open_checkpoint(path)
    assert all(bitwise(checkpoint.read(name), t) for name, t in large.items())
    written = [sum(f.size_bytes for name, f in checkpoint.manifest.files.items() if name.startswith(f"rank-{r}-")) for r in range(4)]
    total = sum(t.numel() * 4 for t in large.values())
    assert total <= sum(written) < total + 4096
    assert max(written) < 0.5 * total


def test_only_the_chunks_that_hold_a_box_are_read(tmp_path, monkeypatch):
    tensor = torch.arange(5 * CHUNK_BYTES // 8, dtype=torch.int64)
    path = save(tmp_path, 1, [Piece("t", tuple(tensor.shape), whole_box(tuple(tensor.shape)), tensor)], {}, {})
    read = []
    original = LocalFiles.read_range
    monkeypatch.setattr(
        LocalFiles,
        "read_range",
        lambda self, name, start, length: read.append((name, start // CHUNK_BYTES)) or original(self, name, start, length),
    )
    open_checkpoint(path).read("t", Box((3 * CHUNK_BYTES // 8 + 100,), (5,)))
    assert [chunk for name, chunk in read if name.endswith("safetensors")] == [0, 3]  # the header's, and the one


def test_the_safetensors_library_reads_what_is_written(tmp_path, state, whole):
    path = save(tmp_path, 1, whole(state), {}, {})
    with safe_open(path / "rank-0-0.safetensors", "pt") as file:
        assert set(file.keys()) == state.keys() - {"none"}
        assert all(bitwise(file.get_tensor(name), state[name]) for name in file.keys())  # noqa: SIM118 (not a dict)


def test_every_stored_dtype_keeps_its_bits(tmp_path, whole):
    raw = torch.randint(0, 2, (64,), dtype=torch.uint8)
    state = {name: raw.clone().view(dtype) for name, dtype in tensor_file.DTYPES.items()}
    checkpoint = open_checkpoint(save(tmp_path, 1, whole(state), {}, {}))
    assert all(bitwise(checkpoint.read(name), t) and checkpoint.tensors[name].dtype == name for name, t in state.items())


def test_newest_is_the_last_committed_even_where_the_run_went_back(tmp_path, state, whole):
    for step in (10, 20, 15):
        save(tmp_path, step, whole(state), {}, {}, keep=Keep(last=3))
    assert newest(tmp_path) == tmp_path / "step-15"
    assert (tmp_path / "latest").read_text() == "step-15\n"
    assert [c.path.name for c in committed(tmp_path)] == ["step-15", "step-20", "step-10"]
    assert newest(tmp_path / "nowhere") is None


def test_pruning_keeps_the_last_two_at_least(tmp_path, state, whole):
    for step in range(5):
        save(tmp_path, step, whole(state), {}, {}, keep=Keep(last=0))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-3", "step-4"]


def test_saving_a_step_again_replaces_it(tmp_path, state, whole):
    save(tmp_path, 1, whole(state), {"try": 1}, {})
    save(tmp_path, 2, whole(state), {"try": 1}, {})
    save(tmp_path, 2, whole(state), {"try": 2}, {})
    assert open_checkpoint(tmp_path / "step-2").meta == {"try": 2}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1", "step-2"]


def test_a_replacement_cut_short_leaves_the_replaced_one_readable_and_two_to_fall_back_to(tmp_path, state, whole):
    save(tmp_path, 1, whole(state), {}, {})
    save(tmp_path, 2, whole(state), {"try": 1}, {})
    (tmp_path / "step-2").rename(tmp_path / "step-2.replaced-3")  # died between the two renames
    found = newest(tmp_path)
    assert found == tmp_path / "step-2.replaced-3"
    assert open_checkpoint(found).meta == {"try": 1}
    save(tmp_path, 2, whole(state), {"try": 2}, {})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-1", "step-2"]


def test_what_dead_saves_left_is_swept_and_a_stale_writer_cannot_commit(tmp_path, state, whole, monkeypatch):
    (tmp_path / "step-9.tmp-41").mkdir(parents=True)
    original = saving._write

    def overtaken(store, draft, rank, parts):
        report = original(store, draft, rank, parts)
        monkeypatch.setattr(saving, "_write", original)
        save(tmp_path, 7, whole(state), {"by": "the newer launch"}, {})
        return report

    monkeypatch.setattr(saving, "_write", overtaken)
    with pytest.raises(StorageError, match="step-7"):
        save(tmp_path, 7, whole(state), {"by": "the stale one"}, {"deep/er/file": b""})
    assert sorted(p.name for p in tmp_path.iterdir()) == ["latest", "step-7"]
    checkpoint = open_checkpoint(tmp_path / "step-7")
    assert (checkpoint.meta, checkpoint.manifest.generation) == ({"by": "the newer launch"}, 43)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([((0,), (4,)), ((5,), (3,))], "do not tile"),
        ([((0,), (5,)), ((4,), (4,))], "do not tile"),
        ([((0,), (4,)), ((4,), (5,))], "reaches beyond"),
    ],
)
def test_parts_that_do_not_make_a_whole_tensor_are_refused(tmp_path, on_ranks, boxes, message):
    def one(ranks):
        box = Box(*boxes[ranks.rank])
        return save(tmp_path, 1, [Piece("t", (8,), box, torch.zeros(box.sizes))], {}, {}, ranks)

    for outcome in on_ranks(2, one):
        assert isinstance(outcome, StorageError)
        assert message in str(outcome)
    assert newest(tmp_path) is None


def test_what_json_or_safetensors_cannot_say_is_refused(tmp_path, whole):
    with pytest.raises(StorageError, match="complex"):
        save(tmp_path, 1, whole({"c": torch.zeros(2, dtype=torch.complex64)}), {}, {})
    with pytest.raises(StorageError, match="not JSON serializable"):
        save(tmp_path, 1, [], {"generator": object()}, {})
    with pytest.raises(StorageError, match=r"'\.\./x'"):
        save(tmp_path, 1, [], {}, {"../x": b""})
    assert list(tmp_path.iterdir()) == []


def test_asking_for_what_was_not_saved_names_it(tmp_path, state, whole):
    checkpoint = open_checkpoint(save(tmp_path, 1, whole(state), {}, {"config.toml": b""}))
    with pytest.raises(CheckpointError, match="optim/exp_avg/x"):
        checkpoint.read("optim/exp_avg/x")
    with pytest.raises(CheckpointError, match=r"tokenizer.json.*config\.toml"):
        checkpoint.file("tokenizer.json")


def test_the_manifest_is_plain_json(tmp_path, state, whole):
    body = json.loads((save(tmp_path, 1, whole(state), {"a": [1]}, {}) / "manifest.json").read_text())
    assert (body["format"], body["version"], body["step"], body["meta"]) == ("paraxis checkpoint", 1, 1, {"a": [1]})
    assert body["tensors"]["model/up.weight"]["pieces"] == [
        {"file": "rank-0-0.safetensors", "key": "model/up.weight", "offsets": [0, 0], "sizes": [12, 10]}
    ]


def test_the_config_refuses_to_keep_fewer_than_two():
    with pytest.raises(ConfigError, match=r"checkpoint\.keep_last=1"):
        CheckpointConfig(keep_last=1)
    with pytest.raises(ConfigError, match=r"checkpoint\.every=-1"):
        CheckpointConfig(every=-1)
