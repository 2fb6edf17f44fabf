"""On an object store a save is there or is not, whatever fails meanwhile; and what is there is found, read whole, and pruned."""

import logging
from dataclasses import replace

import pytest
import torch

from paraxis.base.errors import CheckpointError, ConfigError, ParaxisError, StorageError
from paraxis.base.layout import whole_box
from paraxis.checkpoint import object_store, objects
from paraxis.checkpoint import save as saving
from paraxis.checkpoint.compare import compare
from paraxis.checkpoint.inspect import listed
from paraxis.checkpoint.load import committed, newest, open_checkpoint
from paraxis.checkpoint.manifest import MANIFEST, Manifest, StoredFile
from paraxis.checkpoint.place import Draft, Url, location
from paraxis.checkpoint.reshard import reshard
from paraxis.checkpoint.retain import KEEP, Keep, prune
from paraxis.checkpoint.save import Piece, save
from paraxis.checkpoint.store import open_store
from paraxis.checkpoint.tensor_file import write_file
from paraxis.checkpoint.verify import no_progress, verify
from tests.objects import Bench, Fault, served

PLACE = "faulty://bucket/runs/demo"
SHARD = "rank-0-0.safetensors"


@pytest.fixture
def bench(tmp_path, monkeypatch):
    monkeypatch.setattr(objects, "FIRST_WAIT_S", 0.001)
    monkeypatch.setattr(objects, "PART_BYTES", 4096)
    with served(tmp_path / "bench") as bench:
        yield bench


def tensors(step: int) -> dict[str, torch.Tensor]:
    """About 20 kB: an upload of several parts."""
    return {"model/w": torch.full((50, 100), float(step)), "optim/step": torch.tensor(step)}


def put(step: int, meta: dict | None = None, keep: Keep = KEEP, ranks=None, state: dict | None = None):
    pieces = [Piece(name, tuple(t.shape), whole_box(tuple(t.shape)), t) for name, t in (state or tensors(step)).items()]
    return save(PLACE, step, pieces, meta or {}, {"config.toml": b"a = 1\n", "tokenizer/t.json": b"{}"}, ranks, keep=keep)


def holds(path, step: int) -> bool:
    checkpoint = open_checkpoint(path)
    return checkpoint.manifest.step == step and all(checkpoint.read(name).equal(t) for name, t in tensors(step).items())


def assert_tidy(bench: Bench) -> None:
    """Every object there is belongs to a checkpoint, but for `latest` and the number of the last save."""
    known = {f"bucket/runs/demo/{name}" for name in ("latest", f"generation-{committed(PLACE)[0].manifest.generation}")}
    for checkpoint in committed(PLACE):
        known |= {f"bucket/runs/demo/{checkpoint.path.name}/{name}" for name in (MANIFEST, *checkpoint.manifest.files)}
    assert set(bench.there()) == known
    assert list((bench.folder / "uploads").iterdir()) == []


def test_what_was_saved_is_read_from_any_cut_and_older_ones_go(bench, state, whole, on_ranks):
    for step in (1, 2, 3):
        paths = on_ranks(
            3,
            lambda ranks, step=step: save(
                PLACE,
                step,
                [
                    Piece(name, tuple(t.shape), whole_box(tuple(t.shape)).cut(0, 3, ranks.rank), t.chunk(3)[ranks.rank])
                    for name, t in {"model/w": torch.arange(30.0)}.items()
                ],
                {"step": step},
                {},
                ranks,
            ),
        )
        assert paths == [Url(f"{PLACE}/step-{step}.save-{step}")] * 3
    assert [str(checkpoint.path) for checkpoint in committed(PLACE)] == [f"{PLACE}/step-3.save-3", f"{PLACE}/step-2.save-2"]
    assert open_checkpoint(paths[0]).read("model/w").equal(torch.arange(30.0))
    assert open_store(PLACE).latest() == "step-3.save-3"
    assert_tidy(bench)
    path = save(PLACE, 4, whole(state), {}, {"config.toml": b"x"})
    checkpoint = open_checkpoint(str(path))
    for name, tensor in state.items():
        assert checkpoint.read(name).reshape(-1).view(torch.uint8).equal(tensor.reshape(-1).view(torch.uint8)), name
    assert verify(path).whole


def test_a_step_that_is_saved_again_replaces_itself_and_leaves_two_to_fall_back_to(bench):
    for step, attempt in ((1, 1), (2, 1), (2, 2)):
        put(step, {"try": attempt})
    assert [(one.path.name, one.meta["try"]) for one in committed(PLACE)] == [("step-2.save-3", 2), ("step-1.save-1", 1)]
    assert_tidy(bench)


PASSING = [
    Fault("part", SHARD, times=1),
    Fault("part", SHARD, skip=1, times=1),
    Fault("complete", SHARD, times=2),
    Fault("complete", "t.json", "timeout", times=2),
    Fault("put", MANIFEST, times=3),
    Fault("put", "generation-", times=2),
    Fault("put", "latest", times=4),
    Fault("list", times=2),
    Fault("info", times=4),
    Fault("read", times=3),
    Fault("read", short=True, times=2),
    Fault("remove", times=2),
    Fault(slow_s=0.002),
]


@pytest.mark.parametrize("fault", PASSING, ids=lambda fault: f"{fault.op}-{fault.key}-{fault.skip}{'-short' * fault.short}")
@pytest.mark.parametrize("late", [0, 3])
def test_faults_that_pass_delay_a_save_and_change_nothing(bench, fault, late, caplog):
    for step in (1, 2):
        put(step)
    bench.expect(fault, late_listings=late)
    path = put(3)
    bench.expect()
    assert newest(PLACE) == path
    assert holds(path, 3)
    assert holds(committed(PLACE)[1].path, 2)
    assert fault.slow_s or "trying again" in caplog.text
    put(4)
    assert_tidy(bench)


LASTING = [
    Fault("part", SHARD),
    Fault("part", SHARD, skip=1),
    Fault("complete", SHARD),
    Fault("complete", "t.json", "timeout"),
    Fault("put", MANIFEST),
    Fault("put", "generation-"),
    Fault("list"),
    Fault("info", MANIFEST),
    Fault("read", "latest"),
    Fault("part", SHARD, "permission"),
    Fault("put", "", "permission"),
    Fault(""),
]


@pytest.mark.parametrize("fault", LASTING, ids=lambda fault: f"{fault.op}-{fault.key}-{fault.skip}-{fault.error}")
def test_faults_that_last_leave_the_previous_checkpoint_the_newest_and_no_trace(bench, fault, on_ranks):
    put(1)
    put(2)
    bench.expect(fault)
    for outcome in on_ranks(2, lambda ranks: put(3, ranks=ranks, state=tensors(3) if ranks.rank == 0 else {"optim/step": torch.tensor(3)})):
        assert isinstance(outcome, StorageError)
        assert "step-3 was not saved" in str(outcome)
    bench.expect()
    assert [holds(one.path, step) for one, step in zip(committed(PLACE), (2, 1), strict=True)] == [True, True]
    assert list((bench.folder / "uploads").iterdir()) == []
    put(4)
    put(5)
    assert holds(newest(PLACE), 5)
    assert_tidy(bench)


def test_what_is_final_is_not_tried_again(bench):
    put(1)
    bench.expect(Fault("put", "generation", "permission"))
    with pytest.raises(StorageError, match="PermissionError"):
        put(2)
    assert bench.met("fault-0") == 1


def test_a_failure_after_the_commit_is_said_and_costs_nothing(bench, caplog):
    put(1)
    for number, fault in enumerate((Fault("put", "latest"), Fault("remove"))):
        bench.expect(fault)
        caplog.clear()
        path = put(2 + number)
        assert "could not be tidied away" in caplog.text
        bench.expect()
        assert newest(PLACE) == path
    put(4)
    assert_tidy(bench)


@pytest.mark.parametrize(("late", "stride"), [(2, 4), *(pytest.param(late, 1, marks=pytest.mark.full) for late in (0, 2, 50))])
def test_a_process_that_ends_at_any_operation_of_a_save_leaves_the_last_committed_one(bench, late, stride):
    put(1)
    put(2)
    step, cuts = 3, 0
    for skip in range(0, 200, stride):
        bench.expect(Fault("", "", "cut", skip=skip), late_listings=late)
        try:
            put(step)
            ended = False
        except SystemExit:
            ended = True
            cuts += 1
        bench.expect(late_listings=late)
        warnings = []
        found = newest(PLACE, warnings.append)
        assert warnings == []
        there = open_checkpoint(found).manifest.step
        assert there == step or (ended and there == step - 1)
        assert holds(found, there)
        step = there + 1
        if not ended:
            break
    assert cuts * stride > 30
    bench.expect()
    put(step)
    put(step + 1)
    assert_tidy(bench)


@pytest.mark.parametrize("late", [1, 10**6])
def test_a_listing_that_is_late_hides_neither_the_newest_nor_what_is_kept(bench, late):
    bench.expect(late_listings=late)
    for step in (1, 2, 3):
        path = put(step)
        assert newest(PLACE) == path
        assert holds(path, step)
        assert verify(path).damage == ()
    bench.expect(Fault("put", "latest"), late_listings=late)  # nor one that nobody has announced
    path = put(4)
    assert newest(PLACE) == path
    bench.expect()
    assert holds(newest(PLACE), 4)
    assert {one.manifest.step for one in committed(PLACE)} >= {3, 4}
    put(5)
    assert [one.manifest.step for one in committed(PLACE)] == [5, 4]
    assert_tidy(bench)


def test_a_connection_that_breaks_while_reading_is_made_anew_and_never_taken_for_damage(bench):
    put(1)
    put(2)
    bench.expect(Fault("read", SHARD, times=2), Fault("read", SHARD, short=True, skip=3, times=1))
    assert holds(newest(PLACE), 2)
    for fault in (Fault("read", MANIFEST), Fault("read", MANIFEST, short=True)):
        bench.expect(fault)
        with pytest.raises(StorageError, match=f"tried {objects.ATTEMPTS} times"):
            newest(PLACE)
    bench.expect(Fault("read", SHARD, short=True))
    with pytest.raises(StorageError):
        open_checkpoint(newest(PLACE)).read("model/w")


def overtaken(monkeypatch, newer, name: str) -> None:
    """Has `newer` called once, when a save has done `name` of this module of its own."""
    original = getattr(saving, name)

    def late(*arguments):
        monkeypatch.setattr(saving, name, original)
        report = original(*arguments)
        newer()
        return report

    monkeypatch.setattr(saving, name, late)


@pytest.mark.parametrize("late", [0, 10**6])
@pytest.mark.parametrize("step", [3, 4])
@pytest.mark.parametrize("moment", ["_begin", "_write"])
def test_a_writer_that_was_overtaken_cannot_commit(bench, monkeypatch, late, step, moment):
    put(1)
    put(2)
    bench.expect(late_listings=late)
    overtaken(monkeypatch, lambda: put(step, {"by": "the newer"}), moment)
    with pytest.raises(StorageError, match="newer save"):
        put(3, {"by": "the stale"})
    bench.expect()
    assert newest(PLACE) == Url(f"{PLACE}/step-{step}.save-4")
    assert open_checkpoint(newest(PLACE)).meta == {"by": "the newer"}
    put(5)
    put(6)
    assert_tidy(bench)


def test_a_writer_that_is_overtaken_by_one_that_has_only_begun_cannot_commit(bench, monkeypatch):
    put(1)
    overtaken(monkeypatch, lambda: saving._begin(open_store(PLACE), 7), "_write")
    with pytest.raises(StorageError, match="newer save"):
        put(2)
    assert [one.manifest.step for one in committed(PLACE)] == [1]


def test_a_writer_whose_draft_was_swept_just_before_its_manifest_came_cannot_commit(bench, monkeypatch):
    put(1)
    original = object_store.ObjectStore._is_last

    def swept_right_after(self, draft):
        answer = original(self, draft)
        monkeypatch.setattr(object_store.ObjectStore, "_is_last", original)
        open_store(PLACE).sweep()
        return answer

    monkeypatch.setattr(object_store.ObjectStore, "_is_last", swept_right_after)
    with pytest.raises(StorageError, match="newer save"):
        put(2)
    assert [one.manifest.step for one in committed(PLACE)] == [1]
    put(3)
    put(4)
    assert_tidy(bench)


@pytest.mark.parametrize("kind", ["url", "folder"])
def test_tidying_up_after_a_save_leaves_a_newer_one_that_has_begun_alone(bench, tmp_path, monkeypatch, kind):
    place = PLACE if kind == "url" else tmp_path / "run"
    newer = []
    original = saving._retire

    def late(*arguments):
        newer.append(saving._begin(open_store(place), 2)["draft"])
        original(*arguments)

    monkeypatch.setattr(saving, "_retire", late)
    save(place, 1, [], {}, {})
    open_store(place).commit(Draft(**newer[0]), Manifest(2, newer[0]["generation"], "", {}, {}, {}).to_bytes())
    assert [one.manifest.step for one in committed(place)] == [2, 1]


def test_a_number_belongs_to_whose_words_are_there_even_where_the_store_overwrites(bench):
    put(1)
    store, rival = open_store(PLACE), open_store(PLACE)
    draft = store.begin(2, 2)
    bench.path("bucket/runs/demo/generation-2").unlink()  # two begin at once, and the store lets both make the same object
    taken = rival.begin(2, 2)
    assert (taken.name, taken.generation) == (draft.name, draft.generation)
    rival.write(f"{taken.name}/config.toml", lambda sink: write_file(sink, b"rival"))
    with pytest.raises(StorageError, match="newer save"):
        store.commit(draft, b"")
    store.discard(draft)
    assert f"bucket/runs/demo/{taken.name}/config.toml" in bench.there()
    rival.commit(taken, Manifest(2, 2, "", {}, {}, {"by": "rival"}).to_bytes())
    assert open_checkpoint(newest(PLACE)).meta == {"by": "rival"}


def test_damage_is_named_and_the_older_one_is_used(bench):
    put(1)
    path = put(2)
    shard = bench.path(f"bucket/runs/demo/{path.name}/{SHARD}")
    data = shard.read_bytes()
    for harm in ("flip", "short", "missing"):
        if harm == "flip":
            shard.write_bytes(data[:-5] + bytes([data[-5] ^ 1]) + data[-4:])
        elif harm == "short":
            shard.write_bytes(data[:-1])
        else:
            shard.unlink()
        (damage,) = verify(path).damage
        assert damage.file == SHARD
        assert "model/w" in damage.tensors
        if harm == "flip":
            with pytest.raises(CheckpointError, match=f"{SHARD} is damaged"):
                open_checkpoint(path).read("model/w")
        else:
            said = []
            assert newest(PLACE, said.append).name == "step-1.save-1"
            assert SHARD in said[0]
            assert next(one.problem for one in listed(PLACE) if one.step == 2).startswith("damaged")
        shard.write_bytes(data)
    bench.put(f"bucket/runs/demo/{path.name}/extra", b"")
    assert verify(path).unlisted == ("extra",)


def test_prune_reshard_and_compare_take_urls(bench, tmp_path):
    for step in range(1, 6):
        put(step, keep=Keep(last=99))
    assert prune(PLACE, Keep(last=2)).removed == ("step-3.save-3", "step-2.save-2", "step-1.save-1")
    source = open_checkpoint(newest(PLACE))
    for destination in ("faulty://bucket/other", tmp_path / "local", str(tmp_path / "text")):
        written = open_checkpoint(reshard(source, destination, 2, no_progress))
        assert compare(source, written, no_progress).same
        assert sorted(name for name in written.manifest.files if "rank" in name) == [SHARD, "rank-1-0.safetensors"]
        with pytest.raises(CheckpointError, match="is not an empty folder"):
            reshard(source, destination, 2, no_progress)


def test_checkpoints_are_read_after_they_are_copied_from_one_kind_of_place_to_the_other(bench, tmp_path):
    local = save(tmp_path / "run", 7, [Piece("t", (3,), whole_box((3,)), torch.arange(3))], {}, {})
    for file in local.iterdir():
        bench.put(f"bucket/runs/demo/step-7/{file.name}", file.read_bytes())
    assert newest(PLACE) == Url(f"{PLACE}/step-7")
    path = put(8)
    (tmp_path / "run" / path.name / "tokenizer").mkdir(parents=True)
    for key in bench.there():
        if f"/{path.name}/" in key:
            (tmp_path / "run" / path.name / key.partition(f"/{path.name}/")[2]).write_bytes(bench.path(key).read_bytes())
    assert newest(tmp_path / "run") == tmp_path / "run" / path.name
    assert holds(tmp_path / "run" / path.name, 8)


@pytest.mark.parametrize("words", ["../../elsewhere/step-9.save-9", "step-9/../../x", "", "step-1", "\0\xff", "x" * 10**5])
def test_what_latest_and_the_numbers_say_is_not_followed_out_of_the_place(bench, words):
    path = put(1)
    outside = put(9).name
    for key in [key for key in bench.there() if outside in key]:
        bench.put(key.replace("runs/demo/", "elsewhere/"), bench.path(key).read_bytes())
        bench.path(key).unlink()
    for key in ("latest", "generation-2", "generation-3"):
        bench.put(f"bucket/runs/demo/{key}", words.encode())
    assert newest(PLACE) == path
    assert put(2) == newest(PLACE)


@pytest.mark.parametrize("name", ["../step-1.save-1/config.toml", "/etc/hostname", "a/../../b", "..", "", MANIFEST])
def test_keys_that_leave_the_checkpoint_and_oversized_manifests_are_refused(bench, name, monkeypatch):
    path = put(1)
    key = f"bucket/runs/demo/{path.name}/{MANIFEST}"
    manifest = Manifest.from_bytes(bench.path(key).read_bytes())
    bench.put(key, replace(manifest, files={name: StoredFile(0, ())}, tensors={}).to_bytes())
    with pytest.raises(CheckpointError, match=MANIFEST):
        open_checkpoint(path)
    bench.put(key, manifest.to_bytes())
    monkeypatch.setattr("paraxis.checkpoint.load.MANIFEST_LIMIT_BYTES", 100)
    with pytest.raises(CheckpointError, match="more than any manifest should"):
        open_checkpoint(path)


@pytest.mark.parametrize(
    ("place", "why"),
    [
        ("s3://me:hunter2@bucket/x", "user and a password"),
        ("s3://me:hun/hunter2@bucket/x", "user and a password"),
        ("s3://bucket/x?key=hunter2", "options after a"),
        ("s3://bucket/x#hunter2", "options after a"),
        ("simplecache::s3://bucket/x", "one file system"),
        ("s3://bucket/../x", "'..'"),
        ("s3://bucket//x", "is empty"),
        ("s3://", "is empty"),
        ("s3://bucket/*", "wildcard"),
        ("file://x/y", "absolute"),
    ],
)
def test_a_url_that_names_no_place_or_holds_a_secret_is_refused_without_repeating_it(place, why):
    with pytest.raises(ConfigError, match=why) as refusal:
        location(place)
    assert "hunter2" not in str(refusal.value)


def test_paths_and_urls_are_told_apart(tmp_path):
    assert location(str(tmp_path)) == location(f"file://{tmp_path}") == tmp_path
    url = location("S3://bucket/runs/")
    assert (str(url), str(url.parent / "a"), url.name) == ("s3://bucket/runs", "s3://bucket/a", "runs")
    assert location("abfs://container@account.dfs.core.windows.net/x").name == "x"


def test_a_store_that_nothing_installed_can_open_is_one_message(monkeypatch):
    monkeypatch.setitem(objects.known_implementations, "s3x", {"class": "s3fs_not_there.S3", "err": "get it"})
    with pytest.raises(ConfigError, match=r"s3x://bucket/x needs a package that is not installed: pip install s3fs_not_there"):
        open_store("s3x://bucket/x")
    with pytest.raises(ConfigError, match="Protocol not known"):
        open_store("nosuch://bucket/x")


def test_secrets_in_what_a_library_says_are_not_repeated(bench, monkeypatch, caplog):
    def chatty(*_, **__):
        raise ConnectionError("GET https://me:hunter2@host/x?X-Amz-Signature=hunter2&sig=hunter2 failed")

    caplog.set_level(logging.DEBUG)
    monkeypatch.setattr("tests.objects.FaultyFileSystem.ls", chatty)
    with pytest.raises(ParaxisError) as refusal:
        newest(PLACE)
    assert "hunter2" not in str(refusal.value) + caplog.text
