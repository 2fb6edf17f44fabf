"""Running a program for its measurements: timed, ended at a limit, its output kept, and the reason where it fails."""

import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

_POLL_S = 0.02
_GRACE_S = 15.0  # to end its own workers in, after each SIGTERM

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_PREFIX = re.compile(r"^(\[\w+\]:\s*)+")  # torchrun and torch name the rank before its lines
_EXCEPTION = re.compile(r"^(?!.*ChildFailedError)[A-Za-z_][\w.]*(Error|Exception|Interrupt): .+")
_KILLED = re.compile(r"failed \(exitcode: -(\d+)\) local_rank: (\d+)")  # torchrun, of a worker that a signal ended
_OURS = "paraxis: error: "


@dataclass(frozen=True)
class Timing:
    """How a program ended: its exit code, or None where it was stopped at the limit. Seconds count from its launch."""

    code: int | None
    first_step_s: float | None
    wall_s: float


def run_program(
    command: Sequence[str],
    output: Path,
    *,
    first_step_done: Callable[[], bool],
    limit_s: float,
    folder: Path | None = None,
    variables: Mapping[str, str] | None = None,
) -> Timing:
    """Runs `command`, its output going to the file `output`, and asks `first_step_done` until it is.

    After `limit_s` seconds the program is stopped, as it is when we are interrupted or asked to end. Called in the main thread.
    """
    first_step_s = None
    with open(output, "wb") as file, leaving_on_sigterm():
        started_s = time.perf_counter()
        process = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=folder, env=variables
        )
        try:
            while (code := process.poll()) is None and time.perf_counter() - started_s < limit_s:
                if first_step_s is None and first_step_done():
                    first_step_s = time.perf_counter() - started_s
                time.sleep(_POLL_S)
        finally:
            _end(process)
    wall_s = time.perf_counter() - started_s
    if first_step_s is None and first_step_done():  # between two looks
        first_step_s = wall_s
    return Timing(code, first_step_s, wall_s)


@contextmanager
def leaving_on_sigterm() -> Iterator[None]:
    """While inside, SIGTERM raises SystemExit, as Ctrl-C raises KeyboardInterrupt: a program that we run must not keep the devices."""

    def leave(number: int, frame: Any) -> NoReturn:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ends a program that starts workers: it has to do that itself, so it is asked twice before it is killed."""
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
        try:
            process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        return


def plain(text: str) -> str:
    """`text` without terminal colours."""
    return _COLOURS.sub("", text)


def reason(timing: Timing, output: str, limit_s: float) -> str | None:
    """Why the program failed, in a line of its output where one tells; None for one that ended well."""
    if timing.code == 0:
        return None
    if timing.code is None:
        return f"stopped after {limit_s:.0f} s"
    lines = [stripped for line in plain(output).splitlines() if (stripped := _PREFIX.sub("", line).strip())]
    # The first exception is the cause; later ones are those of ranks that lost it.
    exceptions = [line for line in lines if _EXCEPTION.match(line)]
    messages = [line.removeprefix(_OURS) for line in lines if line.startswith(_OURS)]
    killed = [f"rank {found[2]} was ended by {signal.Signals(int(found[1])).name}" for line in lines if (found := _KILLED.search(line))]
    rest = [line for line in lines if any(letter.isalnum() for letter in line)][-1:]
    return next(iter([*exceptions, *messages, *killed, *rest]), f"exit code {timing.code}")[:300]
