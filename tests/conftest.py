"""Fixtures and options every test shares. Ranks are forked from this process, so it must stay free of CUDA, and of threads that do
anything.

A CUDA build of torch starts threads for the GPUs it sees as soon as it runs a backward, and then cannot fork. So GPUs are hidden,
except where GPU tests alone are asked for: `pytest -m gpu`.
"""

import os
import sys

# Before torch is imported: one thread a rank (the machine is shared), no pools of helpers that a forked rank would inherit,
# and a way to ask for GPUs that does not initialise CUDA.
os.environ.update(
    OMP_NUM_THREADS="1",
    TOKENIZERS_PARALLELISM="false",
    JE_ARROW_MALLOC_CONF="background_thread:false",  # Arrow's allocator starts one when it is imported
    HF_HUB_DISABLE_PROGRESS_BARS="1",  # each of transformers' is watched by a thread
    TORCHINDUCTOR_COMPILE_THREADS="1",
    PYTORCH_NVML_BASED_CUDA_CHECK="1",
)

if "gpu" not in sys.argv:  # of `-m gpu`
    os.environ["CUDA_VISIBLE_DEVICES"] = ""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tqdm import tqdm

from tests.record import Recorder
from tests.worlds import run_world, warm_up

torch.set_num_threads(1)
tqdm.monitor_interval = 0  # the thread that watches datasets' bars would stay, and tests fork


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--record", type=Path, metavar="FOLDER", help="write counts, commit, duration and versions to a file in FOLDER")


def pytest_configure(config: pytest.Config) -> None:
    if (folder := config.getoption("--record")) and not hasattr(config, "workerinput"):  # of many processes the first counts for all
        config.pluginmanager.register(Recorder(folder))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(scope="session")
def world() -> Callable[..., list[Any]]:
    """`world(2, fn, *args, timeout=60)`: the results of `fn(*args)` on two fresh gloo ranks. See `tests/worlds.py`."""
    warm_up()

    def start(ranks: int, fn: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        return run_world(fn, ranks, *args, timeout=timeout)

    return start
