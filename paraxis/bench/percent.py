"""How far predictions are from what was measured, in percent, with the sign, and all of them in a few numbers."""

from collections.abc import Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any


def percent(said: float | None, measured: float | None) -> float | None:
    """Positive where too much was predicted; None where either is not known."""
    return None if said is None or measured is None else round(100 * (said / measured - 1), 2)


def summaries(records: Sequence[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """For each set of records and each key that ends in _percent: the mean of what it is off by without sign, with its sign, and the
    worst. The rows that are counted are those of which something was predicted."""
    keys = [key for key in records[0] if key.endswith("_percent")] if records else []
    for name in dict.fromkeys(record["set"] for record in records):
        off = {key: [record[key] for record in records if record["set"] == name and record[key] is not None] for key in keys}
        number = sum(record["set"] == name and any(record[key] is not None for key in keys) for record in records)
        for what, of in (("mean", _mean_size), ("mean with sign", fmean), ("worst", _largest)):
            yield {"set": name, "row": f"{what} of {number}", **{key: round(of(all), 2) if all else None for key, all in off.items()}}


def _mean_size(values: Sequence[float]) -> float:
    return fmean(map(abs, values))


def _largest(values: Sequence[float]) -> float:
    return max(values, key=abs)
