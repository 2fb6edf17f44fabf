"""`paraxis probe`: measures this machine or cluster and writes the cluster file that planning reads."""

import json
import sys
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from paraxis.base.env import count_gpus_without_cuda, read_environment, worker_threads
from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import Arguments, parse_strictly, whole_number
from paraxis.resilience.launch import launch

HELP = """\
usage: paraxis probe [options]

Measures matrix products, attention and memory rates of the devices, and all-gather, reduce-scatter, all-reduce, all-to-all and
point-to-point over sizes and groups of ranks, under NCCL or, without GPUs, gloo; and writes a cluster file with versions and date.
Alone, the command starts its own workers; under torchrun or Slurm's srun it is one of theirs, and measures the whole cluster.

  --out FILE    the cluster file (default: cluster.toml)
  --name NAME   what the cluster is called in it (default: the number and kind of its devices)
  --ranks N     workers to start (default: one for every GPU; two without GPUs)
  --quick       fewer and smaller measurements: in seconds, and rougher
  --links       collectives and messages alone
  --json        print what was measured as JSON
  --debug       show tracebacks of errors
  --help        this

examples:
  paraxis probe --quick --out laptop.toml
  paraxis probe --out cluster.toml
  torchrun --nnodes 2 --nproc-per-node 8 ... -m paraxis probe --out cluster.toml
"""

OPTIONS = ("out", "name", "ranks")
FLAGS = ("quick", "links", "json", "debug", "help")
CPU_RANKS = 2  # enough for a collective


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused or fails."""
    parsed = parse_strictly("probe", arguments, (), OPTIONS, FLAGS)
    if "help" in parsed.flags:
        print(HELP, end="")
        return 0
    env = read_environment()
    if env.is_worker:
        return _measure(parsed)
    count_gpus_without_cuda()
    from paraxis.parallel.world import can_be_copied, visible_devices

    devices = visible_devices()
    ranks = whole_number("ranks", parsed.options.get("ranks", str(devices or CPU_RANKS)), 1)
    if devices and ranks > devices:
        raise ConfigError(f"--ranks={ranks} needs as many GPUs, but this machine shows {devices}; lower it")
    if ranks == 1:
        return _measure(parsed)
    return launch(
        [sys.executable, "-m", "paraxis", "probe", *arguments], ranks, work=partial(_as_worker, arguments) if can_be_copied() else None
    )


def _as_worker(arguments: list[str]) -> int:
    """The whole command in a copy of this process that has become a worker."""
    import torch

    from paraxis.cli import main

    torch.set_num_threads(worker_threads())
    return main(["probe", *arguments])


def _measure(parsed: Arguments) -> int:
    from rich.console import Console

    from paraxis.bench.machine import look
    from paraxis.parallel.world import join, leave
    from paraxis.plan.calibrate import describe_cluster, measure, usual
    from paraxis.plan.cluster_file import write_cluster

    console = Console(stderr=True, highlight=False)
    world = join(read_environment())
    try:
        effort = usual(world.device, quick="quick" in parsed.flags)
        say = (lambda text: console.print(f"measuring {text}")) if world.first else (lambda text: None)
        measured = measure(world, effort, devices="links" not in parsed.flags, say=say)
        if measured is None:
            return 0
        name = parsed.options.get("name", f"{world.size} x {world.device.name}")
        cluster = describe_cluster(measured, name, look().versions, f"{datetime.now(UTC):%Y-%m-%d}")
        out = Path(parsed.options.get("out", "cluster.toml"))
        write_cluster(out, cluster)
        if "json" in parsed.flags:
            print(json.dumps(asdict(cluster), indent=1))
        console.print(f"cluster: {out}", soft_wrap=True)
    finally:
        leave()
    return 0
