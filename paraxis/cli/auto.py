"""`parallel.auto=true`: the planner's choice in place of it, before a run is built."""

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.bench.machine import ask_machine
from paraxis.cli.study import Question, Study, ask
from paraxis.parallel.world import visible_devices
from paraxis.plan.cluster_file import read_cluster, ready_clusters
from paraxis.plan.explain import gib, placed, why_refused, why_slower
from paraxis.plan.hardware import Cluster
from paraxis.plan.search import Effort, Option, traced

MEASURED = "cluster.toml"  # where paraxis probe writes, unless told otherwise
# Counted, not timed: every worker of a launcher that is not ours comes to the same choice by itself.
EFFORT = Effort(traced=4)


def settle_auto(
    recipe: str, settings: Mapping[str, object], cluster: str | None, ranks: int | None, *, aloud: bool
) -> tuple[dict[str, Any], int]:
    """`settings` with the choice added and `parallel.auto` gone, and the ranks that it is for: so many as were asked for, else this
    machine's GPUs, else all of the cluster's. `aloud` says on stderr what was chosen, and why.

    Raises ConfigError without a cluster, and where nothing fits with ranks on devices in their order.
    """
    devices = visible_devices()
    found = read_cluster(cluster) if cluster else this_cluster(devices)
    ranks = ranks or devices or found.ranks
    if ranks != found.ranks:
        found = found.with_devices(ranks)
    given = {path: value for path, value in settings.items() if path != "parallel.auto"}
    study = ask(Question(recipe=recipe, settings=given, cluster=found), EFFORT)
    best = study.best
    if best is None:
        assert study.lacking is not None
        helps = "; ".join(change.words for change in study.lacking.changes) or "more devices, or a smaller model"
        raise ConfigError(f"parallel.auto: nothing fits on {found.name}: {why_refused(study.lacking.option)}; it would with {helps}")
    if list(best.order) != list(range(ranks)):
        best = _in_order(study, best, aloud=aloud)
    if aloud:
        _say(study, best)
    return study.settings(best), ranks


def _in_order(study: Study, best: Option, *, aloud: bool) -> Option:
    """`best` as ranks are started, which is in the devices' order, not in the one that was found to be faster."""
    found = traced(replace(best, config=best.candidate.config(study.config)), study.cluster, study.ranks, placed=False)
    if not found.fits:
        raise ConfigError(
            f"parallel.auto: {best.candidate.layout} fits with {placed(best)}, but not in the devices' order, in which ranks are started: "
            f"{why_refused(found)}; list the hosts in that order, or set a layout that paraxis plan finds"
        )
    if aloud:
        words = f"{found.step_s:.3g} s a step; {best.step_s:.3g} s if hosts are listed so that {placed(best)}"
        print(f"parallel: ranks are started in the devices' order, with {words}", file=sys.stderr)
    return found


def _say(study: Study, best: Option) -> None:
    own = best.candidate
    words = [
        f"parallel: auto chose {own.layout}, {own.micro_batch} x {own.micro_batches} rows, recompute {own.remat}: "
        f"{best.step_s:.3g} s a step and {gib(best.reserved)} of {gib(best.usable)} GiB on {study.cluster.name} ({best.source})"
    ]
    for other in study.found.options[1:3]:
        words.append(f"parallel: not {other.candidate.layout}, recompute {other.candidate.remat}: {why_slower(other, best)}")
    print("\n".join(words), file=sys.stderr)


def this_cluster(devices: int) -> Cluster:
    """The file that paraxis probe has left here, or the ready one of this machine's GPUs. Raises ConfigError where there is none."""
    if Path(MEASURED).is_file():
        return read_cluster(MEASURED)
    name = ask_machine().name if devices else "a CPU"
    known = [read_cluster(ready) for ready in ready_clusters()] if devices else []
    same = [one for one in known if {device.name for device in one.accelerators.values()} == {name} and devices <= one.pools[0].devices]
    if same:
        return min(same, key=lambda one: one.pools[0].devices)  # the host most like this one
    raise ConfigError(
        f"parallel.auto=true needs to know this machine ({name}), and there is no {MEASURED} here; run paraxis probe, which measures "
        f"it, or give --cluster: a file, or one of {', '.join(ready_clusters())}"
    )
