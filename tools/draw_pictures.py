"""Draws the pictures of docs/axes, and the table of schedules there: `python -m tools.draw_pictures`. A test holds the files to it.

Timelines are drawn from the very lists of actions that training executes (`base/schedules.py`), timed by `base/schedule.py`.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from paraxis.base.axes import AXES, Degrees
from paraxis.base.schedule import Action, Kind, Schedule, finish_times, idle_share, most_in_flight
from paraxis.base.schedules import SCHEDULES, Plan, build_schedule

FOLDER = Path(__file__).resolve().parents[1] / "docs" / "axes"
TABLE = ("<!-- schedules -->\n", "<!-- end of schedules -->")

# A backward takes as long as two forwards, and its halves one each: products with the same matrices, twice.
COST: dict[Kind, float] = {"F": 1.0, "B": 2.0, "I": 1.0, "W": 1.0}
RANKS, MICRO_BATCHES = 4, 8
LARGER = (8, 32)  # the table's second pair
STAGES_A_RANK = {name: known.stages_a_rank or 2 for name, known in SCHEDULES.items()}
NAMES: dict[Kind, str] = {
    "F": "forward",
    "B": "backward",
    "I": "backward: gradient of inputs",
    "W": "backward: gradients of weights",
}

# Colours that the colour-blind tell apart (Okabe and Ito); the second stage of a rank is paler. Text and bands follow the reader's mode.
STYLE = """\
text{font:11px system-ui,sans-serif;fill:#333}
.n{text-anchor:middle;fill:#fff}.d{text-anchor:middle;fill:#111}.b{font-weight:600}.m{text-anchor:middle}
.idle{fill:#e6e6e6}.line{stroke:#777;fill:none}.paper{stroke:#fff;stroke-width:1}
.F,.r0{fill:#0072b2}.B,.r3{fill:#e69f00}.I,.r1{fill:#d55e00}.W,.r2{fill:#009e73}
.F2{fill:#8cc4e8}.B2{fill:#f5d38a}.I2{fill:#f2b48a}.W2{fill:#8fd6bf}
@media(prefers-color-scheme:dark){text{fill:#ddd}.n{fill:#fff}.d{fill:#111}.idle{fill:#3a3a3a}.line{stroke:#999}.paper{stroke:#111}}
"""


def svg(width: float, height: float, title: str, parts: Iterable[str]) -> str:
    """A whole picture; `title` is what a reader who cannot see it is told."""
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" role="img">'
    return "\n".join([head, f"<title>{title}</title>", f"<style>{STYLE}</style>", *parts, "</svg>\n"])


def text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:g}" y="{y:g}"' + (f' class="{kind}"' if kind else "") + f">{words}</text>"


def box(x: float, y: float, width: float, height: float, kind: str, words: str = "") -> str:
    """A filled rectangle, with words in its middle: light ones on a rank's colour, the page's on a band."""
    drawn = f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" class="{kind} paper"/>'
    inked = "m" if kind == "idle" else "d" if kind in ("B", "r3") or kind in ("F2", "B2", "I2", "W2") else "n"
    return drawn + (text(x + width / 2, y + height / 2 + 4, words, inked) if words else "")


def arrow(x: float, y: float, to_x: float, words: str = "") -> str:
    """A level arrow, to the right or to the left, with words above it."""
    barbs = "m-5-4l5 4l-5 4" if to_x > x else "m5-4l-5 4l5 4"
    head = f"M{x:g} {y:g}H{to_x:g}{barbs}"
    return f'<path class="line" d="{head}"/>' + (text((x + to_x) / 2, y - 6, words, "m") if words else "")


# Timelines.


def drawn_schedule(name: str) -> Schedule:
    return build_schedule(name, Plan(RANKS, MICRO_BATCHES, STAGES_A_RANK[name]))


def timeline(schedule: Schedule) -> str:
    """A row a rank; an action is as wide as it takes, with the number of its micro-batch."""
    a_rank = schedule.stages // schedule.ranks
    unit, left, top, high = 28 / a_rank, 52.0, 8.0, 22.0
    ended = finish_times(schedule, COST)
    span = max(ended.values()) * unit
    parts: list[str] = []
    for rank, actions in enumerate(schedule.actions):
        y = top + rank * (high + 4)
        parts.append(text(4, y + 15, f"rank {rank}"))
        parts.append(f'<rect x="{left:g}" y="{y:g}" width="{span:g}" height="{high:g}" class="idle"/>')
        parts += row_of(actions, ended, schedule, left, y, unit, high)
    below = top + schedule.ranks * (high + 4) + 18
    kept = ", ".join(map(str, most_in_flight(schedule)))
    said = f"idle {percent(idle_share(schedule, COST))} of the work; forwards kept at most: {kept}"
    paler = "; paler: the rank's second stage" if a_rank > 1 else ""
    parts += [*legend(schedule, left, below), text(left, below + 22, said + paler)]
    title = f"{schedule.name} on {schedule.ranks} ranks with {schedule.micro_batches} micro-batches: {said}"
    return svg(left + span + 8, below + 32, title, parts)


def row_of(
    actions: Iterable[Action], ended: dict[Action, float], schedule: Schedule, left: float, y: float, unit: float, high: float
) -> Iterator[str]:
    """One rank's actions: a path and a text for each kind and stage, so that the files stay small."""
    kinds: dict[str, list[Action]] = {}
    for action in actions:
        kinds.setdefault(action.kind + ("2" if action.stage >= schedule.ranks else ""), []).append(action)
    for kind, of_kind in kinds.items():
        starts = [left + (ended[action] - COST[action.kind]) * unit for action in of_kind]
        wide = COST[of_kind[0].kind] * unit
        outline = "".join(f"M{x:g} {y:g}h{wide:g}v{high:g}h-{wide:g}z" for x in starts)
        middles = " ".join(f"{x + wide / 2:g}" for x in starts)
        numbers = "".join(str(action.micro_batch) for action in of_kind)  # a digit each: every one has its own x
        ink = "d" if kind == "B" or kind.endswith("2") else "n"
        yield f'<path class="{kind} paper" d="{outline}"/><text class="{ink}" y="{y + 15:g}" x="{middles}">{numbers}</text>'


def legend(schedule: Schedule, x: float, y: float) -> Iterator[str]:
    used = {action.kind for own in schedule.actions for action in own}
    for kind, words in NAMES.items():
        if kind in used:
            yield box(x, y - 10, 12, 12, kind)
            yield text(x + 17, y, words)
            x += 30 + 6 * len(words)


def percent(share: float) -> str:
    return f"{100 * share:.3g}%"


def table() -> str:
    """The schedules in figures, as the lists give them."""
    head = ["schedule", "stages a rank", "idle", *(f"{p} ranks, {m}" for p, m in ((RANKS, MICRO_BATCHES), LARGER))]
    head += [f"kept, {RANKS} ranks, {MICRO_BATCHES}", "backward", "takes"]
    lines = [head, ["---"] * len(head)]
    for name, known in SCHEDULES.items():
        made = [build_schedule(name, Plan(p, m, STAGES_A_RANK[name])) for p, m in ((RANKS, MICRO_BATCHES), LARGER)]
        kept = " ".join(f"{most / made[0].stages:.4g}" for most in most_in_flight(made[0]))
        takes = "groups of p" if known.in_groups else f"m ≥ {LEAST[name]}" if name in LEAST else "any m"
        stages = str(known.stages_a_rank) if known.stages_a_rank else "v, usually 2"
        lines.append([f"`{name}`", stages, IDLE[name], *(percent(idle_share(one, COST)) for one in made), kept])
        lines[-1] += ["split" if made[0].splits_backward else "whole", takes]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


# In words, what the table's figures are; tests/base/test_schedule.py holds the lists to these.
IDLE = {
    "gpipe": "(p - 1) / m",
    "1f1b": "(p - 1) / m",
    "interleaved": "(p - 1) / (v m)",
    "bfs": "(p - 1) / (v m)",
    "zbh1": "(p - 1) / (3 m)",
    "zbv": "(p - 1) / (6 m)",
    "dualpipev": "(p - 1) / (6 m)",
}
LEAST = {"zbv": "2p - 1", "dualpipev": "2p"}


# The other axes.


def rank_order() -> str:
    """Which ranks are neighbours: the innermost axis first."""
    degrees = Degrees(pp=2, fsdp=2, tp=2)
    used = [axis for axis in AXES if getattr(degrees, axis) > 1]
    parts, side = [], 62.0
    for rank, at in enumerate(product(*(range(getattr(degrees, axis)) for axis in used))):
        x, y = 60 + rank * side + 8 * (rank // 2) + 12 * (rank // 4), 34.0
        parts.append(box(x, y, side - 6, 40, f"r{rank // 2}", f"rank {rank}"))
        parts += [text(x + side / 2 - 3, y + 58 + 15 * n, str(index), "m") for n, index in enumerate(at)]
    parts += [text(8, 92 + 15 * n, axis, "b") for n, axis in enumerate(used)]
    parts.append(text(60, 20, "pp2 x fsdp2 x tp2: a colour is a tp group, which talks most; pipeline stages are farthest apart"))
    return svg(610, 135, "Rank order of pp2 x fsdp2 x tp2", parts)


def data() -> str:
    """dp2 x fsdp2: who reads which rows and stores which part."""
    parts = [text(8, 18, "rank", "b"), text(70, 18, "reads", "b"), text(180, 18, "stores: weights, gradients, optimizer state", "b")]
    for rank in range(4):
        y, part = 28.0 + rank * 34 + 10 * (rank // 2), rank % 2
        parts += [text(14, y + 18, str(rank)), box(70, y, 90, 26, f"r{rank}", f"rows {rank}, {rank + 4}, ...")]
        for number in range(3):
            x = 180 + number * 118
            parts += [box(x + half * 54, y, 54, 26, f"r{half}" if half == part else "idle", "AB"[half]) for half in range(2)]
    for replica in range(2):
        parts.append(text(548, 62 + 78 * replica, f"replica {replica}: A and B gathered block by block,"))
        parts.append(text(548, 77 + 78 * replica, "their gradients summed and cut again"))
    parts.append(text(180, 198, "across replicas, once a step: the gradients of A summed, and those of B"))
    return svg(800, 210, "dp2 x fsdp2: rows, and which part of every block a rank stores", parts)


def tensor() -> str:
    """tp2 through one block."""
    columns = [
        (74, 90, "norm", ("positions 0-½", "positions ½-1")),
        (218, 160, "q, k, v; attention; o", ("half of the heads", "the other heads")),
        (432, 90, "norm", ("positions 0-½", "positions ½-1")),
        (576, 160, "gate, up; down", ("half of the features", "the other features")),
    ]
    parts = [text(8, 50 + 46 * rank, f"rank {rank}") for rank in range(2)]
    for x, wide, name, held in columns:
        parts.append(text(x + wide / 2, 20, name, "m b"))
        parts += [box(x, 30 + 46 * rank, wide, 32, f"r{rank}", held[rank]) for rank in range(2)]
    for x, to_x, words in ((166, 214, "gather"), (380, 428, "scatter"), (524, 572, "gather"), (738, 786, "scatter")):
        parts += [arrow(x, 70, to_x, words)]
    parts.append(text(74, 130, "gather: all-gather along the sequence; scatter: partial outputs summed, each rank keeps its positions."))
    parts.append(text(74, 146, "In backward a scatter stands for each gather, and a gather for each scatter."))
    return svg(800, 158, "tp2: what each rank computes of one block", parts)


def context() -> str:
    """cp4: who holds which positions, who computes which scores; and what an all-to-all over heads exchanges."""
    ranks, cell = 4, 22.0
    holder = [min(piece, 2 * ranks - 1 - piece) for piece in range(2 * ranks)]
    parts = [text(70, 16, "keys: 8 pieces of a row", "b"), text(8, 44, "queries", "b")]
    for q, rank in enumerate(holder):
        y = 30 + q * cell
        parts += [box(70 + k * cell, y, cell, cell, f"r{rank}" if k <= q else "idle") for k in range(2 * ranks)]
        parts.append(text(70 + 8 * cell + 8, y + 15, f"rank {rank}"))
    parts.append(text(70, 226, "Every rank computes 9 of the 36 blocks."))
    x = 350.0
    parts += [text(x, 16, "ring: keys and values travel, queries stay", "b")]
    for rank in range(ranks):
        parts.append(box(x + rank * 100, 28, 70, 26, f"r{rank}", f"K, V of {rank}"))
        parts.append(arrow(x + rank * 100 + 72, 41, x + rank * 100 + 97))
    parts.append(text(x, 72, "and from rank 3 to rank 0. Three moves bring every key past every query."))
    parts += [text(x, 108, "ulysses: positions are exchanged for heads", "b")]
    for at, (title, cut) in enumerate((("before: positions", True), ("in attention: heads", False))):
        left = x + at * 220
        parts.append(text(left, 126, title))
        for p, h in product(range(ranks), range(ranks)):
            parts.append(box(left + p * 36, 132 + h * 18, 36, 18, f"r{p if cut else h}"))
    parts += [arrow(x + 152, 168, x + 212, "all-to-all"), text(x, 226, "across: positions, in pieces of each rank; down: heads")]
    return svg(800, 238, "cp4: zigzag pieces, the ring, and the exchange of positions for heads", parts)


@dataclass(frozen=True)
class _Sent:
    """A row on its way: from a rank, to an expert."""

    source: int
    expert: int


def expert() -> str:
    """ep4 with eight experts: rows go to the ranks of their experts, and come back."""
    chosen = ((0, 5, 3, 2, 5, 7), (1, 4, 4, 6, 0, 2), (5, 3, 5, 7, 1, 6), (2, 5, 0, 4, 7, 5))
    rows = [_Sent(rank, number) for rank, own in enumerate(chosen) for number in own]
    parts = [text(70, 16, "tokens, with the experts chosen for them", "b"), text(384, 16, "sorted by expert, at the experts' ranks", "b")]
    for rank in range(4):
        y = 28.0 + rank * 38
        parts.append(text(8, y + 17, f"rank {rank}"))
        parts += [box(70 + 26 * n, y, 26, 26, f"r{number // 2}", str(number)) for n, number in enumerate(chosen[rank])]
        here = sorted((row for row in rows if row.expert // 2 == rank), key=lambda row: (row.expert, row.source))
        parts += [box(384 + 26 * n, y, 26, 26, f"r{rank}", str(row.expert)) for n, row in enumerate(here)]
        parts.append(text(664, y + 17, f"experts {2 * rank} and {2 * rank + 1}: {len(here)} rows"))
    parts += [arrow(240, 80, 370, "all-to-all"), arrow(370, 130, 240, "and back")]
    parts.append(text(70, 196, "A colour is the rank that has the expert. Nothing is dropped, so ranks get unevenly many rows."))
    return svg(810, 208, "ep4: rows sent to the ranks of their experts, and back", parts)


def pictures() -> dict[str, str]:
    """Every picture by its file's name."""
    drawn = {f"{name}.svg": timeline(drawn_schedule(name)) for name in SCHEDULES}
    others = {"ranks": rank_order(), "data": data(), "tensor": tensor(), "context": context(), "expert": expert()}
    return drawn | {f"{name}.svg": picture for name, picture in others.items()}


def with_table(page: str) -> str:
    """The page on pipelines with the table of schedules as it is now."""
    before, rest = page.split(TABLE[0])
    _, after = rest.split(TABLE[1])
    return f"{before}{TABLE[0]}\n{table()}\n{TABLE[1]}{after}"


def main() -> None:
    for name, picture in pictures().items():
        (FOLDER / "pictures" / name).write_text(picture)
    page = FOLDER / "pipeline.md"
    page.write_text(with_table(page.read_text()))


if __name__ == "__main__":
    main()
