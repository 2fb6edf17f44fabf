"""`paraxis plan`: which layouts of a run fit a cluster, how fast each would be, and why."""

import json
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from paraxis.base.env import stay_forkable
from paraxis.base.errors import ConfigError, StorageError
from paraxis.cli.arguments import Arguments, parse, whole_number
from paraxis.cli.output import show

if TYPE_CHECKING:
    from paraxis.cli.study import Study
    from paraxis.plan.search import Option

OPTIONS = ("cluster", "gpus", "layout", "seconds", "picture", "trace", "beside")
FLAGS = ("exact", "json", "debug", "help")
SECONDS = 25  # that a search may take, so that it has ended within half a minute
COUNTLESS = 100_000  # simulations: the seconds bound them
NOTHING_FITS = 1

HELP = f"""\
usage: paraxis plan RECIPE --cluster FILE [--gpus N] [--layout LAYOUT] [--field=value ...] [options]

Ranks the layouts in which RECIPE fits a cluster by predicted step time, and says why the next ones lose. Degrees, pipeline schedule,
micro-batch, recomputation and resharding are chosen; what is set here as --field=value is kept. Several precisions may be given to choose
from (--precision=bf16,float8_tensorwise). A step has the tokens that train.global_tokens says, else those of the recipe's own layout.
Nothing is run: this works on a laptop, for any cluster.

  --cluster FILE   a file that paraxis probe wrote, or a ready one by name (dgx_a100, dgx_h100, dgx_h200, dgx_b200, two_h200)
  --gpus N         how many devices, in place of the file's number: its host is repeated
  --layout LAYOUT  predict this one layout, such as fsdp8xtp2 or pp4.zbvxfsdp8, with everything else as the recipe has it
  --exact          trace every block of the winner, or of the layout, instead of a few
  --seconds S      how long a search may take (default: {SECONDS}); what was not traced by then is marked as simulated
  --picture FILE   draw the winner's step: its timeline and memory, as .html or .svg (without: in the terminal, with --layout)
  --trace FILE     write the winner's simulated step for Perfetto or Chrome's trace viewer
  --beside FILE    with --trace: put it beside a trace that training wrote (--profile.steps), starting together
  --json           print everything as JSON
  --debug          show tracebacks of errors
  --help           this

The exit code is {NOTHING_FITS} where nothing fits; how many GiB are lacking and what would help is printed.

examples:
  paraxis plan llama3_8b --cluster dgx_h100
  paraxis plan llama3_70b --cluster dgx_h100 --gpus 1024 --train.global_tokens=4194304
  paraxis plan llama3_8b --cluster two_h200 --layout fsdp2 --exact
  paraxis plan my.py:small --cluster cluster.toml --parallel.tp=2 --json
"""


def run(arguments: list[str]) -> int:
    """Runs the command and returns its exit code. Raises ParaxisError for what is refused or fails."""
    parsed = parse(arguments, OPTIONS, FLAGS)
    if "help" in parsed.flags:
        print(HELP, end="")
        return 0
    if len(parsed.names) != 1:
        given = f"not {len(parsed.names)} ({' '.join(parsed.names)})" if parsed.names else "as in: paraxis plan debug --cluster dgx_h100"
        raise ConfigError(f"plan takes one recipe, {given}")
    if "cluster" not in parsed.options:
        raise ConfigError("plan needs --cluster: a file that paraxis probe wrote, or a ready one such as --cluster dgx_h100")
    if (name := parsed.options.get("picture")) and not name.endswith((".svg", ".html")):
        raise ConfigError(f"--picture={name} is neither .html nor .svg; name one of these")
    if "beside" in parsed.options and "trace" not in parsed.options:
        raise ConfigError(f"--beside={parsed.options['beside']} needs --trace FILE: where both are to be written")
    stay_forkable()
    study = _study(parsed)
    _draw(parsed, study)
    if "json" in parsed.flags:
        show(json.dumps(_told(study), allow_nan=False))
    else:
        _print(parsed, study)
    return 0 if study.best is not None and study.best.fits else NOTHING_FITS


def _study(parsed: Arguments) -> "Study":
    # Here, so that help does not wait for torch.
    import torch

    from paraxis.cli.study import Question, ask
    from paraxis.plan.cluster_file import read_cluster
    from paraxis.plan.search import Effort

    started_s = time.monotonic()
    torch.set_num_threads(1)
    cluster = read_cluster(parsed.options["cluster"])
    if gpus := parsed.options.get("gpus"):
        cluster = cluster.with_devices(whole_number("gpus", gpus, 1))
    seconds = whole_number("seconds", parsed.options.get("seconds", str(SECONDS)), 1)
    effort = Effort(simulated=COUNTLESS, seconds=max(1.0, seconds - (time.monotonic() - started_s)))
    question = Question(
        recipe=parsed.names[0], settings=parsed.settings, cluster=cluster, layout=parsed.options.get("layout", ""), all_devices=bool(gpus)
    )
    return ask(question, effort, exact="exact" in parsed.flags, drawn=bool({"picture", "trace"} & parsed.options.keys()))


def _draw(parsed: Arguments, study: "Study") -> None:
    """The pictures that were asked for, of the best option, or of what takes least where nothing fits."""
    if (prediction := study.shown.prediction) is None:
        return
    from paraxis.plan.picture_page import picture_page
    from paraxis.plan.picture_svg import timeline_svg
    from paraxis.plan.picture_trace import trace_beside, trace_text

    title = f"{study.config.name}, {study.shown.candidate.layout} on {study.cluster.name}"
    if name := parsed.options.get("picture"):
        _write(name, timeline_svg(prediction) if name.endswith(".svg") else picture_page(prediction, title))
    if name := parsed.options.get("trace"):
        measured = parsed.options.get("beside")
        _write(name, trace_beside(prediction, Path(measured)) if measured else trace_text(prediction))


def _write(name: str, text: str) -> None:
    try:
        Path(name).write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(f"{name} cannot be written: {error.strerror}; choose another file") from error


def _told(study: "Study") -> dict[str, Any]:
    """Everything, as JSON has it: bytes, seconds."""
    found = study.found
    return {
        "recipe": study.recipe,
        "cluster": study.cluster.name,
        "ranks": study.ranks,
        "tokens_per_step": study.tokens,
        "precision": ",".join(study.precisions) or study.config.precision,
        "plans": [_option(study, one) for one in found.options],
        "pareto": [_option(study, one) for one in found.pareto],
        "refused": [_option(study, one) for one in found.refused],
        "lacking": None
        if study.lacking is None
        else {
            "bytes": study.lacking.bytes,
            "least": _option(study, study.lacking.option),
            "changes": [{"words": one.words, "devices": one.devices, **_option(study, one.option)} for one in study.lacking.changes],
        },
        "search": {
            "candidates": found.candidates,
            "simulated": found.simulated,
            "traced": found.traced,
            "complete": found.complete,
            "seconds": study.seconds,
        },
    }


def _option(study: "Study", option: "Option") -> dict[str, Any]:
    from paraxis.plan.explain import placed, why_refused, why_slower

    own = option.candidate
    return {
        "layout": own.layout,
        "settings": study.settings(option),
        "schedule": own.schedule if own.degrees.pp > 1 else None,
        "cuts": list(option.cuts),
        "micro_batch": own.micro_batch,
        "micro_batches": own.micro_batches,
        "remat": own.remat,
        "reshard": own.reshard,
        "precision": option.config.precision,
        "placement": placed(option),
        "source": option.source,
        "step_s": option.step_s,
        "tokens_per_s": option.tokens_per_s,
        "mfu": option.mfu,
        "exposed_s": option.exposed_s,
        "bubble": option.bubble,
        "memory": dict(option.held),
        "reserved": option.reserved,
        "usable": option.usable,
        "fits": option.fits,
        "why": why_slower(option, study.shown) if option.fits and study.best is not None else "" if option.fits else why_refused(option),
    }


def _print(parsed: Arguments, study: "Study") -> None:
    from paraxis.cli.plan_table import print_study

    print_study(study, pictures="layout" in parsed.options)
