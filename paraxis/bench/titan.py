"""Training steps of TorchTitan 0.2.2 (https://github.com/pytorch/torchtitan), run from a folder that its user has set up.

    DIR/titan.toml    the configuration that every row starts from
    DIR/wheels/       its wheels, installed for the benchmark only; not needed where Python finds torchtitan (or DIR holds a checkout)
    DIR/...           whatever the configuration names: a tokenizer, documents

docs/performance.md says how to set it up. What it measures is read from the lines it logs.
"""

import importlib.metadata
import importlib.util
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

from paraxis.base.env import peer_variables
from paraxis.base.errors import ConfigError, ParaxisError
from paraxis.bench.program import plain, reason, run_program
from paraxis.bench.rows import Measured, Pace, Row

CONFIG = "titan.toml"
VERSION = "0.2"  # later ones take other options and read no TOML

_LINE = re.compile(
    r"(?:(?P<time>\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) .*)?\bstep:\s*(?P<step>\d+)\s+loss:\s*(?P<loss>\S+)\s.*?"
    r"memory:\s*(?P<gib>[\d.]+)GiB\S*\s+tps:\s*(?P<tps>[\d,]+)\s+tflops:\s*[\d,.]+\s+mfu:\s*(?P<mfu>[\d.]+)%"
)
_UNMIXED = "Mixed precision training is disabled"  # it computes in fp32 then, whatever was asked for
# The axes of a layout beside the options that set their degrees, with their defaults.
_DEGREES = {
    "dp": ("parallelism.data_parallel_replicate_degree", 1),
    "fsdp": ("parallelism.data_parallel_shard_degree", -1),
    "tp": ("parallelism.tensor_parallel_degree", 1),
    "cp": ("parallelism.context_parallel_degree", 1),
    "pp": ("parallelism.pipeline_parallel_degree", 1),
}


@dataclass(frozen=True)
class Logged:
    """One line of its log: the step, and what it measured over the steps since the line before."""

    step: int
    loss: float
    reserved_gib: float
    tokens_per_s: float
    mfu: float
    time_s: float | None


@dataclass(frozen=True)
class Site:
    """Where TorchTitan runs: the user's folder, and where its modules are if Python does not find them by itself."""

    folder: Path
    modules: Path | None
    version: str


@dataclass(frozen=True)
class Titan:
    """One row: the folder's configuration with `options` on top."""

    row: Row
    site: Site
    options: Sequence[str]
    settings: Mapping[str, Any]
    ranks: int
    pace: Pace

    def measure(self, folder: Path) -> Measured:
        """Trains once, with its logs in `folder`."""
        output = folder / "output.log"
        timing = run_program(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(self.ranks)),
                *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--log-dir", str(folder / "ranks")),
                # Of the ranks, the last one speaks: with a pipeline it alone knows the loss.
                *("--local-ranks-filter", str(self.ranks - 1), "--tee", "3"),
                *("-m", "torchtitan.train", "--job.config_file", CONFIG, *self.options),
                *("--training.steps", str(self.pace.steps), "--job.dump_folder", str(folder / "dump")),
            ],
            output,
            first_step_done=lambda: bool(read_log(output.read_text(errors="replace"))),
            limit_s=self.pace.limit_s,
            folder=self.site.folder,
            variables=peer_variables(self.site.modules),
        )
        text = output.read_text(errors="replace")
        others = "".join(path.read_text(errors="replace") for path in sorted(folder.glob("ranks/**/stderr.log")))
        lines = read_log(text)
        windows = measured_windows(lines, self.pace.warmup)
        error = reason(timing, others + text, self.pace.limit_s)
        if not windows and error is None:
            error = f"no line of its log is of steps after the warm-up only; lower metrics.log_freq in {CONFIG}, or raise --steps"
        return Measured(
            layout=layout_of(self.settings, self.ranks),
            ranks=self.ranks,
            precision=precision_of(self.settings, text),
            tokens_per_s=[last.tokens_per_s for _, last in windows],
            step_s=[
                (last.time_s - first.time_s) / (last.step - first.step)
                for first, last in windows
                if first.time_s is not None and last.time_s is not None
            ],
            mfu_torchtitan=median([last.mfu for _, last in windows]) if windows else None,
            reserved_gib=max((line.reserved_gib for line in lines), default=None),
            losses=[(line.step, line.loss) for line in lines],
            first_step_s=timing.first_step_s,
            wall_s=timing.wall_s,
            error=error,
        )


def titan(name: str, options: Sequence[str], site: Site, ranks: int, pace: Pace) -> Titan:
    """The row `name` with `options` on top of the folder's configuration. Raises ConfigError for options that cannot be read."""
    given = read_options(options)
    if "training.steps" in given:
        raise ConfigError("training.steps is the benchmark's own here; set --steps (and --warmup) instead")
    with open(site.folder / CONFIG, "rb") as file:
        try:
            settings = _dotted(tomllib.load(file))
        except ValueError as error:
            raise ConfigError(f"{site.folder / CONFIG} is not valid TOML: {error}") from error
    settings |= given
    row = Row(
        system="torchtitan",
        name=name,
        options=shlex.join(options),
        model=f"{settings.get('model.name', 'llama3')}_{settings.get('model.flavor', 'debugmodel')}".lower(),
        seq_len=int(settings.get("training.seq_len", 2048)),
        batch=int(settings.get("training.local_batch_size", 8)),
    )
    return Titan(row, site, options, settings, ranks, pace)


def open_site(folder: Path, target: Path) -> Site:
    """The folder that a user has set up; wheels in it are installed into `target` where Python does not find torchtitan.

    Raises ConfigError for a folder that lacks something or holds another version, ParaxisError when pip fails.
    """
    if not (folder / CONFIG).is_file():
        raise ConfigError(f"--titan={folder} holds no {CONFIG}; docs/performance.md says how to set the folder up")
    modules = None
    if importlib.util.find_spec("torchtitan") is None and not (folder / "torchtitan" / "train.py").is_file():
        wheels = sorted(map(str, folder.resolve().glob("wheels/*.whl")))
        if not wheels:
            raise ConfigError(
                f"--titan={folder}: Python finds no torchtitan, and there is none in {folder / 'wheels'}; "
                "pip install torchtitan==0.2.2, or set the folder up as docs/performance.md says"
            )
        _install(wheels, target)
        modules = target
    version = _version(modules)
    if not version.startswith((VERSION, "unknown")):
        raise ConfigError(f"torchtitan {version} takes other options than 0.2.2, which this benchmark speaks; install torchtitan==0.2.2")
    return Site(folder.resolve(), modules, version)


def _install(wheels: Sequence[str], target: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile", "--no-cache-dir"]
    done = subprocess.run([*command, "--target", str(target), *wheels], capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["pip said nothing"])[-1]
        raise ParaxisError(f"the wheels of torchtitan could not be installed: {last}")


def _version(modules: Path | None) -> str:
    where = {"path": [str(modules)]} if modules else {}
    context = importlib.metadata.DistributionFinder.Context(name="torchtitan", **where)
    found = importlib.metadata.Distribution.discover(context=context)
    return next((distribution.version for distribution in found), "unknown")  # a checkout carries no version


def read_log(text: str) -> list[Logged]:
    """The lines of a log that give a step's measurements, in order."""
    return [_logged(match) for line in plain(text).splitlines() if (match := _LINE.search(line))]


def _logged(match: re.Match[str]) -> Logged:
    time = match["time"]
    return Logged(
        step=int(match["step"]),
        loss=float(match["loss"]),
        reserved_gib=float(match["gib"]),
        tokens_per_s=float(match["tps"].replace(",", "")),
        mfu=float(match["mfu"]) / 100,
        time_s=datetime.strptime(time, "%Y-%m-%d %H:%M:%S,%f").timestamp() if time else None,
    )


def measured_windows(lines: Sequence[Logged], warmup: int) -> list[tuple[Logged, Logged]]:
    """The lines that speak of no warm-up step, each with the line before: a line averages over the steps between the two."""
    return [(before, line) for before, line in pairwise(lines) if before.step >= warmup]


def read_options(words: Sequence[str]) -> dict[str, str]:
    """Options by name: `--a.b c d` and `--a.b=c` alike, "" where no value was given."""
    found: dict[str, str] = {}
    name = None
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value
        elif name is None:
            raise ConfigError(f"{word!r} is not an option of torchtitan; write --section.field value")
        else:
            found[name] = f"{found[name]} {word}".strip()
    return found


def _dotted(table: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in table.items():
        found |= _dotted(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return found


def layout_of(settings: Mapping[str, Any], ranks: int) -> str:
    """The layout that its degrees make on `ranks` ranks, in our grammar."""
    degrees = {axis: int(settings.get(option, default)) for axis, (option, default) in _DEGREES.items()}
    if degrees["fsdp"] == -1:
        taken = 1
        for axis, degree in degrees.items():
            taken *= degree if axis != "fsdp" else 1
        degrees["fsdp"] = ranks // taken
    return " x ".join(f"{axis}{degree}" for axis, degree in degrees.items() if degree != 1) or "one rank"


def precision_of(settings: Mapping[str, Any], log: str) -> str:
    """What it computes in: float8 where linears are converted, else what mixed precision or the weights' dtype say."""
    if "float8" in str(settings.get("model.converters", "")):
        return "float8"
    weights = str(settings.get("training.dtype", "float32"))
    compute = str(settings.get("training.mixed_precision_param", "bfloat16"))
    if weights == "bfloat16":
        return "bf16_weights"
    return "bf16" if compute == "bfloat16" and _UNMIXED not in log else "fp32"
