"""Key tables: our parameter names beside another library's, so that weights can be renamed, and taken apart or put together where
theirs are smaller or larger.

    KEYS = {
        "embed.weight": "model.embed_tokens.weight",
        "layers.{i}.attention.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
        "layers.{i}.mlp.experts.up_proj": Stacked("model.layers.{i}.mlp.experts.{e}.up_proj.weight", transpose=True),
        "layers.{i}.attention.k_proj.weight": Piece("h.{i}.attn.c_attn.weight", 1, of=3, transpose=True),
    }

A placeholder in braces stands for one whole number, the same wherever it is repeated; both sides of a row name the same placeholders,
but for the `{e}` of a `Stacked`, over which their tensors are counted.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cache


@dataclass(frozen=True)
class Stacked:
    """Our tensor is theirs of {e} = 0, 1, 2, ... side by side along a new dimension 0; with `transpose`, each is a matrix turned."""

    pattern: str
    transpose: bool = False

    def names(self, count: int) -> list[str]:
        """What they call each of `count` tensors, in our order."""
        return [self.pattern.replace("{e}", str(number)) for number in range(count)]

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of each of theirs, where `shape` is ours."""
        return shape[:0:-1] if self.transpose else shape[1:]


@dataclass(frozen=True)
class Piece:
    """Ours is number `number` of the equal pieces that theirs has, so many, side by side in its last dimension; with `transpose`, it is
    a matrix turned. All pieces of one tensor of theirs stand in the table."""

    pattern: str
    number: int = 0
    of: int = 1
    transpose: bool = False

    def their_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape of the whole of theirs, where `shape` is ours."""
        *rest, last = shape[::-1] if self.transpose else shape
        return (*rest, last * self.of)


Theirs = str | Stacked | Piece
KeyTable = Mapping[str, Theirs]

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def to_theirs(table: KeyTable, name: str) -> Theirs | None:
    """What the other library calls our parameter `name`, or None where no row of `table` speaks of it."""
    for ours, theirs in table.items():
        if match := _matcher(ours).fullmatch(name):
            numbers = match.groupdict()
            if isinstance(theirs, str):
                return theirs.format_map(numbers)
            return replace(theirs, pattern=theirs.pattern.format_map({**numbers, "e": "{e}"}))
    return None


@cache
def _matcher(pattern: str) -> re.Pattern[str]:
    seen: set[str] = set()
    parts: list[str] = []
    for i, part in enumerate(_PLACEHOLDER.split(pattern)):  # text, placeholder, text, placeholder, ..., text
        if i % 2 == 0:
            parts.append(re.escape(part))
        else:
            # No leading zeros: two spellings of one index would be two names for one tensor.
            parts.append(f"(?P={part})" if part in seen else f"(?P<{part}>0|[1-9][0-9]*)")
            seen.add(part)
    return re.compile("".join(parts))
