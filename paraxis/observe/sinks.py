"""Files that a run appends to, one JSON object a line: metrics and events. A full disk costs lines, never the run."""

import errno
import json
import logging
import math
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Literal

from paraxis.base.errors import StorageError

log = logging.getLogger(__name__)

EventKind = Literal["start", "resume", "checkpoint", "evaluation", "warning", "failure", "stop"]


class JsonLines:
    """Appends JSON objects to a file, each line whole and on its way to disk when `write` returns.

    Raises StorageError when the file cannot be opened. A line that cannot be written is left out, with one warning for
    all of them.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._warned = False
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror}; choose another --run-dir, or make it writable") from error

    def write(self, record: Mapping[str, object]) -> None:
        """Appends one object. JSON has no NaN or infinity: such a value becomes null, and `nonfinite` says which it was."""
        line = (json.dumps(_finite(record), allow_nan=False) + "\n").encode()
        before = os.fstat(self._file.fileno()).st_size
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(before)  # no half line stays
            if not self._warned:
                log.warning("%s could not be written (%s): lines are missing from it; training goes on", self._path, error.strerror)
            self._warned = True

    def close(self) -> None:
        self._file.close()


class EventLog:
    """`events.jsonl`: what happened to a run, when, and why. Several processes may append to the same file."""

    def __init__(self, path: Path, rank: int) -> None:
        self._lines = JsonLines(path)
        self._rank = rank

    def write(self, kind: EventKind, reason: str, *, step: int | None = None, **fields: object) -> None:
        """Appends one event: time (UTC, ISO 8601), kind, rank, reason, step (null outside the steps), and `fields`."""
        now = time.time()
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(now)) + f".{int(now % 1 * 1000):03d}Z"
        self._lines.write({"time": stamp, "kind": kind, "rank": self._rank, "reason": reason, "step": step, **fields})

    def close(self) -> None:
        self._lines.close()


def cut_after(path: Path, step: int) -> None:
    """Drops the lines of steps after `step` from a metrics file, and any that are broken, by replacing the file atomically.

    A run that continues at a checkpoint does those steps again; so the file has each step once. No file is no work.
    Raises StorageError when the shortened file cannot be written.
    """
    shortened = path.with_suffix(".tmp")
    try:
        with open(path, "rb") as old, open(shortened, "wb") as new:
            new.writelines(line.rstrip(b"\n") + b"\n" for line in old if 0 <= _step_of(line) <= step)
            new.flush()
            os.fsync(new.fileno())
        os.replace(shortened, path)
    except FileNotFoundError:
        return
    except OSError as error:
        raise StorageError(f"{path} cannot be rewritten: {error.strerror}; free space, or choose another --run-dir") from error


def _step_of(line: bytes) -> int:
    """The step of a metrics line, or -1 where a crash left less than a line."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return -1


def _finite(record: Mapping[str, object]) -> dict[str, object]:
    wild = {name: str(value) for name, value in record.items() if isinstance(value, float) and not math.isfinite(value)}
    return {**record, **dict.fromkeys(wild), "nonfinite": wild} if wild else dict(record)
