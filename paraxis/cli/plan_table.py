"""What `paraxis plan` found, in the terminal."""

import shlex
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from paraxis.base.layout import layout_settings
from paraxis.cli.study import Study, spelled
from paraxis.plan.explain import gib, placed, run_lengths, why_refused, why_slower
from paraxis.plan.picture_text import memory_text, timeline_text
from paraxis.plan.record import CATEGORIES
from paraxis.plan.search import Option

FILE_WIDTH = 180  # of a table that goes to no terminal
SHOWN = 6
HELD = (*CATEGORIES, "fragmentation")


def print_study(study: Study, *, pictures: bool) -> None:
    """Tables of the options and of their memory; what is lacking where nothing fits; the winner's command. `pictures` of its step, or of
    that which takes least."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = FILE_WIDTH
    shown = list(study.found.options[:SHOWN]) or ([study.lacking.option] if study.lacking else [])
    console.print(_times(study, shown))
    console.print(_memory(shown))
    _print_refused(console, study)
    _print_pareto(console, study)
    _print_lacking(console, study)
    if study.best is not None:
        _print_best(console, study, study.best)
    if pictures and (prediction := study.shown.prediction) is not None:
        console.print(timeline_text(prediction, console.width))
        console.print(memory_text(prediction, console.width))
    found = study.found
    if found.simulated:
        left = "" if found.complete else "; there was no time for more, which could hide better ones (--seconds)"
        console.print(
            f"{found.candidates:,} candidates, {found.simulated} of them simulated, {found.traced} traced, in {study.seconds:.1f} s{left}"
        )


def _times(study: Study, options: Sequence[Option]) -> Table:
    device = study.cluster.accelerator_of(0).name
    several = len(study.precisions) > 1
    precisions = " or ".join(study.precisions) if several else study.config.precision
    title = f"{study.config.name} on {study.ranks} x {device} ({study.cluster.name}), {precisions}, {study.tokens:,} tokens a step"
    table = Table(title=title, box=SIMPLE_HEAD)
    for name in ("layout", "rows x micro-batches", "recompute", "reshard"):
        table.add_column(name, overflow="fold")
    for name in ("step s", "tokens/s/GPU", "MFU", "waiting s", "bubble", "peak GiB"):
        table.add_column(name, justify="right")
    table.add_column("figures")
    table.add_column("why it loses", overflow="fold")
    for one in options:
        own = one.candidate
        why = why_slower(one, options[0]) if one.fits else why_refused(one)
        table.add_row(
            f"{own.layout}, {one.config.precision}" if several else own.layout,
            f"{own.micro_batch} x {own.micro_batches}",
            own.remat,
            own.reshard,
            f"{one.step_s:.4g}",
            f"{one.tokens_per_s:,.0f}",
            "" if one.mfu is None else f"{one.mfu:.1%}",
            f"{one.exposed_s:.3g}",
            f"{one.bubble:.1%}",
            f"{gib(one.reserved)} of {gib(one.usable)}",
            one.source,
            why,
        )
    return table


def _memory(options: Sequence[Option]) -> Table:
    table = Table(title="Memory of the fullest rank at its peak, GiB", box=SIMPLE_HEAD)
    table.add_column("layout", overflow="fold")
    for name in HELD:
        table.add_column(name, justify="right")
    for one in options:
        table.add_row(one.candidate.layout, *(gib(one.held.get(name, 0)) for name in HELD))
    return table


def _print_refused(console: Console, study: Study) -> None:
    for one in study.found.refused[:3] if study.best is not None else ():
        own = one.candidate
        console.print(
            f"faster, but does not fit: {own.layout}, {own.micro_batch} x {own.micro_batches}, recompute {own.remat}: {why_refused(one)} "
            f"({one.source})",
            soft_wrap=True,
        )


def _print_pareto(console: Console, study: Study) -> None:
    if len(study.found.pareto) < 2:
        return
    console.print("Less memory for more time:")
    for one in study.found.pareto[:SHOWN]:
        own = one.candidate
        console.print(
            f"  {gib(one.reserved):>6} GiB  {one.tokens_per_s:,.0f} tokens/s/GPU  {own.layout}, "
            f"{own.micro_batch} x {own.micro_batches}, recompute {own.remat}, reshard {own.reshard} ({one.source})",
            soft_wrap=True,
        )


def _print_lacking(console: Console, study: Study) -> None:
    if (lacking := study.lacking) is None:
        return
    console.print(
        f"Nothing fits: {lacking.option.candidate.layout}, which takes least, lacks {gib(lacking.bytes)} GiB "
        f"({gib(lacking.option.reserved)} of {gib(lacking.option.usable)}, {lacking.option.source})",
        soft_wrap=True,
    )
    for change in lacking.changes:
        reached = f"{gib(change.option.reserved)} of {gib(change.option.usable)} GiB"
        console.print(f"would fit with {change.words}: {reached} ({change.option.source})", soft_wrap=True)
    if not lacking.changes and study.found.simulated:
        console.print("no single setting, and no doubling of the devices, was found with which it would")


def _print_best(console: Console, study: Study, best: Option) -> None:
    if best.cuts:
        console.print(f"stages: {len(best.cuts)} of {run_lengths(best.cuts)} layers, schedule {best.candidate.schedule}")
    console.print(f"placement: {placed(best)}", soft_wrap=True)
    layout = best.candidate.layout
    said = {f"parallel.{field}" for field in layout_settings(layout)}
    others = {path: value for path, value in study.settings(best).items() if path not in said}
    console.print(shlex.join(["paraxis", "train", study.recipe, f"--layout={layout}", *spelled(others)]), soft_wrap=True)
