"""What one layout saves another continues from, bit for bit; and every layout finds the same held-out loss."""

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

from paraxis.checkpoint.load import open_checkpoint
from paraxis.models.llama import LlamaConfig
from paraxis.optim.config import OptimConfig
from paraxis.train.config import RunConfig, TrainConfig
from paraxis.train.evaluate import evaluate
from paraxis.train.run import Run, assemble
from paraxis.train.state import pieces, restore_run, save_run
from paraxis.train.step import train_step
from paraxis.verify.measure import joined
from tests.measure import MadeRows, Part, run_of, this_world, with_layout
from tests.train.planted import VOCABULARY, experts
from tests.worlds import run_world

SEQ_LEN, ROWS_A_STEP = 16, 8
DENSE = LlamaConfig(vocab_size=VOCABULARY, width=16, layers=4, heads=4, kv_heads=2, mlp_width=32)
MODELS = {"dense": DENSE, "tied": replace(DENSE, tied=True), "experts": experts().model}


def config_of(model: str, layout: str) -> RunConfig:
    train = TrainConfig(micro_batch=1, global_tokens=ROWS_A_STEP * SEQ_LEN)
    base = replace(experts(), model=MODELS[model], train=train, optim=OptimConfig(name="adamw", lr=0.01), precision="fp64")
    return with_layout(replace(base, data=replace(base.data, seq_len=SEQ_LEN)), layout)


def held(run: Run) -> list[Part]:
    """This rank's parts of weights and optimizer state."""
    return [Part(p.name, p.shape, p.box, p.tensor.detach().clone()) for p in pieces(run) if not p.name.startswith("random/")]


def whole(ranks: list[list[Part]]) -> dict[str, torch.Tensor]:
    """All of it put together; copies are bitwise equal."""
    tensors, apart = joined(ranks)
    assert [name for name, spread in apart.items() if spread] == []
    return tensors


def train(run: Run, steps: int) -> list[float]:
    """The losses of so many steps, from where the run's data position is."""
    loader = run.loader()
    try:
        losses = [train_step(run, [run.take(batch) for batch in next(loader)], lr=0.01).loss for _ in range(steps)]
    finally:
        loader.close()
    run.row, run.step = run.row + steps * run.rows_per_step, run.step + steps
    return losses


def save_and_go_on(config: RunConfig, folder: Path) -> tuple[list[Part], list[float]]:
    run = run_of(config, MadeRows(VOCABULARY, SEQ_LEN))
    train(run, 2)
    parts = held(run)
    save_run(run, folder, {})
    return parts, train(run, 2)


def restore_and_go_on(config: RunConfig, folder: Path) -> tuple[list[Part], list[float]]:
    run = run_of(config, MadeRows(VOCABULARY, SEQ_LEN))
    restore_run(run, open_checkpoint(folder / "step-2"))
    parts = held(run)
    if run.tied is not None:
        for own, mirror in zip(run.tied.own, run.tied.mirrors, strict=bool(run.tied.mirrors)):
            assert torch.equal(own.local, mirror.local)
    return parts, train(run, 2)


def on(layout: str, body: Any, model: str, folder: Path) -> tuple[dict[str, torch.Tensor], list[float]]:
    config = config_of(model, layout)
    ranks = run_world(body, config.parallel.degrees.ranks, config, folder)
    assert all(losses == ranks[0][1] for _, losses in ranks)
    return whole([parts for parts, _ in ranks]), ranks[0][1]


@pytest.mark.parametrize(
    ("model", "saving", "continuing"),
    [
        ("dense", "pp2.zbv", "fsdp2"),
        ("tied", "cp2.ring", "pp2"),
        ("experts", "fsdp2xep2", "tp2"),
        pytest.param("tied", "pp2.zbv", "pp4", marks=pytest.mark.full),
        pytest.param("tied", "pp2xfsdp2", "pp2.zbv", marks=pytest.mark.full),
        pytest.param("tied", "tp2", "pp2.dualpipevxtp2", marks=pytest.mark.full),
        pytest.param("dense", "pp2.interleavedxtp2", "cp4.ulysses2", marks=pytest.mark.full),
        pytest.param("experts", "pp2.zbh1xfsdp2xep2", "cp2.ringxep2", marks=pytest.mark.full),
        pytest.param("experts", "cp2xtp2xep2", "pp2.interleaved", marks=pytest.mark.full),
        pytest.param("experts", "fsdp4xep2", "fsdp2xep2", marks=pytest.mark.full),
        pytest.param("experts", "pp2", "fsdp4xep4", marks=pytest.mark.full),
    ],
)
def test_a_run_goes_on_elsewhere_with_bitwise_the_state_it_was_saved_with(model: str, saving: str, continuing: str, tmp_path: Path):
    saved, stayed = on(saving, save_and_go_on, model, tmp_path)
    restored, moved = on(continuing, restore_and_go_on, model, tmp_path)
    assert saved.keys() == restored.keys()
    assert [name for name in saved if not torch.equal(saved[name], restored[name])] == []
    assert moved == pytest.approx(stayed, rel=1e-9)


def scored(config: RunConfig, rows: int) -> tuple[float, int]:
    run = assemble(config, this_world(), MadeRows(VOCABULARY, SEQ_LEN), MadeRows(VOCABULARY, SEQ_LEN, length=rows))
    train(run, 1)
    first = evaluate(run)
    assert evaluate(run) == first
    train(run, 1)  # a pipeline that has evaluated trains on
    return first


@cache
def scored_by_one_process(model: str) -> tuple[float, int]:
    return run_world(scored, 1, config_of(model, ""), 5)[0]


@pytest.mark.parametrize(
    ("model", "layout"),
    [
        ("dense", "pp2"),
        ("dense", "cp2.ring"),
        ("experts", "fsdp2xep2"),
        *(
            pytest.param(model, layout, marks=pytest.mark.full)
            for model, layout in [
                ("tied", "pp2.zbv"),
                ("dense", "pp2xfsdp2xtp2"),
                ("dense", "pp4.zbh1"),
                ("dense", "cp2.ulyssesxtp2"),
                ("dense", "fsdp2xcp2.allgather"),
                ("experts", "pp2xcp2xep2"),
                ("experts", "cp2.ringxtp2xep2"),
            ]
        ),
    ],
)
def test_the_held_out_loss_is_that_of_one_process(model: str, layout: str):
    """Of five rows, which no number of data ranks shares evenly."""
    config = config_of(model, layout)
    ranks = run_world(scored, config.parallel.degrees.ranks, config, 5)
    loss, targets = scored_by_one_process(model)
    assert len(set(ranks)) == 1
    assert ranks[0][1] == targets
    assert ranks[0][0] == pytest.approx(loss, rel=1e-10)
