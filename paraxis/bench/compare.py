"""Running the rows of a benchmark in turns, so that a machine that warms up or slows down favours none of them."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paraxis.bench.rows import Measured, Pace, Subject, record


def compare(
    subjects: Sequence[Subject],
    runs: int,
    pace: Pace,
    folder: Path,
    say: Callable[[str], None],
    keep: Callable[[list[dict[str, Any]]], None],
) -> None:
    """Runs every row `runs` times and gives the records of all that have run to `keep` after each, so that none is lost."""
    measured: list[list[Measured]] = [[] for _ in subjects]
    for run in range(1, runs + 1):
        for number, (subject, done) in enumerate(zip(subjects, measured, strict=True), 1):
            row = subject.row
            say(f"{row.system} {row.name} (row {number} of {len(subjects)}" + (f", run {run} of {runs})" if runs > 1 else ")"))
            place = folder / f"{number}-{run}"
            place.mkdir(parents=True)
            done.append(subject.measure(place))
            say(f"  {outcome(done[-1])}")
            keep([record(subject.row, done, pace) for subject, done in zip(subjects, measured, strict=True) if done])


def outcome(run: Measured) -> str:
    """One run in a line."""
    if run.error is not None:
        return f"failed: {run.error}"
    numbers = [f"{rate:,.0f}" for rate in (min(run.tokens_per_s), max(run.tokens_per_s))]
    return f"{' - '.join(numbers)} tokens/s a device, {run.reserved_gib or 0:.1f} GiB, {run.wall_s:.0f} s in all"
