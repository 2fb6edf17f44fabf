"""transformers' Trainer beside ours: it does the work of our row, and work that it cannot do alike is refused."""

import importlib.util
import json
import os
import subprocess
import sys
from dataclasses import replace
from math import log
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

from paraxis.base.env import cores
from paraxis.base.errors import ConfigError
from paraxis.bench.hf_trainer import HfTrainer, hf_trainer
from paraxis.bench.machine import Machine
from paraxis.bench.rows import Pace
from paraxis.bench.step import Ours, ours
from paraxis.cli import main
from paraxis.cli.arguments import parse
from paraxis.cli.bench_peers import PEER_OPTIONS, peers

ROOT = Path(__file__).parents[2]
MACHINE = Machine(0, "x86_64", 2, {})
PACE = Pace(steps=3, warmup=1, limit_s=100)
runs_it = pytest.mark.skipif(importlib.util.find_spec("accelerate") is None, reason="transformers' Trainer needs accelerate")


def row(**settings: object) -> Ours:
    return ours("a", "debug", {name.replace("__", "."): value for name, value in settings.items()}, None, MACHINE, PACE)


@runs_it
def test_its_losses_are_of_the_rows_and_targets_that_ours_would_take(tmp_path: Path):
    subject = hf_trainer(row(train__global_tokens=256, train__micro_batch=2), 1)  # two micro-batches of two rows of 64 tokens
    run = subject.measure(tmp_path)
    assert run.error is None
    assert [step for step, _ in run.losses] == [1, 2, 3]
    assert [rate * seconds for rate, seconds in zip(run.tokens_per_s, run.step_s, strict=True)] == [pytest.approx(256)] * 2
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tmp_path), attn_implementation="sdpa")
    rows = load_file(tmp_path / "rows.safetensors")
    tokens_bt, targets_bt = (rows[name][:4] for name in ("tokens", "targets"))
    assert torch.equal(tokens_bt[:, 1:], targets_bt[:, :-1])
    logits_btv = model(tokens_bt).logits
    assert run.losses[0][1] == pytest.approx(cross_entropy(logits_btv.flatten(0, 1), targets_bt.flatten()).item(), abs=1e-5)


@runs_it
@pytest.mark.timeout(240)
def test_the_command_measures_it_beside_ours_on_as_many_ranks_and_threads(tmp_path: Path):
    words = ["--steps=3", "--warmup=1", "--row=two: --layout=dp2", "--against=transformers", "--out=out.json", "--logs=logs"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "paraxis", "bench", "step", "debug", *words]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=230)
    assert done.returncode == 0, done.stderr
    results = json.loads((tmp_path / "out.json").read_text())
    assert {"transformers", "accelerate"} <= results["versions"].keys()
    own, other = results["rows"]
    assert (own["system"], other["system"]) == ("paraxis", "transformers")
    same = ("name", "model", "seq_len", "batch", "layout", "ranks", "precision", "error")
    assert [own[key] for key in same] == [other[key] for key in same] == ["two", "debug", 64, 2, "dp2", 2, "fp32", None]
    assert "of best peer" in done.stdout
    assert other["losses"].keys() == own["losses"].keys()
    assert other["losses"]["1"] == pytest.approx(log(512), abs=0.2)
    assert other["reserved_gib"] > 0
    assert other["first_step_s"] > 0
    told = [json.loads((tmp_path / f"logs/2-1/rank-{rank}.json").read_text()) for rank in range(2)]
    assert [rank["threads"] for rank in told] == [int(os.environ["OMP_NUM_THREADS"])] * 2
    assert not list((tmp_path / "logs/2-1").rglob("*checkpoint*"))


def test_the_work_of_a_row_is_told_to_it():
    subject = hf_trainer(row(layout="dp2", precision="bf16", remat__mode="full", train__global_tokens=1024, optim__clip_norm=0.5), 2)
    assert (subject.row.system, subject.row.model, subject.row.batch) == ("transformers", "debug", 2)
    told = {name: subject.arguments[name] for name in ("bf16", "gradient_checkpointing", "gradient_accumulation_steps", "max_grad_norm")}
    assert told == {"bf16": True, "gradient_checkpointing": True, "gradient_accumulation_steps": 4, "max_grad_norm": 0.5}
    assert "torch_compile_backend" not in subject.arguments
    assert hf_trainer(row(compile="inductor"), 1).arguments["torch_compile_backend"] == "inductor"


def test_one_rank_sees_one_gpu_of_many_and_many_ranks_share_the_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    alone = replace(hf_trainer(row(), 1), devices=2).variables()
    assert alone["CUDA_VISIBLE_DEVICES"] == "2"
    assert "OMP_NUM_THREADS" not in alone
    many = replace(hf_trainer(row(layout="dp2"), 2), devices=2).variables()
    assert many["CUDA_VISIBLE_DEVICES"] == "2,3"
    assert many["OMP_NUM_THREADS"] == str(max(1, cores() // 2))


@pytest.mark.parametrize(
    ("settings", "ranks", "words"),
    [
        ({"parallel.tp": 2}, 2, "tp2 splits more than the rows of a step"),
        ({"precision": "fp64"}, 1, "precision=fp64 is not its"),
        ({"optim.name": "sgd"}, 1, "optim.name=sgd is not measured"),
        ({"remat.mode": "selective"}, 1, "remat.mode=selective is not its"),
        ({"data.document_mask": "true"}, 1, "data.document_mask=true is not its"),
        ({"train.deterministic": "true"}, 1, "train.deterministic=true holds for ours only"),
        ({"train.init_from": "runs/a"}, 1, "train.init_from is read by ours only"),
        ({"parallel.auto": "true"}, 1, "parallel.auto=true leaves the layout open"),
    ],
)
def test_work_that_it_cannot_do_alike_is_refused(settings: dict[str, object], ranks: int, words: str):
    with pytest.raises(ConfigError, match=f"--against transformers, row 'a': .*{words}"):
        hf_trainer(ours("a", "debug", settings, None, MACHINE, PACE), ranks)


def test_a_model_without_a_hugging_face_form_is_refused_with_the_reason():
    recipe = f"{ROOT / 'examples/convolutional.py'}:tiny"
    with pytest.raises(ConfigError, match="row 'a': a ConvolutionalConfig has no Hugging Face form here"):
        hf_trainer(ours("a", recipe, {}, None, MACHINE, PACE), 1)


def test_data_that_cannot_be_had_fail_the_row_alone(tmp_path: Path):
    run = hf_trainer(row(data__paths="nonesuch"), 1).measure(tmp_path)
    assert run.error is not None
    assert run.error.startswith("data.paths: no file at ")


@pytest.mark.parametrize("missing", [["accelerate"], ["transformers", "accelerate"]])
def test_a_package_that_is_missing_is_named_in_a_line(missing: list[str], tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for name in ("transformers", "accelerate"):
        monkeypatch.setitem(sys.modules, name, None if name in missing else sys.modules.get(name, pytest))
    assert main(["bench", "step", "debug", "--against", "transformers"]) == 78
    said = capsys.readouterr().err
    assert f"Python finds no {' and no '.join(missing)}; pip install transformers accelerate" in said
    assert said.count("\n") == 1


def test_rows_that_are_the_same_work_to_it_run_once(tmp_path: Path, monkeypatch):
    monkeypatch.setattr("paraxis.bench.hf_trainer.versions", dict)
    parsed = parse(["step", "debug", "--ranks", "2", "--against", "transformers"], ("ranks", *PEER_OPTIONS), ())
    rows = [ours(name, "debug", {"layout": name}, 2, MACHINE, PACE) for name in ("fsdp2", "dp2")]
    rows.append(ours("bf16", "debug", {"layout": "dp2", "precision": "bf16"}, 2, MACHINE, PACE))
    _, found = peers(parsed, rows, tmp_path, MACHINE, PACE)
    assert all(isinstance(subject, HfTrainer) for subject in found)
    assert [subject.row.name for subject in found] == ["fsdp2", "bf16"]


@pytest.mark.parametrize(
    "arguments",
    ["--against transformers --titan .", "--titan .", "--against titan", "--against titan --titan-options=--a"],
)
def test_options_of_another_peer_are_refused(arguments: str, tmp_path: Path):
    parsed = parse(["step", "debug", *arguments.split()], PEER_OPTIONS, ())
    with pytest.raises(ConfigError, match="need both --against titan and --titan DIR"):
        peers(parsed, [], tmp_path, MACHINE, PACE)
