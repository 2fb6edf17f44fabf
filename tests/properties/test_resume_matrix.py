"""Any layout to any layout: a run that is saved on one and goes on on the other is the run that never stopped.

For every ordered pair: train three steps, save, resume, train three. What a layout has just read it saves again, and that is bit for bit
what it was given. Losses, weights, optimizer state and the rows in their global order are those of one process that trained all six steps.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch.distributed as dist

from paraxis.checkpoint.compare import Differences, compare
from paraxis.checkpoint.load import open_checkpoint
from paraxis.checkpoint.verify import no_progress
from paraxis.data.config import DataConfig
from paraxis.data.open import open_training
from paraxis.data.prepare import prepare
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen3 import Qwen3MoEConfig
from paraxis.observe.folder import RunFolder
from paraxis.ops.routing import RoutingConfig
from paraxis.optim.config import OptimConfig
from paraxis.optim.curves import learning_rate
from paraxis.train.config import RunConfig, TrainConfig
from paraxis.train.resume import resume_run
from paraxis.train.run import Run, assemble
from paraxis.train.state import save_run
from paraxis.train.step import train_step
from tests.data.corpus import sentences
from tests.measure import this_world, with_layout, worst_difference
from tests.worlds import run_world

STEPS, SEQ_LEN, ROWS_A_STEP, VOCABULARY = 3, 16, 12, 300
LOSSES, STATE = 1e-10, 1e-9  # of max|a - b| / max|b|, in fp64

DENSE = LlamaConfig(vocab_size=VOCABULARY, width=16, layers=7, heads=4, kv_heads=2, mlp_width=32)
ROUTING = RoutingConfig(experts=8, chosen=2, balance_loss=0.1, z_loss=0.1, bias_rate=0.003)
EXPERTS = Qwen3MoEConfig(
    vocab_size=VOCABULARY, width=16, layers=4, heads=4, kv_heads=2, head_size=4, mlp_width=16, tied=True, routing=ROUTING
)


class Place(NamedTuple):
    """A layout, the rows of its micro-batches, and where its pipeline is cut if not evenly."""

    layout: str
    micro_batch: int
    cuts: tuple[int, ...] = ()


# Every axis and kind of schedule and of attention across cp, on every number of ranks from 1 to 8.
DENSE_PLACES = {
    "one process": Place("", 3),
    "dp2": Place("dp2", 2),
    "fsdp3": Place("fsdp3", 1),
    "tp2": Place("tp2", 4),
    "pp2": Place("pp2", 2, (1, 6)),
    "pp2.zbv": Place("pp2.zbv", 2),
    "pp2.interleaved3": Place("pp2.interleaved3", 3, (1, 1, 1, 1, 1, 2)),
    "pp4.zbh1": Place("pp4.zbh1", 2, (2, 1, 3, 1)),
    "pp5.gpipe": Place("pp5.gpipe", 2),
    "pp7": Place("pp7", 1),
    "cp2.ring": Place("cp2.ring", 3),
    "cp4.ulysses2": Place("cp4.ulysses2", 4),
    "cp2.allgather x fsdp3": Place("cp2.allgatherxfsdp3", 2),
    "dp2 x fsdp2 x tp2": Place("dp2xfsdp2xtp2", 1),
    "pp2.dualpipev x cp2.ulysses x tp2": Place("pp2.dualpipevxcp2.ulyssesxtp2", 2),
}
EXPERT_PLACES = {
    "one process": Place("", 3),
    "fsdp2": Place("fsdp2", 3),
    "fsdp2 x ep2": Place("fsdp2xep2", 2),
    "fsdp4 x ep4": Place("fsdp4xep4", 1),
    "fsdp4 x ep2": Place("fsdp4xep2", 3),
    "dp3 x fsdp2 x ep2": Place("dp3xfsdp2xep2", 1),
    "tp2": Place("tp2", 2),
    "cp2.ring x ep2": Place("cp2.ringxep2", 4),
    "cp2 x tp2 x ep2": Place("cp2xtp2xep2", 2),
    "pp2.interleaved": Place("pp2.interleaved", 2),
    "pp2.zbv x fsdp2 x ep2": Place("pp2.zbvxfsdp2xep2", 1),
    "pp3 x fsdp2 x ep2": Place("pp3xfsdp2xep2", 1, (1, 1, 2)),
    "pp2.zbh1 x cp2 x fsdp2 x ep4": Place("pp2.zbh1xcp2xfsdp2xep4", 1),
}
MODELS: dict[str, tuple[Any, dict[str, Place]]] = {"dense": (DENSE, DENSE_PLACES), "experts": (EXPERTS, EXPERT_PLACES)}

PAIRS = [(model, there, tuple(places)) for model, (_, places) in MODELS.items() for there in places]
COVERING = [
    ("dense", "cp2.ring", ("pp2.zbv", "cp2.ring")),
    ("experts", "fsdp2 x ep2", ("pp2.interleaved",)),
]


class Leg(NamedTuple):
    """What a rank saw of some steps: losses, gradient norms, and the tokens of the rows it read by their place in the global order."""

    losses: list[float]
    norms: list[float]
    rows: dict[int, list[int]]


@dataclass
class Origins:
    """Runs of six uninterrupted steps that were saved after three, each made when it is first asked for."""

    folder: Path
    data: DataConfig
    made: dict[tuple[str, str], tuple[Leg, Leg]] = field(default_factory=dict)

    def config(self, model: str, name: str) -> RunConfig:
        kind, places = MODELS[model]
        place = places[name]
        train = TrainConfig(steps=2 * STEPS, micro_batch=place.micro_batch, global_tokens=ROWS_A_STEP * SEQ_LEN)
        optim = OptimConfig(lr=0.01, warmup=2)
        config = with_layout(RunConfig(model=kind, data=self.data, train=train, optim=optim, precision="fp64"), place.layout)
        return replace(config, parallel=replace(config.parallel, cuts=place.cuts))

    def path(self, model: str, name: str) -> Path:
        return self.folder / model / name

    def legs(self, model: str, name: str) -> tuple[Leg, Leg]:
        """The steps before the save and those after it, of an uninterrupted run."""
        if (model, name) not in self.made:
            config = self.config(model, name)
            ranks = run_world(begin_and_go_on, config.parallel.degrees.ranks, config, self.folder, self.path(model, name), timeout=300)
            self.made[model, name] = together([first for first, _ in ranks]), together([second for _, second in ranks])
        return self.made[model, name]


@pytest.fixture(scope="module")
def origins(tmp_path_factory: pytest.TempPathFactory) -> Origins:
    """Their data are a mixture of two sources that changes a step after the save; a pass over one of them ends before."""
    folder = tmp_path_factory.mktemp("matrix")
    for name, count in (("a", 90), ("b", 40)):
        (folder / f"{name}.txt").write_text("\n".join(f"{name} {text}" for text in sentences(count)))
    paths, mixture = (f"a={folder}/a.txt", f"b={folder}/b.txt"), ("a=2 b=1", f"{STEPS + 1}: a=1 b=2")
    data = DataConfig(paths=paths, mixture=mixture, tokenizer=f"train:{VOCABULARY}", seq_len=SEQ_LEN, document_mask=True)
    for path in data.plain_paths:
        prepare(replace(data, paths=(path,), mixture=()), folder / "cache")
    return Origins(folder, data)


def fresh(config: RunConfig, folder: Path, number: int = 0) -> Run:
    """The run as a new process would have it: `number` tells those of one process apart."""
    rows = open_training(config.data, folder / "cache", seed=config.train.seed, rows_per_step=lambda: ROWS_A_STEP).rows
    world = this_world()
    return assemble(config, replace(world, store=dist.PrefixStore(f"run {number}", world.store)), rows, None)


def train(run: Run) -> Leg:
    """Three steps on, as train/loop.py takes them."""
    leg, loader, micro_batch = Leg([], [], {}), run.loader(), run.config.train.micro_batch
    try:
        for _ in range(STEPS):
            batches = next(loader)
            for number, batch in enumerate(batches):
                first = run.row + (number * run.mesh.degrees.data_ranks + run.mesh.data_rank) * micro_batch
                leg.rows.update({first + place: row for place, row in enumerate(batch.tokens_bt.tolist())})
            lr = learning_rate(run.config.optim, run.step, run.config.train.steps)
            report = train_step(run, [run.take(batch) for batch in batches], lr=lr)
            run.step, run.row = run.step + 1, loader.cursor
            run.tokens += run.rows_per_step * run.config.data.seq_len
            leg.losses.append(report.loss)
            leg.norms.append(report.grad_norm)
    finally:
        loader.close()
    return leg


def begin_and_go_on(config: RunConfig, folder: Path, place: Path) -> tuple[Leg, Leg]:
    run = fresh(config, folder)
    first = train(run)
    save_run(run, place / "checkpoints", {"config.toml": b"the same"})
    second = train(run)
    save_run(run, place / "end", {})
    return first, second


def resume_each(config: RunConfig, folder: Path, sources: Sequence[Path], into: Path) -> list[Leg]:
    """From each of `sources`: resumed, saved again as it is, and three steps on."""
    legs = []
    for number, source in enumerate(sources):
        run = fresh(config, folder, number)
        resume_run(run, RunFolder(source), "must")
        save_run(run, into / source.name / "again", {"config.toml": b"the same"})
        legs.append(train(run))
        save_run(run, into / source.name / "end", {})
    return legs


def together(ranks: Sequence[Leg]) -> Leg:
    """What all ranks saw, who report the same numbers, and read each row alike where several do."""
    rows: dict[int, list[int]] = {}
    for rank in ranks:
        assert (rank.losses, rank.norms) == (ranks[0].losses, ranks[0].norms)
        assert all(rows.get(place, row) == row for place, row in rank.rows.items())
        rows |= rank.rows
    return Leg(ranks[0].losses, ranks[0].norms, rows)


def differences(a: Path, b: Path) -> Differences:
    return compare(open_checkpoint(a), open_checkpoint(b), no_progress)


def worst(a: Path, b: Path) -> tuple[float, str]:
    """The largest difference of a tensor: weights, the routers' biases and the optimizer's state."""
    held = [{name: checkpoint.read(name) for name in checkpoint.tensors} for checkpoint in map(open_checkpoint, (a, b))]
    return worst_difference(*held)


def selected(pairs: Sequence[tuple[str, str, tuple[str, ...]]], *marks: pytest.MarkDecorator) -> list[Any]:
    return [pytest.param(*pair, marks=marks, id=f"{pair[0]}-{pair[1]}-from_{len(pair[2])}".replace(" ", "_")) for pair in pairs]


@pytest.mark.timeout(1000)
@pytest.mark.parametrize(("model", "there", "sources"), [*selected(COVERING), *selected(PAIRS, pytest.mark.full)])
def test_a_run_goes_on_on_any_layout_as_if_it_had_never_stopped(
    model: str, there: str, sources: tuple[str, ...], origins: Origins, tmp_path: Path
):
    whole = origins.legs(model, "one process")[1]
    for source in sources:
        origins.legs(model, source)
    config = origins.config(model, there)
    paths = [origins.path(model, source) for source in sources]
    ranks = run_world(resume_each, config.parallel.degrees.ranks, config, origins.folder, paths, tmp_path, timeout=900)
    end = f"step-{2 * STEPS}"
    for number, source in enumerate(sources):
        moved, path, into = together([legs[number] for legs in ranks]), origins.path(model, source), tmp_path / source
        pair = f"{source} -> {there}"
        assert differences(path / "checkpoints" / f"step-{STEPS}", into / "again" / f"step-{STEPS}").same, pair
        assert moved.rows == whole.rows, pair
        assert moved.losses == pytest.approx(whole.losses, rel=LOSSES), pair
        assert worst(into / "end" / end, origins.path(model, "one process") / "end" / end) < (STATE, ""), pair
        if source == there:
            assert moved == origins.legs(model, there)[1]
            assert differences(into / "end" / end, path / "end" / end).same
