"""The walk through one step quotes the code as it is."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_every_quote_of_the_walk_stands_in_the_code():
    quotes = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "one-step.md").read_text(), flags=re.DOTALL)
    code = "\n".join(path.read_text() for path in (ROOT / "paraxis").rglob("*.py"))
    assert quotes
    assert [quote for quote in quotes if quote not in code] == []
