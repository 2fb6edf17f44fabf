"""The results of a benchmark as a file, `NAME-HARDWARE-DATE.json`."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from paraxis.base.errors import ConfigError, StorageError

FOLDER = Path("bench/results")


@dataclass(frozen=True, kw_only=True)
class Results:
    """What was measured: on what, with which versions, when (UTC), by which command, and a record for each row."""

    hardware: str
    versions: Mapping[str, str]
    date: str
    command: str
    rows: Sequence[Mapping[str, Any]] = ()

    def json(self) -> str:
        return json.dumps(asdict(self), indent=1) + "\n"

    def file_name(self, name: str) -> str:
        """Where the results of the benchmark `name` belong: "step-2x-nvidia-h200-2026-01-31.json"."""
        slug = re.sub(r"[^a-z0-9]+", "-", re.sub(r"^(\d+) x ", r"\1x-", self.hardware.lower())).strip("-")
        return f"{name}-{slug}-{self.date}.json"


def write_results(path: Path, results: Results) -> None:
    """Writes the file, whole or not at all. Raises StorageError where it cannot be written."""
    unfinished = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(results.json())
        os.replace(unfinished, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror}; choose another --out") from error


def read_results(path: Path) -> Results:
    """What `write_results` wrote. Raises ConfigError for a file that is missing or something else."""
    try:
        return Results(**json.loads(path.read_text()))
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}; check the path") from error
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path} holds no benchmark results; give a file that paraxis bench wrote") from error
