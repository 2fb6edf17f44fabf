"""`paraxis train`: starts the local workers of a run, or is one of them."""

import gc
import shutil
import sys
import textwrap
from collections.abc import Iterable
from dataclasses import fields, replace
from functools import partial
from itertools import groupby
from pathlib import Path

from paraxis.base.axes import Degrees
from paraxis.base.config import Setting, describe, flatten, redact, suggestion, to_toml
from paraxis.base.env import Environment, count_gpus_without_cuda, read_environment, worker_threads
from paraxis.base.errors import ConfigError
from paraxis.base.loading import loading
from paraxis.cli.arguments import Arguments, one_of, parse, whole_number
from paraxis.cli.end_of_run import show_end
from paraxis.cli.output import show
from paraxis.resilience.launch import launch

OPTIONS = ("layout", "ranks", "run-dir", "resume", "cluster")
FLAGS = ("print-config", "debug", "help")
RESUME = ("auto", "never", "must")

HELP = """\
usage: paraxis train RECIPE [--field=value ...] [options]

RECIPE is a built-in name, path/to/file.py:function, package.module:function, or a TOML file that
names one (base = "...") and changes settings. Any setting of the recipe is an option: --train.steps=20.
Alone, the command starts its own workers; under torchrun or Slurm's srun it is one of theirs.

  --layout LAYOUT  every degree at once, such as fsdp2xtp2, in place of --parallel.fsdp=2 --parallel.tp=2
  --cluster FILE   with --parallel.auto=true: what the planner chooses a layout for (default: cluster.toml, where paraxis
                   probe has written one here, else the ready file of this machine's GPUs)
  --ranks N        workers to start (default: as many as the parallel degrees need; with parallel.fsdp=-1
                   every GPU of this machine, or one process that computes with all cores)
  --run-dir DIR    where the run is kept (default: runs/NAME)
  --resume WHEN    auto: continue if the folder holds a checkpoint (default); must: continue or refuse;
                   never: refuse a folder that holds one
  --print-config   print the resolved run as TOML, and stop
  --debug          show tracebacks of errors
  --help           this; with a RECIPE, all of its settings

examples:
  paraxis train debug                                      ten steps on a CPU
  paraxis train debug --help                               its settings, with their values
  paraxis train debug --parallel.tp=2 --train.steps=20     two workers, tensor parallel
  paraxis train runs/debug/config.toml --run-dir runs/two  the same run again, elsewhere
  torchrun --nproc-per-node 8 -m paraxis train llama3_8b
"""


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused or fails."""
    parsed = parse(arguments, OPTIONS, FLAGS)
    if not parsed.names and "help" in parsed.flags:
        print(HELP, end="")
        return 0
    if len(parsed.names) != 1:
        given = f"not {len(parsed.names)} ({' '.join(parsed.names)})" if parsed.names else "as in: paraxis train debug"
        raise ConfigError(f"train takes one recipe, {given}; a setting is written --field=value")
    gc.disable()  # imports and compilers make a million objects that stay; the loop turns it on again (train/loop.py)
    try:
        return _run(parsed, arguments)
    finally:
        gc.enable()


def _run(parsed: Arguments, arguments: list[str]) -> int:
    env = read_environment()
    if not env.is_worker:
        count_gpus_without_cuda()
    with loading(lambda: ["sympy"]):  # torch needs it, and it nothing of torch
        # Here, so that help does not wait for torch.
        from paraxis.base.layout import laid_out
        from paraxis.parallel.world import can_be_copied
        from paraxis.recipes.find import find
        from paraxis.train.check import check
        from paraxis.train.worker import run_worker

    [recipe] = parsed.names
    resume = one_of("resume", parsed.options.get("resume", "auto"), RESUME)
    settings = _known(parsed.settings, recipe)
    if layout := parsed.options.get("layout"):
        settings = laid_out(settings, layout)
    config, base = find(recipe, settings)
    if config.parallel.auto and not parsed.flags & {"help", "print-config"}:
        settings, arguments = _settled(parsed, settings, env)
        config, base = find(recipe, settings)
    elif "cluster" in parsed.options and not parsed.flags & {"help", "print-config"}:
        raise ConfigError("--cluster is what parallel.auto=true plans for; set that, or leave this out")
    if "help" in parsed.flags:
        show(settings_help(recipe, describe(config)))
        return 0
    if "print-config" in parsed.flags:
        show(to_toml(config, base).rstrip())
        return 0
    ranks = choose_ranks(parsed.options.get("ranks"), config.parallel.degrees, env)
    check(config, ranks)
    run_dir = Path(parsed.options.get("run-dir", f"runs/{config.name}"))
    if ranks > 1 and not env.is_worker:
        work = partial(_as_worker, arguments) if can_be_copied() else None
        if code := launch([sys.executable, "-m", "paraxis", "train", *arguments], ranks, work=work):
            return code
    else:
        run_worker(config, base=base, run_dir=run_dir, resume=resume)
    if not env.is_worker:
        show_end(config, run_dir)
    return 0


def _settled(parsed: Arguments, settings: dict[str, object], env: Environment) -> tuple[dict[str, object], list[str]]:
    """The planner's choice in place of `parallel.auto`: as settings, and as the command line that workers of ours are given."""
    from paraxis.cli.auto import settle_auto
    from paraxis.cli.study import spelled

    asked = parsed.options.get("ranks")
    ranks = env.world_size if env.is_worker else whole_number("ranks", asked, 1) if asked else None
    [recipe] = parsed.names
    settings, ranks = settle_auto(recipe, settings, parsed.options.get("cluster"), ranks, aloud=env.rank == 0)
    options = {name: value for name, value in parsed.options.items() if name not in ("cluster", "layout")}
    words = [f"--{name}={value}" for name, value in {**options, "ranks": str(ranks)}.items()]
    return settings, [recipe, *words, *(f"--{flag}" for flag in parsed.flags), *spelled(settings)]


def _as_worker(arguments: list[str]) -> int:
    """The whole command in a copy of this process that has become a worker."""
    import torch

    from paraxis.cli import main

    torch.set_num_threads(worker_threads())
    return main(["train", *arguments])


def _known(settings: dict[str, object], recipe: str) -> dict[str, object]:
    """`settings`, after refusing any that is neither in a run nor an option of this command, with the nearest of both."""
    from paraxis.recipes.find import find
    from paraxis.train.config import RunConfig

    sections = [field.name for field in fields(RunConfig)]
    for name in settings:
        if name.partition(".")[0] not in sections:
            known = [f"--{path}" for path in (*OPTIONS, *FLAGS, *flatten(find(recipe)[0]))]
            hint = suggestion(f"--{name}", known)
            raise ConfigError(f"--{name} is neither an option nor a setting{hint} See paraxis train {recipe} --help")
    return settings


def choose_ranks(requested: str | None, degrees: Degrees, env: Environment) -> int:
    """How many ranks the run has: those of the launcher we are under, else `--ranks`, else what the degrees need.

    With `fsdp=-1` that is every GPU of this machine, or CPU processes for two shards. Raises ConfigError where `--ranks`
    contradicts the launcher, or exceeds this machine's GPUs.
    """
    from paraxis.parallel.world import visible_devices

    ranks = whole_number("ranks", requested, 1) if requested else None
    if env.is_worker:
        if ranks not in (None, env.world_size):
            raise ConfigError(f"--ranks={ranks} does not fit the {env.world_size} workers that {env.launcher} started; leave it out")
        return env.world_size
    devices = visible_devices()
    if ranks is None:
        # Without GPUs one process computes with all cores, which is faster than several that share parameters out.
        ranks = devices or replace(degrees, fsdp=1).ranks if degrees.fsdp == -1 else degrees.ranks
    if devices and ranks > devices:
        raise ConfigError(
            f"{ranks} ranks need as many GPUs, but this machine shows {devices}; lower --ranks or the parallel degrees, "
            "or hide the GPUs (CUDA_VISIBLE_DEVICES=) to run on CPU processes"
        )
    return ranks


def settings_help(recipe: str, settings: Iterable[Setting]) -> str:
    """Every setting of a recipe with its type, doc and value, a paragraph for each section."""
    width = min(shutil.get_terminal_size().columns, 140)
    lines = [f"usage: paraxis train {recipe} [--field=value ...] [options]", "", f"The settings of {recipe}, and their values in it."]
    for section, members in groupby(settings, key=lambda setting: setting.path.rpartition(".")[0]):
        lines += ["", f"{section or 'run'}:"]
        for setting in members:
            lines.append(f"  --{setting.path} {setting.words}")
            text = f"{setting.doc} [{_spelled(redact(setting.path, setting.value))}]".strip()
            lines += textwrap.wrap(text, width, initial_indent=" " * 8, subsequent_indent=" " * 8)
    return "\n".join([*lines, "", "paraxis train --help lists the options."])


def _spelled(value: object) -> str:
    """A value as it is typed on the command line."""
    if isinstance(value, tuple):
        return ",".join(map(_spelled, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
