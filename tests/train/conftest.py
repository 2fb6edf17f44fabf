"""What tests of whole runs share: a small text, and one cache of its tokens for all of them."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def _use_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PARAXIS_CACHE", str(cache))


@pytest.fixture(scope="session")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sixty short documents as JSON lines."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = ["".join(f"{n} times {m} is {n * m}. " for m in range(2, 3 + n % 17)) for n in range(60)]
    path.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    return path
