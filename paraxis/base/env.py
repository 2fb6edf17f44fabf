"""The only reader of the environment: who started this process, as which rank of how many, and where caches live.

Four ways to be started, told apart in this order:

    local     by `resilience/launch.py` on this machine; ranks meet through a file in a private folder
    torchrun  by torchrun, or anything that sets the same variables
    slurm     by srun with more than one task; an sbatch script or a one-task shell is not a worker
    none      by a person
"""

import ctypes
import os
import re
import sys
import time
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from paraxis.base.errors import ConfigError

STARTED_S = time.perf_counter()  # commands load this file first of all; copies of a process have its clock

_STORE = "PARAXIS_STORE"
_CACHE = "PARAXIS_CACHE"
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"
_ALLOCATOR = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"}
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
_EXPANDABLE = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}
_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True, kw_only=True)
class Environment:
    """What the environment says. Local workers meet through the file `store_path`; others at `master_addr:master_port`."""

    launcher: Literal["none", "local", "torchrun", "slurm"] = "none"
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    store_path: Path | None = None
    master_addr: str = ""
    master_port: int = 0
    cache_dir: Path

    @property
    def is_worker(self) -> bool:
        """Whether a launcher started this process as one of its ranks."""
        return self.launcher != "none"


def read_environment(variables: Mapping[str, str] | None = None) -> Environment:
    """The record of `variables`, by default of this process. Raises ConfigError for a worker's variables that are missing or no numbers."""
    variables = os.environ if variables is None else variables
    cache_dir = _cache_dir(variables)
    if _STORE in variables:
        return replace(_numbered("local", variables, cache_dir), store_path=Path(variables[_STORE]))
    if "RANK" in variables and "WORLD_SIZE" in variables:
        host, port = _text("torchrun", variables, "MASTER_ADDR"), _number("torchrun", variables, "MASTER_PORT")
        return replace(_numbered("torchrun", variables, cache_dir), master_addr=host, master_port=port)
    if _is_srun_task(variables):
        return _slurm(variables, cache_dir)
    return Environment(cache_dir=cache_dir)


def worker_variables(rank: int, ranks: int, store_path: Path) -> dict[str, str]:
    """This process's environment, changed to that of local worker `rank` of `ranks`, which meet through the file `store_path`."""
    variables = {
        **os.environ,
        **dict(zip(_RANKS, map(str, (rank, ranks, rank, ranks)), strict=True)),
        _STORE: str(store_path),
        # One machine needs no other interface, and on this one nobody else can connect.
        "GLOO_SOCKET_IFNAME": _LOOPBACK,
        "NCCL_SOCKET_IFNAME": _LOOPBACK,
    }
    return share_cores(variables, ranks)


def share_cores(variables: dict[str, str], ranks: int) -> dict[str, str]:
    """The same variables, with as many threads for each of `ranks` processes as share out the cores; the person's own number stays."""
    # Without a limit every rank starts a thread on every core.
    return {"OMP_NUM_THREADS": str(max(1, cores() // ranks)), **variables}


def stay_forkable() -> None:
    """Keeps this process free of threads and of CUDA, so that ranks can be forked from it; only before it first imports torch or Arrow."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")  # Arrow's allocator starts one when it is imported
    count_gpus_without_cuda()


def count_gpus_without_cuda() -> None:
    """Has torch count GPUs without initialising CUDA, which no fork survives."""
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"


def become_worker(rank: int, ranks: int, store_path: Path, gpus: bool) -> None:
    """Makes this forked process local worker `rank` of `ranks`, which meet through the file `store_path`; without `gpus` it sees none."""
    os.environ.update(worker_variables(rank, ranks, store_path))
    if not gpus:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""


def worker_threads() -> int:
    """The threads that a local worker computes with on the CPU."""
    return int(os.environ["OMP_NUM_THREADS"])


def allow_deterministic_kernels() -> None:
    """Gives cuBLAS the fixed workspace without which its results vary; only before this process first uses CUDA."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def prefer_expandable_segments() -> None:
    """Lets the CUDA allocator grow its segments, which fragments less; only before this process first uses CUDA."""
    if not _ALLOCATOR & os.environ.keys():
        os.environ.update(_EXPANDABLE)


def keep_attention_kernels() -> None:
    """Has FlashAttention-4 keep on disk what it compiles; only before this process first imports it. What a person says stays."""
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(_cache_dir(os.environ) / "flash-attn-4"))


def keep_freed_memory() -> None:
    """Has this process's malloc keep what is freed for the next step, which the kernel would have to clear first. glibc alone listens.

    Blocks below 32 MiB, the most that it allows: activations and logits of models for CPUs.
    """
    if (mallopt := getattr(ctypes.CDLL(None), "mallopt", None)) is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def tokenise_with(threads: int) -> None:
    """Gives the `tokenizers` library so many threads in this process; only before it first uses them."""
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if threads > 1 else "false"
    os.environ["RAYON_NUM_THREADS"] = str(threads)


@contextmanager
def private_caches(folder: Path) -> Generator[None]:
    """While inside, compiled code and prepared data of this process's children are kept in `folder` instead of the usual places."""
    own = {"TORCHINDUCTOR_CACHE_DIR": str(folder / "inductor"), "TRITON_CACHE_DIR": str(folder / "triton"), _CACHE: str(folder / "paraxis")}
    before = {name: os.environ.get(name) for name in own}
    os.environ.update(own)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def peer_variables(site: Path | None) -> dict[str, str]:
    """This process's environment for another training system, whose modules are looked for in the folder `site` first.

    Its allocator is set as ours is, unless the environment already says how.
    """
    python_path = os.pathsep.join(filter(None, [str(site or ""), os.environ.get("PYTHONPATH", "")]))
    allocator = {} if _ALLOCATOR & os.environ.keys() else _EXPANDABLE
    return {**os.environ, **allocator, "PYTHONUNBUFFERED": "1", **({"PYTHONPATH": python_path} if python_path else {})}


def helper_variables() -> dict[str, str]:
    """This process's environment for a helper of its own: one that finds this very package, and no accelerator."""
    package = str(Path(__file__).parents[2])
    python_path = os.pathsep.join(filter(None, [package, os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": python_path, "CUDA_VISIBLE_DEVICES": ""}


def cores() -> int:
    """How many processor cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cache_dir(variables: Mapping[str, str]) -> Path:
    if own := variables.get(_CACHE):
        return Path(own)
    if shared := variables.get("XDG_CACHE_HOME"):
        return Path(shared) / "paraxis"
    return Path(variables.get("HOME") or os.path.expanduser("~")) / ".cache" / "paraxis"


def _is_srun_task(variables: Mapping[str, str]) -> bool:
    """Whether srun started this as one of several tasks. sbatch sets most of the same variables, but no step."""
    return {"SLURM_PROCID", "SLURM_STEP_ID"} <= variables.keys() and _slurm_tasks(variables) > 1


def _slurm_tasks(variables: Mapping[str, str]) -> int:
    # The job may hold more tasks than this step runs.
    name = "SLURM_STEP_NUM_TASKS" if "SLURM_STEP_NUM_TASKS" in variables else "SLURM_NTASKS"
    return _number("slurm", variables, name) if name in variables else 1


def _slurm(variables: Mapping[str, str], cache_dir: Path) -> Environment:
    hosts = variables.get("SLURM_STEP_NODELIST") or _text("slurm", variables, "SLURM_JOB_NODELIST")
    port = _number("slurm", variables, "MASTER_PORT") if "MASTER_PORT" in variables else _slurm_port(variables)
    return Environment(
        launcher="slurm",
        rank=_number("slurm", variables, "SLURM_PROCID"),
        world_size=_slurm_tasks(variables),
        local_rank=_number("slurm", variables, "SLURM_LOCALID"),
        local_world_size=_slurm_tasks_here(variables),
        master_addr=variables.get("MASTER_ADDR") or first_host(hosts),
        master_port=port,
        cache_dir=cache_dir,
    )


def _slurm_port(variables: Mapping[str, str]) -> int:
    """A port all tasks of this step agree on: below the ephemeral ports, apart for jobs and steps that share a node."""
    return 15_000 + (97 * _number("slurm", variables, "SLURM_JOB_ID") + _number("slurm", variables, "SLURM_STEP_ID")) % 15_000


def _slurm_tasks_here(variables: Mapping[str, str]) -> int:
    """How many tasks run on this node, from a list such as `4(x2),3` in the order of nodes."""
    tasks = variables.get("SLURM_STEP_TASKS_PER_NODE") or variables.get("SLURM_TASKS_PER_NODE")
    if tasks is None:
        return _number("slurm", variables, "SLURM_NTASKS_PER_NODE")
    counts: list[int] = []
    for count, repeats in re.findall(r"(\d+)(?:\(x(\d+)\))?", tasks):
        counts += [int(count)] * int(repeats or 1)
    node = int(variables.get("SLURM_NODEID", 0))
    if node >= len(counts):
        raise ConfigError(f"SLURM_NODEID={node} has no entry in SLURM_TASKS_PER_NODE={tasks}; start the workers with srun")
    return counts[node]


def first_host(hosts: str) -> str:
    """The first name of a Slurm host list: `node003` of `node[003-005,9],other`."""
    first = re.match(r"(?:[^,\[]|\[[^\]]*\])*", hosts)
    assert first is not None  # it matches the empty string
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group())


def _numbered(launcher: Literal["local", "torchrun"], variables: Mapping[str, str], cache_dir: Path) -> Environment:
    """The record of a worker whose place is written in torchrun's variables, which the local launcher sets too."""
    rank, world_size, local_rank, local_world_size = (_number(launcher, variables, name) for name in _RANKS)
    return Environment(
        launcher=launcher,
        rank=rank,
        world_size=world_size,
        local_rank=local_rank,
        local_world_size=local_world_size,
        cache_dir=cache_dir,
    )


def _text(launcher: str, variables: Mapping[str, str], name: str) -> str:
    if not variables.get(name):
        remedy = {"torchrun": "start with torchrun, or unset RANK and WORLD_SIZE to run alone", "slurm": "start the workers with srun"}
        raise ConfigError(f"{name} is not set, but a worker started by {launcher} needs it; {remedy.get(launcher, 'do not set ' + _STORE)}")
    return variables[name]


def _number(launcher: str, variables: Mapping[str, str], name: str) -> int:
    text = _text(launcher, variables, name)
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} is not a whole number; it is set by {launcher}, and has to be one")
    return int(text)
