"""Pictures of predicted steps show what was predicted, all of it and nothing twice; files that open; a measured trace kept whole."""

import gzip
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from xml.etree import ElementTree

import pytest
import torch
from rich.console import Console

from paraxis.base.device import CPU
from paraxis.base.errors import ConfigError
from paraxis.base.schedules import SCHEDULES, Plan, build_schedule
from paraxis.observe.config import ProfileConfig
from paraxis.observe.trace import Profile
from paraxis.plan import picture_trace
from paraxis.plan.memory import Peak
from paraxis.plan.picture_page import picture_page
from paraxis.plan.picture_svg import PLOT, memory_svg, timeline_svg
from paraxis.plan.picture_text import memory_text, timeline_text
from paraxis.plan.picture_trace import trace_beside, trace_text
from paraxis.plan.pictures import MESSAGES, WORK, columns, rows
from paraxis.plan.predict import Prediction
from paraxis.plan.simulate import Compute, Item, Played, Player, Start, Wait, finished, play_pipeline

MIB = 2**20
COST = {"F": 10e-3, "B": 20e-3, "I": 10.5e-3, "W": 9e-3}
SVG = "{http://www.w3.org/2000/svg}"


def blocks(number: int, compute_s: float, gather_s: float, reduce_s: float) -> list[Item]:
    """Sharded blocks that wait for what they gather, and that reduce."""
    items: list[Item] = []
    for _ in range(number):
        items += [Start("all_gather", gather_s, "inside"), Wait("all_gather"), Compute(compute_s)]
        items += [Wait("reduce_scatter"), Start("reduce_scatter", reduce_s, "inside")]
    return items


def pipeline(name: str, ranks: int = 4, micro_batches: int = 8, sharded: int = 0) -> Played:
    schedule = build_schedule(name, Plan(ranks, micro_batches, SCHEDULES[name].stages_a_rank or 2))

    def items(action) -> list[Item]:
        cost = COST[action.kind] / (schedule.stages / ranks)
        return blocks(sharded, cost / sharded, 0.4 * cost / sharded, 0.3 * cost / sharded) if sharded else [Compute(cost)]

    # A rank has a link to each neighbour, so that two messages of one can travel at once.
    players = play_pipeline(schedule, items, lambda source, target: 0.7e-3, link=lambda source, target: f"{source} {target}")
    return finished(players, [[Compute(4e-3)] for _ in players])


def alone() -> Played:
    player = Player(0, 1.05)
    player.play([Compute(1e-3)], "start")
    for batch in range(2):
        player.play(blocks(32, 2e-3, 1e-3, 1.4e-3), f"micro-batch {batch}")
    return finished([player], [[Wait("reduce_scatter", everything=True), Compute(8e-3)]])


def curve(step_s: float, points: int = 2000) -> list[tuple[float, Mapping[str, int]]]:
    """Activations that grow and go, with a peak of one moment."""
    found: list[tuple[float, Mapping[str, int]]] = []
    for point in range(points):
        activations = min(point, points - point) * MIB + (5000 * MIB if point == 1234 else 0)
        held = {"parameters": 900 * MIB, "gradients": point * MIB // 4, "optimizer": 1800 * MIB, "activations": activations}
        found.append((step_s * point / points, {**held, "communication": point % 7 * MIB, "other": MIB}))
    return found


def predicted(played: Played, usable: int = 8000 * MIB) -> Prediction:
    memory = curve(played.step_s)
    held = dict(max((held for _, held in memory), key=lambda held: sum(held.values())))
    return Prediction(
        step_s=played.step_s,
        tokens_per_s=1234.0,
        mfu=0.4,
        exposed_s=played.exposed_s,
        bubble=played.bubble,
        rank=0,
        peak=Peak(held, "backward", 0, 2, sum(held.values()) + 100 * MIB),
        usable=usable,
        runs=True,
        timeline=played.spans,
        memory=memory,
    )


CASES = {
    "1f1b": lambda: pipeline("1f1b"),
    "interleaved": lambda: pipeline("interleaved"),
    "zbv": lambda: pipeline("zbv"),
    "sharded": lambda: pipeline("zbh1", sharded=8),
    "alone": alone,
}


@pytest.fixture(params=CASES)
def played(request) -> Played:
    return CASES[request.param]()


def seconds_of(played: Played, rank: int, lane: str) -> float:
    return sum(span.end_s - span.start_s for span in played.spans if (span.rank, span.lane) == (rank, lane))


def strokes(picture: str) -> list[list[tuple[str, float, float, float]]]:
    """Each row's rectangles: kind, height of the band's middle, left and right end."""
    found = []
    for group in ElementTree.fromstring(picture).iter(f"{SVG}g"):
        row: list[tuple[str, float, float, float]] = []
        for path in group.iter(f"{SVG}path"):
            if "stroke-width" not in path.attrib:
                continue
            x, y = map(float, re.match(r"M([\d.]+) ([\d.]+)", path.attrib["d"]).groups())
            at = x
            for move, wide in re.findall(r"(?:M[\d.]+ [\d.]+|m([-\d.]+) 0)h([\d.]+)", path.attrib["d"]):
                at += float(move or 0)
                row.append((path.attrib["class"].removesuffix("-paler"), y, at, at + float(wide)))
                at += float(wide)
        found.append(row)
    return found


def test_drawn_spans_are_as_wide_as_the_seconds_predicted(played: Played):
    drawn = strokes(timeline_svg(predicted(played)))
    assert len(drawn) == len({span.rank for span in played.spans})
    per_s = PLOT / played.step_s
    for rank, row in enumerate(drawn):
        widths: Counter[str] = Counter()
        for kind, _, start, end in row:
            widths[kind] += end - start
        computed = sum(widths[kind] for kind in WORK if kind not in ("wait", "idle"))
        outside = sum(s.end_s - s.start_s for s in played.spans if (s.rank, s.lane, s.name) == (rank, "wait", "p2p"))
        inside = seconds_of(played, rank, "wait") - outside
        assert computed == pytest.approx((seconds_of(played, rank, "compute") - inside) * per_s, abs=1)
        for lane in ("wait", *MESSAGES):
            assert widths[lane] == pytest.approx(seconds_of(played, rank, lane) * per_s, abs=1), lane
        assert computed + widths["wait"] + widths["idle"] == pytest.approx(PLOT, abs=1)


def test_nothing_that_is_drawn_overlaps_its_neighbours(played: Played):
    for row in strokes(timeline_svg(predicted(played))):
        for band in {y for _, y, _, _ in row}:
            ends = sorted((start, end) for _, y, start, end in row if y == band)
            assert all(before[1] <= after[0] + 0.03 for before, after in pairwise(ends))  # roundings to 0.01


def test_nothing_that_is_simulated_overlaps_either(played: Played):
    for row in rows(predicted(played)):
        for band in (row.work, *(track for _, track in row.messages)):
            assert all(before.end_s <= after.start_s for before, after in pairwise(band))


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv", "sharded"])
def test_idle_time_in_the_picture_is_the_bubble(name: str):
    played = CASES[name]()
    idle = work = 0.0
    for row in rows(predicted(played)):
        optimizer_s = next(piece.start_s for piece in row.work if piece.kind == "optimizer")
        for piece in row.work:
            if piece.end_s <= optimizer_s:
                idle += (piece.end_s - piece.start_s) * (piece.kind == "idle")
                work += (piece.end_s - piece.start_s) * (piece.kind != "idle")
    assert idle / work == pytest.approx(played.bubble)
    assert max(row.seconds.get("wait", 0.0) for row in rows(predicted(played))) == pytest.approx(played.exposed_s)


@pytest.mark.parametrize("width", [60, 80, 140])
def test_a_text_picture_has_the_width_asked_for(played: Played, width: int):
    prediction = predicted(played)
    for text in (timeline_text(prediction, width), memory_text(prediction, width)):
        lines = text.plain.splitlines()
        assert max(map(len, lines)) == width
        console = Console(width=width, force_terminal=False)
        with console.capture() as said:
            console.print(text, end="")
        assert said.get() == text.plain


@pytest.mark.parametrize("name", ["1f1b", "interleaved", "zbv", "sharded"])
def test_each_kind_has_as_many_letters_as_it_takes_time(name: str):
    prediction = predicted(CASES[name]())
    lines = [line for line in timeline_text(prediction, 140).plain.splitlines() if line.startswith("pp ")]
    for line, row in zip(lines, rows(prediction), strict=True):
        cells = Counter(line[5:128].upper())
        for kind in row.seconds.keys() & WORK.keys():
            expected = row.seconds[kind] / prediction.step_s * 123
            assert cells[WORK[kind].letter] == pytest.approx(expected, abs=3), kind


def test_pictures_are_well_formed_and_load_nothing(played: Played):
    prediction = predicted(played)
    page = picture_page(prediction, "a <b> & c")
    for picture in (timeline_svg(prediction), memory_svg(prediction)):
        tree = ElementTree.fromstring(picture)
        assert tree.attrib["aria-label"]
        assert picture.replace("http://www.w3.org/2000/svg", "").count("http") == 0
        assert picture.strip() in page
    assert "a &lt;b&gt; &amp; c" in page
    assert not re.search(r"<script|<link|src=|href=|@import|url\(", page)
    assert "prefers-color-scheme:dark" in page
    body = page.removeprefix("<!doctype html>\n").replace('<meta charset="utf-8">', "").replace('width=device-width">', 'width"/>')
    ElementTree.fromstring(body)  # well-formed as XML too, its two void elements aside
    for row in rows(prediction):
        assert f"{1e3 * row.seconds['idle']:,.2f}" in page if "idle" in row.seconds else True


def test_no_peak_is_lost_in_few_columns():
    memory = curve(2.0)
    most = max(sum(held.values()) for _, held in memory)
    for number in (10, 72, 900, 5000):
        found = columns(memory, 2.0, number)
        assert len(found) == number
        assert max(sum(held.values()) for held in found) == most
        assert found[0] == dict(max((held for at, held in memory if at < 2.0 / number), key=lambda held: sum(held.values())))
        assert sum(found[-1].values()) >= sum(memory[-1][1].values())


def test_memory_that_does_not_fit_is_above_the_line_and_said_to():
    prediction = predicted(CASES["1f1b"](), usable=5000 * MIB)
    lacking = (prediction.reserved - prediction.usable) / 2**30
    assert f"{lacking:.4g} GiB too much" in memory_text(prediction).plain
    heights = {}
    for path in ElementTree.fromstring(memory_svg(prediction)).iter(f"{SVG}path"):
        if path.attrib.get("class", "").startswith(("usable", "reserved")):
            heights[path.attrib["class"].split()[0]] = float(path.attrib["d"].partition(" ")[2].partition("h")[0])
    assert heights["reserved"] < heights["usable"]  # pixels from the top


def test_a_device_far_larger_than_the_run_does_not_flatten_the_curve():
    prediction = predicted(CASES["1f1b"](), usable=10**6 * MIB)
    assert "above the picture" in memory_text(prediction).plain
    assert "above the picture" in memory_svg(prediction)
    assert any("AAAA" in line for line in memory_text(prediction).plain.splitlines())


def test_many_ranks_and_spans_make_no_large_file():
    step = pipeline("interleaved", 8, 16, sharded=8)
    spans = [replace(span, rank=span.rank + 8 * copy) for copy in range(8) for span in step.spans]
    prediction = predicted(replace(step, spans=spans))
    assert len(spans) > 40_000
    picture = timeline_svg(prediction)
    assert len(picture) < 2_000_000
    row, widths = rows(prediction)[40], Counter[str]()
    for kind, _, start, end in strokes(picture)[40]:
        widths[kind] += end - start
    for kind, spent_s in row.seconds.items():
        assert widths[kind] == pytest.approx(spent_s / prediction.step_s * PLOT, abs=1), kind


# Chrome traces.


def events_of(text: str) -> list[dict]:
    return json.loads(text)["traceEvents"]


def test_the_events_of_each_rank_add_up_to_the_step(played: Played):
    prediction = predicted(played)
    events = events_of(trace_text(prediction))
    names = {(e["pid"], e["tid"]): e["args"]["name"] for e in events if e["name"] == "thread_name"}
    ranks = {e["pid"] for e in events if e["ph"] == "X"}
    assert len(ranks) == len({span.rank for span in played.spans})
    for pid in ranks:
        work = [e for e in events if e["ph"] == "X" and e["pid"] == pid and names[pid, e["tid"]] == "work"]
        assert sum(e["dur"] for e in work) == pytest.approx(1e6 * played.step_s)
        assert all(before["ts"] + before["dur"] <= after["ts"] + 1e-3 for before, after in pairwise(work))
    for lane, look in MESSAGES.items():
        drawn = sum(e["dur"] for e in events if e["ph"] == "X" and names[e["pid"], e["tid"]] == look.words)
        assert drawn == pytest.approx(1e6 * sum(seconds_of(played, rank, lane) for rank in range(len(ranks))))


def test_the_memory_counter_has_the_whole_curve():
    prediction = predicted(CASES["alone"]())
    counted = [e for e in events_of(trace_text(prediction)) if e["ph"] == "C"]
    assert [e["args"] for e in counted] == [dict(held) for _, held in prediction.memory]
    assert {e["pid"] for e in counted}.isdisjoint(e["pid"] for e in events_of(trace_text(prediction)) if e["ph"] == "X")


def profile_steps(folder: Path) -> None:
    profile = Profile(ProfileConfig(steps="2:3"), folder, 0, CPU)
    for step in (2, 3):
        profile.before_step(step)
        torch.ones(64, 64) @ torch.ones(64, 64)
        profile.after_step(step)


def test_beside_a_measured_trace_both_steps_start_at_once_and_nothing_is_lost(world, tmp_path):
    world(1, profile_steps, tmp_path)
    (path,) = tmp_path.iterdir()
    with gzip.open(path, "rt") as file:
        measured = json.load(file)
    prediction = predicted(CASES["1f1b"]())
    both = json.loads(trace_beside(prediction, path))
    own = [e for e in both["traceEvents"] if e.get("cat") == "simulated"]
    for event in measured["traceEvents"]:
        assert event in both["traceEvents"]
    assert {key: value for key, value in both.items() if key != "traceEvents"} == {k: v for k, v in measured.items() if k != "traceEvents"}
    (last,) = [e for e in measured["traceEvents"] if e.get("name") == "step 3"]
    assert min(e["ts"] for e in own) == last["ts"]
    assert {e["pid"] for e in own}.isdisjoint(e.get("pid") for e in measured["traceEvents"])
    assert sum(e["ph"] == "X" for e in own) == sum(e["ph"] == "X" for e in events_of(trace_text(prediction)))


def write(path: Path, events: Sequence[object]) -> Path:
    path.write_text(json.dumps({"traceEvents": events}))
    return path


def test_where_a_device_was_profiled_its_own_step_is_the_one_beside(tmp_path):
    label = {"ph": "X", "name": "step 7", "pid": 3, "tid": 1, "dur": 5}
    host, device = {**label, "cat": "user_annotation", "ts": 100.0}, {**label, "cat": "gpu_user_annotation", "ts": 130.5}
    first = {**host, "name": "step 6", "ts": 60.0}
    for events, start_us in (([host, first], 100.0), ([first, host, device], 130.5)):
        both = events_of(trace_beside(predicted(CASES["alone"]()), write(tmp_path / "trace.json", events)))
        assert min(e["ts"] for e in both if e.get("cat") == "simulated") == start_us


BROKEN = {
    "none": (None, "there is no measured trace"),
    "a pickle": (b"\x80\x04\x95\x00", "is not JSON"),
    "cut short": (gzip.compress(b'{"traceEvents": []}' * 999)[:40], "cannot be read"),
    "not packed right": (b"\x1f\x8b" + b"\x07" * 64, "cannot be read"),
    "deflated wrongly": (gzip.compress(b"x" * 99)[:10] + b"\xff" * 40, "cannot be read"),
    "too deep": (b"[" * 200_000, "is not JSON"),
    "a list": (b"[]", "no list of traceEvents"),
    "events of nothing": (b'{"traceEvents": [3]}', "no list of traceEvents"),
    "no step": (b'{"traceEvents": [{"ph": "X", "name": "step x", "ts": 1}]}', "no event called step N"),
    "no time": (b'{"traceEvents": [{"ph": "X", "name": "step 1", "ts": NaN}]}', "no event called step N"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_file_that_is_no_such_trace_is_refused_with_its_path(case: str, tmp_path):
    data, said = BROKEN[case]
    path = tmp_path / "trace.json.gz"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(ConfigError, match=said) as refused:
        trace_beside(predicted(CASES["1f1b"]()), path)
    assert str(path) in str(refused.value)
    assert "--profile.steps" in str(refused.value)


def test_a_trace_that_unpacks_to_too_much_is_refused_before_it_does(tmp_path, monkeypatch):
    monkeypatch.setattr(picture_trace, "LARGEST", 2**20)
    path = tmp_path / "trace.json.gz"
    path.write_bytes(gzip.compress(b" " * 2**22))
    with pytest.raises(ConfigError, match="more than 1 MiB unpacked; profile fewer steps"):
        trace_beside(predicted(CASES["1f1b"]()), path)
