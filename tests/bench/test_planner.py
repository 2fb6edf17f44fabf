"""Published rows: read as runs that can be checked, predicted by the planner and by others' equations, never fitted on when scored."""

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from paraxis.base.errors import ConfigError, DataError
from paraxis.bench import planner
from paraxis.bench.percent import summaries
from paraxis.bench.planner import MegatronRun, Said, Sample, accelerator, fitted, record, samples, trace
from paraxis.bench.published import Published, clusters, published
from paraxis.plan.published import GPTStep, amp_s, pipette_s
from paraxis.train.check import check

FOLDER = Path(__file__).parents[2] / "bench/published"
ROWS = published(FOLDER)
# 10 rows of a micro-batch each through 4 stages: numbers that can be checked by hand.
STEP = GPTStep(
    width=8, layers=4, vocab_size=16, seq_len=4, micro_batch=1, micro_batches=10, tensor=1, stages=4, replicas=2,
    forward_s=1.0, backward_s=2.0, stages_bytes_per_s=640.0, replicas_bytes_per_s=768.0,
)  # fmt: skip


def test_the_rows_are_split_as_was_written_down():
    assert Counter((row.set, row.use) for row in ROWS) == {
        ("vtrain, one host", "calibrate"): 1440,
        ("vtrain, many hosts", "score"): 54,
        ("Megatron-LM", "calibrate"): 1,
        ("Megatron-LM", "score"): 5,
        ("TorchTitan", "calibrate"): 1,
        ("TorchTitan", "score"): 5,
    }


@pytest.mark.parametrize("use", ["calibrate", "score"])
def test_rows_are_runs_that_can_be_had(use: str):
    for row in [row for row in ROWS if row.use == use][:: 40 if use == "calibrate" else 4]:
        check(row.config, row.ranks)
        assert row.config.parallel.degrees.filling(row.ranks).ranks == row.ranks


def test_a_row_s_time_comes_from_its_published_number():
    by_name = {row.name: row.step_s for row in ROWS}
    assert by_name["12288x96 1536 rows of 2048, 4 at a time, pp16xdp4xtp8"] == pytest.approx(57.5043)
    assert by_name["8B on 8, fsdp8, eager"] == pytest.approx(2 * 8192 / 5762)
    # 96 B s l h^2 (1 + s / 6h + V / 16lh) operations at 137 TFLOP/s on each of 32 devices.
    flops = 96 * 512 * 2048 * 24 * 2304**2 * (1 + 2048 / (6 * 2304) + 51_200 / (16 * 24 * 2304))
    assert by_name["1.7B on 32, 16 rows at a time, pp1xdp32xtp1"] == pytest.approx(flops / (32 * 137e12))


def test_collectives_inside_a_host_are_the_measured_ones():
    inside = clusters(FOLDER)["vtrain_a100"].links["nvlink"].exchanges
    assert {(exchange.kind, exchange.ranks) for exchange in inside} == {("all_reduce", ranks) for ranks in (2, 4, 8)}
    assert min(inside, key=lambda e: (-e.ranks, e.bytes)).seconds == pytest.approx(92.79e-6)


def test_constants_of_devices_say_where_they_come_from():
    for name, cluster in clusters(FOLDER).items():
        assert "fitted" in accelerator(cluster).source, name
        assert "data sheet" not in accelerator(cluster).measured


def test_amp_counts_messages_once_and_pipette_once_a_round():
    message_s = 2 * 4 * 8 / 640
    gradients_s = {blocks: 2 * (16 * 8 + blocks * 64) / 768 for blocks in (12, 16)}
    assert amp_s(STEP) == pytest.approx(13 * 3 + 6 * message_s + gradients_s[12])
    assert pipette_s(STEP) == pytest.approx(3 * 3 + 2 * (4 * 3 + 6 * message_s) + gradients_s[16])
    assert pipette_s(replace(STEP, micro_batches=3)) == amp_s(replace(STEP, micro_batches=3))


def test_without_replicas_or_stages_the_equations_are_the_micro_batches():
    alone = replace(STEP, stages=1, replicas=1)
    assert amp_s(alone) == pipette_s(alone) == 30


@pytest.fixture(scope="module")
def pipeline() -> MegatronRun:
    """A calibration row with pipeline, tensors and replicas, traced in a process that is in no world."""
    [row] = [row for row in ROWS if row.name == "2048x12 16 rows of 1024, 2 at a time, pp2xdp2xtp2"]
    assert not dist.is_initialized()
    traced = trace(row, {})
    assert isinstance(traced, MegatronRun)
    return traced


def test_a_prediction_follows_the_machine(pipeline):
    machine = clusters(FOLDER)["vtrain_a100"]
    usual = pipeline.said(machine).step_s
    assert 0.5 < usual / pipeline.row.step_s < 1.5
    for name, factor in (("product_share", 0.3), ("memory_share", 0.3), ("launch_s", 3), ("skew_s", 10)):
        assert pipeline.said(planner.changed(machine, name, factor)).step_s > usual, name


def test_the_pipeline_is_played_not_summed(pipeline):
    """At least as long as its busiest stage, and the equations' bubble is there: 4 micro-batches through 2 stages take 5 turns."""
    said = pipeline.said(clusters(FOLDER)["vtrain_a100"])
    assert said.step_s == pytest.approx(said.by_equation["amp"], rel=0.25)


def test_a_fit_finds_the_constant_that_made_the_times(pipeline):
    machine = planner.changed(clusters(FOLDER)["vtrain_a100"], "launch_s", 0.1)
    seen = replace(pipeline, row=replace(pipeline.row, step_s=pipeline.said(planner.changed(machine, "product_share", 0.7)).step_s))
    found = fitted([Sample(seen)], machine, ("product_share",), lambda text: None)
    assert accelerator(found).product_share == pytest.approx(0.7 * accelerator(machine).product_share, rel=0.02)


def test_scored_rows_are_not_fitted_on(pipeline):
    scored = replace(pipeline, row=replace(pipeline.row, use="score"))
    for sample in (Sample(scored), Sample(pipeline, scored)):
        with pytest.raises(AssertionError, match="scored rows are not fitted on"):
            fitted([sample], clusters(FOLDER)["vtrain_a100"], ("product_share",), lambda text: None)


def test_a_shape_of_block_is_one_sample_of_the_deepest_and_the_shallowest_rows_alike(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(planner, "trace", lambda row, known: MegatronRun(row, None))  # type: ignore[arg-type]
    found = samples([row for row in ROWS if row.set == "vtrain, one host"], {})
    assert len(found) == 2 * 4 * 4  # widths, micro-batches, tensor-parallel degrees
    for sample in found:
        assert sample.shorter is not None
        longer, shorter = sample.longer.row.config, sample.shorter.row.config
        assert (longer.model.layers, shorter.model.layers) == (24, 12)
        assert replace(longer, model=shorter.model, parallel=shorter.parallel) == shorter
        assert sample.seconds > 0


def example(seconds: float, **changes: Any) -> Published:
    return replace(ROWS[0], set="some", name=f"{seconds}", step_s=seconds, **changes)


def test_a_record_has_signed_percents_and_a_summary_their_mean_and_worst():
    said = Said(step_s=1.1, by_equation={"amp": 0.8, "pipette": 1.0}, reserved=9 * 2**30)
    rows = [record(example(1.0, reserved_gib=10.0), said), record(example(2.2), said), record(example(3.0), None, "cannot be had")]
    assert [row["planner_percent"] for row in rows] == [10.0, -50.0, None]
    assert (rows[0]["amp_percent"], rows[0]["memory_percent"], rows[2]["problem"]) == (-20.0, -10.0, "cannot be had")
    mean, signed, worst = summaries(rows)
    assert (mean["row"], mean["planner_percent"], mean["memory_percent"]) == ("mean of 2", 30.0, 10.0)
    assert (signed["planner_percent"], worst["planner_percent"]) == (-20.0, -50.0)


def test_a_folder_without_rows_is_refused_by_its_path(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"measured_single_node.csv: No such file .* --rows"):
        published(tmp_path)
    (tmp_path / "vtrain").mkdir()
    for name in ("measured_single_node.csv", "measured_multi_node.csv"):
        (tmp_path / "vtrain" / name).write_text((FOLDER / "vtrain" / name).read_text().splitlines()[0])
    (tmp_path / "published_rows.json").write_text(json.dumps({"megatron_ptdp_a100": {}}))
    with pytest.raises(DataError, match="does not hold the published rows"):
        published(tmp_path)
