"""What a run tells the world: progress, metrics, events and profiles. Rank 0 speaks; every rank may profile."""

import logging
from collections.abc import Mapping

from paraxis.base.strategy import Strategy
from paraxis.observe.config import MetricsConfig
from paraxis.observe.folder import RunFolder
from paraxis.observe.memory import read_memory
from paraxis.observe.metrics import MetricsLog
from paraxis.observe.progress import show_progress
from paraxis.observe.sinks import EventKind, EventLog
from paraxis.observe.throughput import StepTime, mfu
from paraxis.parallel.world import World
from paraxis.train.step import Said, StepReport

log = logging.getLogger("paraxis")


class Record:
    """The run folder's files and the terminal, as seen from one rank. On other ranks only `failure` does anything."""

    def __init__(self, folder: RunFolder, world: World, config: MetricsConfig, *, total: int, done: int) -> None:
        self._folder, self._world = folder, world
        self._speaks = world.first
        if self._speaks:
            self._progress = show_progress(total, done)
            self._metrics = MetricsLog(folder, config, done)
            self._events = EventLog(folder.events_file, world.rank)

    def say(self, text: str) -> None:
        """A line for the terminal."""
        if self._speaks:
            self._progress.say(text)

    def event(self, kind: EventKind, reason: str, *, step: int | None = None, **fields: object) -> None:
        """A line for events.jsonl; warnings are shown too."""
        if self._speaks:
            self._events.write(kind, reason, step=step, **fields)
            if kind == "warning":
                self._progress.say(f"{kind}: {reason}")

    def failure(self, reason: str, step: int, *, shared: bool) -> None:
        """A line for events.jsonl about what ends the run, from the rank it happened on; from rank 0 where it is `shared` by all."""
        if self._speaks or not shared:
            events = EventLog(self._folder.events_file, self._world.rank)
            events.write("failure", reason, step=step)
            events.close()

    def step(self, step: int, report: StepReport, timed: StepTime, values: Mapping[str, float | int | None]) -> None:
        """The numbers of a finished step."""
        if not self._speaks:
            return
        if self._metrics.due(step):
            self._metrics.write(
                step, {"loss": report.loss, "grad_norm": report.grad_norm, **values, "step_s": timed.step_s, "data_s": report.data_s}
            )
        tokens_per_s = values["tokens_per_s"] or 0.0
        self._progress.update(step, loss=report.loss, tokens_per_s=tokens_per_s * self._world.size, memory_gib=report.memory_gib)

    def evaluation(self, step: int, loss: float) -> None:
        """A held-out loss, in nats per target."""
        if self._speaks:
            self._metrics.curve(step, {"heldout_loss": loss})
            self._progress.say(f"step {step}: held-out loss {loss:.4f}")

    def close(self) -> None:
        if self._speaks:
            self._progress.close()
            self._metrics.close()
            self._events.close()


def speed(tokens: int, timed: StepTime, world: World, strategy: Strategy, flops_per_token: float) -> dict[str, float | None]:
    """tokens/s of each device and MFU for a step over `tokens` tokens."""
    tokens_per_s = timed.tokens_per_s(tokens, world.size)
    return {"tokens_per_s": tokens_per_s, "mfu": mfu(flops_per_token, tokens_per_s, world.device.name, strategy.precision.products)}


def said(world: World, stop: bool, data_s: float) -> Said:
    """What this rank tells the others with its next step."""
    return Said(stop=stop, data_s=data_s, memory_gib=read_memory(world.device).reserved_gib)
