"""Progress for the person who started the run: a live line in a terminal, plain lines in a log file. One rank shows it."""

import sys
import time
from collections import deque
from typing import TYPE_CHECKING, Protocol, TextIO

if TYPE_CHECKING:
    from rich.console import Console

_PLAIN_EVERY_S = 5.0  # seconds between plain lines
_WINDOW = 20  # steps that the estimate of the time left looks back on


class Progress(Protocol):
    """What the training loop tells of each step."""

    def update(self, step: int, *, loss: float, tokens_per_s: float, memory_gib: float) -> None:
        """Shows that `step` steps are done: its loss (mean nats a target), the tokens/s of all ranks, peak memory of a rank."""
        ...

    def say(self, text: str) -> None:
        """Shows a line of text that stays."""
        ...

    def close(self) -> None: ...


def show_progress(total: int, done: int = 0, stream: TextIO | None = None) -> Progress:
    """Progress from step `done` to `total`, on `stream` (standard output): live where it is a terminal."""
    out = sys.stdout if stream is None else stream
    if out.isatty():
        from rich.console import Console  # not needed where nobody watches

        console = Console(file=out)
        if console.is_interactive:  # not a dumb terminal
            return LiveProgress(total, done, console)
    return PlainProgress(total, done, out)


class TimeLeft:
    """Estimates the seconds left from the pace of the last steps, so that a slow first step (compilation) is soon forgotten."""

    def __init__(self, total: int, done: int) -> None:
        self._total = total
        self._recent = deque([(done, time.perf_counter())], maxlen=_WINDOW + 1)

    def after(self, step: int) -> float:
        """The seconds left once `step` is done."""
        self._recent.append((step, time.perf_counter()))
        (first, started_s), (last, ended_s) = self._recent[0], self._recent[-1]
        return (self._total - step) * (ended_s - started_s) / max(1, last - first)


class PlainProgress:
    """One line every few seconds, and one for the first and the last step."""

    def __init__(self, total: int, done: int, stream: TextIO) -> None:
        self._total = total
        self._stream = stream
        self._left = TimeLeft(total, done)
        self._shown_s = -_PLAIN_EVERY_S

    def update(self, step: int, *, loss: float, tokens_per_s: float, memory_gib: float) -> None:
        left_s = self._left.after(step)
        now_s = time.perf_counter()
        if step < self._total and now_s - self._shown_s < _PLAIN_EVERY_S:
            return
        self._shown_s = now_s
        self.say(f"step {step}/{self._total}  {_numbers(loss, tokens_per_s, memory_gib)}  left {duration(left_s)}")

    def say(self, text: str) -> None:
        print(text, file=self._stream, flush=True)

    def close(self) -> None:
        pass


class LiveProgress:
    """A bar that is redrawn in place; what is said meanwhile scrolls above it."""

    def __init__(self, total: int, done: int, console: "Console") -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
        from rich.progress import Progress as Bar

        self._left = TimeLeft(total, done)
        columns = (TextColumn("step"), MofNCompleteColumn(), BarColumn(), TextColumn("{task.fields[numbers]}"))
        self._bar = Bar(*columns, console=console, expand=True)
        self._task = self._bar.add_task("train", total=total, completed=done, numbers="starting")
        self._bar.start()

    def update(self, step: int, *, loss: float, tokens_per_s: float, memory_gib: float) -> None:
        numbers = f"{_numbers(loss, tokens_per_s, memory_gib)}  left {duration(self._left.after(step))}"
        self._bar.update(self._task, completed=step, numbers=numbers)

    def say(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False)

    def close(self) -> None:
        self._bar.stop()


def _numbers(loss: float, tokens_per_s: float, memory_gib: float) -> str:
    return f"loss {loss:.4f}  {tokens_per_s:,.0f} tokens/s  {memory_gib:.1f} GiB"


def duration(seconds: float) -> str:
    """Seconds as 1:05 or 2:03:04."""
    minutes, second = divmod(round(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
