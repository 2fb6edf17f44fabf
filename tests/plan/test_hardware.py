"""Clusters: files read and written, links found, and times that hold what measurements and physics say."""

import tomllib
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from paraxis.base.errors import ConfigError
from paraxis.plan.cluster_file import cluster_toml, parse_cluster, read_cluster, ready_clusters, write_cluster
from paraxis.plan.hardware import EXCHANGES, Cluster, Exchange, Link, Pool
from paraxis.plan.rates import Accelerator, AttentionTime, Move, Product

CHIP = Accelerator(name="chip", memory_bytes=80 << 30, bytes_per_s=2e12, peak_flops={"bf16": 300e12, "fp32": 20e12})
FAST = Link(name="fast", kind="nvlink", bytes_per_s=300e9)
SLOW = Link(name="slow", kind="infiniband", bytes_per_s=25e9)


def cluster(hosts: int = 2, devices: int = 4, **changes: object) -> Cluster:
    pool = Pool(hosts=hosts, devices=devices, accelerator="chip", inside="fast", network="slow")
    made = Cluster(name="test", accelerators={"chip": CHIP}, links={"fast": FAST, "slow": SLOW}, pools=(pool,))
    return replace(made, **changes)


@pytest.mark.parametrize("name", ready_clusters())
def test_a_ready_file_is_read_and_written_back_alike(name: str, tmp_path: Path):
    found = read_cluster(name)
    write_cluster(tmp_path / "again.toml", found)
    assert read_cluster(str(tmp_path / "again.toml")) == found
    assert found.with_devices(found.ranks).ranks == found.ranks
    for rank in range(found.ranks):
        assert found.accelerator_of(rank).source


def test_ready_files_are_of_the_clusters_that_people_have():
    assert {"dgx_a100", "dgx_h100", "dgx_h200", "dgx_b200", "two_h200"} <= {*ready_clusters()}


def test_measured_tables_come_back_from_a_file():
    chip = replace(
        CHIP,
        products=(Product(dtype="bf16", m=64, n=32, k=16, seconds=5e-6),),
        attentions=(AttentionTime(dtype="bf16", batch=1, heads=8, kv_heads=2, width=64, length=1024, forward_s=1e-4, backward_s=3e-4),),
        moves=(Move(bytes=1 << 20, seconds=4e-6),),
    )
    link = replace(FAST, exchanges=(Exchange(kind="all_gather", ranks=4, bytes=1 << 20, seconds=2e-5),))
    made = cluster(accelerators={"chip": chip}, links={"fast": link, "slow": SLOW}, matrix=((1e9, 2e9), (3e9, 4e9)), date="2026-01-31")
    assert parse_cluster(tomllib.loads(cluster_toml(made))) == made


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("gb_per_s = 450", 'gb_per_s = "fast"'),
        ('kind = "nvlink"', 'kind = "rope"'),
        ('network = "infiniband"', 'network = "carrier pigeon"'),
        ("hosts = 1", "hosts = 0"),
        ("devices = 8", "device = 8"),
        ("gb_per_s = 3350", ""),
        ("peak_tflops = { bf16", "peak_tflops = { bf17"),
        ("memory_gib = 79.1", 'memory_gib = 79.1\nproducts = [["bf16", 1, 2]]'),
        ("[links.nvlink]", "[links.nvlink]\nexchanges = [['gossip', 2, 1, 8, 1.0]]"),
    ],
)
def test_a_wrong_file_is_refused_in_words(change: str, says: str, tmp_path: Path):
    from paraxis.plan.cluster_file import READY

    path = tmp_path / "wrong.toml"
    text = (READY / "dgx_h100.toml").read_text()
    assert change in text
    path.write_text(text.replace(change, says, 1))
    with pytest.raises(ConfigError, match=r"wrong\.toml"):
        read_cluster(str(path))


def test_a_file_that_is_not_there_names_the_ready_ones():
    with pytest.raises(ConfigError, match="dgx_h100"):
        read_cluster("nowhere.toml")


def test_more_devices_repeat_the_host():
    many = read_cluster("dgx_h100").with_devices(1024)
    assert (many.ranks, many.hosts, many.host_of(1023)) == (1024, 128, 127)
    assert read_cluster("dgx_h100").with_devices(2).ranks == 2
    with pytest.raises(ConfigError, match="multiple of the 8"):
        read_cluster("dgx_h100").with_devices(12)
    with pytest.raises(ConfigError, match="none for rank 8"):
        read_cluster("dgx_h100").host_of(8)


def test_a_group_talks_over_the_links_that_it_crosses():
    two = cluster()
    inside, across = two.exchange_s("all_gather", 1e9, range(4)), two.exchange_s("all_gather", 1e9, (0, 4))
    assert inside == pytest.approx(0.75e9 / (0.8 * 300e9), rel=0.01)
    assert across == pytest.approx(0.5e9 / (0.9 * 25e9), rel=0.01)
    # Four devices a host go out through four ports.
    assert two.exchange_s("all_gather", 1e9, range(8)) == pytest.approx(0.875e9 / (0.9 * 100e9), rel=0.01)
    assert two.exchange_s("p2p", 1e9, (0, 1)) < two.exchange_s("p2p", 1e9, (0, 4))
    assert two.exchange_s("all_gather", 1e9, (3,)) == 0


def test_hosts_of_other_pools_and_measured_pairs_set_the_pace():
    ethernet = Link(name="ethernet", kind="ethernet", bytes_per_s=1e9)
    pool = Pool(hosts=1, devices=4, accelerator="chip", inside="fast")
    mixed = cluster(pools=(pool, pool), links={"fast": FAST, "slow": SLOW, "ethernet": ethernet}, between="ethernet")
    assert mixed.exchange_s("p2p", 1e9, (0, 4)) == pytest.approx(1 / 0.8, rel=0.01)
    measured = cluster(hosts=3, devices=1, matrix=((0, 20e9, 5e9), (20e9, 0, 20e9), (5e9, 20e9, 0)))
    assert measured.exchange_s("p2p", 1e9, (0, 2)) == pytest.approx(0.2, rel=0.01)
    assert measured.exchange_s("all_gather", 3e9, (0, 1, 2)) == pytest.approx(2e9 / 5e9, rel=0.01)  # the ring's slowest edge


@pytest.mark.parametrize("kind", EXCHANGES)
def test_more_bytes_never_take_less_and_faster_links_never_more(kind: str):
    two, faster = cluster(), cluster(links={"fast": replace(FAST, bytes_per_s=600e9), "slow": replace(SLOW, bytes_per_s=50e9)})
    ranks = (0, 4) if kind == "p2p" else range(8)
    times = [two.exchange_s(kind, 4.0**power, ranks) for power in range(16)]
    assert all(less <= more for less, more in pairwise(times))
    assert all(faster.exchange_s(kind, 4.0**power, ranks) <= time for power, time in enumerate(times))


def test_a_measured_exchange_is_given_back_and_carried_over_to_other_groups():
    table = tuple(Exchange(kind="all_reduce", ranks=4, bytes=bytes, seconds=s) for bytes, s in ((1 << 20, 1e-4), (1 << 26, 2e-3)))
    two = cluster(links={"fast": replace(FAST, exchanges=table), "slow": SLOW})
    assert two.exchange_s("all_reduce", 1 << 20, range(4)) == pytest.approx(1e-4)
    assert two.exchange_s("all_reduce", 1 << 26, range(4)) == pytest.approx(2e-3)
    assert two.exchange_s("all_reduce", 1 << 23, range(4)) == pytest.approx((1e-4 * 2e-3) ** 0.5)
    # The same link, half of the ranks: what the ring's model says of the two sizes of group.
    plain = cluster()
    ratio = plain.exchange_s("all_reduce", 1 << 26, range(2)) / plain.exchange_s("all_reduce", 1 << 26, range(4))
    assert two.exchange_s("all_reduce", 1 << 26, range(2)) == pytest.approx(2e-3 * ratio)
    assert two.exchange_s("all_reduce", 1 << 28, range(4)) == pytest.approx(8e-3, rel=0.05)  # beyond the table at its rate


def test_ranks_that_come_late_hold_up_collectives_and_not_messages():
    usual, late = cluster(), cluster(links={"fast": replace(FAST, skew_s=1e-3), "slow": SLOW})
    for ranks, doublings in ((range(2), 1), (range(4), 2), (range(8), 3)):
        for kind in EXCHANGES:
            if kind != "p2p":
                more = late.exchange_s(kind, 1 << 20, ranks) - usual.exchange_s(kind, 1 << 20, ranks)
                assert more == pytest.approx(1e-3 * doublings)
    assert late.exchange_s("p2p", 1 << 20, (0, 1)) == usual.exchange_s("p2p", 1 << 20, (0, 1))
    assert late.exchange_s("all_reduce", 1 << 20, (0, 4)) == usual.exchange_s("all_reduce", 1 << 20, (0, 4))  # one rank a host
    assert parse_cluster(tomllib.loads(cluster_toml(late))) == late
    with pytest.raises(ConfigError, match="skew_s=-1 and"):
        replace(FAST, skew_s=-1)


def test_what_the_host_took_of_a_measured_exchange_is_not_the_devices():
    table = tuple(Exchange(kind="all_gather", ranks=2, bytes=size, seconds=s) for size, s in ((1 << 20, 90e-6), (1 << 30, 2.5e-3)))
    plain, asked = (cluster(links={"fast": replace(FAST, exchanges=table, host_s=s), "slow": SLOW}) for s in (0.0, 50e-6))
    for size in (1 << 20, 1 << 25, 1 << 30):
        assert asked.exchange_s("all_gather", size, (0, 1)) == pytest.approx(plain.exchange_s("all_gather", size, (0, 1)) - 50e-6)
    assert parse_cluster(tomllib.loads(cluster_toml(asked))) == asked
    with pytest.raises(ConfigError, match="host_s=-1 0 or more"):
        replace(FAST, host_s=-1)
    for wrong in ({"host_eager_s": -1.0}, {"posted": 0.5}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            replace(CHIP, **wrong)


def test_products_follow_the_roofline_where_nothing_was_measured():
    assert CHIP.product_s("bf16", 8192, 8192, 8192) == pytest.approx(2 * 8192**3 / 300e12 / CHIP.product_share)
    assert CHIP.product_s("bf16", 1, 8192, 8192) == pytest.approx(2 * 8192 * 8194 / 2e12 / CHIP.product_share, rel=0.01)  # bytes
    assert CHIP.product_s("bf16", 2, 2, 2) == CHIP.shortest_s
    assert CHIP.moving_s(2e9) == pytest.approx(1e-3 / CHIP.memory_share)
    with pytest.raises(ConfigError, match="no peak for float8"):
        CHIP.product_s("float8", 64, 64, 64)


def test_measured_products_are_given_back_and_their_shares_interpolated():
    sizes = ((1024, 1024, 1024), (8192, 8192, 8192))
    ideal = {m: 2 * m * n * k / 300e12 for m, n, k in sizes}
    shares = {1024: 0.4, 8192: 0.9}
    products = tuple(Product(dtype="bf16", m=m, n=n, k=k, seconds=ideal[m] / shares[m]) for m, n, k in sizes)
    chip = replace(CHIP, products=products, launch_s=0)
    for m, n, k in sizes:
        assert chip.product_s("bf16", m, n, k) == pytest.approx(ideal[m] / shares[m])
    between = 2 * 2896**3 / 300e12 / chip.product_s("bf16", 2896, 2896, 2896)
    assert between == pytest.approx(0.65, abs=0.01)  # half way in the logarithm
    assert chip.product_s("fp32", 4096, 4096, 4096) == pytest.approx(2 * 4096**3 / 20e12 / CHIP.product_share)


def test_attention_counts_half_of_the_pairs_and_five_products_backward():
    whole = CHIP.attention_s("bf16", 1, 32, 128, 8192, 8192, causal=False)
    assert CHIP.attention_s("bf16", 1, 32, 128, 8192, 8192) == pytest.approx(whole / 2)
    assert CHIP.attention_s("bf16", 1, 32, 128, 8192, 8192, causal=False, backward=True) == pytest.approx(2.5 * whole)
    h200 = read_cluster("two_h200").accelerator_of(0)
    assert h200.attention_s("bf16", 1, 32, 128, 8192, 8192) == pytest.approx(957.488e-6)
    assert h200.attention_s("bf16", 1, 32, 128, 8192, 8192, backward=True) == pytest.approx(2780.35e-6)
