"""`paraxis verify`: proof that layouts compute the numbers of one process."""

import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from paraxis.base.env import stay_forkable
from paraxis.base.errors import ConfigError
from paraxis.cli.arguments import parse, whole_number
from paraxis.cli.output import show

if TYPE_CHECKING:
    from rich.table import Table

    from paraxis.train.config import RunConfig
    from paraxis.verify.compare import Row

OPTIONS = ("precision", "steps")
FLAGS = ("json", "debug", "help")
ALL = "all"
FEW_RANKS = 4  # of the layouts that are tried where none is named
FILE_WIDTH = 160  # of a table that goes to no terminal
MISSED = 1

HELP = f"""\
usage: paraxis verify RECIPE [--layouts LAYOUT ... | all] [--field=value ...] [options]

Proves that layouts compute the same numbers. The recipe's model is made small but stays of its kind (grouped heads, experts,
tied or latent projections), and is run on one process and on each layout, on this machine: on its GPUs where there are enough,
else on CPU processes. Compared are the loss, the gradient norm, every gradient before and after clipping, how many tokens each
expert got, and the weights after a few steps of SGD with momentum and of AdamW. The data is made up, with unevenly many targets
on each rank and in each micro-batch. A difference is max|a - b| / max|b|; in fp64 1e-10 is allowed, and 1e-9 for weights.

  --layouts ...     layouts such as fsdp2xtp2 or pp2.zbvxcp2; all: every legal combination of axes on up to 8 ranks, with every
                    schedule and way of attention (default: every legal combination on up to {FEW_RANKS}, without these)
  --precision NAME  fp64 (default), or fp32, in which 1e-5 is allowed and AdamW is left out
  --steps K         optimizer steps (default: 3)
  --json            print {{"layouts": [{{"layout", "ranks", "loss_diff", "grad_norm_diff", "grad_diff", "grad_name", "weight_diff",
                    "ok"}}]}}; what is wrong stands on stderr
  --debug           show tracebacks, those of failed ranks too

The exit code is {MISSED} where a layout missed, failed or did not come to its end.

examples:
  paraxis verify debug
  paraxis verify llama3_8b --layouts dp2 fsdp2xtp2
  paraxis verify debug --layouts all
  paraxis verify my.py:small --layouts fsdp4 --model.tied=true --json
"""


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused or fails."""
    words, layouts = take_layouts(arguments)
    parsed = parse(words, OPTIONS, FLAGS)
    if "help" in parsed.flags:
        print(HELP, end="")
        return 0
    if len(parsed.names) != 1:
        given = f"not {len(parsed.names)} ({' '.join(parsed.names)})" if parsed.names else "as in: paraxis verify debug"
        raise ConfigError(f"verify takes one recipe, {given}; layouts follow --layouts")
    stay_forkable()
    # Here, so that help does not wait for torch.
    from paraxis.recipes.find import find
    from paraxis.verify.layouts import legal_layouts
    from paraxis.verify.run import verify

    config, _ = find(parsed.names[0], parsed.settings)
    precision = parsed.options.get("precision", "fp64")
    steps = whole_number("steps", parsed.options.get("steps", "3"), 1)
    if layouts is None:
        layouts = legal_layouts(config, precision, FEW_RANKS, every_choice=False)
    elif layouts == [ALL]:
        layouts = legal_layouts(config, precision)
    found = list(_counted(verify(config, layouts, precision=precision, steps=steps), layouts))
    _tell(config, found, precision, steps, as_json="json" in parsed.flags)
    if "debug" in parsed.flags:
        print("\n\n".join(f"{row.layout}: {row.account}" for row in found if row.account), file=sys.stderr)
    return 0 if all(row.ok for row in found) else MISSED


def take_layouts(arguments: Sequence[str]) -> tuple[list[str], list[str] | None]:
    """The words that are not of `--layouts`, and the layouts after it, up to the next option; None where it is not there.

    A layout may be written with spaces around its x, and commas may stand between layouts. Raises ConfigError where none follows.
    """
    words = list(arguments)
    at = next((n for n, word in enumerate(words) if word.partition("=")[0] == "--layouts"), None)
    if at is None:
        return words, None
    end = next((n for n in range(at + 1, len(words)) if words[n].startswith("-")), len(words))
    text = " ".join([words[at].partition("=")[2], *words[at + 1 : end]])
    if not (layouts := re.sub(r"\s+x\s+", "x", text).replace(",", " ").split()):
        raise ConfigError("--layouts needs layouts, such as --layouts dp2 fsdp2xtp2, or all")
    if ALL in layouts and len(layouts) > 1:
        raise ConfigError(f"--layouts {' '.join(layouts)}: {ALL} holds every legal layout; leave the others out")
    return words[:at] + words[end:], layouts


def _counted(rows: "Iterable[Row]", layouts: Sequence[str]) -> "Iterator[Row]":
    """`rows`, with the layout that is being run in a line of the terminal."""
    left = iter(rows)
    for number, layout in enumerate(layouts, start=1):
        if sys.stderr.isatty():
            print(f"\r\033[K{number} of {len(layouts)}: {layout}", end="", file=sys.stderr, flush=True)
        yield next(left)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr, flush=True)


def _tell(config: "RunConfig", rows: "Sequence[Row]", precision: str, steps: int, as_json: bool) -> None:
    """Prints the verdicts; as JSON on stdout with what is wrong on stderr, or as a table that has both."""
    if as_json:
        names = ("layout", "ranks", "loss_diff", "grad_norm_diff", "grad_diff", "grad_name", "weight_diff", "ok")
        show(json.dumps({"layouts": [{name: _finite(getattr(row, name)) for name in names} for row in rows]}))
        for row in rows:
            if not row.ok:
                print(f"{row.layout}: {row.reason}", file=sys.stderr)
        return
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = FILE_WIDTH
    console.print(_table(config, rows, precision, steps))
    missed = [row.layout for row in rows if not row.ok]
    counted = f"{len(rows)} layouts" if len(rows) != 1 else "1 layout"
    show(f"{counted}: " + (f"{len(missed)} missed ({', '.join(missed)})" if missed else "the same numbers as one process"))


def _table(config: "RunConfig", rows: "Sequence[Row]", precision: str, steps: int) -> "Table":
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(title=f"{config.name}, shrunk, against one process in {precision}", box=SIMPLE_HEAD)
    for title in ("layout", "ranks", "loss", "norm", "gradient", "worst in", f"step {steps}", "verdict"):
        words = title in ("layout", "worst in", "verdict")
        table.add_column(title, justify="left" if words else "right", overflow="fold", min_width=len(title))
    for row in rows:
        shown = [_spelled(row.loss_diff), _spelled(row.grad_norm_diff), _spelled(row.grad_diff), row.grad_name or ""]
        verdict = Text("same", "green") if row.ok else Text(f"MISS: {row.reason}", "red")
        table.add_row(row.layout, str(row.ranks), *shown, _spelled(row.weight_diff), verdict)
    return table


def _finite(value: object) -> object:
    """`value`, or None for a number that JSON has no word for."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _spelled(difference: float | None) -> str:
    return "" if difference is None else f"{difference:.1e}"
