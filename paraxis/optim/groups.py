"""Which parameters decay: a rule over their names and global shapes, so that every layout groups them alike."""

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from fnmatch import fnmatchcase

from paraxis.base.errors import ConfigError
from paraxis.optim.config import NO_DECAY, OptimConfig


def group_names(shapes: Mapping[str, Sequence[int]], config: OptimConfig) -> dict[str, list[str]]:
    """Splits parameter names into {"decay": [...], "no_decay": [...]}, in the order of `shapes` (name -> global shape).

    A parameter does not decay when a pattern of `optim.no_decay` matches its name, or when it has fewer than two
    dimensions (unless `optim.decay_vectors`). Raises ConfigError for a pattern that matches no parameter, unless it is
    one of the defaults, which fit most models but need not fit all.
    """
    for pattern in config.no_decay:
        if pattern not in NO_DECAY and not any(fnmatchcase(name, pattern) for name in shapes):
            near = get_close_matches(pattern, shapes, n=1, cutoff=0.0)
            raise ConfigError(
                f"optim.no_decay: {pattern!r} matches no parameter; remove it, or correct it"
                + (f" (the nearest parameter is {near[0]!r}; `*` stands for any text)" if near else "")
            )
    groups: dict[str, list[str]] = {"decay": [], "no_decay": []}
    for name, shape in shapes.items():
        exempt = any(fnmatchcase(name, pattern) for pattern in config.no_decay) or (len(shape) < 2 and not config.decay_vectors)
        groups["no_decay" if exempt else "decay"].append(name)
    return groups
