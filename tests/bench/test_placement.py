"""`paraxis bench placement`: what it makes up has the variation that it says, and what it reports can be had by its command."""

import json
from pathlib import Path
from statistics import fmean, pstdev

import pytest

from paraxis.bench.placement import NOISE, placement_rows, snapshots
from paraxis.cli import main
from paraxis.plan.cluster_file import read_cluster
from paraxis.recipes.find import find

LAYOUT = ["--parallel.pp=2", "--parallel.fsdp=-1", "--parallel.microbatches=4", "--compile=none"]


@pytest.mark.parametrize("variation", [0.0, 0.1, 0.2])
def test_links_vary_as_much_as_is_said_and_alike_in_both_snapshots(variation: float):
    now, after = snapshots(32, 1e9, variation, 0)
    pairs = [(a, b) for a in range(32) for b in range(32) if a != b]
    links = [now[a][b] for a, b in pairs]
    assert fmean(links) == pytest.approx(1e9, rel=0.02)
    assert pstdev(links) / fmean(links) == pytest.approx((variation**2 + NOISE**2) ** 0.5, rel=0.15)
    changed = pstdev([after[a][b] / now[a][b] for a, b in pairs])
    assert changed == pytest.approx(2**0.5 * NOISE, rel=0.2)
    assert snapshots(32, 1e9, variation, 0) == (now, after)


def test_more_is_saved_where_links_differ_more_and_on_the_next_snapshot_too():
    config = find("llama3_8b", {"parallel.pp": 2, "model.layers": 2, "parallel.microbatches": 4, "data.seq_len": 1024})[0]
    even, uneven = placement_rows(config, read_cluster("dgx_h100").with_devices(64), (0.0, 0.4), seeds=1)
    assert even["saved_of_natural_percent"] < 5 < uneven["saved_of_natural_percent"]
    assert uneven["next_snapshot_of_natural_percent"] > 5
    assert uneven["placed_s"] < uneven["natural_s"]


def test_the_command_writes_results_that_become_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = tmp_path / "results.json"
    assert main(["bench", "placement", "debug", *LAYOUT, "--hosts=2", "--matrices=1", f"--out={out}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(out.read_text())
    assert main(["bench", "table", str(out)]) == 0
    assert "saved of natural percent" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["debug", "--hosts=1"], "hosts=1"),
        ([], "takes one recipe"),
        (["debug", "--cluster=nowhere.toml"], "dgx_h100"),
        (["debug", "--parallel.fsdp=3"], "needs 3 ranks but 128"),
    ],
)
def test_what_cannot_be_placed_is_refused_in_words(words: list[str], says: str, capsys: pytest.CaptureFixture[str]):
    assert main(["bench", "placement", *words]) != 0
    assert says in capsys.readouterr().err
