"""Key tables: our parameter names beside another library's, so that weights can be renamed.

    KEYS = {
        "embed.weight": "model.embed_tokens.weight",
        "layers.{i}.attention.q_proj.weight": "model.layers.{i}.self_attn.q_proj.weight",
    }

A placeholder in braces stands for one whole number, the same wherever it is repeated; both sides of a row name the same placeholders.
"""

import re
from collections.abc import Mapping
from functools import cache

KeyTable = Mapping[str, str]

_PLACEHOLDER = re.compile(r"\{(\w+)\}")


def to_theirs(table: KeyTable, name: str) -> str | None:
    """What the other library calls our parameter `name`, or None where no row of `table` speaks of it."""
    for ours, theirs in table.items():
        if match := _matcher(ours).fullmatch(name):
            return theirs.format_map(match.groupdict())
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
