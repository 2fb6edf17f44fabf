"""`paraxis plan` and `paraxis train --parallel.auto=true`, as a user calls them, on a cluster of CPU processes."""

import json
import os
import shlex
import subprocess
import sys
import tomllib
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from paraxis.base.errors import ConfigError
from paraxis.cli import auto, main, plan
from paraxis.cli.study import Question, ask
from paraxis.plan.cluster_file import read_cluster
from paraxis.plan.search import Effort
from paraxis.recipes.find import find
from tests.cli.folders import said

CPU = """
name = "four processes"

[[pools]]
hosts = 1
devices = 4
accelerator = "cpu"
inside = "memory"

[accelerators.cpu]
name = "a CPU"
memory_gib = {memory}
reserved_gib = 0
gb_per_s = 20
peak_tflops = {{ bf16 = 0.05, fp32 = 0.05, fp64 = 0.02 }}

[links.memory]
kind = "memory"
gb_per_s = 5
"""
FEW = ("--parallel.pp=1", "--parallel.cp=1", "--train.micro_batch=2")  # what is left is searched in a second
OPTION = {
    "layout": str, "settings": dict, "schedule": str | None, "cuts": list, "micro_batch": int, "micro_batches": int, "remat": str,
    "reshard": str, "precision": str, "placement": str, "source": str, "step_s": float, "tokens_per_s": float, "mfu": float | None,
    "exposed_s": float, "bubble": float, "memory": dict, "reserved": float, "usable": int, "fits": bool, "why": str,
}  # fmt: skip
MEMORY = {"parameters", "gradients", "optimizer", "activations", "communication", "fragmentation"}


FIXED = (*FEW, "--parallel.tp=1", "--remat.mode=none", "--train.global_tokens=512")


@pytest.fixture
def cluster(tmp_path: Path) -> Path:
    path = tmp_path / "here.toml"
    path.write_text(CPU.format(memory=4))
    return path


def told(capsys: pytest.CaptureFixture[str], *words: object) -> dict[str, Any]:
    return json.loads(said(capsys, "plan", *words, "--json"))


def test_everything_that_was_found_is_told_as_json(cluster: Path, capsys: pytest.CaptureFixture[str]):
    answer = told(capsys, "debug", "--cluster", cluster, "--gpus", "2", "--seconds", "60", *FIXED)
    assert (answer["recipe"], answer["cluster"], answer["ranks"], answer["tokens_per_step"]) == ("debug", "four processes", 2, 512)
    assert answer["plans"]
    for one in [*answer["plans"], *answer["pareto"]]:
        assert one.keys() == OPTION.keys()
        assert all(isinstance(one[name], kind) for name, kind in OPTION.items())
        assert one["memory"].keys() >= MEMORY
        assert one["reserved"] == pytest.approx(sum(one["memory"].values()))
        assert one["settings"]["train.global_tokens"] in (512, "512")
    assert answer["plans"][0]["source"] == "traced"
    assert answer["plans"][0]["why"] == ""
    assert answer["search"]["traced"] >= 1
    assert answer["lacking"] is None


def test_the_table_ends_in_a_command_that_trains_so(cluster: Path, capsys: pytest.CaptureFixture[str]):
    shown = said(capsys, "plan", "debug", "--cluster", cluster, "--gpus", "2", "--seconds", "60", "--name=two words", *FIXED)
    assert "tokens/s/GPU" in shown
    assert "fragmentation" in shown
    [command] = [line for line in shown.splitlines() if line.startswith("paraxis train debug ")]
    config = tomllib.loads(said(capsys, *shlex.split(command)[1:], "--print-config"))
    assert (config["name"], config["train"]["global_tokens"]) == ("two words", 512)
    assert config["parallel"]["dp"] * config["parallel"]["fsdp"] * config["parallel"]["tp"] == 2


def test_a_layout_is_predicted_as_it_was_given(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    page, trace = tmp_path / "step.html", tmp_path / "step.json"
    drawn = ["--picture", page, "--trace", trace]
    [one] = told(capsys, "debug", "--cluster", cluster, "--layout", "fsdp2", *drawn)["plans"]
    assert (one["layout"], one["source"]) == ("fsdp2", "traced")
    assert "<svg" in page.read_text()
    assert json.loads(trace.read_text())["traceEvents"]
    [whole] = told(capsys, "debug", "--cluster", cluster, "--layout", "fsdp2", "--exact")["plans"]
    assert whole["source"] == "exact"
    assert whole["reserved"] == pytest.approx(one["reserved"], rel=0.005)


def test_a_simulated_step_is_written_beside_a_measured_one(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    measured, both = tmp_path / "measured.json", tmp_path / "both.json"
    step = {"ph": "X", "name": "step 3", "pid": 1, "tid": 1, "ts": 500.0, "dur": 100.0}
    measured.write_text(json.dumps({"traceEvents": [step]}))
    words = ["debug", "--cluster", cluster, "--layout", "fsdp2", "--beside", measured]
    told(capsys, *words, "--trace", both)
    events = json.loads(both.read_text())["traceEvents"]
    assert step in events
    assert len(events) > 10
    assert main(["plan", *map(str, words)]) != 0
    assert "needs --trace FILE" in capsys.readouterr().err


def test_a_run_in_float8_is_refused_for_devices_without_it(cluster: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "debug", "--cluster", str(cluster), "--precision=float8_tensorwise", "--layout", "fsdp2"]) != 0
    assert "tensorwise products need an NVIDIA GPU" in capsys.readouterr().err


def test_weights_that_travel_in_float8_are_planned_where_any_travel(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture):
    words = ["debug", "--cluster", "dgx_h100", "--gpus", "2", "--precision=float8_tensorwise", "--float8.gather=float8", "--json"]
    assert main(["plan", *words]) == 0
    assert json.loads(capsys.readouterr().out)["plans"][0]["layout"] == "fsdp2"
    assert "dp2 could not be traced: float8.gather=float8 says nothing where no weight is gathered" in caplog.text


def test_of_several_precisions_the_fastest_comes_first_and_each_plan_says_its_own(capsys: pytest.CaptureFixture[str]):
    words = ["debug", "--cluster", "dgx_h100", "--gpus", "2", *FIXED, "--precision=fp32,bf16", "--json"]
    assert plan.run(words) == 0
    answer = json.loads(capsys.readouterr().out)
    plans = answer["plans"]
    assert answer["precision"] == "fp32,bf16"
    assert {one["precision"] for one in plans} == {"fp32", "bf16"}
    assert [one["tokens_per_s"] for one in plans] == sorted((one["tokens_per_s"] for one in plans), reverse=True)
    recipe = find("debug")[0].precision
    assert all(one["settings"].get("precision", recipe) == one["precision"] for one in plans)
    slower = next(one for one in plans if one["precision"] != plans[0]["precision"])
    assert f"in {slower['precision']}" in slower["why"] or "as fast" in slower["why"] or "faster by prediction" in slower["why"]
    assert plan.run(["debug", "--cluster", "dgx_h100", "--layout", "dp2", "--precision=fp32,bf16", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["plans"]) == 2


def test_nothing_that_fits_says_how_much_is_lacking(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    small = tmp_path / "small.toml"
    small.write_text(CPU.format(memory=0.001))
    words = ["debug", "--cluster", str(small), "--layout", "fsdp2", "--json"]
    assert plan.run(words) == plan.NOTHING_FITS
    answer = json.loads(capsys.readouterr().out)
    least = answer["lacking"]["least"]
    assert answer["plans"] == []
    assert answer["lacking"]["bytes"] == pytest.approx(least["reserved"] - 0.001 * 2**30, abs=1)
    drawn = tmp_path / "step.svg"
    assert plan.run([*words[:-1], "--picture", str(drawn)]) == plan.NOTHING_FITS
    shown = capsys.readouterr().out
    assert f"lacks {answer['lacking']['bytes'] / 2**30:.3g} GiB" in shown
    assert drawn.read_text().startswith("<svg"), "what does not fit is drawn too"
    assert "usable: 1.024 MiB" in shown, "in the terminal as well"
    study = ask(Question(recipe="debug", settings={}, cluster=read_cluster(str(small)), layout="fsdp2", all_devices=False), Effort())
    assert plan._option(study, study.shown)["why"].startswith("memory")
    assert plan._option(study, replace(study.shown, usable=2**40))["why"] == "", "there is no best one that it could be slower than"


def test_a_step_whose_micro_batches_are_set_has_the_tokens_of_the_best_layout(cluster: Path, capsys: pytest.CaptureFixture[str]):
    fixed = [*FEW, "--parallel.fsdp=2", "--remat.mode=none", "--parallel.microbatches=3", "--data.seq_len=64"]
    answer = told(capsys, "debug", "--cluster", cluster, "--gpus", "2", "--seconds", "60", *fixed)
    best = answer["plans"][0]
    assert best["micro_batches"] == 3
    assert answer["tokens_per_step"] == 2 * 2 * 3 * 64
    assert answer["tokens_per_step"] == pytest.approx(best["tokens_per_s"] * best["step_s"] * 2)


FORGETFUL = """
from dataclasses import dataclass, replace
from torch import nn
from paraxis.recipes.find import find

base = find("debug")[0]

@dataclass(frozen=True, kw_only=True)
class Forgetful(type(base.model)):
    def build(self):
        model = super().build()
        model.forgets = nn.Dropout(0.1)
        return model

def forgetful():
    return replace(base, name="forgetful", model=Forgetful(**vars(base.model)))
"""


def test_a_run_that_training_refuses_is_refused_for_the_same_reason(cluster: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "forgetful.py").write_text(FORGETFUL)
    words = ["plan", f"{tmp_path}/forgetful.py:forgetful", "--cluster", str(cluster), "--gpus", "2", "--seconds", "60", *FIXED]
    assert main(words) not in (0, plan.NOTHING_FITS)
    assert "forgets drops out at random" in capsys.readouterr().err


def test_what_is_missing_is_asked_for(cluster: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ConfigError, match="needs --cluster"):
        plan.run(["debug"])
    with pytest.raises(ConfigError, match="takes 8 devices"):
        plan.run(["debug", "--cluster", str(cluster), "--layout", "fsdp8"])
    with pytest.raises(ConfigError, match=r"neither \.html nor \.svg"):
        plan.run(["debug", "--cluster", str(cluster), "--layout", "fsdp2", "--picture", "step.png"])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError, match=r"run paraxis probe.*--cluster"):
        auto.this_cluster(0)
    (tmp_path / "cluster.toml").write_text(cluster.read_text())
    assert auto.this_cluster(0).name == "four processes"


def test_the_ready_file_of_a_machine_is_that_of_its_gpus_and_of_the_host_most_like_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(auto, "ask_machine", lambda: SimpleNamespace(name="NVIDIA H200"))
    assert [auto.this_cluster(devices).name for devices in (1, 2, 3, 8)] == ["2 x H200", "2 x H200", "DGX H200", "DGX H200"]


LINKED = """
matrix_gb_per_s = [[9, 0.01, 9, 0.01], [0.01, 9, 0.01, 9], [9, 0.01, 9, 0.01], [0.01, 9, 0.01, 9]]
"""


def test_auto_trains_with_ranks_in_order_as_they_are_started(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    file = tmp_path / "islands.toml"
    between = 'inside = "memory"\nnetwork = "memory"'
    text = CPU.format(memory=4).replace("hosts = 1\ndevices = 4", "hosts = 4\ndevices = 1").replace('inside = "memory"', between)
    file.write_text(LINKED + text)
    asked = {
        "parallel.pp": 2,
        "parallel.fsdp": 2,
        "parallel.schedule": "1f1b",
        "remat.mode": "none",
        "train.micro_batch": 2,
        "parallel.reshard": "never",
    }
    study = ask(Question(recipe="debug", settings=asked, cluster=read_cluster(str(file))), auto.EFFORT)
    assert study.best is not None
    assert list(study.best.order) != [0, 1, 2, 3]
    settings, ranks = auto.settle_auto("debug", asked, str(file), None, aloud=True)
    assert (settings["parallel.pp"], ranks) == (2, 4)
    said_so = capsys.readouterr().err
    assert "ranks are started in the devices' order" in said_so
    assert f"{study.best.step_s:.3g} s if hosts are listed" in said_so


def trained(folder: Path, *words: object) -> list[float]:
    """The losses of two steps."""
    command = [sys.executable, "-m", "paraxis", "train", "debug", "--train.steps=2", "--checkpoint.every=0", "--run-dir", folder, *words]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, timeout=190, cwd=folder.parent, env=env, check=False)
    assert done.returncode == 0, done.stderr
    if "--parallel.auto=true" in words:
        assert done.stderr.count("auto chose") >= 1
    return [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.timeout(400)  # starts Python twice, and ranks from it
def test_auto_trains_as_the_layout_that_it_chose_and_keeps_that(cluster: Path, tmp_path: Path):
    losses = trained(tmp_path / "auto", "--parallel.auto=true", "--cluster", cluster, "--ranks", "2", *FIXED)
    saved = tomllib.loads((tmp_path / "auto" / "config.toml").read_text())
    assert saved["parallel"]["auto"] is False
    assert saved["train"]["micro_batch"] == 2
    assert saved["parallel"]["dp"] * saved["parallel"]["fsdp"] == 2
    chosen = [f"--parallel.{name}={saved['parallel'][name]}" for name in ("dp", "fsdp", "reshard")]
    assert losses == trained(tmp_path / "explicit", *chosen, *FIXED)
    assert len(losses) == 2
