"""Everything a run keeps is saved and comes back bit for bit, or the run is refused by name; dtypes on disk are those of the run."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from paraxis.base.device import CPU
from paraxis.base.errors import ConfigError
from paraxis.checkpoint.load import open_checkpoint
from paraxis.cli import main
from paraxis.cli.weights import open_weights
from paraxis.models.buffers import first_buffers
from paraxis.parallel.remat import checkpoint_blocks
from paraxis.train.run import Run
from paraxis.train.state import STATE, meta, pieces, save_run
from tests.measure import MadeRows, run_of, with_layout
from tests.runs import RECIPES, assert_same_curves, assert_same_state, metrics, paraxis, refusal, saved, succeeded
from tests.train.planted import VOCABULARY, experts, layers
from tests.train.stateful import WIDTH, Stateful, StatefulConfig
from tests.worlds import run_world

RECIPE = f"{Path(__file__).parent / 'stateful.py'}:run"
OF_THE_MOMENT = {"tokens_per_s", "mfu", "memory_gib", "step_s", "data_s"}  # what a clock and this process's memory say


@pytest.mark.parametrize(
    ("options", "layout"),
    [
        (["--model.normalises=true", "--model.counts_rows=true", "--model.drops=0.3"], []),
        ([], ["--parallel.fsdp=2"]),
        ([], ["--parallel.pp=2"]),
        pytest.param(["--train.global_tokens=32"], ["--parallel.pp=2", "--parallel.schedule=zbv"], marks=pytest.mark.full),
    ],
)
def test_a_model_with_buffers_of_its_own_continues_bitwise_and_so_do_its_metrics(options: list[str], layout: list[str], tmp_path: Path):
    train = ["train", RECIPE, *options, *layout, "--data.bad_rows=4"]
    succeeded(paraxis(*train, "--run-dir=whole", folder=tmp_path))
    for steps in (3, 6):
        succeeded(paraxis(*train, "--run-dir=parts", f"--train.steps={steps}", folder=tmp_path))
    assert_same_curves(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")
    whole, parts = ([{k: v for k, v in m.items() if k not in OF_THE_MOMENT} for m in metrics(tmp_path / run)] for run in ("whole", "parts"))
    assert parts == whole
    _, tensors = saved(tmp_path / "whole")
    assert tensors["buffer/counted"][0] >= 6
    assert "buffer/table" not in tensors
    assert ("random/cpu" in tensors) == ("--model.drops=0.3" in options)
    assert ("buffer/norm.running_var" in tensors) == ("--model.normalises=true" in options)


def test_what_a_layout_has_counted_another_counts_on(tmp_path: Path):
    for steps, layout in ((2, "fsdp2"), (4, "pp2"), (6, "fsdp1")):
        succeeded(paraxis("train", RECIPE, "--run-dir=run", f"--train.steps={steps}", f"--layout={layout}", folder=tmp_path))
    _, tensors = saved(tmp_path / "run")
    assert tensors["buffer/counted"][0] == 2 * 1 + 2 * 2 + 2 * 2  # a forward for each micro-batch: fsdp2 has one a step


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--model.fault=plain"], "Stateful.average is a plain tensor, which is neither saved nor moved"),
        (["--model.fault=extra"], "WithExtraState keeps _extra_state in its state_dict"),
        (["--model.fault=computed"], "buffer largest of Stateful is computed from a parameter"),
        (["--model.fault=split", "--parallel.tp=2"], "splits the buffer counted, but they are whole on every rank"),
        (["--model.normalises=true", "--parallel.fsdp=2"], "norm normalises over the rows of one rank"),
        (["--data.streamed=true"], "the data (StreamedRows) has a state_dict, which nobody saves"),
    ],
)
def test_a_run_with_something_that_is_not_saved_is_refused_by_its_name(options: list[str], says: str, tmp_path: Path):
    assert says in refusal(paraxis("train", RECIPE, "--run-dir=run", *options, folder=tmp_path), 78)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


@pytest.mark.parametrize(
    ("option", "says"),
    [
        ("--model.counts_rows=true", "buffer counted differs between ranks 0 and 1 after the first step"),
        ("--model.drops=0.3", "the model drew random numbers in the first step (rank 0)"),
    ],
)
def test_ranks_that_come_to_differ_are_found_after_the_first_step(option: str, says: str, tmp_path: Path):
    ended = paraxis("train", RECIPE, "--run-dir=run", "--parallel.fsdp=2", option, folder=tmp_path)
    assert ended.code not in (0, 1)
    assert says in ended.err.splitlines()[-1]
    assert len(metrics(tmp_path / "run")) == 1


def test_skipped_steps_in_a_row_are_counted_on_after_a_resume(tmp_path: Path):
    run = ["train", f"{RECIPES}:run", "--data.bad_rows=2,3,4", "--train.bad_steps=3", "--run-dir=run"]
    succeeded(paraxis(*run, "--train.steps=4", folder=tmp_path))
    assert saved(tmp_path / "run")[0]["skipped_steps"] == 2
    ended = paraxis(*run, folder=tmp_path)
    assert "3 steps in a row, up to step 5, had a loss or gradient that is not finite" in ended.err


class Dropping(nn.Linear):
    """A layer that drops out where no module shows it."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.dropout(super().forward(x))


@pytest.mark.parametrize("kept", ["costly", (), (("linear", 0),)], ids=str)
def test_a_block_that_is_computed_again_drops_out_what_it_did_before(kept: Any):
    gradients = []
    for what in (None, kept):
        torch.manual_seed(0)
        blocks = [Dropping(8, 8) for _ in range(3)]
        checkpoint_blocks(blocks, [what] * 3, lambda block: False)
        nn.Sequential(*blocks)(torch.randn(4, 8)).square().sum().backward()
        gradients.append([block.weight.grad for block in blocks] + [torch.rand(1)])  # nor is anything drawn twice
    assert all(map(torch.equal, *gradients))
    assert not torch.equal(gradients[0][0], torch.zeros(8, 8))


def buffers_of_a_rank(layout: str) -> dict[str, torch.Tensor]:
    from tests.train.stateful import run

    assembled = run_of(with_layout(run(), layout), MadeRows(VOCABULARY, 8))
    return {name: buffer for module in assembled.modules for name, buffer in module.named_buffers()}


def test_buffers_begin_as_the_model_made_them_and_random_ones_alike_on_every_rank():
    ranks = [*run_world(buffers_of_a_rank, 1, ""), *run_world(buffers_of_a_rank, 2, "pp2")]
    for buffers in ranks:
        assert torch.equal(buffers["table"], torch.linspace(0.5, 1.5, WIDTH))
        assert torch.equal(buffers["drawn"], ranks[0]["drawn"])
        assert 0.5 <= buffers["drawn"].min() < buffers["drawn"].max() <= 1.5


def test_first_buffers_need_no_parameters_and_leave_the_generator_alone():
    before = torch.get_rng_state()
    one, other = (first_buffers(lambda: Stateful(StatefulConfig()), seed) for seed in (0, 1))
    assert torch.equal(before, torch.get_rng_state())
    assert one.keys() == {"counted", "drawn", "table"}
    assert not torch.equal(one["drawn"], other["drawn"])
    with pytest.raises(ConfigError, match="computed from a parameter"):
        first_buffers(lambda: Stateful(StatefulConfig(fault="computed")), 0)


def test_the_table_says_everything_that_a_checkpoint_holds(tmp_path: Path):
    """Each of its entries has tensors or numbers of its own, and no two have the same."""

    def body() -> tuple[list[Any], list[Any]]:
        run = run_of(with_layout(experts(), ""), MadeRows(VOCABULARY, 8))
        torch.rand(1)  # so that there is a generator to save
        tensors = [{piece.name for piece in one.pieces(run)} for one in STATE.values()]
        records = [set(one.record(run)) for one in STATE.values()]
        assert {piece.name for piece in pieces(run)} == set().union(*tensors)
        assert meta(run).keys() == set().union(*records)
        return [*map(len, tensors)], [*map(len, records)]

    [(tensors, records)] = run_world(body, 1)
    assert dict(zip(STATE, tensors, strict=True))["random"] == 1
    assert all(a or b for (name, a), b in zip(zip(STATE, tensors, strict=True), records, strict=True) if name != "buffers")


def saved_at_once(config: Any, folder: Path) -> None:
    run: Run = run_of(config, MadeRows(VOCABULARY, 8))
    save_run(run, folder, {})


@pytest.mark.parametrize("precision", ["bf16", "fp64"])
def test_dtypes_on_disk_follow_neither_the_layout_nor_the_dtype_that_is_computed_in(precision: str, tmp_path: Path):
    stored = {}
    for layout in ("", "fsdp2", "tp2", "fsdp2xep2"):
        config = with_layout(replace(experts(), precision=precision), layout)
        run_world(saved_at_once, config.parallel.degrees.ranks, config, tmp_path / (layout or "one"))
        checkpoint = open_checkpoint(tmp_path / (layout or "one") / "step-0")
        stored[layout] = {name: (tensor.dtype, checkpoint.read(name)) for name, tensor in checkpoint.tensors.items()}
    assert {dtype for dtype, _ in stored[""].values()} == {"F32" if precision == "bf16" else "F64"}
    for other in stored.values():
        assert other.keys() == stored[""].keys()
        assert [n for n, (dtype, x) in other.items() if dtype != stored[""][n][0] or not torch.equal(x, stored[""][n][1])] == []


def unbiased_experts() -> Any:
    """Experts that have a form of Hugging Face's."""
    model = experts().model
    return replace(experts(), model=replace(model, routing=replace(model.routing, bias_rate=0.0)))


@pytest.mark.parametrize(("recipe", "layout"), [(layers, "pp2.zbv"), (unbiased_experts, "fsdp2xep2"), (unbiased_experts, "pp2xtp2")])
def test_exports_of_the_same_weights_are_the_same_bytes_whatever_layout_saved_them(recipe: Any, layout: str, tmp_path: Path):
    for name in ("", layout):
        config = with_layout(recipe(), name)
        run_world(saved_at_once, config.parallel.degrees.ranks, config, tmp_path / f"ours{name}")
        assert main(["convert", "export", str(tmp_path / f"ours{name}"), str(tmp_path / f"out{name}"), "--shard-size=20KB"]) == 0
    one, other = ({file.name: file.read_bytes() for file in (tmp_path / f"out{name}").iterdir()} for name in ("", layout))
    assert len(one) > 3
    assert one == other


def test_a_model_that_is_opened_to_be_scored_has_its_buffers_too(tmp_path: Path):
    succeeded(paraxis("train", RECIPE, "--run-dir=run", "--model.normalises=true", folder=tmp_path))
    _, tensors = saved(tmp_path / "run")
    model = open_weights(tmp_path / "run", StatefulConfig(normalises=True)).load(CPU, torch.float32)
    buffers = dict(model.named_buffers())
    assert torch.equal(buffers["table"], torch.linspace(0.5, 1.5, WIDTH))
    for name in ("counted", "drawn", "norm.running_mean", "norm.running_var"):
        assert torch.equal(buffers[name], tensors[f"buffer/{name}"])
