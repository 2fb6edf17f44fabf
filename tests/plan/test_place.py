"""Placements are as good as trying every one of them, and what they find by themselves is what people do by rule."""

import random
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any

import pytest

from paraxis.base.axes import AXES, Degrees
from paraxis.base.errors import ConfigError
from paraxis.plan.cluster_file import read_cluster
from paraxis.plan.cuts import cuts_by_speed, stage_speeds
from paraxis.plan.hardware import Cluster, Link, Pool
from paraxis.plan.memory import coordinates, sketch
from paraxis.plan.place import Placement, cost_s, place
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.rates import Accelerator
from paraxis.plan.timing import Place
from paraxis.plan.traffic import Collective, Traffic, groups_of, traffic_of
from paraxis.recipes.find import find
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta
from paraxis.train.stages import build_stages

CHIP = Accelerator(name="chip", memory_bytes=80 << 30, bytes_per_s=2e12, peak_flops={"bf16": 300e12})
LINKS = {
    "fast": Link(name="fast", kind="nvlink", bytes_per_s=300e9),
    "slow": Link(name="slow", kind="infiniband", bytes_per_s=25e9),
    "ethernet": Link(name="ethernet", kind="ethernet", bytes_per_s=3e9),
}


def cluster_of(*hosts: int, matrix: Sequence[Sequence[float]] = (), between: str = "ethernet", slower: float = 1.0) -> Cluster:
    """A pool for each number of hosts; of one device a host where there is a matrix, else of four; chips of the last may be slower."""
    devices = 1 if matrix else 4
    chips = {"chip": CHIP, "other": replace(CHIP, name="other", peak_flops={"bf16": 300e12 / slower})}
    kinds = ["chip"] * (len(hosts) - 1) + ["chip" if slower == 1 else "other"]
    pools = tuple(
        Pool(hosts=n, devices=devices, accelerator=kind, inside="fast", network="slow") for n, kind in zip(hosts, kinds, strict=True)
    )
    return Cluster(name="test", accelerators=chips, links=LINKS, pools=pools, between=between, matrix=tuple(map(tuple, matrix)))


def made_traffic(degrees: Degrees, draw: random.Random) -> Traffic:
    """Something of every axis that is used, of random sizes; some pipeline ranks have more of it."""

    def collective(group: Any, exchange: Any) -> Collective:
        return Collective(
            group=group,
            exchange=exchange,
            bytes=draw.uniform(1e6, 1e9),
            times=tuple(draw.choice([1.0, 2.0, 3.0]) for _ in range(degrees.pp)),
        )

    each, once = [], []
    if degrees.tp > 1:
        each.append(collective("tp", "all_reduce"))
    if degrees.cp > 1:
        each.append(collective("cp", "all_to_all"))
    if degrees.ep > 1:
        each.append(collective("ep", "all_to_all"))
    if degrees.shards > 1:
        once += [collective("shards", "all_gather"), collective("shards", "reduce_scatter")]
    if degrees.dp > 1:
        once.append(collective("dp", "all_reduce"))
    hops = tuple((stage, stage + 1) for stage in range(degrees.pp - 1))
    return Traffic(
        each=tuple(each),
        once=tuple(once),
        micro_batches=4,
        message_bytes=draw.uniform(1e6, 1e9) if hops else 0.0,
        hops=hops,
        rounds=2.0 if hops else 0.0,
    )


class Judge:
    """The cost of an order, from `Cluster.exchange_s` and coordinates alone; what `place` counts step by step, written down in one go."""

    def __init__(self, cluster: Cluster, degrees: Degrees, traffic: Traffic) -> None:
        self.cluster, self.degrees, self.traffic = cluster, degrees, traffic
        self.at = [coordinates(rank, degrees) for rank in range(degrees.ranks)]
        self.groups = {one.group: self._groups(one.group) for one in (*traffic.each, *traffic.once)}
        self.lanes = self._alike(("dp", "fsdp", "cp", "tp"))

    def _groups(self, kind: str) -> dict[int, list[list[int]]]:
        d = self.degrees
        kept = {"tp": ("pp", "dp", "fsdp", "cp"), "cp": ("pp", "dp", "fsdp", "tp"), "shards": ("pp", "dp", "tp"), "dp": AXES[:1] + AXES[2:]}
        if kind == "ep":
            shard = [at["fsdp"] * d.cp + at["cp"] for at in self.at]
            keys = [(at["pp"], at["dp"], shard[rank] // d.ep, at["tp"]) for rank, at in enumerate(self.at)]
            groups = [[rank for rank, own in enumerate(keys) if own == key] for key in dict.fromkeys(keys)]
        else:
            groups = self._alike(kept[kind])
        return {stage: [group for group in groups if self.at[group[0]]["pp"] == stage] for stage in range(d.pp)}

    def _alike(self, axes: Sequence[str]) -> list[list[int]]:
        keys = [tuple(at[axis] for axis in axes) for at in self.at]
        return [[rank for rank, own in enumerate(keys) if own == key] for key in dict.fromkeys(keys)]

    def _slowest(self, ones: Sequence[Collective], stage: int, order: Sequence[int]) -> float:
        """Of each kind of group the slowest."""
        total = 0.0
        for kind in dict.fromkeys(one.group for one in ones):
            own = [one for one in ones if one.group == kind]
            total += max(
                sum(one.times[stage] * self.cluster.exchange_s(one.exchange, one.bytes, [order[r] for r in group]) for one in own)
                for group in self.groups[kind][stage]
            )
        return total

    def __call__(self, order: Sequence[int]) -> float:
        t, stages = self.traffic, range(self.degrees.pp)
        each = [self._slowest(t.each, stage, order) for stage in stages]
        once = [self._slowest(t.once, stage, order) for stage in stages]
        path = 0.0
        if t.hops:
            path = max(
                sum(
                    self.cluster.exchange_s("p2p", t.message_bytes, (order[a], order[b]))
                    for one, other in t.hops
                    for a, b in ((lane[one], lane[other]), (lane[other], lane[one]))
                )
                for lane in self.lanes
            )
        return (t.micro_batches - 1) * max(each) + sum(each) + max(once) + t.rounds * path


def random_matrix(hosts: int, draw: random.Random) -> list[list[float]]:
    """Islands of fast links among slow ones, no two alike, nor both directions of one; hosts are numbered at random."""
    island = [draw.randrange(3) for _ in range(hosts)]
    return [[draw.uniform(0.5, 1.5) * (40e9 if island[a] == island[b] else 10e9) for b in range(hosts)] for a in range(hosts)]


def every_order(cluster: Cluster, ranks: int) -> Any:
    """Every order that differs from others by more than devices of one host changing places."""
    seen = set()
    for order in permutations(range(cluster.ranks), ranks):
        hosts = tuple(cluster.host_of(device) for device in order)
        if hosts not in seen:
            seen.add(hosts)
            yield order


SIX = [
    Degrees(pp=6), Degrees(fsdp=6), Degrees(pp=3, fsdp=2), Degrees(pp=2, fsdp=3), Degrees(dp=3, tp=2), Degrees(fsdp=3, tp=2),
    Degrees(pp=3, tp=2), Degrees(cp=3, dp=2), Degrees(fsdp=6, ep=3), Degrees(fsdp=3, cp=2, ep=2),
]  # fmt: skip
EIGHT = [
    Degrees(pp=2, fsdp=2, tp=2), Degrees(pp=4, tp=2), Degrees(pp=2, dp=2, fsdp=2), Degrees(pp=8), Degrees(fsdp=4, tp=2), Degrees(dp=8),
    Degrees(pp=2, cp=2, tp=2), Degrees(fsdp=8, ep=4),
]  # fmt: skip


def is_as_good_as_the_best_of_all(cluster: Cluster, degrees: Degrees, seed: int) -> None:
    traffic = made_traffic(degrees, random.Random(seed))
    judge = Judge(cluster, degrees, traffic)
    found = place(cluster, degrees, traffic)
    assert found.cost_s == pytest.approx(judge(found.order))
    assert found.natural_s == pytest.approx(judge(range(degrees.ranks)))
    assert found.cost_s == pytest.approx(min(judge(order) for order in every_order(cluster, degrees.ranks)))


@pytest.mark.parametrize("degrees", SIX, ids=str)
@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(3, 20))])
def test_six_ranks_are_placed_as_well_as_by_trying_every_placement(degrees: Degrees, seed: int):
    cluster = cluster_of(6, matrix=random_matrix(6, random.Random(100 + seed)))
    is_as_good_as_the_best_of_all(cluster, degrees, seed)


@pytest.mark.full
@pytest.mark.parametrize("degrees", EIGHT, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_eight_ranks_are_placed_as_well_as_by_trying_every_placement(degrees: Degrees, seed: int):
    cluster = cluster_of(8, matrix=random_matrix(8, random.Random(200 + seed)))
    is_as_good_as_the_best_of_all(cluster, degrees, seed)


@pytest.mark.parametrize("degrees", EIGHT, ids=str)
@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.full) for seed in range(1, 10))])
def test_devices_of_two_hosts_are_placed_as_well_as_by_trying_every_placement(degrees: Degrees, seed: int):
    is_as_good_as_the_best_of_all(cluster_of(1, 1), degrees, seed)


@pytest.mark.parametrize("degrees", [Degrees(pp=2, fsdp=2), Degrees(fsdp=4), Degrees(pp=4)], ids=str)
def test_the_best_hosts_are_taken_where_not_all_are_needed(degrees: Degrees):
    is_as_good_as_the_best_of_all(cluster_of(7, matrix=random_matrix(7, random.Random(3))), degrees, 3)


def stages_of(order: Sequence[int], degrees: Degrees) -> list[Sequence[int]]:
    size = degrees.ranks // degrees.pp
    return [order[first : first + size] for first in range(0, degrees.ranks, size)]


def test_data_groups_stay_on_an_island_and_pipelines_cross_to_the_other():
    # Even hosts are one island and odd ones the other, with a slow link between; nothing says so but the matrix.
    matrix = [[40e9 if a % 2 == b % 2 else 2e9 for b in range(8)] for a in range(8)]
    degrees = Degrees(pp=2, fsdp=4)
    found = place(cluster_of(8, matrix=matrix), degrees, replace(made_traffic(degrees, random.Random(0)), message_bytes=1e6))
    assert [len({device % 2 for device in stage}) for stage in stages_of(found.order, degrees)] == [1, 1]
    assert found.gain > 0.5


def test_a_pipeline_stays_on_an_island_where_its_messages_are_what_costs():
    matrix = [[40e9 if a % 2 == b % 2 else 2e9 for b in range(8)] for a in range(8)]
    degrees = Degrees(pp=4, fsdp=2)
    heavy = replace(made_traffic(degrees, random.Random(0)), message_bytes=4e9, rounds=100.0)
    found = place(cluster_of(8, matrix=matrix), degrees, heavy)
    for pipeline in range(2):
        assert len({stage[pipeline] % 2 for stage in stages_of(found.order, degrees)}) == 1


def test_tensor_groups_stay_inside_a_host():
    degrees = Degrees(pp=2, dp=2, tp=4)
    cluster = cluster_of(2, 2)
    found = place(cluster, degrees, replace(made_traffic(degrees, random.Random(1)), message_bytes=1e6))
    for group in groups_of("tp", degrees).reshape(-1, 4):
        assert len({cluster.host_of(found.order[rank]) for rank in group}) == 1


def test_infiniband_beats_roce_and_that_both_joined_by_ethernet_which_beats_a_rule_that_ignores_links():
    config = find(
        "llama3_8b",
        {"parallel.pp": 2, "parallel.dp": 4, "parallel.fsdp": 1, "parallel.tp": 4, "parallel.microbatches": 16, "data.seq_len": 2048},
    )[0]
    degrees = config.parallel.degrees
    roce = Link(name="roce", kind="roce", bytes_per_s=25e9)
    plain = cluster_of(4, 4)

    def alike(network: str) -> Cluster:
        pool = replace(plain.pools[0], hosts=8, network=network)
        return replace(plain, pools=(pool,), links={**LINKS, "roce": roce})

    ib, ro = replace(plain.pools[0], network="slow"), replace(plain.pools[1], network="roce")
    mixed = replace(plain, pools=(ib, ro), links={**LINKS, "roce": roce})
    traffic = traffic_of(config, mixed, 32)
    # Replica j's stages on neighbouring hosts, so that every data group has hosts in both pools.
    hosts = [(j // 2) * 4 + (j % 2) * 2 + stage for stage in range(2) for j in range(4)]
    naive = cost_s(mixed, degrees, traffic, [host * 4 + device for host in hosts for device in range(4)])
    placed = {name: place(alike(name), degrees, traffic, moves=600).cost_s for name in ("slow", "roce", "ethernet")}
    found = place(mixed, degrees, traffic, moves=600)
    assert placed["slow"] <= placed["roce"] <= found.cost_s < naive <= placed["ethernet"]
    assert [len({device // 16 for device in stage}) for stage in stages_of(found.order, degrees)] == [1, 1]


def test_like_devices_share_a_stage_and_layers_follow_their_speed():
    # One fast host, two slow ones, one fast: by number, both stages would have one of each.
    chips = {"chip": CHIP, "other": replace(CHIP, name="other", peak_flops={"bf16": 300e12 * 22 / 26})}
    pools = tuple(
        Pool(hosts=n, devices=2, accelerator=kind, inside="fast", network="slow") for n, kind in ((1, "chip"), (2, "other"), (1, "chip"))
    )
    cluster = Cluster(name="test", accelerators=chips, links=LINKS, pools=pools, between="slow")
    config = find("llama3_8b", {"model.layers": 48, "model.vocab_size": 1024, "parallel.pp": 2, "parallel.fsdp": 4})[0]
    degrees = config.parallel.degrees
    natural = stage_speeds(cluster, 2, range(8), "bf16")
    assert natural[0] == natural[1]
    assert cuts_by_speed(config, cluster, range(8)) == ()
    found = place(cluster, degrees, traffic_of(config, cluster, 8))
    speeds = stage_speeds(cluster, 2, found.order, "bf16")
    assert max(speeds) / min(speeds) == pytest.approx(26 / 22)
    cuts = cuts_by_speed(config, cluster, found.order)
    assert abs(max(cuts) - 26) <= 1
    assert sum(cuts) == 48
    assert (cuts[0] > cuts[1]) == (speeds[0] > speeds[1])
    # Training takes the cut as it is.
    trained = replace(config, parallel=replace(config.parallel, cuts=cuts))
    stages = build_stages(trained, degrees, on_meta(trained))
    assert stages is not None
    assert tuple(len(own) for own in stages.layers) == cuts


def test_layers_that_a_stage_has_no_memory_for_go_to_another():
    config = find("llama3_8b", {"model.layers": 8, "model.vocab_size": 1024, "parallel.pp": 2, "parallel.fsdp": 4})[0]
    cluster = cluster_of(1, 1, slower=2.0)
    usable = cluster.accelerator_of(0).usable_bytes
    assert cuts_by_speed(config, cluster, range(8)) == (6, 2)
    assert cuts_by_speed(config, cluster, range(8), memory=[[usable / 4] * 8, [usable / 4] * 8]) == (4, 4)
    with pytest.raises(ConfigError, match="fits the memory"):
        cuts_by_speed(config, cluster, range(8), memory=[[usable] * 8] * 2)
    with pytest.raises(ConfigError, match="memory of 3 stages"):
        cuts_by_speed(config, cluster, range(8), memory=[[0.0] * 8] * 3)


def test_hosts_that_are_alike_stay_as_they_are_numbered():
    cluster = read_cluster("dgx_h100").with_devices(1024)
    config = find("llama3_70b", {"parallel.pp": 8, "parallel.fsdp": 16, "parallel.tp": 8, "parallel.microbatches": 32})[0]
    found = place(cluster, config.parallel.degrees, traffic_of(config, cluster, 1024))
    assert found.order == range(1024)
    assert found.cost_s == found.natural_s


def test_the_same_question_has_the_same_answer_and_more_moves_no_worse_one():
    cluster, degrees = cluster_of(12, matrix=random_matrix(12, random.Random(5))), Degrees(pp=3, fsdp=4)
    traffic = made_traffic(degrees, random.Random(5))

    def found(moves: int) -> Placement:
        return place(cluster, degrees, traffic, moves=moves, seed=7)

    assert found(900) == found(900)
    assert found(9000).cost_s <= found(900).natural_s
    assert sorted(found(900).order) == list(range(12))


def test_more_ranks_than_devices_are_refused():
    with pytest.raises(ConfigError, match="needs 16 devices, and test has 8"):
        place(cluster_of(1, 1), Degrees(fsdp=16), Traffic())


def test_a_pipeline_s_path_is_paid_once_a_round_and_as_often_as_it_folds():
    def said(**settings: Any) -> Traffic:
        fields = {f"parallel.{name}": value for name, value in {"pp": 2, "microbatches": 8, **settings}.items()}
        return traffic_of(find("llama3_8b", {"data.seq_len": 512, **fields})[0], cluster_of(1, 1), 2)

    plain = said()
    assert (plain.hops, plain.rounds, plain.micro_batches) == (((0, 1),), 4.0, 8)
    assert plain.message_bytes == 512 * 4096 * 2
    assert said(schedule="gpipe").rounds == 1.0
    assert said(schedule="interleaved").hops == ((0, 1), (1, 0), (0, 1))
    assert said(schedule="zbv").hops == ((0, 1), (1, 0))
    assert traffic_of(find("llama3_8b", {"data.seq_len": 512})[0], cluster_of(1, 1), 1) == Traffic(work_s=pytest.approx(plain.work_s / 4))


def exchanged(config: RunConfig, ranks: int) -> dict[tuple[tuple[int, ...], str], float]:
    """What rank 0 of a traced step moves, in bytes, by group and kind, without what is small."""
    found: dict[tuple[tuple[int, ...], str], float] = {}
    traced = sketch(config, ranks, 0, PretendedDevice("cpu", 0, "chip", CHIP.memory_bytes), exact=True).base
    for one in traced.operators:
        if one.sort == "exchange" and len(one.group) > 1:
            key = one.group, str(one.exchange)
            found[key] = found.get(key, 0.0) + one.bytes
    return {key: bytes for key, bytes in found.items() if bytes > 2 << 20}


LAYOUTS: list[Any] = [
    ("llama3_8b", 4, {"fsdp": 2, "tp": 2, "remat": "full", "microbatches": 2}),
    ("llama3_8b", 8, {"pp": 2, "dp": 2, "fsdp": 2, "microbatches": 4}),
    ("llama3_8b", 4, {"cp": 2, "cp_kind": "ulysses", "tp": 2, "microbatches": 2}),
    ("llama3_8b", 4, {"cp": 4, "cp_kind": "ring"}),
    ("qwen3_30b_a3b", 4, {"fsdp": 4, "ep": 2, "microbatches": 2}),
    *(
        pytest.param(*case, marks=pytest.mark.full)
        for case in [
            ("llama3_8b", 2, {"tp": 2, "sequence_parallel": False}),
            ("llama3_8b", 2, {"tp": 2, "sequence_parallel": False, "remat": "full"}),
            ("llama3_8b", 2, {"tp": 2, "remat": "selective"}),
            ("llama3_8b", 2, {"cp": 2, "cp_kind": "ulysses", "remat": "selective"}),
            ("qwen3_30b_a3b", 2, {"fsdp": 2, "ep": 2, "remat": "selective"}),
            ("llama3_8b", 4, {"cp": 2, "cp_kind": "allgather", "fsdp": 2, "microbatches": 2}),
            ("llama3_8b", 2, {"cp": 2, "cp_kind": "allgather", "remat": "full"}),
            ("llama3_8b", 4, {"cp": 2, "cp_kind": "ring", "tp": 2, "remat": "full", "microbatches": 2}),
            ("llama3_8b", 2, {"cp": 2, "cp_kind": "ulysses", "remat": "full"}),
            ("llama3_8b", 4, {"pp": 2, "fsdp": 2, "reshard": "always", "microbatches": 4}),
            ("llama3_8b", 4, {"pp": 2, "fsdp": 2, "schedule": "zbv", "microbatches": 4}),
            ("llama3_8b", 2, {"fsdp": 2, "reduce": "micro_batch", "microbatches": 2}),
            ("llama3_8b", 2, {"fsdp": 2, "reshard": "never", "microbatches": 2}),
            ("llama3_8b", 4, {"dp": 2, "fsdp": 2, "reduce": "micro_batch", "microbatches": 2}),
            ("qwen3_30b_a3b", 2, {"fsdp": 2, "ep": 2, "remat": "full"}),
            ("qwen3_30b_a3b", 4, {"fsdp": 2, "tp": 2, "ep": 2}),
        ]
    ),
]


@pytest.mark.parametrize(("recipe", "ranks", "settings"), LAYOUTS, ids=str)
def test_the_closed_form_is_what_a_traced_step_exchanges(apart: Any, recipe: str, ranks: int, settings: dict[str, Any]):
    parallel = {f"parallel.{name}": value for name, value in settings.items() if name != "remat"}
    fields = {
        "compile": "none",
        "remat.mode": settings.get("remat", "none"),
        "data.seq_len": 1024,
        "model.layers": 4 if "schedule" in settings else 2,
        "parallel.fsdp": 1,
    } | parallel
    config = find(recipe, fields | ({"model.routing.balance_loss": 0.0} if "qwen" in recipe else {}))[0]
    degrees = config.parallel.degrees
    traffic = traffic_of(config, cluster_of(1, 1), ranks)
    said: dict[tuple[tuple[int, ...], str], float] = {}
    for ones, times in ((traffic.each, traffic.micro_batches), (traffic.once, 1)):
        for one in ones:
            key = tuple(groups_of(one.group, degrees)[0, 0].tolist()), one.exchange
            said[key] = said.get(key, 0.0) + one.bytes * one.times[0] * times
    assert said == pytest.approx(apart(lambda: exchanged(config, ranks)), rel=2e-3)


def test_a_stage_of_several_devices_is_as_slow_as_the_slowest_and_has_the_memory_of_the_smallest():
    mixed = cluster_of(1, 1, slower=2.0)
    small = replace(mixed, accelerators={**mixed.accelerators, "chip": replace(CHIP, memory_bytes=24 << 30)})  # the faster one
    place = Place(small, 0, range(8), Degrees(fsdp=8))
    assert place.accelerator.name == "other"
    assert place.usable_bytes == (24 << 30) - CHIP.reserved_bytes
