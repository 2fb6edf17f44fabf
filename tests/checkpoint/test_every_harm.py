"""Whatever harm comes to the files of the newest checkpoint, a run names the file, aloud, and goes on from the one before."""

import logging
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from paraxis.checkpoint.load import open_checkpoint
from paraxis.checkpoint.manifest import MANIFEST
from paraxis.checkpoint.verify import verify
from paraxis.observe.folder import RunFolder
from paraxis.train.config import RunConfig
from paraxis.train.resume import resume_run
from paraxis.train.state import pieces, save_run
from paraxis.train.step import train_step
from tests.measure import MadeRows, run_of, with_layout
from tests.train.planted import VOCABULARY
from tests.train.planted import run as small
from tests.worlds import run_world

SHARDS = ("rank-0-0.safetensors", "rank-1-0.safetensors")
BESIDE = ("config.toml", "tokenizer/tokenizer.json")
FILES = (MANIFEST, *SHARDS, *BESIDE)


@dataclass(frozen=True)
class Harm:
    """What happens to `files` of the checkpoint `new`, given the one before; one of `named` is to be said."""

    files: tuple[str, ...]
    named: tuple[str, ...]
    do: Callable[[Path, Path], None]
    what: str


class Resumed(NamedTuple):
    """Where a run went on from, what was said of the newest, what `ckpt verify` found in it, and whether the state is the older one's."""

    path: str
    warnings: list[str]
    damaged: list[str]
    restored: bool


def flipped(file: str, bit: int) -> Harm:
    def do(new: Path, old: Path) -> None:
        data = bytearray((new / file).read_bytes())
        data[bit // 8] ^= 1 << bit % 8
        (new / file).write_bytes(data)

    return Harm((file,), (file,), do, f"bit {bit}")


def rewritten(file: str, what: str, change: Callable[[bytes], bytes]) -> Harm:
    return Harm((file,), (file,), lambda new, old: (new / file).write_bytes(change((new / file).read_bytes())) and None, what)


def missing(file: str) -> Harm:
    return Harm((file,), (file,), lambda new, old: (new / file).unlink(), "missing")


def linked(file: str) -> Harm:
    """The same bytes, by a link to elsewhere."""

    def do(new: Path, old: Path) -> None:
        outside = new.parent.parent / "outside"
        shutil.copy(new / file, outside)
        (new / file).unlink()
        (new / file).symlink_to(outside)

    return Harm((file,), (file,), do, "a link")


def in_a_folders_place(file: str) -> Harm:
    def do(new: Path, old: Path) -> None:
        (new / file).unlink()
        (new / file).mkdir()

    return Harm((file,), (file,), do, "a folder")


def mixed(files: tuple[str, ...]) -> Harm:
    """These files are the older step's."""
    others = tuple(file for file in FILES if file not in files)
    named = (MANIFEST, *others) if MANIFEST in files else files  # that it is of another step, or what does not fit it
    return Harm(files, named, lambda new, old: [shutil.copy(old / file, new / file) for file in files] and None, "the older step's")


@contextmanager
def done(harm: Harm, new: Path, old: Path) -> Iterator[None]:
    kept = {file: (new / file).read_bytes() for file in harm.files}
    harm.do(new, old)
    try:
        yield
    finally:
        for file, data in kept.items():
            if (new / file).is_dir():
                (new / file).rmdir()
            (new / file).unlink(missing_ok=True)
            (new / file).write_bytes(data)


def config_on(layout: str) -> RunConfig:
    return with_layout(small(), layout)


def save_two_steps(config: RunConfig, folder: Path) -> None:
    run = run_of(config, MadeRows(VOCABULARY, config.data.seq_len))
    loader = run.loader()
    for step in (1, 2):
        train_step(run, next(loader), lr=0.01)
        run.step = step
        files = {"config.toml": b"step = %d\n" % step, "tokenizer/tokenizer.json": b"%d" % step + bytes(range(256)) * 9}
        save_run(run, folder / "checkpoints", files)
    loader.close()


def resume_after_each(config: RunConfig, folder: Path, harms: Sequence[Harm]) -> list[Resumed]:
    """On one rank, which therefore reads every file."""
    run = run_of(config, MadeRows(VOCABULARY, config.data.seq_len))
    old, new = (folder / "checkpoints" / f"step-{step}" for step in (1, 2))
    before = {name: open_checkpoint(old).read(name) for name in open_checkpoint(old).tensors}
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("paraxis").addHandler(handler)
    found = []
    for harm in harms:
        said.clear()
        with done(harm, new, old):
            path = resume_run(run, RunFolder(folder), "must")
            assert path is not None
            damaged = [damage.file for damage in verify(new).damage]
        same = all(torch.equal(piece.tensor, before[piece.name]) for piece in pieces(run))
        found.append(Resumed(path.name, list(said), damaged, same and run.step == 1))
    said.clear()
    assert resume_run(run, RunFolder(folder), "must") == new  # nothing but the harm was wrong with it
    assert said == []
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Two checkpoints of two ranks."""
    run_world(save_two_steps, 2, config_on("fsdp2"), tmp_path)
    new = tmp_path / "checkpoints" / "step-2"
    assert {str(path.relative_to(new)) for path in new.rglob("*") if path.is_file()} == set(FILES)
    return tmp_path


def flips(folder: Path, count: int) -> list[Harm]:
    """Half of them in files chosen alike, half at any byte of all."""
    sizes = {file: (folder / "checkpoints" / "step-2" / file).stat().st_size for file in FILES}
    dice = random.Random(count)
    files = dice.choices(FILES, k=count // 2) + dice.choices(FILES, weights=list(sizes.values()), k=count - count // 2)
    return [flipped(file, dice.randrange(8 * sizes[file])) for file in files]


def lengths() -> list[Harm]:
    cuts = {"empty": 0.0, "one in ten": 0.1, "half": 0.5, "nine in ten": 0.9}
    found = [rewritten(file, what, lambda data, part=part: data[: int(len(data) * part)]) for file in FILES for what, part in cuts.items()]
    for file in FILES:
        found += [rewritten(file, "a byte less", lambda data: data[:-1]), rewritten(file, "a byte more", lambda data: data + b"\0")]
        found += [missing(file), linked(file), in_a_folders_place(file)]
    return found


def mixes() -> list[Harm]:
    return [mixed(files) for count in range(1, len(FILES)) for files in combinations(FILES, count)]


def assert_each_is_refused_by_name(folder: Path, harms: Sequence[Harm]) -> None:
    found: list[Resumed] = []
    for first in range(0, len(harms), 100):
        found += run_world(resume_after_each, 1, config_on(""), folder, harms[first : first + 100], timeout=100)[0]
    for harm, resumed in zip(harms, found, strict=True):
        told = f"{harm.what} of {harm.files}: {resumed}"
        assert resumed.path == "step-1", told
        assert resumed.restored, told
        assert len(resumed.warnings) == 1, told
        assert "step-2 is passed over" in resumed.warnings[0], told
        assert any(name in resumed.warnings[0] for name in harm.named), told
        assert set(resumed.damaged) & set(harm.named), told


@pytest.mark.timeout(600)
@pytest.mark.parametrize("count", [30, pytest.param(500, marks=pytest.mark.full)])
def test_a_flipped_bit_anywhere_is_refused_by_the_files_name_and_the_older_checkpoint_is_used(count: int, folder: Path):
    assert_each_is_refused_by_name(folder, flips(folder, count))


def test_a_file_of_another_length_missing_or_no_file_is_refused_by_name_and_the_older_checkpoint_is_used(folder: Path):
    assert_each_is_refused_by_name(folder, lengths())


def test_every_mix_of_two_steps_is_refused_by_name_and_the_older_checkpoint_is_used(folder: Path):
    harms = mixes()
    assert len(harms) == 30
    assert_each_is_refused_by_name(folder, harms)
