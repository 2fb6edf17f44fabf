"""Every axis, alone and composed, dense and with experts: loss, gradient norm, every gradient and trained weight equal one process's.

A line of the matrix is a model, a layout with its number of ranks, and what else is set. Every step of every line clips, sums gradients
over several micro-batches wherever data ranks leave more than one, and divides by a count of targets that differs between rows; every
mixture of experts has its balance loss, z-loss and selection bias on, and must send the same numbers of tokens to the same experts.
"""

from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paraxis.base.axes import DEGREES, Degrees
from paraxis.base.device import Device
from paraxis.base.layout import parse_layout
from paraxis.base.schedule import write_csv
from paraxis.base.schedules import SCHEDULES, Plan, build_schedule
from paraxis.base.strategy import RematConfig
from paraxis.data.config import DataConfig
from paraxis.models.deepseek import DeepSeekConfig
from paraxis.models.gpt import GPTConfig
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen3 import Qwen3MoEConfig
from paraxis.ops.routing import RoutingConfig
from paraxis.optim.config import OptimConfig
from paraxis.parallel.world import World
from paraxis.train.choose import build_strategy
from paraxis.train.config import RunConfig, TrainConfig
from paraxis.train.run import on_meta
from paraxis.train.stages import build_stages
from paraxis.train.step import make_gradients
from tests.measure import MadeRows, Measured, measure, run_of, with_layout
from tests.properties.test_layouts import assert_same
from tests.worlds import run_world

ROWS_A_STEP, SEQ_LEN, VOCAB = 8, 32, 64
BALANCED = RoutingConfig(experts=8, chosen=2, balance_loss=0.1, z_loss=0.1, bias_rate=0.05)

# Grouped heads everywhere but in DeepSeek, whose heads share a latent vector instead.
DENSE = LlamaConfig(vocab_size=VOCAB, width=32, layers=4, heads=8, kv_heads=4, head_size=4, mlp_width=64)
MODELS: dict[str, Any] = {
    "dense": DENSE,
    "tied": replace(DENSE, tied=True),
    "deep": replace(DENSE, layers=8),
    "gpt": GPTConfig(vocab_size=VOCAB, width=32, layers=4, heads=8, max_seq_len=SEQ_LEN),
    "qwen3": Qwen3MoEConfig(
        vocab_size=VOCAB, width=32, layers=4, heads=8, kv_heads=4, head_size=4, mlp_width=16, tied=True, routing=BALANCED
    ),
    "deepseek": DeepSeekConfig(
        vocab_size=VOCAB,
        width=32,
        layers=4,
        dense_layers=1,
        heads=4,
        q_rank=24,
        kv_rank=16,
        nope_width=8,
        rope_width=4,
        value_width=8,
        mlp_width=48,
        expert_width=16,
        routing=replace(BALANCED, chosen=3, gate="sigmoid", scale=2.5, groups=4, chosen_groups=2, group_score="top2"),
    ),
}


@dataclass(frozen=True)
class Line:
    """A line of the matrix. `csv`: the layout's schedule is read from a file. `covers`: every test run has it, not the full one alone."""

    model: str
    layout: str
    documents: bool = False
    remat: RematConfig = field(default_factory=RematConfig)
    compile: str = "none"
    cuts: tuple[int, ...] = ()
    csv: bool = False
    reduce: str = "auto"
    reshard: str = "auto"
    covers: bool = False

    @property
    def degrees(self) -> Degrees:
        said = parse_layout(self.layout) if self.layout else {}
        return Degrees(**{axis: said[axis] for axis in DEGREES if axis in said})  # type: ignore[arg-type]

    @property
    def config(self) -> RunConfig:
        return RunConfig(
            model=MODELS[self.model],
            data=DataConfig(seq_len=SEQ_LEN, document_mask=self.documents),
            train=TrainConfig(micro_batch=1, global_tokens=ROWS_A_STEP * SEQ_LEN),
            optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.05),
            precision="fp64",
            compile=self.compile,  # type: ignore[arg-type]
            remat=self.remat,
        )

    def __str__(self) -> str:
        said = [f"{self.degrees.ranks}_ranks", self.model, self.layout]
        said += ["documents"] if self.documents else []
        said += [self.remat.mode] if self.remat.mode != "none" else []
        said += [self.compile] if self.compile != "none" else []
        said += ["cut_" + "_".join(map(str, self.cuts))] if self.cuts else []
        said += ["reduced_each_" + self.reduce] if self.reduce != "auto" else []
        said += ["resharded_" + self.reshard] if self.reshard != "auto" else []
        return "-".join(said + (["csv"] if self.csv else []))


def lines(model: str, *layouts: str, **settings: Any) -> list[Line]:
    return [Line(model, layout, **settings) for layout in layouts]


def covering(model: str, *layouts: str, **settings: Any) -> list[Line]:
    return lines(model, *layouts, covers=True, **settings)


SELECTIVE, FULL, SECOND = RematConfig(mode="selective"), RematConfig(mode="full"), RematConfig(mode="full", every=2)

MATRIX = [
    # One axis: every schedule, every way across a split context, every degree.
    *covering("dense", "pp2", "pp2.interleaved", "pp2.zbh1", "cp2.ring", "cp4.ulysses2"),
    *covering("deep", "pp4.zbv"),
    *lines("dense", "pp2.gpipe", "pp2.bfs", "pp2.zbv", "pp2.dualpipev", "pp4", "pp4.gpipe", "pp4.zbh1"),
    *lines("deep", "pp4.interleaved", "pp4.bfs", "pp4.dualpipev", "pp2.interleaved4", "pp8", "pp8.zbh1"),
    *lines("dense", "cp2.ulysses", "cp2.allgather", "cp4.ring", "cp4.ulysses", "cp4.allgather", "cp8.ring", "cp8.ulysses4"),
    *lines("dense", "dp8", "fsdp8", "dp2xfsdp2xtp2", "fsdp2xtp4"),
    *covering("dense", "cp2.ulysses", documents=True),
    *lines("dense", "cp2.ring", "cp2.allgather", "cp4.ring", "cp4.ulysses2", "cp4.allgather", "pp2.zbv", documents=True),
    # Two axes.
    *covering("dense", "pp2.zbvxfsdp2", "cp2.ringxtp2"),
    *lines("dense", "pp2xfsdp2", "pp2.interleavedxfsdp2", "pp2.dualpipevxfsdp2", "pp2.bfsxdp2", "pp2xtp2", "pp2.zbvxtp2", "pp2.zbh1xtp4"),
    *lines("dense", "fsdp2xcp2.ring", "dp2xcp2.ulysses", "fsdp2xcp4.ulysses2", "cp4.ulyssesxtp2", "pp4.zbh1xfsdp2", "pp4xtp2"),
    *lines("dense", "pp2xcp2.ring", "pp2.interleavedxcp4.ulysses2", "pp2.zbvxcp2.ulysses", "pp4.gpipexcp2.allgather", documents=True),
    # Three axes.
    *covering("dense", "pp2xfsdp2xtp2"),
    *lines("dense", "pp2.zbvxfsdp2xtp2", "pp2.interleavedxfsdp2xtp2", "pp2xdp2xfsdp2", "pp2.dualpipevxdp2xtp2"),
    *lines("dense", "pp2xcp2.ringxtp2", "pp2.zbh1xcp2.ulyssesxtp2", "fsdp2xcp2.ringxtp2", "fsdp2xcp2.allgatherxtp2", documents=True),
    *lines("dense", "pp2xfsdp2xcp2", "pp2.zbvxfsdp2xcp2.ring", "dp2xfsdp2xcp2.ulysses"),
    # An embedding that both ends of a pipeline hold, on two ranks or on one.
    *covering("tied", "pp2", "pp2.zbv"),
    *lines("tied", "pp4", "pp2.interleaved", "pp2.dualpipev", "pp2xfsdp2", "pp2.zbvxtp2"),
    *lines("tied", "pp2xfsdp2xtp2", "pp2.zbvxfsdp2xcp2.ring", "pp2xcp2.ringxtp2"),
    # Learned positions, which the first stage and each rank's part of the sequence look up.
    *covering("gpt", "pp2.zbh1xtp2", "fsdp2xcp2.ulysses"),
    *lines("gpt", "dp2xfsdp2", "pp2.dualpipevxfsdp2", "pp2xcp2.ringxtp2", "cp4.ulysses2xtp2", "pp2.zbvxcp2.allgather", documents=True),
    *lines("gpt", "pp2xfsdp2xtp2", remat=FULL),
    *lines("gpt", "cp2.ringxtp2", "fsdp2xtp2", compile="aot_eager", remat=SELECTIVE),
    # Recomputed, compiled, cut by hand, scheduled from a file.
    *covering("dense", "pp2xcp2.ring", remat=SELECTIVE),
    *covering("dense", "pp2", compile="aot_eager"),
    *covering("dense", "pp2", cuts=(1, 3)),
    *lines("dense", "pp2.interleavedxfsdp2", "fsdp2xcp2.ulyssesxtp2", remat=SELECTIVE),
    *lines("dense", "pp2.zbvxfsdp2", "cp4.ulysses2", "pp2xcp2.ringxtp2", remat=FULL),
    *lines("dense", "pp2xtp2", "cp2.ring", "cp2.ulyssesxtp2", compile="aot_eager"),
    *lines("dense", "pp2xfsdp2xtp2", compile="aot_eager", remat=SELECTIVE),
    *lines("tied", "pp2.bfsxcp2.ulysses", compile="aot_eager", documents=True),
    *lines("deep", "pp2.zbv", "pp2.interleavedxfsdp2", cuts=(3, 1, 2, 2)),
    *lines("tied", "pp4", cuts=(1, 1, 1, 1)),
    *covering("dense", "pp2.zbh1", csv=True),
    *lines("deep", "pp2.interleaved3xtp2", csv=True, remat=SECOND),
    # What FSDP gathers and sums for each micro-batch, or once a step.
    *lines("dense", "pp2xfsdp2", "pp2.interleavedxfsdp2", "fsdp2xcp2.ring", reduce="micro_batch", reshard="always"),
    *lines("dense", "pp2.zbvxfsdp2", "pp2.dualpipevxfsdp2", reshard="always"),
    *lines("qwen3", "fsdp2xep2", "pp2xfsdp2xep2", reduce="micro_batch", reshard="always"),
    *lines("qwen3", "pp2.zbh1xfsdp2xep2", reshard="always"),
    *lines("tied", "pp2xdp2xfsdp2", reduce="micro_batch"),
    # Experts: spread over ranks with other rows, other positions of the same rows, or both; whole; cut along their features.
    *covering("qwen3", "fsdp2xep2", "cp2.ringxep2", "pp2.zbh1xfsdp2xep2"),
    *lines("qwen3", "dp2", "fsdp2", "tp2", "pp2", "pp2.zbv", "cp2.ulysses", "fsdp4xep2", "fsdp4xep4", "fsdp8xep8", "dp2xfsdp2xep2"),
    *lines("qwen3", "fsdp2xtp2xep2", "fsdp2xcp2xep2", "fsdp2xcp2.ringxep4", "cp4.ulysses2xep4", "cp2.ulyssesxtp2xep2"),
    *lines("qwen3", "pp2xfsdp2xep2", "pp2.zbvxfsdp2xep2", "pp2.interleavedxfsdp2xtp2xep2", "pp2.bfsxfsdp4xep2"),
    *lines("qwen3", "pp2xcp2.ringxep2", "pp2.zbvxcp2xtp2xep2", "pp2xfsdp2xcp2xep4", "fsdp2xcp2.allgatherxtp2xep2", documents=True),
    *lines("qwen3", "fsdp2xtp2xep2", "pp2xcp2.ringxep2", remat=SELECTIVE),
    *lines("qwen3", "fsdp2xcp2.ringxep2", remat=FULL),
    *lines("qwen3", "fsdp2xep2", "pp2xcp2xep2", compile="aot_eager", remat=SELECTIVE),
    *covering("deepseek", "fsdp2xtp2xep2", "pp2xcp2.ringxep2"),
    *lines("deepseek", "tp2", "tp4", "pp2", "pp4", "cp2.ring", "cp2.ulysses", "cp4.ulysses2", "fsdp4xep4", "fsdp2xcp2xep4"),
    *lines("deepseek", "pp2.zbvxfsdp2xep2", "pp2.zbh1xtp2", "pp2xfsdp2xtp2xep2", "fsdp2xcp2.ringxtp2xep2", "pp2xfsdp2xcp2xep2"),
    *lines("deepseek", "cp2.allgatherxep2", "pp2.dualpipevxcp2.ulyssesxep2", documents=True),
    *lines("deepseek", "pp2xfsdp2xep2", cuts=(3, 1), remat=SELECTIVE),
    *lines("deepseek", "fsdp2xcp2.ringxep2", remat=FULL),
    *lines("deepseek", "fsdp2xtp2xep2", compile="aot_eager"),
]


def rows_of(line: Line) -> MadeRows:
    return MadeRows(VOCAB, SEQ_LEN, documents=line.documents)


@cache
def one_process(model: str, documents: bool) -> Measured:
    line = Line(model, "", documents)
    return measure(config=line.config, layout="", rows=rows_of(line))


@pytest.mark.parametrize("line", [pytest.param(line, marks=() if line.covers else pytest.mark.full, id=str(line)) for line in MATRIX])
def test_every_axis_gives_the_numbers_of_one_process(line, tmp_path):
    layout, settings = line.layout, {"cuts": line.cuts, "reduce": line.reduce, "reshard": line.reshard}
    if line.csv:
        said = parse_layout(layout)
        name, ranks = str(said["schedule"]), line.degrees.pp
        plan = Plan(ranks, ROWS_A_STEP // line.degrees.data_ranks, int(said.get("stages_a_rank") or SCHEDULES[name].stages_a_rank or 2))
        write_csv(build_schedule(name, plan), tmp_path / "schedule.csv")
        settings |= {"schedule": str(tmp_path / "schedule.csv"), "stages_a_rank": 0}
    found = measure(config=line.config, layout=layout, rows=rows_of(line), parallel=settings)
    expected = one_process(line.model, line.documents)
    assert_same(found, expected, "fp64")
    assert found.tokens.keys() == expected.tokens.keys()
    assert [name for name, tokens_e in expected.tokens.items() if not found.tokens[name].equal(tokens_e)] == []


def test_the_matrix_has_every_axis_schedule_and_way_across_a_split_context():
    """Or it would not prove what it says."""
    said = [parse_layout(line.layout) for line in MATRIX]
    assert len(MATRIX) == len({str(line) for line in MATRIX}) >= 60
    assert {line.degrees.ranks for line in MATRIX} == {2, 4, 8}
    assert {layout.get("schedule", "1f1b") for layout in said if "pp" in layout} == set(SCHEDULES)
    assert {layout.get("cp_kind") for layout in said if "cp" in layout} >= {"ring", "ulysses", "usp", "allgather"}
    counts = one_process("qwen3", False).tokens
    assert len(counts) == MODELS["qwen3"].layers
    assert all(len(set(tokens_e.tolist())) > 1 for tokens_e in counts.values()), "uneven, so that the bias moves"


class Gathers(TorchDispatchMode):
    """Counts all-gathers."""

    count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        namespace, name = func._schema.name.split("::")
        self.count += "c10d" in namespace and "allgather" in name.replace("_", "")
        return func(*args, **(kwargs or {}))


def gathers_of_a_step(config: RunConfig, rows: MadeRows) -> int:
    run = run_of(config, rows)
    loader = run.loader()
    try:
        with Gathers() as gathers:
            make_gradients(run, [run.take(batch) for batch in next(loader)])
    finally:
        loader.close()
    return gathers.count


@pytest.mark.parametrize(("schedule", "ends"), [("1f1b", [1, 1, 2, 2]), ("zbv", [3, 3, 0, 0])])
def test_a_pipeline_gathers_parameters_once_a_step_where_they_fit_and_else_for_each_pass_of_a_micro_batch(schedule, ends):
    """`ends`: what each rank gathers beside blocks: of the first stage the embedding, of the last the norm and, by itself, the head."""
    config = with_layout(Line("dense", "").config, f"pp2.{schedule}xfsdp2")
    blocks, micro_batches = MODELS["dense"].layers // 2, ROWS_A_STEP // 2
    rows = MadeRows(VOCAB, SEQ_LEN)
    assert run_world(gathers_of_a_step, 4, config, rows) == [blocks + n for n in ends]
    config = replace(config, parallel=replace(config.parallel, reshard="always"))
    for count, n in zip(run_world(gathers_of_a_step, 4, config, rows), ends, strict=True):
        assert 2 * blocks * micro_batches <= count <= 2 * (blocks + n) * micro_batches


@pytest.mark.parametrize(("schedule", "chosen"), [("1f1b", "inductor"), ("zbh1", "none"), ("zbv", "none"), ("dualpipev", "none")])
def test_compile_auto_leaves_schedules_that_split_the_backward_uncompiled(schedule, chosen):
    config = replace(with_layout(Line("dense", "").config, f"pp2.{schedule}"), compile="auto")
    model, degrees = on_meta(config), config.parallel.degrees
    world = World(0, 2, 0, Device("cuda", 0, "any GPU", 80 << 30), torch.distributed.HashStore())
    at = dict.fromkeys(("dp", "fsdp", "tp", "cp", "pp"), 0)
    assert build_strategy(config, world, at, build_stages(config, degrees, model), model).compile == chosen


def test_the_head_counts_where_stages_are_cut():
    config = with_layout(Line("deep", "").config, "pp2")
    for vocab_size, layers in ((VOCAB, [4, 4]), (1000, [6, 2]), (2000, [7, 1])):
        config = replace(config, model=replace(config.model, vocab_size=vocab_size))
        stages = build_stages(config, config.parallel.degrees, on_meta(config))
        assert stages is not None
        assert [len(own) for own in stages.layers] == layers
