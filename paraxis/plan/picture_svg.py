"""Pictures of a predicted step as SVG, light or dark as the reader's screen is, and named for those who cannot see them.

Their size does not grow with the number of spans: what is narrower than a pixel is drawn with its neighbours, as wide as all of them.
"""

from collections.abc import Iterable, Iterator, Sequence
from html import escape

from paraxis.plan.pictures import (
    HELD,
    MESSAGES,
    WORK,
    Look,
    Piece,
    Row,
    columns,
    memory_summary,
    percent,
    row_name,
    rows,
    seconds,
    size,
    span_s,
    stack,
    summary,
    ticks,
)
from paraxis.plan.predict import Prediction

LEFT, PLOT, RIGHT = 64.0, 900.0, 96.0  # pixels of names, of the step, of shares
MANY = 16  # rows: from here on they are lower
BANDS_IN_FULL = 96  # that are drawn to the pixel; of more, each is drawn more coarsely
DIGIT = 7.0  # pixels
TALL = 260.0  # pixels of the memory's curve

_BOTH = "text{font:11px system-ui,sans-serif;fill:#333}.m{text-anchor:middle}.e{text-anchor:end}"
_LIGHT = ".page{fill:#fff}.idle{stroke:#e6e6e6;fill:#e6e6e6}.grid{stroke:#ddd}.edge{stroke:#fff}.usable{stroke:#c00}.reserved{stroke:#777}"
_DARK = "text{fill:#ddd}.page{fill:#161616}.idle{stroke:#3a3a3a;fill:#3a3a3a}.grid{stroke:#333}.edge{stroke:#161616}"
_DARK_LINES = ".usable{stroke:#ff6b6b}.reserved{stroke:#aaa}"
_INK = ".l{fill:#fff}.d{fill:#111}"


def _style() -> str:
    looks: dict[str, Look] = {**{kind: look for kind, look in WORK.items() if kind != "idle"}, **MESSAGES}
    looks |= {f"held-{category}": look for category, look in HELD.items()}
    colours = {kind: look.colour for kind, look in looks.items()}
    colours |= {f"{kind}-paler": look.paler for kind, look in looks.items() if look.paler}
    inked = "".join(f".{kind}{{stroke:{colour};fill:{colour}}}" for kind, colour in colours.items())
    dashed = ".line{stroke-dasharray:6 4;fill:none}.grid,.edge{fill:none}"
    return f"{_BOTH}{inked}{_LIGHT}{_INK}{dashed}@media(prefers-color-scheme:dark){{{_DARK}{_DARK_LINES}{_INK}}}"


def timeline_svg(prediction: Prediction) -> str:
    """A row for each rank of the pipeline: what it computes, where it waits or idles, and under it its messages, a track each."""
    drawn, end_s = rows(prediction), span_s(prediction)
    high, thin, beside = (22.0, 5.0, (-6, 7)) if len(drawn) <= MANY else (12.0, 3.0, (0,))
    grain = max(1.0, sum(1 + len(row.messages) for row in drawn) / BANDS_IN_FULL)
    y, parts = 34.0, list[str]()
    for row in drawn:
        name = row_name(row.rank, len(drawn))
        told = escape(described(name, row, end_s))
        parts.append(f'<g role="img" aria-label="{told}"><title>{told}</title>')
        parts.append(_text(LEFT - 8, y + high / 2 + 4, name, "e"))
        parts += _band(row.work, y, high, end_s, grain)
        parts += _numbers(row.actions, y, high, end_s)
        shares = [f"{percent(row.seconds.get(kind, 0.0) / end_s)} {kind}" for kind in ("idle", "wait")]
        parts += [_text(LEFT + PLOT + 8, y + high / 2 + 4 + shift, said) for said, shift in zip(shares, beside, strict=False)]
        y += high
        for _, track in row.messages:
            parts += _band(track, y + 1, thin - 1, end_s, grain)
            y += thin
        parts.append("</g>")
        y += thin + 1
    parts = [*_time_grid(end_s, 30.0, y), *parts]
    parts += _legend(_used(drawn), y + 32)
    return _picture(y + 44 + 18 * _lines(_used(drawn)), summary(prediction), parts)


def memory_svg(prediction: Prediction) -> str:
    """What the fullest rank holds over the step, categories piled up, with what the device can give."""
    end_s = span_s(prediction)
    held = columns(prediction.memory, end_s, int(PLOT))
    full = max(prediction.allocated, prediction.reserved)
    near = prediction.usable < 3 * full
    top = 1.06 * (max(full, prediction.usable) if near else full)
    floor = 34.0 + TALL

    def height(size: float) -> float:
        return floor - size / top * TALL

    unit = next(unit for unit in (2**30, 2**20, 2**10, 1) if top >= unit)
    parts = _time_grid(end_s, 34.0, floor)
    for tick in ticks(top / unit, 5):
        parts.append(f'<path class="grid" d="M{LEFT:g} {height(tick * unit):.1f}h{PLOT:g}"/>')
        parts.append(_text(LEFT - 6, height(tick * unit) + 4, size(tick * unit) if tick else "0", "e"))
    piles = [dict(stack(one)) for one in held]
    used = [category for category in HELD if any(one.get(category) for one in held)]
    for category in reversed(used):  # each one down to the floor, the lower ones over it
        outline = _stairs([height(pile[category]) for pile in piles])
        parts.append(f'<path class="held-{category}" stroke="none" d="M{LEFT:g} {floor:g}{outline}V{floor:g}z"/>')
    parts += _level(height(prediction.reserved), f"reserved {size(prediction.reserved)}", "reserved", LEFT + 4)
    if near:
        parts += _level(height(prediction.usable), f"usable {size(prediction.usable)}", "usable e", LEFT + PLOT - 4)
    else:
        parts.append(_text(LEFT + PLOT, 28, f"usable: {size(prediction.usable)}, above the picture", "e"))
    legend = [(f"held-{category}", HELD[category].words) for category in used]
    parts += _legend(legend, floor + 36)
    return _picture(floor + 48, memory_summary(prediction), parts)


def described(name: str, row: Row, end_s: float) -> str:
    """A row in words: the share of the step that goes to each kind of work, and to messages of each lane."""
    spent = [(look.words, row.seconds[kind]) for kind, look in {**WORK, **MESSAGES}.items() if kind in row.seconds]
    return f"{name}: " + ", ".join(f"{words} {percent(spent_s / end_s)}" for words, spent_s in spent)


def fitted(pieces: Iterable[Piece], per_s: float, grain: float) -> Iterator[tuple[Piece, float, float]]:
    """Where each piece is drawn, in pixels from the left, and how wide, at `per_s` pixels a second.

    Neighbours that lie within `grain` pixels of each other and are narrower become one piece a kind, one after another from where the
    first of them starts: together as wide as they are, at most `grain` beside their place.
    """
    waiting: list[Piece] = []
    for piece in pieces:
        wide = (piece.end_s - piece.start_s) * per_s >= grain
        if waiting and (wide or (piece.end_s - waiting[0].start_s) * per_s > grain):
            yield from _together(waiting, per_s)
            waiting = []
        if wide:
            yield piece, piece.start_s * per_s, (piece.end_s - piece.start_s) * per_s
        else:
            waiting.append(piece)
    yield from _together(waiting, per_s)


def _together(pieces: Sequence[Piece], per_s: float) -> Iterator[tuple[Piece, float, float]]:
    widths: dict[tuple[str, bool], tuple[Piece, float]] = {}
    for piece in pieces:
        first, wide = widths.get((piece.kind, piece.paler), (piece, 0.0))
        widths[piece.kind, piece.paler] = first, wide + (piece.end_s - piece.start_s) * per_s
    x = pieces[0].start_s * per_s if pieces else 0.0
    for piece, wide in widths.values():
        yield piece, x, wide
        x += wide


def _band(pieces: Sequence[Piece], y: float, high: float, end_s: float, grain: float) -> Iterator[str]:
    """A path for each kind, a level stroke as thick as the band is high: the shortest way to write rectangles."""
    strokes: dict[str, list[tuple[float, float]]] = {}
    for piece, x, wide in fitted(pieces, PLOT / end_s, grain):
        strokes.setdefault(piece.kind + ("-paler" if piece.paler else ""), []).append((x, wide))
    for kind, stretches in strokes.items():
        drawn, at = [], 0.0  # moves from the last one's end, as rounded, so that roundings do not add up
        for x, wide in stretches:
            start, end = round(LEFT + x, 2), round(LEFT + x + wide, 2)
            drawn.append(f"m{start - at:.2f} 0h{end - start:.2f}" if at else f"M{start:g} {y + high / 2:g}h{end - start:.2f}")
            at = end
        yield f'<path class="{kind}" stroke-width="{high:g}" d="{"".join(drawn)}"/>'


def _numbers(actions: Sequence[Piece], y: float, high: float, end_s: float) -> Iterator[str]:
    """An edge before each action that is wide enough to tell, and its micro-batch's number where it finds room."""
    edges = list[str]()
    for action in actions:
        x, wide = LEFT + action.start_s / end_s * PLOT, (action.end_s - action.start_s) / end_s * PLOT
        if wide >= 4:
            edges.append(f"M{x:.1f} {y:g}v{high:g}")
        if high >= 12 and action.label and wide >= DIGIT * len(action.label) + 4:
            yield _text(x + wide / 2, y + high / 2 + 4, action.label, "m d" if WORK[action.kind].dark or action.paler else "m l")
    if edges:
        yield f'<path class="edge" d="{"".join(edges)}"/>'


def _time_grid(end_s: float, top: float, floor: float) -> list[str]:
    """Round times, from `top` down to `floor`."""
    parts = list[str]()
    for tick in ticks(end_s, 8):
        x = LEFT + tick / end_s * PLOT
        parts.append(f'<path class="grid" d="M{x:.1f} {top:g}V{floor:g}"/>' + _text(x, floor + 13, seconds(tick) if tick else "0", "m"))
    return parts


def _stairs(heights: Sequence[float]) -> str:
    """From column to column, a pixel each, at those heights."""
    steps, before = list[str](), ""
    for x, y in enumerate(heights):
        if (now := f"V{y:.1f}") != before:
            steps.append(f"H{LEFT + x:g}{now}" if x else now)
            before = now
    return "".join(steps) + f"H{LEFT + len(heights):g}"


def _level(y: float, words: str, kind: str, x: float) -> list[str]:
    """A dashed line, and at `x` what it is."""
    return [f'<path class="{kind} line" d="M{LEFT:g} {y:.1f}h{PLOT:g}"/>', _text(x, y - 5, words, kind.partition(" ")[2])]


def _used(drawn: Sequence[Row]) -> list[tuple[str, str]]:
    work = {piece.kind for row in drawn for piece in row.work}
    legend = [(kind, look.words) for kind, look in WORK.items() if kind in work]
    if any(piece.paler for row in drawn for piece in row.actions):
        legend.append(("F-paler", "paler: every other stage of a rank"))
    lanes = {lane for row in drawn for lane, _ in row.messages}
    return legend + [(lane, look.words) for lane, look in MESSAGES.items() if lane in lanes]


def _placed(legend: Sequence[tuple[str, str]]) -> Iterator[tuple[float, int, str, str]]:
    x, line = LEFT, 0
    for kind, words in legend:
        wide = 30 + 6.2 * len(words)
        if x + wide > LEFT + PLOT and x > LEFT:
            x, line = LEFT, line + 1
        yield x, line, kind, words
        x += wide


def _lines(legend: Sequence[tuple[str, str]]) -> int:
    return max((line for _, line, _, _ in _placed(legend)), default=0)


def _legend(legend: Sequence[tuple[str, str]], y: float) -> Iterator[str]:
    for x, line, kind, words in _placed(legend):
        yield f'<rect class="{kind}" x="{x:g}" y="{y + 18 * line - 9:g}" width="11" height="11" stroke="none"/>'
        yield _text(x + 17, y + 18 * line, words)


def _text(x: float, y: float, words: str, kind: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}"' + (f' class="{kind}"' if kind else "") + f">{escape(words)}</text>"


def _picture(height: float, title: str, parts: Iterable[str]) -> str:
    """A whole picture; `title` heads it, and is what a reader who cannot see it is told first."""
    wide = LEFT + PLOT + RIGHT
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {wide:g} {height:g}" width="{wide:g}" height="{height:g}" role="group"'
    page = f'<rect class="page" width="{wide:g}" height="{height:g}"/>'
    said = escape(title)
    return "\n".join([f'{head} aria-label="{said}">', f"<style>{_style()}</style>", page, _text(LEFT, 18, title), *parts, "</svg>\n"])
