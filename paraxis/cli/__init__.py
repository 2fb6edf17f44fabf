"""The command line: dispatches to one module a command, and turns what we refuse into one message and an exit code.

This file imports nothing heavy, so that `paraxis --help` answers at once; a command imports what it needs when it runs.
"""

import importlib
import sys
import traceback
from collections.abc import Sequence

from paraxis import __version__
from paraxis.base.config import suggestion
from paraxis.base.env import read_environment
from paraxis.base.errors import ConfigError, ParaxisError, Preempted
from paraxis.resilience.launch import claim

# Name to the module whose `run(arguments) -> exit code` it is, and a line for --help.
COMMANDS = {
    "train": ("paraxis.cli.train", "train a recipe on this machine, or as a worker of torchrun or Slurm"),
}

INTERRUPTED = 130  # what shells report for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` (by default those of this process) name, and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except ParaxisError as error:
        if (speaker := _speaker(error)) is not None:
            if "--debug" in arguments:
                traceback.print_exc()
            print(f"paraxis: {speaker}{error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        if _speaker(error) is not None:
            raise  # a defect of ours: the traceback is what helps
        return 1


def _speaker(error: Exception) -> str | None:
    """What stands before the message of `error`, or None where another rank is the one to give it."""
    alike = isinstance(error, (ConfigError, Preempted))  # every rank meets these, so one a host has to say it
    label = "" if isinstance(error, Preempted) else "error: "
    try:
        env = read_environment()
    except ConfigError:  # which is then the error itself
        return label
    if env.store_path is not None and not claim(env.store_path):
        return None
    if alike:
        return label if env.store_path is not None or env.local_rank == 0 else None
    return f"{label}rank {env.rank}: " if env.is_worker else label


def _dispatch(arguments: list[str]) -> int:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(_help())
        return 0
    if arguments[0] == "--version":
        print(f"paraxis {__version__}")
        return 0
    if arguments[0] not in COMMANDS:
        raise ConfigError(f"there is no command {arguments[0]!r}{suggestion(arguments[0], COMMANDS)} See paraxis --help")
    module, _ = COMMANDS[arguments[0]]
    return importlib.import_module(module).run(arguments[1:])


def _help() -> str:
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {summary}" for name, (_, summary) in COMMANDS.items()]
    return "\n".join(
        [
            "usage: paraxis COMMAND ...",
            "",
            "Train large generative models on any mix of parallel axes, with the same numbers.",
            "",
            *lines,
            "",
            "paraxis COMMAND --help says more and has examples.",
        ]
    )
