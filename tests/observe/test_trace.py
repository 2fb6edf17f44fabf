"""Profiles cover exactly the steps asked for, and can be opened. They run in worlds of one: a profiler leaves a thread behind."""

import gzip
import json
import subprocess
import sys
import unittest
from pathlib import Path

import pytest
import torch

from paraxis.base.device import CPU, Device
from paraxis.base.errors import ConfigError
from paraxis.observe.config import ProfileConfig
from paraxis.observe.memory import read_memory
from paraxis.observe.trace import Profile


def run_steps(config: ProfileConfig, folder: Path, first: int, last: int) -> None:
    profile = Profile(config, folder, 0, CPU)
    weight = torch.ones(64, 64, requires_grad=True)
    for step in range(first, last + 1):
        profile.before_step(step)
        (torch.ones(64, 64) @ weight).sum().backward()
        profile.after_step(step)
    profile.close()


def events(path) -> list[dict]:
    with gzip.open(path, "rt") as file:
        return json.load(file)["traceEvents"]


def test_a_window_of_steps_becomes_a_chrome_trace_of_those_steps(world, tmp_path):
    world(1, run_steps, ProfileConfig(steps="2:3"), tmp_path / "trace", 1, 5)
    (path,) = (tmp_path / "trace").iterdir()
    assert path.name == "rank0-steps2-3.json.gz"
    names = [event.get("name") for event in events(path)]
    assert {name for name in names if str(name).startswith("step ")} == {"step 2", "step 3"}
    assert "aten::mm" in names


def test_a_run_that_ends_within_the_window_writes_what_there_is(world, tmp_path):
    world(1, run_steps, ProfileConfig(steps="2:9"), tmp_path, 1, 4)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0-steps2-4.json.gz"]


def test_a_run_resumed_within_the_window_profiles_the_rest_of_it(world, tmp_path):
    world(1, run_steps, ProfileConfig(steps="2:4"), tmp_path, 4, 6)
    assert [path.name for path in tmp_path.iterdir()] == ["rank0-steps4-4.json.gz"]


@pytest.mark.parametrize("config", [ProfileConfig(), ProfileConfig(steps="2:3", ranks=(1,))], ids=["off", "another rank"])
def test_where_nothing_is_profiled_nothing_is_written(world, tmp_path, config):
    world(1, run_steps, config, tmp_path / "trace", 1, 4)
    assert not (tmp_path / "trace").exists()


def test_memory_of_the_window_is_a_curve_of_allocated_bytes(world, tmp_path):
    world(1, run_steps, ProfileConfig(steps="2:2", memory=True), tmp_path, 1, 3)
    curve = [event["args"]["bytes"] for event in events(tmp_path / "rank0-steps2-2-memory.json.gz")]
    assert len(curve) > 3
    assert max(curve) - min(curve) >= 64 * 64 * 4


def what_is_said_when_it_cannot_be_written(folder: Path) -> list[str]:
    with unittest.TestCase().assertLogs(level="WARNING") as said:
        run_steps(ProfileConfig(steps="1:1", memory=True), folder, 1, 2)
    return said.output


def test_a_profile_that_cannot_be_written_does_not_end_the_run(world, tmp_path):
    (tmp_path / "trace").write_text("in the way")
    ((said,),) = world(1, what_is_said_when_it_cannot_be_written, tmp_path / "trace")
    assert "profile of steps 1 to 1 could not be written" in said


@pytest.mark.parametrize("steps", ["10", "12:10", "a:b", "1:2:3", "-1:2"])
def test_steps_that_cannot_be_read_are_refused(steps):
    with pytest.raises(ConfigError, match=r"profile\.steps=.*such as 10:12"):
        ProfileConfig(steps=steps)


def test_memory_without_steps_is_refused():
    with pytest.raises(ConfigError, match=r"profile\.memory=true.*set profile\.steps"):
        ProfileConfig(memory=True)


def test_the_memory_of_a_process_is_between_nothing_and_the_peak():
    used = read_memory(CPU)
    assert 0.01 < used.current_gib <= used.reserved_gib * 1.01


def trace_on_cuda(folder: Path) -> None:
    device = Device("cuda", 0, "", 0)
    torch.cuda.init()
    profile = Profile(ProfileConfig(steps="1:1", memory=True), folder, 0, device)
    profile.before_step(1)
    big = torch.ones(1024, 1024, device=device.torch)
    torch.mm(big, big)
    profile.after_step(1)
    assert any(event.get("cat") == "kernel" for event in events(folder / "rank0-steps1-1.json.gz"))
    assert (folder / "rank0-steps1-1-memory.pickle").stat().st_size > 0
    used = read_memory(device)
    assert 4 / 1024 <= used.current_gib <= used.allocated_gib <= used.reserved_gib


@pytest.mark.gpu
def test_on_cuda_the_trace_has_kernels_and_the_snapshot_is_written(tmp_path):
    code = "import sys; from pathlib import Path; from tests.observe.test_trace import trace_on_cuda; trace_on_cuda(Path(sys.argv[1]))"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=Path(__file__).parents[2], check=True, timeout=300)
