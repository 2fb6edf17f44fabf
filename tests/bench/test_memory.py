"""What steps take is measured on workers of their own, and again under limits until one is too low."""

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from paraxis.base.errors import ConfigError
from paraxis.bench import memory
from paraxis.bench.memory import Taken, Trial, memory_rows
from paraxis.cli.bench_memory import run

SMALL = {"data.seq_len": 32, "model.layers": 4, "train.micro_batch": 1, "layout": "fsdp2"}


def trial(**options: Any) -> Trial:
    return Trial(**{"name": "one", "recipe": "debug", "settings": SMALL, "ranks": 2, "steps": 4, **options})


def test_a_row_says_what_a_few_steps_took_on_any_layout():
    [row] = memory_rows([trial(settings={**SMALL, "layout": "pp2.zbv", "compile": "none"})])
    assert (row["layout"], row["ranks"], row["precision"], row["micro_batch"], row["seq_len"]) == ("pp2", 2, "fp32", 1, 32)
    assert row["options"] == "--data.seq_len=32 --model.layers=4 --train.micro_batch=1 --layout=pp2.zbv --compile=none"
    assert row["step_s"] > 0
    assert 0 < row["allocated_gib"] <= row["reserved_gib"]
    assert (row["limit_gib"], row["out_of_memory"], row["error"]) == (None, False, None)


def test_a_row_whose_workers_fail_says_so_and_the_next_one_runs():
    broken = trial(name="broken", settings={**SMALL, "train.global_tokens": 64, "precision": "float8_tensorwise", "attention": "cudnn"})
    first, second = memory_rows([broken, trial()])
    assert first["error"].startswith("the workers ended with exit code ")
    assert second["error"] is None


def workers_that_need(gib: float, launched: list[list[float]]) -> Callable[..., int]:
    """Stands in for workers whose rank 1 needs so much."""

    def launch(command: list[str], ranks: int, work: Any) -> int:
        plan, folder = json.loads(command[-2]), Path(command[-1])
        launched.append(plan["limits_gib"])
        with open(folder / "0.json", "w") as zero, open(folder / "1.json", "w") as one:
            for limit in plan["limits_gib"]:
                short = 0 < limit < gib
                said = Taken(limit_gib=limit, allocated_gib=gib - 1, reserved_gib=gib, step_s=0.5, out_of_memory=short)
                one.write(json.dumps(asdict(said)) + "\n")
                if short:
                    return 1
                zero.write(json.dumps(asdict(said)) + "\n")
        return 0

    return launch


def test_limits_are_tried_from_the_largest_and_workers_that_ran_out_are_replaced(monkeypatch: pytest.MonkeyPatch):
    launched: list[list[float]] = []
    monkeypatch.setattr(memory, "launch", workers_that_need(50.0, launched))
    monkeypatch.setattr(memory, "visible_devices", lambda: 2)
    rows = list(memory_rows([trial(limits_gib=(45, 60, 48, 55))]))
    assert [(row["limit_gib"], row["out_of_memory"]) for row in rows] == [
        (None, False),
        (60, False),
        (55, False),
        (48, True),
        (45, True),
    ]
    assert launched == [[0.0, 60, 55, 48, 45], [45]]
    assert [row["reserved_gib"] for row in rows] == [50.0, 50.0, 50.0, None, None]


def test_rows_that_cannot_run_are_refused_by_name_before_any_does():
    with pytest.raises(ConfigError, match=r"row 'three': .*3"):
        next(memory_rows([trial(), trial(name="three", settings={**SMALL, "layout": "tp2", "model.kv_heads": 3, "model.heads": 3})]))
    with pytest.raises(ConfigError, match="row 'one' has limits, but on a CPU"):
        next(memory_rows([trial(limits_gib=(1.0,))]))
    with pytest.raises(ConfigError, match="must be sizes in GiB above 0"):
        run(["memory", "debug", "--row", "a: --limits=60,none"])
