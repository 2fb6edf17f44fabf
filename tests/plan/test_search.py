"""The search: what it may choose from, that pruning loses nothing, what it proposes, and what it says where nothing fits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import pairwise, product
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn

from paraxis.base.axes import Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.layout import laid_out
from paraxis.base.schedule import most_in_flight
from paraxis.base.schedules import SCHEDULES, Plan, build_schedule
from paraxis.parallel.world import World
from paraxis.plan import holdings, lacking, record
from paraxis.plan.candidates import Candidate, Space, candidate_of, planned
from paraxis.plan.closed import Costs
from paraxis.plan.cluster_file import read_cluster
from paraxis.plan.explain import why_slower
from paraxis.plan.hardware import Cluster
from paraxis.plan.holdings import in_flight
from paraxis.plan.lacking import find_lacking
from paraxis.plan.memory import coordinates
from paraxis.plan.pretend import PretendedDevice
from paraxis.plan.search import ALIKE, Effort, Option, Search, distinct, pareto, simplest_first, trace_all, traced, with_known
from paraxis.recipes.find import find
from paraxis.train.check import check, on_meta
from paraxis.train.choose import build_strategy
from paraxis.train.config import RunConfig

SMALL: dict[str, object] = {"model.layers": 4, "train.global_tokens": 16 * 64}


def config_of(settings: dict[str, object], recipe: str = "debug") -> RunConfig:
    return find(recipe, {"compile": "none", "precision": "bf16", **settings, "parallel.auto": True})[0]


@pytest.fixture(autouse=True)
def without_workspaces(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are larger than all that these models hold."""
    for module in (holdings, record):
        monkeypatch.setattr(module, "WORKSPACE_BYTES", 512)


def space_of(ranks: int, fixed: dict[str, object], shape: dict[str, object] = SMALL, recipe: str = "debug") -> Space:
    config = planned(config_of({**shape, **fixed}, recipe), ranks, {**fixed, "train.global_tokens": 0})
    return Space(config, on_meta(config), ranks, fixed)


def cluster_of(ranks: int, gib: float = 79.1) -> Cluster:
    cluster = read_cluster("dgx_h100").with_devices(ranks)
    chip = replace(cluster.accelerators["h100"], memory_bytes=int(gib * 2**30), reserved_bytes=0)
    return replace(cluster, accelerators={"h100": chip})


def search_of(space: Space, gib: float = 79.1, **effort: Any) -> Search:
    return Search(space, cluster_of(space.ranks, gib), Effort(**{"traced": 0, "simulated": 10_000, **effort}))


def every_setting(space: Space) -> list[Candidate]:
    """Degrees, schedules, kinds and micro-batches in all combinations, legal or not; nothing recomputed."""
    ranks, found = space.ranks, []
    sizes = [n for n in range(1, ranks + 1) if ranks % n == 0]
    for pp, dp, fsdp, cp, tp in product(sizes, repeat=5):
        if pp * dp * fsdp * cp * tp != ranks:
            continue
        schedules = [(name, chunks) for name in SCHEDULES for chunks in (0, 2, 3, 4)] if pp > 1 else [("auto", 0)]
        kinds = [("ring", 0), ("ulysses", 0), ("allgather", 0), ("usp", 2), ("usp", 4)] if cp > 1 else [("auto", 0)]
        for (schedule, chunks), (kind, inner), rows in product(schedules, kinds, (1, 2, 4, 8, 16)):
            if inner >= cp > 1 or (inner and cp % inner):  # all of cp exchanges heads: ulysses
                continue
            found.append(
                Candidate(
                    degrees=Degrees(pp=pp, dp=dp, fsdp=fsdp, cp=cp, tp=tp),
                    micro_batch=rows,
                    micro_batches=0,
                    schedule=schedule,
                    stages_a_rank=chunks,
                    cp_kind=kind,
                    cp_ulysses=inner,
                    remat="none",
                )
            )
    return found


def accepted(one: Candidate, space: Space) -> bool:
    try:
        check(one.config(space.config), space.ranks, space.model)
    except ConfigError:
        return False
    known = SCHEDULES.get(one.schedule)
    # Stages a rank are left to their only number where there is one, and said where there is a choice.
    return known is None or (one.stages_a_rank > 0) == ((known.stages_a_rank or 2) > 1)


@pytest.mark.parametrize("ranks", [4, pytest.param(8, marks=pytest.mark.full)])
def test_the_candidates_are_what_training_accepts(ranks: int):
    space = space_of(ranks, {}, {**SMALL, "model.heads": 4, "model.kv_heads": 2})
    legal = {replace(one, micro_batches=0, reshard="auto") for one in space if one.remat == "none"}
    assert legal == {one for one in every_setting(space) if accepted(one, space)}


def test_experts_are_shared_out_where_their_number_and_the_ranks_allow():
    space = space_of(4, {}, {"model.layers": 2, "train.global_tokens": 4 * 4096}, "qwen3_30b_a3b")
    degrees = {one.degrees for one in space.families()}
    assert {one.ep for one in degrees} == {1, 2, 4}
    assert all(one.shards % one.ep == 0 for one in degrees)


@pytest.mark.parametrize("fixed", [{"parallel.tp": 2}, {"parallel.schedule": "zbv"}, {"remat.mode": "full"}, {"train.micro_batch": 4}])
def test_what_is_set_is_kept(fixed: dict[str, object]):
    found = [one.config(space.config) for space in [space_of(4, fixed)] for one in space]
    assert found
    for config in found:
        section, name = next(iter(fixed)).split(".")
        assert getattr(getattr(config, section), name) == next(iter(fixed.values()))


def test_a_step_has_the_tokens_of_the_recipes_own_layout():
    config = find("demo", {"parallel.auto": True})[0]
    assert planned(config, 4, {}).train.global_tokens == 4 * config.train.micro_batch * config.data.seq_len
    asked = find("demo", {"parallel.auto": True, "parallel.microbatches": 3})[0]
    assert planned(asked, 4, {"parallel.microbatches": 3}) == asked


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_activations_in_flight_are_counted_as_schedules_have_them(schedule: str):
    for ranks in (2, 4):
        only = SCHEDULES[schedule].stages_a_rank
        for chunks in [only] if only is not None else [2, 3]:
            for number in (2 * ranks, 3 * ranks):
                listed = most_in_flight(build_schedule(schedule, Plan(ranks, number, chunks)))
                one = Candidate(
                    degrees=Degrees(pp=ranks),
                    micro_batch=1,
                    micro_batches=number,
                    schedule=schedule,
                    stages_a_rank=chunks if chunks > 1 else 0,
                )
                assert [in_flight(one, rank) for rank in range(ranks)] == listed


# With half of the memory, half of the candidates do not fit, and pruning has to go by memory too.
@pytest.mark.parametrize("part", [1.0, 0.5])
def test_pruning_never_loses_the_best(part: float):
    space = space_of(4, {"parallel.cp": 1}, {**SMALL, "model.width": 256, "model.mlp_width": 512})
    roomy = search_of(space)
    sizes = sorted(roomy.estimate(one).reserved for one in space)
    memory = sizes[int(part * len(sizes)) - 1] + 1
    search = search_of(space, memory / 2**30, keep=8)
    estimates = [search.estimate(one) for one in space]
    everything = sorted((one for one in estimates if one.fits), key=lambda one: (one.step_s, one.reserved))
    found = search.run()
    assert sorted(one.step_s for one in found.options)[:8] == pytest.approx([one.step_s for one in distinct(everything)[:8]])
    assert found.complete
    assert len(search.simulated) < len(estimates) / 2, "and most are never simulated"


def test_no_bound_is_above_what_it_bounds():
    space = space_of(4, {})
    search = search_of(space)
    for family in space.families():
        least = search.costs.least_s(family)
        assert least <= search.costs.bound_s(family) * (1 + 1e-9)
    for one in list(space)[::7]:
        assert search.costs.bound_s(one) <= search.estimate(one).step_s * (1 + 1e-9)


def test_steps_that_differ_in_rows_are_compared_by_the_row():
    fixed = {"parallel.microbatches": 4, "parallel.pp": 1, "parallel.cp": 1}
    config = config_of({"model.layers": 4, "model.width": 256, **fixed})
    space = Space(planned(config, 4, fixed), on_meta(config), 4, fixed)
    search = search_of(space, keep=2)
    everything = [search.estimate(one) for one in space]
    assert len({one.candidate.rows for one in everything}) > 1
    for one in everything:
        assert one.candidate.rows == one.config.rows_per_step(one.candidate.degrees)
    found = search_of(space, keep=2).run()
    assert max(one.tokens_per_s for one in found.options) == max(one.tokens_per_s for one in everything if one.fits)


@pytest.mark.parametrize("layout", ["pp2.bfs1", "pp2.interleaved1", "pp2.bfs3", "pp2.zbv", "pp2.1f1b"])
def test_the_layout_of_a_candidate_is_the_one_it_was_made_of(layout: str):
    config = config_of({**SMALL, "model.layers": 8, **laid_out({}, layout)})
    one = candidate_of(config, 2)
    assert one.layout == layout
    fixed = {"parallel.pp": 2, "parallel.schedule": one.schedule, "parallel.stages_a_rank": config.parallel.stages_a_rank}
    assert {other.layout for other in Space(config, on_meta(config), 2, fixed)} == {layout}


def held_by(settings: dict[str, object], ranks: int) -> Mapping[str, float]:
    """What an estimate says of the fullest rank, of a layout without anything to choose."""
    config = config_of({"model.layers": 4, "model.width": 256, "data.seq_len": 512, **settings})
    return Costs(config, on_meta(config), cluster_of(ranks), ranks).memory(candidate_of(config, ranks))


@pytest.mark.parametrize("settings", [{"parallel.dp": 2}, {"parallel.fsdp": 2}, {"parallel.fsdp": 2, "parallel.reshard": "never"}])
def test_parameters_are_estimated_to_be_freed_where_training_frees_them(settings: dict[str, object]):
    config = config_of(settings)
    world = World(0, 2, 0, PretendedDevice("cpu", 0, "NVIDIA H100 80GB HBM3", 79 << 30), dist.HashStore())
    strategy = build_strategy(config, world, coordinates(0, config.parallel.degrees), None, on_meta(config))
    costs = Costs(config, on_meta(config), cluster_of(2), 2)
    assert costs.frees(candidate_of(config, 2)) == strategy.reshard


def test_backward_is_estimated_to_end_with_all_gradients():
    config = config_of({"model.layers": 8, "remat.mode": "full"})
    costs = Costs(config, on_meta(config), cluster_of(1), 1)
    assert costs.memory(candidate_of(config, 1))["gradients"] == 4 * sum(p.numel() for p in on_meta(config).parameters())


def test_recomputing_every_second_block_is_estimated_between_all_and_none():
    runs = {"none": {}, "full": {}, "second": {"remat.mode": "full", "remat.every": 2}, "budget": {"remat.budget": 1.0}}
    held = {name: held_by({"remat.mode": name, **more, "train.micro_batch": 8}, 1)["activations"] for name, more in runs.items()}
    assert held["none"] > held["second"] > held["full"] == held["budget"]
    common = {"model.layers": 4, "remat.mode": "full"}
    configs = [config_of({**common, "remat.every": every}) for every in (1, 2)]
    all_of_them, second = (Costs(one, on_meta(one), cluster_of(1), 1).bound_s(candidate_of(one, 1)) for one in configs)
    assert all_of_them > second


def test_without_sequence_parallelism_a_rank_is_estimated_to_hold_and_move_more():
    for mode in ("none", "full"):
        common: dict[str, object] = {"model.layers": 8, "remat.mode": mode, "train.micro_batch": 8}
        layouts: list[dict[str, object]] = [{}, {"parallel.tp": 2, "parallel.sequence_parallel": False}, {"parallel.tp": 2}]
        configs = [config_of({**common, **one}) for one in layouts]
        costs = [Costs(one, on_meta(one), cluster_of(2), one.parallel.tp) for one in configs]
        candidates = [candidate_of(one.config, one.ranks) for one in costs]
        for of in (Costs.kept, Costs.moved):
            alone, whole, cut = (of(c, c.shape(one).kinds[0], one) for c, one in zip(costs, candidates, strict=True))
            assert alone >= whole > cut


def test_every_option_is_one_that_training_accepts():
    space = space_of(8, {})
    found = search_of(space).run()
    assert len(found.options) == 12
    for one in [*found.options, *found.pareto]:
        check(one.config, 8)
        assert one.fits


def test_of_a_pareto_list_none_is_both_slower_and_larger():
    found = search_of(space_of(4, {}, {**SMALL, "model.width": 256}), 0.02).run()
    listed = found.pareto
    assert listed[0].tokens_per_s == max(one.tokens_per_s for one in found.options)
    assert len(listed) > 1
    assert all(a.tokens_per_s >= b.tokens_per_s and a.reserved > b.reserved for a, b in pairwise(listed))
    assert pareto(listed) == listed


def test_of_options_that_predictions_do_not_tell_apart_the_one_on_fewest_axes_comes_first():
    ring, plain = (Candidate(degrees=Degrees(cp=n, fsdp=2 // n), micro_batch=1, micro_batches=1, remat="none") for n in (2, 1))
    search = search_of(space_of(2, {}))
    fast, slow = (replace(search.estimate(plain), candidate=one, tokens_per_s=rate) for one, rate in ((ring, 1.02), (plain, 1.0)))
    assert simplest_first([fast, slow]) == [slow, fast]
    assert simplest_first([replace(fast, tokens_per_s=1.1), slow])[0].candidate == ring
    assert "less than predictions tell apart" in why_slower(fast, slow)


def test_what_is_learnt_of_the_best_option_may_leave_another_as_the_best():
    found = search_of(space_of(4, {"parallel.pp": 1}, {**SMALL, "model.width": 256})).run()
    best, second = found.options[:2]
    slower = with_known(found, replace(best, source="exact", tokens_per_s=0.5 * best.tokens_per_s))
    assert slower.options[0] == second
    assert [one.source for one in slower.options].count("exact") == 1
    larger = with_known(found, replace(best, source="exact", held={"activations": best.usable + 1.0}))
    assert larger.options[0] == second
    assert best.candidate not in [one.candidate for one in (*larger.options, *larger.pareto)]
    assert [one.source for one in larger.refused if one.candidate == best.candidate] == ["exact"]


def test_what_explains_nothing_by_itself_is_said_to_be_a_little_of_each():
    search = search_of(space_of(2, {}))
    best = search.estimate(next(iter(search.space)))
    assert why_slower(replace(best, tokens_per_s=best.tokens_per_s / 1.05), best) == "5.0% slower: a little of each"


def test_why_nothing_could_be_traced_is_logged(caplog: pytest.LogCaptureFixture):
    search = search_of(space_of(1, {}))
    one = search.estimate(next(iter(search.space)))
    cannot = replace(one, config=replace(one.config, precision="mxfp8"))
    assert trace_all([cannot], search.cluster, 1, 60) == []
    assert "fsdp1 could not be traced: precision=mxfp8: mxfp8 products need" in caplog.text


def test_the_best_options_are_traced_in_processes_of_their_own():
    found = search_of(space_of(2, {"parallel.pp": 1, "remat.mode": "none"}), traced=2, keep=4).run()
    assert found.traced == 2
    assert sum(one.source == "traced" for one in found.options) == 2
    one = next(one for one in found.options if one.source == "traced")
    assert one.prediction is not None
    assert one.reserved == one.prediction.reserved


def test_what_fits_nowhere_lacks_what_a_trace_says(apart: Callable[..., Any]):
    space = space_of(2, {"remat.mode": "none", "train.micro_batch": 8, "parallel.pp": 1, "parallel.cp": 1, "parallel.tp": 1})

    gib = 0.8 * min(search_of(space).estimate(one).reserved for one in space) / 2**30

    def said() -> tuple[float, float, list[tuple[dict[str, Any], int]]]:
        search = search_of(space, gib, traced=1)
        assert not search.run().options
        found = find_lacking(search)
        again = traced(found.option, search.cluster, 2)
        assert again.prediction is not None
        return found.bytes, again.prediction.reserved - int(gib * 2**30), [(dict(c.settings), c.devices) for c in found.changes]

    lacks, wanted, changes = apart(said, timeout=500)
    assert lacks == pytest.approx(wanted, rel=1e-6)
    assert lacks > 0
    assert any("train.micro_batch" in settings for settings, _ in changes)


def test_no_change_is_proposed_that_training_refuses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lacking, "trace_all", lambda *_: [])
    space = space_of(1, {"remat.mode": "full", "train.micro_batch": 1})
    gib = 0.7 * min(search_of(space).estimate(one).reserved for one in space) / 2**30
    forgets = on_meta(space.config)
    forgets.add_module("forgets", nn.Dropout(0.1))  # runs on one rank alone

    def added(space: Space) -> list[int]:
        return [change.devices for change in find_lacking(search_of(space, gib)).changes if change.devices]

    assert added(space) == [1]
    assert added(replace(space, model=forgets)) == []
    with pytest.raises(ConfigError, match="forgets drops out at random"):
        find_lacking(search_of(replace(space, ranks=2, model=forgets), gib))


def test_nothing_to_choose_from_is_refused_with_what_was_set():
    with pytest.raises(ConfigError, match=r"parallel\.tp.*leave a setting out"):
        search_of(space_of(4, {"parallel.tp": 3})).run()


@pytest.mark.full
def test_the_choice_is_the_best_of_all_traces(apart: Callable[..., Any]):
    fixed = {"parallel.pp": 1, "parallel.cp": 1, "parallel.reshard": "auto", "train.micro_batch": 2}
    space = space_of(2, fixed, {**SMALL, "model.width": 1024, "model.mlp_width": 4096, "data.seq_len": 512, "train.global_tokens": 8192})

    def times() -> tuple[float, list[float]]:
        search = search_of(space, traced=4)
        chosen = search.run().options[0]
        all_of_them: list[Option] = [traced(search.estimate(one), search.cluster, 2) for one in space]
        return chosen.step_s, [one.step_s for one in all_of_them]

    chosen_s, every_s = apart(times, timeout=500)
    assert len(every_s) > 4
    assert chosen_s <= ALIKE * min(every_s)
