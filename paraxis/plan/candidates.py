"""Every way to run a recipe on so many ranks that training would accept: what a search chooses from."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from itertools import product
from operator import attrgetter
from typing import Any, Literal

from torch import nn

from paraxis.base.axes import AXES, DEGREES, Degrees
from paraxis.base.dtypes import precision
from paraxis.base.errors import ConfigError
from paraxis.base.layout import IDLE, place
from paraxis.base.schedules import SCHEDULES
from paraxis.base.seams import Staged, routed_layers
from paraxis.base.strategy import ParallelConfig
from paraxis.train.check import check_heads, check_sequence
from paraxis.train.config import RunConfig

Remat = Literal["none", "selective", "full"]
REMATS: tuple[Remat, ...] = ("none", "selective", "full")
MICRO_BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (2, 3, 4, 6, 8)  # stages a rank that are tried where a schedule takes as many as wished
SPLIT_BACKWARD = ("zbh1", "zbv", "dualpipev")


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """One way to run: what a search sets in a configuration. Idle settings are as `base.layout.IDLE` has them; `stages_a_rank` is 0 where
    the schedule has one a rank in any case; `micro_batches` is what follows for a step."""

    degrees: Degrees
    micro_batch: int
    micro_batches: int
    schedule: str = "auto"
    stages_a_rank: int = 0
    cp_kind: str = "auto"
    cp_ulysses: int = 0
    remat: str = "none"
    reshard: str = "auto"

    @property
    def splits_backward(self) -> bool:
        return self.schedule in SPLIT_BACKWARD

    @property
    def chunks(self) -> int:
        """Pipeline stages of each rank."""
        return self.stages_a_rank or 1

    @property
    def rows(self) -> int:
        """Of a step, over all data ranks."""
        return self.degrees.data_ranks * self.micro_batch * self.micro_batches

    @cached_property
    def layout(self) -> str:
        """The candidate in the grammar of layouts: `pp2.zbvxcp4.ulysses2xfsdp2`."""
        parts: list[str] = []
        for axis in DEGREES:
            if (degree := getattr(self.degrees, axis)) == 1:
                continue
            kind = ""
            if axis == "pp":
                known = SCHEDULES.get(self.schedule)  # or a file
                number = self.stages_a_rank if known and known.stages_a_rank is None else ""
                kind = f".{self.schedule}{number}" if known else ""
            elif axis == "cp" and self.cp_kind != "auto":
                kind = f".ulysses{self.cp_ulysses}" if self.cp_kind == "usp" else f".{self.cp_kind}"
            parts.append(f"{axis}{degree}{kind}")
        return "x".join(parts) or "fsdp1"

    def settings(self, base: RunConfig) -> dict[str, Any]:
        """What it sets, by dotted path, where that is not what `base` has already."""
        return differing(self.config(base), base)

    def config(self, base: RunConfig) -> RunConfig:
        """`base` run this way. Raises ConfigError where `base` sets what says nothing then."""
        d = self.degrees
        parallel = replace(
            base.parallel,
            **{axis: getattr(d, axis) for axis in DEGREES},
            auto=False,
            schedule=self.schedule,
            stages_a_rank=self.stages_a_rank,
            cuts=base.parallel.cuts if d.pp > 1 else (),
            cp_kind=self.cp_kind,
            cp_ulysses=self.cp_ulysses,
            reshard=self.reshard,
            async_tp=base.parallel.async_tp and d.tp > 1,
            sequence_parallel=base.parallel.sequence_parallel or d.tp == 1,
        )
        remat = base.remat if self.remat == base.remat.mode else replace(base.remat, mode=self.remat, every=1, budget="auto")
        return replace(base, parallel=parallel, remat=remat, train=replace(base.train, micro_batch=self.micro_batch))


def candidate_of(config: RunConfig, ranks: int) -> Candidate:
    """What `config` says, as one candidate on so many ranks. Raises ConfigError where its degrees or rows do not fill them."""
    parallel, degrees = config.parallel, config.parallel.degrees.filling(ranks)
    schedule = "1f1b" if parallel.schedule == "auto" and degrees.pp > 1 else parallel.schedule
    usual = SCHEDULES[schedule].stages_a_rank or 2 if schedule in SCHEDULES else 1
    return Candidate(
        degrees=degrees,
        micro_batch=config.train.micro_batch,
        micro_batches=config.rows_per_step(degrees) // (degrees.data_ranks * config.train.micro_batch),
        schedule=schedule,
        stages_a_rank=_stages_a_rank(schedule, parallel.stages_a_rank or usual) if degrees.pp > 1 else 0,
        cp_kind=parallel.cp_kind,
        cp_ulysses=parallel.cp_ulysses,
        remat=config.remat.mode,
        reshard=parallel.reshard,
    )


def _stages_a_rank(schedule: str, chunks: int) -> int:
    """`Candidate.stages_a_rank` for so many: 1 has to be said where training would take another number."""
    known = SCHEDULES.get(schedule)
    return chunks if chunks > 1 or (known is not None and known.stages_a_rank is None) else 0


def differing(config: RunConfig, base: RunConfig) -> dict[str, Any]:
    """What a planner may set, by dotted path, where `config` has it otherwise than `base`."""
    paths = [f"parallel.{field.name}" for field in fields(ParallelConfig)]
    paths += ["precision", "train.micro_batch", "train.global_tokens", "remat.mode", "remat.every", "remat.budget"]
    return {path: value for path in paths if (value := _value(config, path)) != _value(base, path)}


def _value(config: RunConfig, path: str) -> object:
    return attrgetter(path)(config)


def planned(config: RunConfig, ranks: int, fixed: Mapping[str, object]) -> RunConfig:
    """The run to search ways for, its batch settled: a step has the tokens that train.global_tokens says, else those of the recipe's own
    layout on so many ranks, so that a choice of layout changes no numbers. Micro-batches that were asked for by number stay."""
    if config.parallel.cuts and "parallel.cuts" not in fixed:
        config = replace(config, parallel=replace(config.parallel, cuts=()))
    if config.train.global_tokens or "parallel.microbatches" in fixed:
        return config
    parallel = config.parallel
    try:
        rows = config.rows_per_step(parallel.degrees.filling(ranks))
    except ConfigError:
        rows = ranks * config.train.micro_batch * (parallel.microbatches or 1)
    tokens = replace(config.train, global_tokens=rows * config.data.seq_len)
    return replace(config, train=tokens, parallel=replace(parallel, microbatches=0))


@dataclass(frozen=True)
class Space:
    """The candidates for `config` (as `planned` leaves it, `model` on the meta device) on `ranks` ranks. What `fixed` names, by dotted
    path, stays as `config` has it."""

    config: RunConfig
    model: nn.Module
    ranks: int
    fixed: Mapping[str, object]

    def __post_init__(self) -> None:
        schedule = self.config.parallel.schedule
        if schedule != "auto" and schedule not in SCHEDULES:
            raise ConfigError(
                f"parallel.schedule={schedule} is for one layout, not for a search; give --layout, or one of {', '.join(SCHEDULES)}"
            )
        cuts = self.config.parallel.cuts
        if cuts and sum(cuts) != self._blocks:
            raise ConfigError(
                f"parallel.cuts={','.join(map(str, cuts))} gives stages {sum(cuts)} layers in all, and the model has {self._blocks}; "
                "let the two agree, or leave it out"
            )

    def __iter__(self) -> Iterator[Candidate]:
        """Every candidate, in a fixed order."""
        for family in self.families():
            yield from self.members(family)

    def families(self) -> Iterator[Candidate]:
        """One for all that differ in how data ranks share parameters out, which costs no computing: the one that shards them most."""
        for degrees in self._degrees():
            kinds = list(self._contexts(degrees))
            reshard = self._reshards(degrees)[0]
            for micro_batch in self._choices("train.micro_batch", MICRO_BATCHES):
                number = self._micro_batches(degrees, micro_batch)
                if not number:
                    continue
                for (schedule, chunks), (kind, inner), remat in product(self._schedules(degrees.pp, number), kinds, self._remats()):
                    yield Candidate(
                        degrees=degrees,
                        micro_batch=micro_batch,
                        micro_batches=number,
                        schedule=schedule,
                        stages_a_rank=chunks,
                        cp_kind=kind,
                        cp_ulysses=inner,
                        remat=remat,
                        reshard=reshard,
                    )

    def members(self, family: Candidate) -> list[Candidate]:
        """The candidates of a family, which is one of them."""
        d = family.degrees
        key = d, family.reshard
        if key not in self._shared:
            self._shared[key] = [(one, reshard) for one in self._sharings(d) for reshard in self._reshards(one)]
        return [replace(family, degrees=one, reshard=reshard) for one, reshard in self._shared[key]]

    def size(self, family: Candidate) -> int:
        """How many members a family has."""
        return len(self._shared.get((family.degrees, family.reshard)) or self.members(family))

    @cached_property
    def _shared(self) -> dict[tuple[Degrees, str], list[tuple[Degrees, str]]]:
        return {}

    def _sharings(self, most: Degrees) -> list[Degrees]:
        """The ways to share out data ranks among replicas and shards, most shards first."""
        dp, fsdp = self._degree("dp"), self._degree("fsdp")
        ways = [(n, most.data_ranks // n) for n in _divisors(most.data_ranks, dp)]
        return [replace(most, dp=n, fsdp=shards) for n, shards in ways if fsdp in (None, shards) and shards * most.cp % most.ep == 0]

    def _choices(self, path: str, tried: Sequence[Any]) -> Sequence[Any]:
        own = _value(self.config, path)
        return [own] if path in self.fixed else sorted({*tried, own})

    def _degrees(self) -> Iterator[Degrees]:
        """Degrees whose product is `ranks`, that the model's tensors, heads and rows can be cut by; of dp and fsdp the most shards."""
        allowed = {axis: self._degree(axis) for axis in DEGREES}
        for tp in _divisors(self.ranks, allowed["tp"]):
            if not self._cuts(Degrees(tp=tp)) or (self._says("tp") and tp == 1):
                continue
            for cp in _divisors(self.ranks // tp, allowed["cp"]):
                if (self._says("cp") and cp == 1) or not self._rows(Degrees(tp=tp, cp=cp)):
                    continue
                for pp in _divisors(self.ranks // tp // cp, allowed["pp"]):
                    if not self._pipes(pp):
                        continue
                    left = self.ranks // tp // cp // pp
                    for ep in self._experts(left * cp, tp, allowed["ep"]):
                        most = Degrees(pp=pp, fsdp=left, cp=cp, tp=tp, ep=ep)
                        yield from self._sharings(most)[:1]

    def _degree(self, axis: str) -> int | None:
        """The degree that is fixed; None where it is free. fsdp=-1 takes what is left, so it is."""
        degree = getattr(self.config.parallel, axis)
        return degree if f"parallel.{axis}" in self.fixed and degree != -1 else None

    def _says(self, axis: str) -> bool:
        """Whether a fixed setting asks for more than one rank along `axis`."""
        return any(f"parallel.{name}" in self.fixed and getattr(self.config.parallel, name) != idle for name, idle in IDLE[axis].items())

    def _cuts(self, degrees: Degrees) -> bool:
        """Whether every parameter can be cut by these degrees of tp and ep, and the heads by tp."""
        first: dict[str, int] = dict.fromkeys(AXES, 0)
        table = getattr(self.model, "layout", {})
        seen: set[tuple[str, tuple[int, ...]]] = set()
        try:
            check_heads(_without_context(self.config), degrees)
            for name, parameter in self.model.named_parameters():
                kind = name.rpartition("layers.")[2].partition(".")[2] or name, tuple(parameter.shape)
                if kind not in seen:
                    seen.add(kind)
                    place(name, tuple(parameter.shape), table, degrees, first)
        except ConfigError:
            return False
        return True

    def _rows(self, degrees: Degrees) -> bool:
        try:
            check_sequence(self.config, degrees, self.model)
        except ConfigError:
            return False
        return True

    def _pipes(self, pp: int) -> bool:
        if pp == 1:
            return not self._says("pp")
        return pp <= self._blocks and isinstance(self.model, Staged) and hasattr(self.config.model, "width")

    @cached_property
    def _blocks(self) -> int:
        return len(self.model.blocks()) if hasattr(self.model, "blocks") else 0  # type: ignore[operator]

    def _experts(self, shards: int, tp: int, fixed: int | None) -> list[int]:
        if not self._routed:
            return [1] if fixed in (None, 1) else []
        return [ep for ep in _divisors(shards, fixed) if ep == 1 or self._divides(tp, ep)]

    @cached_property
    def _routed(self) -> bool:
        return bool(routed_layers(self.model))

    def _divides(self, tp: int, ep: int) -> bool:
        if (tp, ep) not in self._known:
            self._known[tp, ep] = self._cuts(Degrees(tp=tp, fsdp=ep, ep=ep))
        return self._known[tp, ep]

    @cached_property
    def _known(self) -> dict[tuple[int, int], bool]:
        return {}

    def _micro_batches(self, degrees: Degrees, micro_batch: int) -> int:
        """Micro-batches of a step; 0 where its rows cannot be shared out."""
        config = replace(self.config, train=replace(self.config.train, micro_batch=micro_batch))
        try:
            return config.rows_per_step(degrees) // (degrees.data_ranks * micro_batch)
        except ConfigError:
            return 0

    def _schedules(self, pp: int, micro_batches: int) -> list[tuple[str, int]]:
        """The schedules, with stages a rank (0 where that is settled), for so many micro-batches."""
        if pp == 1:
            return [("auto", 0)]
        parallel, found = self.config.parallel, []
        wanted = parallel.stages_a_rank if "parallel.stages_a_rank" in self.fixed else 0
        asked = [parallel.schedule] if "parallel.schedule" in self.fixed and parallel.schedule != "auto" else list(SCHEDULES)
        cuts = len(parallel.cuts) if "parallel.cuts" in self.fixed else 0
        for name in asked:
            known = SCHEDULES[name]
            if micro_batches < known.least(pp) or (known.in_groups and micro_batches % pp) or self._cannot_split(name):
                continue
            for chunks in [known.stages_a_rank] if known.stages_a_rank else [wanted] if wanted else CHUNKS:
                if pp * chunks <= self._blocks and wanted in (0, chunks) and cuts in (0, pp * chunks):
                    found.append((name, _stages_a_rank(name, chunks)))
        return found

    def _cannot_split(self, name: str) -> bool:
        """Whether `name` splits the backward, and something in the configuration cannot."""
        config = self.config
        whole = config.compile not in ("auto", "none") or config.parallel.reduce == "micro_batch"
        return name in SPLIT_BACKWARD and (whole or precision(config.precision).scaling is not None)

    def _contexts(self, degrees: Degrees) -> Iterator[tuple[str, int]]:
        """How attention crosses `cp`: kinds, with how many ranks exchange heads."""
        parallel = self.config.parallel
        if degrees.cp == 1:
            yield "auto", 0
            return
        if "parallel.cp_kind" in self.fixed or "parallel.cp_ulysses" in self.fixed:
            tried = [(parallel.cp_kind, parallel.cp_ulysses)]
        else:
            inner = [("usp", n) for n in _divisors(degrees.cp, None) if 1 < n < degrees.cp]
            tried = [("ring", 0), ("ulysses", 0), ("allgather", 0), *inner]
        for kind, ulysses in tried:
            try:
                own = replace(self.config.parallel, cp=degrees.cp, cp_kind=kind, cp_ulysses=ulysses)
                check_heads(replace(self.config, parallel=own), degrees)
            except ConfigError:
                continue
            yield kind, ulysses

    def _reshards(self, degrees: Degrees) -> Sequence[str]:
        own = self.config.parallel.reshard
        if "parallel.reshard" in self.fixed:
            return [own]
        return ["always", "never"] if degrees.shards > 1 else ["auto"]

    def _remats(self) -> Sequence[str]:
        if any(name.startswith("remat.") for name in self.fixed) or not hasattr(self.model, "blocks"):
            return [self.config.remat.mode]
        return REMATS


def _without_context(config: RunConfig) -> RunConfig:
    return replace(config, parallel=replace(config.parallel, cp_kind="auto", cp_ulysses=0))


def _divisors(number: int, fixed: int | None) -> list[int]:
    """The divisors of `number`; of them only `fixed` where that is given."""
    if fixed is not None:
        return [fixed] if number % fixed == 0 else []
    return [n for n in range(1, number + 1) if number % n == 0]
