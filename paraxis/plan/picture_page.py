"""A predicted step as one page: both pictures and their numbers, with nothing to load and nothing to run."""

from collections.abc import Iterable, Sequence
from html import escape

from paraxis.plan.picture_svg import memory_svg, timeline_svg
from paraxis.plan.pictures import HELD, MESSAGES, WORK, percent, row_name, rows, seconds, size, span_s
from paraxis.plan.predict import Prediction

STYLE = """\
:root{color-scheme:light dark}
body{font:15px/1.5 system-ui,sans-serif;max-width:1090px;margin:2em auto;padding:0 1em;background:#fff;color:#222}
svg{max-width:100%;height:auto}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:14px}
th,td{padding:.2em .8em;text-align:right;border-bottom:1px solid #ddd;font-variant-numeric:tabular-nums}
th:first-child{text-align:left;white-space:nowrap}
caption{text-align:left;padding:.3em 0;color:#666}
@media(prefers-color-scheme:dark){body{background:#161616;color:#ddd}th,td{border-color:#333}caption{color:#aaa}}
"""


def picture_page(prediction: Prediction, title: str) -> str:
    """The whole page, HTML; `title` says what was predicted, such as a recipe and its layout."""
    named = escape(title)
    parts = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>{named}</title>',
        f'<meta name="viewport" content="width=device-width"><style>{STYLE}</style></head><body>',
        f"<h1>{named}</h1>",
        _table("The step", ["", "predicted"], _of_step(prediction)),
        "<h2>What each rank does</h2>",
        timeline_svg(prediction),
        _table("Each rank: milliseconds of the step. Messages may travel while it computes.", *_times(prediction)),
        "<h2>What the fullest rank holds</h2>",
        memory_svg(prediction),
        _table(f"Rank {prediction.rank} at its peak", ["", "GiB", "share"], _held(prediction)),
        "</body></html>\n",
    ]
    return "\n".join(parts)


def _of_step(prediction: Prediction) -> list[list[str]]:
    mfu = [["MFU", percent(prediction.mfu)]] if prediction.mfu is not None else []
    return [
        ["time", seconds(prediction.step_s)],
        ["tokens/s of a device", f"{prediction.tokens_per_s:,.0f}"],
        *mfu,
        ["waiting for messages, the rank that waits longest", seconds(prediction.exposed_s)],
        ["bubble: idle time over working time, before the optimizer", percent(prediction.bubble)],
        ["memory: peak", size(prediction.allocated)],
        ["memory: reserved then", size(prediction.reserved)],
        ["memory: usable", size(prediction.usable)],
    ]


def _times(prediction: Prediction) -> tuple[list[str], list[list[str]]]:
    drawn = rows(prediction)
    looks = {kind: look for kind, look in {**WORK, **MESSAGES}.items() if any(kind in row.seconds for row in drawn)}
    lines = []
    for row in drawn:
        spent = [*(row.seconds.get(kind, 0.0) for kind in looks), span_s(prediction)]
        lines.append([row_name(row.rank, len(drawn)), *(f"{1e3 * spent_s:,.2f}" for spent_s in spent)])
    return ["", *(look.words for look in looks.values()), "step"], lines


def _held(prediction: Prediction) -> list[list[str]]:
    amounts = [(look.words, prediction.held.get(category, 0)) for category, look in HELD.items()]
    total = prediction.allocated
    lines = [[words, f"{held / 2**30:,.3f}", percent(held / total if total else 0.0)] for words, held in amounts if held]
    return [*lines, ["together", f"{total / 2**30:,.3f}", percent(1.0)]]


def _table(caption: str, head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    named = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    told = "\n".join(
        f'<tr><th scope="row">{escape(line[0])}</th>' + "".join(f"<td>{escape(cell)}</td>" for cell in line[1:]) + "</tr>" for line in lines
    )
    return f'<div class="wide"><table><caption>{escape(caption)}</caption><tr>{named}</tr>\n{told}</table></div>'
