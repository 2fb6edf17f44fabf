"""Pictures of a predicted step for a terminal: letters, in colour where there is any."""

from collections.abc import Iterable, Mapping, Sequence

from rich.text import Text

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
)
from paraxis.plan.predict import Prediction

NARROWEST = 40  # columns
MANY = 16  # ranks: from here on a line for each
AMOUNTS = 12  # columns that a rank's shares take
NOTHING = "nothing"


def timeline_text(prediction: Prediction, width: int = 80) -> Text:
    """What each rank of the pipeline does when, in `width` columns (at least 40).

    A column shows one kind of work, chosen so that over a line each kind has as many columns as it takes time. Under a rank's line are
    its messages, unless there are many ranks.
    """
    width = max(width, NARROWEST)
    drawn, end_s = rows(prediction), span_s(prediction)
    names = [row_name(row.rank, len(drawn)) for row in drawn]
    left = max(map(len, names), default=0) + 1
    cells = width - left - AMOUNTS
    text = _wrapped(summary(prediction).split(" "), width)
    for name, row in zip(names, drawn, strict=True):
        idle, waits = (row.seconds.get(kind, 0.0) / end_s for kind in ("idle", "wait"))
        _line(text, name.ljust(left), _work_cells(row, end_s, cells), f"{percent(idle)} idle".rjust(AMOUNTS))
        if row.messages and len(drawn) <= MANY:
            _line(text, " " * left, _message_cells(row, end_s, cells), f"{percent(waits)} wait".rjust(AMOUNTS))
    text.append(" " * left + "0" + seconds(end_s).rjust(cells - 1) + "\n", "dim")
    text.append_text(_legend(drawn, width))
    return text


def memory_text(prediction: Prediction, width: int = 80, height: int = 12) -> Text:
    """What the fullest rank holds over the step, by category, in `width` columns (at least 40) and about `height` lines."""
    width = max(width, NARROWEST)
    top = max(prediction.allocated, prediction.reserved)
    top = max(top, prediction.usable) if prediction.usable < 3 * top else top
    labels = {row: size(top * row / height) for row in (height, height // 2)}
    left = max(map(len, labels.values())) + 1
    held = columns(prediction.memory, span_s(prediction), width - left)
    grid = [_column(one, top, height) for one in held]
    text = _wrapped(memory_summary(prediction).split(" "), width)
    line = round(prediction.usable / top * height)
    for row in range(height, 0, -1):
        cells = ["usable" if row == line else column[row - 1] or NOTHING for column in grid]
        _line(text, labels.get(row, "").rjust(left - 1) + " ", [_held_cell(cell) for cell in cells], "")
    text.append(" " * left + "0" + seconds(span_s(prediction)).rjust(width - left - 1) + "\n", "dim")
    used = [category for category in HELD if any(one.get(category) for one in held)]
    words = [(HELD[category].letter, HELD[category].words, _ink(HELD[category])) for category in used]
    words.append(("─", f"usable: {size(prediction.usable)}" + ("" if line <= height else ", above the picture"), ""))
    return text.append_text(_entries(words, width))


Cell = tuple[str, str]  # a character and its style


def _line(text: Text, before: str, cells: Iterable[Cell], after: str) -> None:
    text.append(before)
    for letter, style in cells:
        text.append(letter, style)
    text.append(after + "\n", "dim")


def _ink(look: Look, paler: bool = False) -> str:
    return f"{'black' if look.dark or paler else 'white'} on {look.paler if paler else look.colour}"


def _work_cells(row: Row, end_s: float, cells: int) -> list[Cell]:
    shares = _shares([row.work], end_s, cells)
    return [_work_cell(kind) for kind in _chosen(shares)]


def _work_cell(kind: str) -> Cell:
    paler, kind = kind.endswith("'"), kind.removesuffix("'")
    look = WORK[kind]
    if kind == "idle":
        return look.letter, "dim"
    return (look.letter.lower() if paler else look.letter), _ink(look, paler)


def _message_cells(row: Row, end_s: float, cells: int) -> list[Cell]:
    shares = _shares([track for _, track in row.messages], end_s, cells)
    for share in shares:
        share[NOTHING] = max(0.0, 1.0 - sum(share.values()))
    return [(" ", "") if kind == NOTHING else (MESSAGES[kind].letter, MESSAGES[kind].colour) for kind in _chosen(shares)]


def _shares(tracks: Iterable[Sequence[Piece]], end_s: float, cells: int) -> list[dict[str, float]]:
    """What part of each cell goes to each kind; paler kinds have a mark."""
    shares: list[dict[str, float]] = [{} for _ in range(cells)]
    for track in tracks:
        for piece in track:
            kind = piece.kind + ("'" if piece.paler else "")
            start, end = piece.start_s / end_s * cells, min(piece.end_s / end_s * cells, float(cells))
            for cell in range(int(start), min(int(end) + 1, cells)):
                if (part := min(end, cell + 1) - max(start, cell)) > 0:
                    shares[cell][kind] = shares[cell].get(kind, 0.0) + part
    return shares


def _chosen(shares: Iterable[Mapping[str, float]]) -> list[str]:
    """A kind for each cell out of those in it, what a kind did not get in one counting for it in the next."""
    owed: dict[str, float] = {}
    found: list[str] = []
    for share in shares:
        for kind, part in share.items():
            owed[kind] = owed.get(kind, 0.0) + part
        found.append(max(share, key=lambda kind: owed[kind]))
        owed[found[-1]] -= 1
    return found


def _legend(drawn: Sequence[Row], width: int) -> Text:
    used = {piece.kind for row in drawn for piece in row.work}
    words = [(look.letter, look.words, "dim" if kind == "idle" else _ink(look)) for kind, look in WORK.items() if kind in used]
    if any(piece.paler for row in drawn for piece in row.actions):
        words.append(("a-z", "every other stage of a rank", ""))
    lanes = {lane for row in drawn for lane, _ in row.messages} if len(drawn) <= MANY else set()
    words += [(look.letter, look.words, look.colour) for lane, look in MESSAGES.items() if lane in lanes]
    return _entries(words, width)


def _entries(words: Sequence[tuple[str, str, str]], width: int) -> Text:
    """A legend: signs in their styles, each with its words; no entry is broken at a line's end."""
    text, used = Text(), 0
    for sign, said, style in words:
        long = len(sign) + 1 + len(said)
        if used and used + 2 + long > width:
            text.append("\n")
            used = 0
        text.append("  " if used else "").append(sign, style).append(f" {said}")
        used += long + (2 if used else 0)
    return text.append("\n")


def _wrapped(words: Iterable[str], width: int) -> Text:
    lines, line = [], ""
    for word in words:
        if line and len(line) + 1 + len(word) > width:
            lines.append(line)
            line = word
        else:
            line = f"{line} {word}".strip()
    return Text("\n".join([*lines, line]) + "\n")


def _column(held: Mapping[str, int], top: float, height: int) -> list[str | None]:
    """The category in each cell of a column, from the bottom up; None above the pile."""
    column: list[str | None] = [None] * height
    below = 0
    for category, upto in stack(held):
        above = round(upto / top * height)
        column[below:above] = [category] * (above - below)
        below = above
    return column


def _held_cell(cell: str) -> Cell:
    if cell in HELD:
        return HELD[cell].letter, _ink(HELD[cell])
    return ("─", "") if cell == "usable" else (" ", "")
