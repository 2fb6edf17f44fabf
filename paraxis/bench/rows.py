"""A row of a benchmark of training steps: what is run, what each run of it measured, and both as one record of the results file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, Protocol


@dataclass(frozen=True, kw_only=True)
class Pace:
    """How long each run of a row is: `warmup` of its `steps` are not measured; it is stopped after `limit_s` seconds."""

    steps: int
    warmup: int
    limit_s: float


@dataclass(frozen=True, kw_only=True)
class Row:
    """What a row runs: `options` as given to the system; `batch` in rows that a data rank puts through the model at a time."""

    system: str
    name: str
    options: str
    model: str
    seq_len: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Measured:
    """One run of a row. Lists hold a value for each measured step, or group of steps, after the warm-up.

    `tokens_per_s` is that of one device, `reserved_gib` the peak of a rank over the whole run, `first_step_s` and `wall_s` count
    from the launch; `startup_s` is where ours says that the seconds before its first step went. `mfu` is ours, `mfu_torchtitan` by
    TorchTitan's convention. `error` says why the run did not end well.
    """

    layout: str
    ranks: int | None
    precision: str
    tokens_per_s: Sequence[float] = ()
    step_s: Sequence[float] = ()
    mfu: float | None = None
    mfu_torchtitan: float | None = None
    reserved_gib: float | None = None
    losses: Sequence[tuple[int, float | None]] = field(default=())
    first_step_s: float | None = None
    startup_s: Mapping[str, float] = field(default_factory=dict)
    wall_s: float = 0.0
    error: str | None = None


class Subject(Protocol):
    """A row that can be run: `measure` does so once, and keeps what the run leaves behind in `folder`."""

    @property
    def row(self) -> Row: ...

    def measure(self, folder: Path) -> Measured: ...


def record(row: Row, runs: Sequence[Measured], pace: Pace) -> dict[str, Any]:
    """The row with the medians over the steps of all its runs, and the fastest and slowest of them; losses are the first run's.

    A row of which a run failed carries its error, and the numbers of the steps that were done.
    """
    rates = [rate for run in runs for rate in run.tokens_per_s]
    first = runs[0]
    return {
        **asdict(row),
        "layout": first.layout,
        "ranks": first.ranks,
        "precision": first.precision,
        "tokens_per_s": _middle(rates, 1),
        "tokens_per_s_min": round(min(rates), 1) if rates else None,
        "tokens_per_s_max": round(max(rates), 1) if rates else None,
        "step_s": _middle([seconds for run in runs for seconds in run.step_s], 4),
        "reserved_gib": max((round(run.reserved_gib, 2) for run in runs if run.reserved_gib is not None), default=None),
        "mfu": _middle([run.mfu for run in runs], 4),
        "mfu_torchtitan": _middle([run.mfu_torchtitan for run in runs], 4),
        "first_step_s": _middle([run.first_step_s for run in runs], 2),
        "wall_s": _middle([run.wall_s for run in runs], 2),
        "steps": pace.steps,
        "warmup": pace.warmup,
        "runs": len(runs),
        "losses": {str(step): loss if loss is None else round(loss, 5) for step, loss in first.losses},
        "error": next((run.error for run in runs if run.error), None),
    }


def _middle(values: Sequence[float | None], digits: int) -> float | None:
    """The median of the values that are known, None where none is."""
    known = [value for value in values if value is not None]
    return round(median(known), digits) if known else None
