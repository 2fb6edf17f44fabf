"""Which layouts there are: every legal combination of axes, each with every schedule and every way across a split context."""

from collections.abc import Iterator
from itertools import product
from math import prod

from paraxis.base.axes import AXES
from paraxis.base.errors import ConfigError
from paraxis.base.layout import CP_KINDS
from paraxis.base.schedules import SCHEDULES
from paraxis.train.config import RunConfig
from paraxis.train.run import check
from paraxis.verify.shrink import shrunk

MOST_RANKS = 8
DEFAULT_SCHEDULE = "1f1b"  # what a layout means that names none


def legal_layouts(config: RunConfig, precision: str, most_ranks: int = MOST_RANKS, every_choice: bool = True) -> list[str]:
    """The layouts on up to `most_ranks` ranks that the shrunken recipe can run on, fewest ranks first.

    With `every_choice` a combination of axes comes with every schedule, every way of attention and every number of expert ranks, one of
    them varied at a time; else with the default of each.
    """
    degrees = product(range(1, most_ranks + 1), repeat=len(AXES))
    combinations: list[dict[str, int]] = [dict(zip(AXES, c, strict=True)) for c in degrees if 1 < prod(c) <= most_ranks]
    combinations.sort(key=lambda combination: prod(combination.values()))
    written = [text for combination in combinations for text in _written(combination, every_choice)]
    return [text for text in written if why_not(config, text, precision) is None]


def why_not(config: RunConfig, layout: str, precision: str) -> str | None:
    """Why the shrunken recipe cannot run on `layout`, or None."""
    try:
        small = shrunk(config, layout, precision)
        check(small, small.parallel.degrees.ranks)
    except ConfigError as error:
        return str(error)
    return None


def _written(combination: dict[str, int], every_choice: bool) -> Iterator[str]:
    """A combination of degrees in the grammar of layouts, and its variants."""

    def text(**suffix: str) -> str:
        return "x".join(f"{axis}{degree}{suffix.get(axis, '')}" for axis, degree in combination.items() if degree > 1)

    yield text()
    if not every_choice:
        return
    if combination["pp"] > 1:
        yield from (text(pp=f".{schedule}") for schedule in SCHEDULES if schedule != DEFAULT_SCHEDULE)
    if combination["cp"] > 1:
        yield from (text(cp=f".{kind}") for kind in CP_KINDS if kind != "usp")
        yield from (text(cp=f".ulysses{inner}") for inner in _divisors(combination["cp"])[:-1])
    shards = combination["fsdp"] * combination["cp"]
    yield from (f"{text()}xep{ways}" for ways in _divisors(shards))


def _divisors(degree: int) -> list[int]:
    """The numbers above 1 that divide `degree`."""
    return [n for n in range(2, degree + 1) if degree % n == 0]
