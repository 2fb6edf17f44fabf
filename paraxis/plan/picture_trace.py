"""A predicted step as a Chrome trace, by itself or beside a measured one; both open in https://ui.perfetto.dev."""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from paraxis.base.errors import ConfigError
from paraxis.plan.pictures import HELD, MESSAGES, WORK, row_name, rows
from paraxis.plan.predict import Prediction

Event = dict[str, Any]

LARGEST = 2**29  # bytes of a measured trace, unpacked: larger ones take Perfetto minutes, and Python several times as much memory
US = 1e6
FAR_US = 1e18  # thirty thousand years


def trace_text(prediction: Prediction) -> str:
    """The simulated step, JSON: a process a rank of the pipeline, a thread for its work and for each track of messages, and a counter of
    the memory that the fullest rank holds. The events of `work` fill the step. Times in microseconds from the step's start."""
    return json.dumps({"traceEvents": list(_events(prediction, 1, 0.0)), "displayTimeUnit": "ms"})


def trace_beside(prediction: Prediction, measured: Path) -> str:
    """The trace that a run wrote for its `profile.steps`, with the simulated step in processes of its own, JSON.

    Both begin at once: the simulated step starts with the last of the measured ones, as the device began it where a device was profiled,
    else as the host did. Every measured event stays as it was. Raises ConfigError for a file that is not such a trace.
    """
    trace = _read(measured)
    events: list[Event] = trace["traceEvents"]
    start_us = _last_step(events, measured)
    taken = max((event["pid"] for event in events if isinstance(event.get("pid"), int)), default=0)
    return json.dumps({**trace, "traceEvents": [*events, *_events(prediction, taken + 1, start_us)]})


def _events(prediction: Prediction, first: int, start_us: float) -> Iterator[Event]:
    """The simulated step's events; rank r of the pipeline is process `first` + r."""
    drawn = rows(prediction)
    looks = {**WORK, **MESSAGES}
    for row in drawn:
        process = first + row.rank
        yield _name("process_name", process, 0, name=f"simulated {row_name(row.rank, len(drawn))}")
        yield _name("process_sort_index", process, 0, sort_index=-len(drawn) + row.rank)  # above what was measured
        tracks = [("work", row.work), *((MESSAGES[lane].words, track) for lane, track in row.messages)]
        for thread, (name, pieces) in enumerate(tracks):
            yield _name("thread_name", process, thread, name=name)
            yield _name("thread_sort_index", process, thread, sort_index=thread)
            for piece in pieces:
                said = f"{looks[piece.kind].words} {piece.label}".rstrip()
                start, end = start_us + piece.start_s * US, start_us + piece.end_s * US
                yield {"ph": "X", "cat": "simulated", "name": said, "pid": process, "tid": thread, "ts": start, "dur": end - start}
    yield from _counter(prediction, first + len(drawn), start_us)


def _counter(prediction: Prediction, process: int, start_us: float) -> Iterator[Event]:
    """What the fullest rank holds, in a process of its own: there is one curve, and a rank of the pipeline stands for many."""
    yield _name("process_name", process, 0, name=f"simulated memory of rank {prediction.rank}")
    yield _name("process_sort_index", process, 0, sort_index=0)
    for at_s, held in prediction.memory:
        sizes = {category: held.get(category, 0) for category in HELD}
        yield {"ph": "C", "cat": "simulated", "name": "bytes held", "pid": process, "tid": 0, "ts": start_us + at_s * US, "args": sizes}


def _name(kind: str, process: int, thread: int, **args: object) -> Event:
    return {"ph": "M", "name": kind, "pid": process, "tid": thread, "ts": 0, "args": args}


def _last_step(events: list[Event], path: Path) -> float:
    """When the last measured step begins, in the trace's microseconds."""
    found: dict[str, tuple[int, float]] = {}
    for event in events:
        kind, _, number = str(event.get("name")).partition(" ")
        if kind == "step" and re.fullmatch(r"\d{1,18}", number, re.ASCII) and event.get("ph") == "X" and _is_time(event.get("ts")):
            # A device's own annotation begins where its first kernel does.
            found[str(event.get("cat"))] = max(found.get(str(event.get("cat")), (-1, 0.0)), (int(number), float(event["ts"])))
    if not found:
        raise ConfigError(f"{path} has no event called step N, as a run writes with --profile.steps=10:12; take a file of its trace folder")
    return found.get("gpu_user_annotation", max(found.values()))[1]


def _is_time(value: object) -> bool:
    return isinstance(value, int | float) and abs(value) < FAR_US  # not true of what is no number either


def _read(path: Path) -> dict[str, Any]:
    """A trace, packed or not. Raises ConfigError."""
    try:
        with open(path, "rb") as plain:
            packed = plain.read(2) == b"\x1f\x8b"
        with gzip.open(path) if packed else open(path, "rb") as file:
            data = file.read(LARGEST + 1)
    except FileNotFoundError as error:
        raise ConfigError(f"there is no measured trace {path}; paraxis train RECIPE --profile.steps=10:12 writes one") from error
    except (OSError, EOFError, zlib.error) as error:
        raise ConfigError(f"the measured trace {path} cannot be read: {error}; give a file that --profile.steps wrote") from error
    if len(data) > LARGEST:
        raise ConfigError(f"the measured trace {path} has more than {LARGEST // 2**20} MiB unpacked; profile fewer steps (--profile.steps)")
    try:
        trace = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"the measured trace {path} is not JSON ({error}); give the .json.gz that --profile.steps wrote") from error
    events = trace.get("traceEvents") if isinstance(trace, dict) else None
    if not isinstance(events, list) or not all(isinstance(event, dict) for event in events):
        raise ConfigError(f"the measured trace {path} has no list of traceEvents; give the .json.gz that --profile.steps wrote")
    return trace
