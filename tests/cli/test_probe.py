"""`paraxis probe`: a machine measured into a file that planning reads, and what is refused."""

from pathlib import Path

import pytest

from paraxis.base.errors import ConfigError
from paraxis.bench.collectives import bus_bytes_per_s, collective_rows
from paraxis.cli import probe
from paraxis.plan.cluster_file import read_cluster
from paraxis.plan.hardware import EXCHANGES, Exchange


def test_two_ranks_measure_this_machine_into_a_cluster_file(tmp_path: Path):
    out = tmp_path / "here.toml"
    assert probe.run(["--quick", "--ranks", "2", "--out", str(out), "--name", "here"]) == 0
    cluster = read_cluster(str(out))
    assert (cluster.name, cluster.ranks, cluster.hosts) == ("here", 2, 1)
    assert "torch" in cluster.versions
    chip = cluster.accelerator_of(0)
    assert all((chip.products, chip.attentions, chip.moves, chip.peak_flops))
    [row] = [p for p in chip.products if p.m == 512]
    assert chip.product_s(row.dtype, row.m, row.n, row.k) == pytest.approx(row.seconds)
    assert {one.kind for one in cluster.links["inside"].exchanges} == {*EXCHANGES}
    assert len(list(collective_rows(cluster))) == len(cluster.links["inside"].exchanges)


def test_bandwidth_on_the_bus_is_counted_as_nccl_tests_does():
    gather, reduce, message = (
        Exchange(kind=kind, ranks=ranks, bytes=8_000, seconds=1.0) for kind, ranks in (("all_gather", 8), ("all_reduce", 8), ("p2p", 2))
    )
    assert [bus_bytes_per_s(one) for one in (gather, reduce, message)] == pytest.approx([7_000, 14_000, 8_000])


def test_what_is_not_an_option_is_refused():
    with pytest.raises(ConfigError, match=r"--rank is not an option.*--ranks"):
        probe.run(["--rank", "2"])
