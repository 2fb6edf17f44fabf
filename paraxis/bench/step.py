"""Training steps of ours, measured through the command a user would type: `paraxis train` in a process of its own."""

import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from paraxis.base.config import redact
from paraxis.base.errors import ConfigError
from paraxis.base.layout import laid_out
from paraxis.bench.machine import Machine
from paraxis.bench.program import reason, run_program
from paraxis.bench.rows import Measured, Pace, Row
from paraxis.models.llama import LlamaConfig, torchtitan_flops_per_token
from paraxis.observe.folder import RunFolder
from paraxis.observe.throughput import mfu
from paraxis.recipes.find import find
from paraxis.train.config import RunConfig

# What a run does beside its steps is left out, unless the row asks for it.
QUIET = {"checkpoint.every": 0, "checkpoint.at_end": "false", "metrics.every": 1, "metrics.tensorboard": "false", "eval.every": 0}


@dataclass(frozen=True)
class Ours:
    """A recipe with the settings of one row."""

    row: Row
    recipe: str
    config: RunConfig
    settings: Mapping[str, object]
    ranks: int | None
    machine: Machine
    pace: Pace

    def measure(self, folder: Path) -> Measured:
        """Trains once, with the run folder and the output in `folder`."""
        run, output = RunFolder(folder / "run"), folder / "output.log"
        settings = {**QUIET, **self.settings, "train.steps": self.pace.steps}
        command = [sys.executable, "-m", "paraxis", "train", self.recipe, *words(settings), f"--run-dir={run.path}", "--resume=never"]
        if self.ranks is not None:
            command.append(f"--ranks={self.ranks}")
        timing = run_program(
            command,
            output,
            first_step_done=lambda: run.metrics_file.exists() and run.metrics_file.stat().st_size > 0,
            limit_s=self.pace.limit_s,
        )
        metrics = read_json_lines(run.metrics_file)
        kept = [line for line in metrics if line["step"] > self.pace.warmup]
        start = next(iter(read_json_lines(run.events_file)), {})
        rates = [line["tokens_per_s"] for line in kept]
        return Measured(
            layout=start.get("layout", str(self.config.parallel.degrees)),
            ranks=start.get("ranks", self.ranks),
            precision=self.config.precision,
            tokens_per_s=rates,
            step_s=[line["step_s"] for line in kept],
            mfu=median(known) if (known := [line["mfu"] for line in kept if line["mfu"] is not None]) else None,
            mfu_torchtitan=self._mfu_torchtitan(median(rates)) if rates else None,
            reserved_gib=max((line["memory_gib"] for line in metrics), default=None),
            losses=[(line["step"], line["loss"]) for line in metrics],
            first_step_s=timing.first_step_s,
            startup_s=start.get("startup_s", {}),
            wall_s=timing.wall_s,
            error=reason(timing, output.read_text(errors="replace"), self.pace.limit_s),
        )

    def _mfu_torchtitan(self, tokens_per_s: float) -> float | None:
        """MFU as TorchTitan counts it, which also takes the bf16 peak whatever the precision; None where it is not defined."""
        model = self.config.model
        if not self.machine.devices or not isinstance(model, LlamaConfig) or hasattr(model, "routing"):  # whose experts it would all count
            return None
        return mfu(torchtitan_flops_per_token(model, self.config.data.seq_len), tokens_per_s, self.machine.name, "bf16")


def ours(name: str, recipe: str, settings: Mapping[str, object], ranks: int | None, machine: Machine, pace: Pace) -> Ours:
    """The row `name` of a recipe; of its `settings`, `layout` says every degree at once, as it does for `paraxis train`.

    Raises ConfigError for settings that the recipe does not have.
    """
    if "train.steps" in settings:
        raise ConfigError("train.steps is the benchmark's own here; set --steps (and --warmup) instead")
    config = configured(recipe, {**QUIET, **settings})
    changed = words({path: value for path, value in settings.items() if path.startswith("model.")})
    row = Row(
        system="paraxis",
        name=name,
        options=" ".join(words({path: redact(path, value) for path, value in settings.items()})),
        model=" ".join([recipe, *changed]),
        seq_len=config.data.seq_len,
        batch=config.train.micro_batch,
    )
    return Ours(row, recipe, config, settings, ranks, machine, pace)


def configured(recipe: str, settings: Mapping[str, object]) -> RunConfig:
    """The recipe's run with these settings, of which `layout` says every degree. Raises ConfigError for those that it does not have."""
    own = {path: value for path, value in settings.items() if path != "layout"}
    return find(recipe, laid_out(own, str(settings["layout"])) if "layout" in settings else own)[0]


def words(settings: Mapping[str, object]) -> list[str]:
    """Settings as the command line spells them; True stands for one that was given without a value."""
    return [f"--{path}" if value is True else f"--{path}={value}" for path, value in settings.items()]


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a file, one a line; none where there is no file, and without a last line that is not whole."""
    return list(_objects(path.read_text().splitlines(keepends=True))) if path.exists() else []


def _objects(lines: Iterable[str]) -> Iterable[dict[str, Any]]:
    for line in lines:
        if line.endswith("\n"):
            yield json.loads(line)
