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
from paraxis.resilience.launch import leave_words

# Name to the module whose `run(arguments) -> exit code` it is, and a line for --help.
COMMANDS = {
    "train": ("paraxis.cli.train", "train a recipe on this machine, or as a worker of torchrun or Slurm"),
    "eval": ("paraxis.cli.eval", "score text with a checkpoint: loss, perplexity, tokens"),
    "generate": ("paraxis.cli.generate", "continue a text with a checkpoint"),
    "convert": ("paraxis.cli.convert", "Hugging Face weights to a checkpoint, and back"),
    "ckpt": ("paraxis.cli.ckpt", "list, verify, compare, rewrite and remove checkpoints"),
    "data": ("paraxis.cli.data", "tokenise and pack a recipe's data ahead of training"),
    "plan": ("paraxis.cli.plan", "rank the layouts of a recipe that fit a cluster, by predicted step time"),
    "probe": ("paraxis.cli.probe", "measure this machine or cluster, for planning"),
    "verify": ("paraxis.cli.verify", "prove that layouts compute the numbers of one process"),
    "bench": ("paraxis.cli.bench", "measure training steps and data, other systems beside them"),
}

INTERRUPTED = 130  # what shells report for Ctrl-C


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command that `arguments` (by default those of this process) name, and returns its exit code."""
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    try:
        return _dispatch(arguments)
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        _report(error, trace="--debug" in arguments)
        return error.exit_code if isinstance(error, ParaxisError) else 1


def _report(error: Exception, trace: bool) -> None:
    """Says `error` once for all ranks: through the launcher whose worker we are, else on stderr.

    Under torchrun and Slurm no process of ours sees all ranks. There they agree on who says what several of them meet, or, if it
    happens before they have met, each host says it once.
    """
    try:
        env = read_environment()
    except ConfigError:  # it is what `error` is about, or will be
        env = None
    alike = isinstance(error, (ConfigError, Preempted))
    label = "" if isinstance(error, Preempted) else "error: "
    if env is not None and env.is_worker and not alike:
        label += f"rank {env.rank}: "
    words = f"paraxis: {label}{error}"
    if not isinstance(error, ParaxisError):  # a defect, ours or a recipe's
        words = f"paraxis: {label}unexpected {type(error).__name__}; its traceback is above"
        trace = True
    if trace:
        words = traceback.format_exc() + words
    if env is not None and env.store_path is not None:
        leave_words(env.store_path, env.rank, words)
        return
    said = error.said if isinstance(error, ParaxisError) else None
    if said is None:
        said = alike and env is not None and env.local_rank > 0
    if not said:
        print(words, file=sys.stderr)


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
