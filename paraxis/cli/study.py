"""A question to the planner answered whole: a recipe, what of it is settled, a cluster; the options, and what is lacking without any."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.base.layout import laid_out
from paraxis.plan.candidates import Space, candidate_of, differing, planned
from paraxis.plan.hardware import Cluster
from paraxis.plan.lacking import Lacking, find_lacking
from paraxis.plan.search import Effort, Found, Option, Search, by_time, pareto, traced, with_known
from paraxis.recipes.find import find
from paraxis.train.check import check
from paraxis.train.config import RunConfig
from paraxis.train.run import on_meta
from paraxis.train.stages import build_stages

AUTO = {"parallel.auto": True}  # settings of axes that are not used yet are then no mistake


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked: `settings` by dotted path are kept. With `layout` all degrees are, and nothing is left to choose; it takes as many
    devices as it needs, or, with `all_devices`, has to take them all."""

    recipe: str
    settings: Mapping[str, object]
    cluster: Cluster
    layout: str = ""
    all_devices: bool = True


@dataclass(frozen=True, kw_only=True)
class Study:
    """The answer. `config` is the run before anything was chosen, `seconds` what answering took; `precisions` are those that were compared,
    where there were several."""

    recipe: str
    config: RunConfig
    cluster: Cluster
    ranks: int
    found: Found
    lacking: Lacking | None
    given: Mapping[str, object]
    seconds: float
    precisions: Sequence[str] = ()

    @property
    def best(self) -> Option | None:
        return self.found.options[0] if self.found.options else None

    @property
    def shown(self) -> Option:
        """The best option; where nothing fits the one that takes least."""
        if self.best is not None:
            return self.best
        assert self.lacking is not None
        return self.lacking.option

    @property
    def tokens(self) -> int:
        """Of a step."""
        return self.shown.candidate.rows * self.config.data.seq_len

    def settings(self, option: Option) -> dict[str, Any]:
        """All that has to be set, beside the recipe, for this option: what was given, and what was chosen."""
        chosen = differing(option.config, find(self.recipe)[0])
        return {path: value for path, value in self.given.items() if path not in AUTO} | chosen


def ask(question: Question, effort: Effort, *, exact: bool = False, drawn: bool = False) -> Study:
    """Searches, or predicts the one layout, in each precision that the question names. `exact` traces every block of the best; `drawn`
    traces it even where the effort was spent.

    Raises ConfigError for what cannot be.
    """
    started_s = time.monotonic()
    precisions = str(question.settings.get("precision", "")).split(",")
    if len(precisions) > 1:
        share = replace(effort, seconds=effort.seconds and effort.seconds / len(precisions))
        one_each = [replace(question, settings={**question.settings, "precision": precision}) for precision in precisions]
        study = _together([ask(one, share, exact=exact and bool(question.layout)) for one in one_each])
    else:
        study = _of_layout(question, exact) if question.layout else _searched(question, effort)
    if not question.layout:
        # What is then known of the best may leave another as the best.
        while (exact and study.best is not None and study.best.source != "exact") or (drawn and study.shown.prediction is None):
            study = _known_better(study, exact and study.best is not None)
    return replace(study, seconds=time.monotonic() - started_s)


def _together(studies: Sequence[Study]) -> Study:
    """The answers in several precisions as one."""
    first, found = studies[0], [study.found for study in studies]
    lacking = [study.lacking for study in studies if study.lacking is not None]
    options = sorted((one for part in found for one in part.options), key=by_time)
    fastest = options[0].tokens_per_s if options else 0.0
    refused = [one for part in found for one in part.refused if one.tokens_per_s > fastest]
    return replace(
        first,
        found=Found(
            options=options,
            pareto=pareto(sorted((one for part in found for one in part.pareto), key=by_time)),
            refused=sorted(refused, key=by_time),
            candidates=sum(part.candidates for part in found),
            simulated=sum(part.simulated for part in found),
            traced=sum(part.traced for part in found),
            complete=all(part.complete for part in found),
        ),
        lacking=None if options else min(lacking, key=lambda one: one.bytes),
        given={path: value for path, value in first.given.items() if path != "precision"},
        precisions=[study.config.precision for study in studies],
    )


def _known_better(study: Study, exact: bool) -> Study:
    """With the shown option traced, and judged by that."""
    whole = traced(study.shown, study.cluster, study.ranks, exact=exact)
    found = study.found if study.best is not None else replace(study.found, options=[study.shown], pareto=[study.shown])
    found = with_known(found, whole)
    changes = study.lacking.changes if study.lacking is not None else []
    lacking = None if found.options else Lacking(option=whole, bytes=whole.reserved - whole.usable, changes=changes)
    return replace(study, found=found, lacking=lacking)


def _searched(question: Question, effort: Effort) -> Study:
    fixed, cluster = question.settings, question.cluster
    config, _ = find(question.recipe, {**fixed, **AUTO})
    ranks = cluster.ranks
    config = planned(config, ranks, fixed)
    search = Search(Space(config, on_meta(config), ranks, fixed), cluster, effort)
    found, lacking = search.run(), None
    if not found.options:
        lacking = find_lacking(search)
        if lacking.option.fits:  # estimates were too high
            found, lacking = replace(found, options=[lacking.option], pareto=[lacking.option]), None
    return Study(
        recipe=question.recipe,
        config=config,
        cluster=cluster,
        ranks=ranks,
        found=found,
        lacking=lacking,
        given=fixed,
        seconds=0.0,
    )


def _of_layout(question: Question, exact: bool) -> Study:
    given = {path: value for path, value in laid_out(question.settings, question.layout).items() if path not in AUTO}
    config, _ = find(question.recipe, given)
    degrees, cluster = config.parallel.degrees, question.cluster
    ranks = cluster.ranks if question.all_devices or degrees.fsdp == -1 else degrees.ranks
    if ranks > cluster.ranks:
        raise ConfigError(
            f"--layout={question.layout} takes {ranks} devices, and {cluster.name} has {cluster.ranks}; give it more (--gpus)"
        )
    check(config, ranks)
    candidate = candidate_of(config, ranks)
    asked = Option(
        candidate=candidate,
        config=config,
        source="traced",
        step_s=0.0,
        tokens_per_s=0.0,
        mfu=None,
        exposed_s=0.0,
        bubble=0.0,
        held={},
        usable=0,
        cuts=_cuts(config, ranks),
    )
    option = traced(asked, cluster, ranks, exact=exact)
    options, refused = ([option], []) if option.fits else ([], [option])
    return Study(
        recipe=question.recipe,
        config=config,
        cluster=cluster,
        ranks=ranks,
        found=Found(options=options, pareto=options, refused=refused, candidates=1, simulated=0, traced=1, complete=True),
        lacking=None if option.fits else Lacking(option=option, bytes=option.reserved - option.usable, changes=[]),
        given=given,
        seconds=0.0,
    )


def _cuts(config: RunConfig, ranks: int) -> tuple[int, ...]:
    stages = build_stages(config, config.parallel.degrees.filling(ranks), on_meta(config))
    return tuple(map(len, stages.layers)) if stages else ()


def spelled(settings: Mapping[str, Any]) -> list[str]:
    """Settings as options of the command line."""
    return [f"--{path}={_text(value)}" for path, value in settings.items()]


def _text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ",".join(map(_text, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
