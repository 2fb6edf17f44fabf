"""What a run holds that no checkpoint would, refused before it trains, or after its first step where that is when it shows."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from paraxis.base.errors import ConfigError, TrainingError
from paraxis.models.buffers import persistent_buffers
from paraxis.train.buffers import digests
from paraxis.train.run import Run

log = logging.getLogger("paraxis")

# Fields of a run that have a state of their own, and which entry of train/state.py:STATE saves it.
SAVED_BY = {"modules": "weights, buffers", "shards": "weights", "buffers": "buffers", "optimizer": "optimizer", "rows": "data"}


def refuse_unsaved(run: Run) -> None:
    """Raises ConfigError where something that `run` trains with has a state that is not saved."""
    covered = {shard.placed.name for shard in run.shards} | {buffer.name for buffer in run.buffers}
    for module in run.modules:
        named = [*module.named_parameters(remove_duplicate=False), *persistent_buffers(module).items()]
        twins = {id(parameter) for name, parameter in module.named_parameters() if name in covered}
        if missing := [name for name, tensor in named if name not in covered and id(tensor) not in twins]:
            raise ConfigError(f"no checkpoint would hold {missing[0]} of {type(module).__name__}; register it in __init__")
    for field in fields(run):
        value = getattr(run, field.name)
        if field.name not in SAVED_BY and _has_state(value):
            raise ConfigError(f"run.{field.name} ({type(value).__name__}) has a state, but train/state.py:STATE has no entry that saves it")
    for field, rows in (("data", run.rows), ("held-out data", run.held_out)):
        if _has_state(rows):
            raise ConfigError(
                f"the {field} ({type(rows).__name__}) has a state_dict, which nobody saves: rows are a pure function of their index "
                "(base/seams.py:Rows), so that position is one number; compute row(index) from its index, and leave state_dict out"
            )


def _has_state(value: Any) -> bool:
    return callable(getattr(value, "state_dict", None)) or callable(getattr(value, "load_state_dict", None))


class FirstStep:
    """Looks at what a run's first step has changed beside what the optimizer steps. Made before it; every rank calls `refuse` after it."""

    def __init__(self, run: Run) -> None:
        self._run, self._before = run, _generators(run)

    def refuse(self) -> None:
        """Raises TrainingError on every rank where ranks have come to differ, or draw at random, in ways that no checkpoint could hold."""
        run = self._run
        if run.world.size == 1:
            return  # whatever it has drawn and counted is saved
        cpu, *gpu = (not torch.equal(a, b) for a, b in zip(self._before, _generators(run), strict=True))
        # Compilers for GPUs draw numbers to time kernels with; and what models draw on a GPU is drawn from the GPU's own generator.
        cpu = cpu and not (run.world.device.is_cuda and run.strategy.compile == "inductor")
        if any(gpu):  # not refused: a kernel may move the generator on without using what it drew
            log.warning(
                "the device's random generator has moved in the first step; random numbers of the model's would differ between layouts"
            )
        said = run.world.gather_json({"drew": cpu, "buffers": digests(run.buffers)})
        if problem := run.world.broadcast_json(_problem(said) if said is not None else None):
            raise TrainingError(problem)


def _problem(said: Sequence[Mapping[str, Any]]) -> str | None:
    """What the ranks' words after the first step add up to."""
    drew = [rank for rank, one in enumerate(said) if one["drew"]]
    if drew:
        return (
            f"the model drew random numbers in the first step (rank {drew[0]}): they differ between layouts and no checkpoint holds "
            "every rank's generator; take the randomness out, or train on one rank"
        )
    first: dict[str, tuple[int, str]] = {}
    for rank, one in enumerate(said):
        for name, copies in one["buffers"].items():
            for digest in copies:
                there, other = first.setdefault(name, (rank, digest))
                if digest != other:
                    return (
                        f"buffer {name} differs between ranks {there} and {rank} after the first step, but a checkpoint holds one value; "
                        "update it alike on every rank (all-reduce what it counts), register it with persistent=False, or train on one rank"
                    )
    return None


def _generators(run: Run) -> list[Tensor]:
    """The state of torch's generators."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state()] if run.world.device.is_cuda else [])]
