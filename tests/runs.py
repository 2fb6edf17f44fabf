"""Whole commands as a person would type them, forked from a test process that has already imported torch.

A fresh `python -m paraxis` imports torch for seconds, and so does each of its workers. Here the command and its workers are
forked instead; all else is real: arguments, launcher, signals, exit codes, what is written to stdout and stderr.
"""

import json
import logging
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import paraxis.cli.train
import paraxis.train.worker
from paraxis.base.forked import Forked
from paraxis.checkpoint.load import newest, open_checkpoint
from paraxis.cli import main
from tests.worlds import warm_up

ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "tests" / "train" / "planted.py"
SMALL = ["--model.width=32", "--model.heads=4", "--model.kv_heads=2", "--model.mlp_width=64", "--model.layers=1", "--model.vocab_size=320"]
OURS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "PARAXIS_STORE")


@dataclass(frozen=True)
class Ended:
    """How a command ended: its exit code (negative: killed by that signal), and what it wrote."""

    code: int
    out: str
    err: str
    seconds: float


def _quietly(body: Callable[[], int], out: Path, err: Path) -> int:
    """`body` with its own streams and log handlers: pytest's would keep to themselves what is written."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    sys.stdout, sys.stderr = (open(number, "w", buffering=1, closefd=False) for number in (1, 2))  # noqa: SIM115
    sys.__stdout__, sys.__stderr__ = sys.stdout, sys.stderr
    logging.getLogger().handlers.clear()
    torch.set_num_threads(1)
    return body()


@dataclass
class Command:
    """`paraxis ARGUMENTS`, running. Without `variables` it is what a person starts; with them, a worker of some launcher.

    `before` is called in the new process first.
    """

    arguments: Sequence[str]
    folder: Path
    variables: Mapping[str, str] = field(default_factory=dict)
    before: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        warm_up()
        self._out, self._err = (self.folder / f"{kind}-{id(self)}-{time.monotonic_ns()}" for kind in ("out", "err"))
        self._started_s = time.monotonic()
        self.process = Forked(partial(_quietly, self._body, self._out, self._err))

    def _body(self) -> int:
        for name in OURS:
            os.environ.pop(name, None)
        os.environ.update(self.variables, CUDA_VISIBLE_DEVICES="", GLOO_SOCKET_IFNAME="lo")
        os.chdir(self.folder)
        if self.before is not None:
            self.before()
        return main(list(self.arguments))

    def until_written(self, path: Path) -> None:
        """Waits until there is something in the file `path`."""
        while not (path.exists() and path.stat().st_size):
            assert self.process.poll() is None, self.wait()
            time.sleep(0.01)

    def send(self, number: int) -> None:
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 60.0) -> Ended:
        try:
            code = self.process.wait(timeout)
        except TimeoutError as error:
            raise AssertionError(f"{error}\n{self._out.read_text()}\n{self._err.read_text()}") from error
        return Ended(code, self._out.read_text(), self._err.read_text(), time.monotonic() - self._started_s)


def paraxis(*arguments: str, folder: Path, before: Callable[[], None] | None = None, timeout: float = 60.0) -> Ended:
    """Runs `paraxis ARGUMENTS` in `folder` to its end."""
    return Command(arguments, folder, before=before).wait(timeout)


def refusal(ended: Ended, code: int) -> str:
    """The one message of a command that ended with `code`: a line on stderr, which is the last, and no traceback."""
    assert ended.code == code, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
    *others, last = ended.err.splitlines()
    assert last.startswith("paraxis: error: "), ended.err
    assert not [line for line in others if "error" in line.lower() or "Traceback" in line], ended.err
    return last


def succeeded(ended: Ended) -> Ended:
    assert ended.code == 0, f"exit code {ended.code}\n{ended.out}\n{ended.err}"
    return ended


def fresh_environment(**variables: str) -> dict[str, str]:
    """The variables of a process that is not forked from this one: it finds the checkout, and no GPU."""
    mine = {name: value for name, value in os.environ.items() if name not in OURS}
    here = {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1"}
    return {**mine, **here, **variables}


def lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def metrics(run: Path) -> list[dict[str, Any]]:
    return lines(run / "metrics.jsonl")


def events(run: Path, kind: str) -> list[dict[str, Any]]:
    return [event for event in lines(run / "events.jsonl") if event["kind"] == kind]


def saved(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """What the newest checkpoint of a run remembers: its numbers, and every tensor whole."""
    path = newest(run / "checkpoints")
    assert path is not None, f"{run} holds no checkpoint"
    checkpoint = open_checkpoint(path)
    return dict(checkpoint.meta), {name: checkpoint.read(name) for name in checkpoint.tensors}


def assert_same_state(a: Path, b: Path) -> None:
    """The newest checkpoints of two runs are equal, bitwise."""
    (meta_a, tensors_a), (meta_b, tensors_b) = saved(a), saved(b)
    assert meta_a == meta_b
    assert tensors_a.keys() == tensors_b.keys()
    different = [name for name in tensors_a if not torch.equal(tensors_a[name], tensors_b[name])]
    assert not different, f"not bitwise equal: {different}"


def assert_same_curves(a: Path, b: Path) -> None:
    """Two runs report each step once, with bitwise the same loss and gradient norm."""
    curve_a, curve_b = ([(m["step"], m["loss"], m["grad_norm"]) for m in metrics(run)] for run in (a, b))
    assert [step for step, _, _ in curve_a] == list(range(1, len(curve_a) + 1))
    assert curve_a == curve_b
