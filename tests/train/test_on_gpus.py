"""What a run promises on GPUs: bitwise repeats where asked for, and the curve that a CPU computes in fp32."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from paraxis.checkpoint.load import open_checkpoint
from tests.runs import assert_same_curves, assert_same_state, events, fresh_environment, metrics

pytestmark = pytest.mark.gpu

SHORT = ["--data.seq_len=128", "--train.micro_batch=8", "--metrics.tensorboard=false", "--optim.schedule=constant"]


def train(folder: Path, name: str, *arguments: str, devices: str = "0", recipe: str = "debug") -> None:
    command = [sys.executable, "-m", "paraxis", "train", recipe, f"--run-dir={name}", *SHORT, *arguments]
    ended = subprocess.run(
        command, cwd=folder, env=fresh_environment(CUDA_VISIBLE_DEVICES=devices), capture_output=True, text=True, timeout=200
    )
    assert ended.returncode == 0, ended.stderr


@pytest.mark.parametrize("mode", ["none", "inductor"])
def test_deterministic_runs_repeat_and_resume_bitwise(mode: str, tmp_path: Path):
    more = ["--train.deterministic=true", f"--compile={mode}", "--precision=bf16", "--data.document_mask=true"]
    train(tmp_path, "whole", *more, "--train.steps=8")
    for steps in (3, 8):
        train(tmp_path, "parts", *more, f"--train.steps={steps}")
    assert [event["step"] for event in events(tmp_path / "parts", "resume")] == [3]
    assert_same_curves(tmp_path / "whole", tmp_path / "parts")
    assert_same_state(tmp_path / "whole", tmp_path / "parts")


def test_compiled_bf16_follows_the_curve_of_fp32_on_a_cpu(tmp_path: Path):
    more = ["--train.steps=150", "--train.micro_batch=16", "--optim.warmup=20", "--checkpoint.at_end=false"]
    train(tmp_path, "gpu", *more, "--compile=inductor", "--precision=bf16")
    train(tmp_path, "cpu", *more, "--precision=fp32", devices="")
    gpu, cpu = ([m["loss"] for m in metrics(tmp_path / run)] for run in ("gpu", "cpu"))
    assert cpu[0] - cpu[-1] > 1
    apart = [abs(a - b) for a, b in zip(gpu, cpu, strict=True)]
    assert max(apart) < 0.03, apart


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("settings", ["tp2", "tp2 --parallel.async_tp=true", "pp2.1f1b", "pp2.zbv", "cp2.ring", "cp2.ulysses"])
def test_two_gpus_follow_the_curve_of_sharded_data_on_every_axis(settings: str, tmp_path: Path):
    # Four layers, since zbv cuts four stages.
    more = ["--model.layers=4", "--train.steps=6", "--train.micro_batch=2", "--train.global_tokens=1024", "--precision=bf16"]
    for name, layout in (("sharded", "fsdp2"), ("other", settings)):
        train(tmp_path, name, *more, *f"--layout={layout}".split(), "--compile=auto", devices="0,1")
    curves = ([m["loss"] for m in metrics(tmp_path / run)] for run in ("sharded", "other"))
    apart = [abs(a - b) for a, b in zip(*curves, strict=True)]
    assert max(apart) < 0.02, apart


def test_a_run_that_saves_behind_its_steps_saves_what_it_would_in_front(tmp_path: Path):
    more = ["--train.deterministic=true", "--compile=none", "--precision=bf16", "--train.steps=6", "--checkpoint.every=2"]
    for mode in ("sync", "async"):
        train(tmp_path, mode, *more, f"--checkpoint.mode={mode}", "--checkpoint.keep_last=9")
    assert_same_curves(tmp_path / "sync", tmp_path / "async")
    for step in (2, 4, 6):
        front, back = (open_checkpoint(tmp_path / mode / "checkpoints" / f"step-{step}") for mode in ("sync", "async"))
        assert front.manifest.tensors == back.manifest.tensors
        shards = {piece.file for tensor in front.tensors.values() for piece in tensor.pieces}
        assert {name: front.manifest.files[name] for name in shards} == {name: back.manifest.files[name] for name in shards}
    assert [event["step"] for event in events(tmp_path / "async", "checkpoint") if event["reason"] == "saving"] == [2, 4]
    assert not events(tmp_path / "async", "warning")
