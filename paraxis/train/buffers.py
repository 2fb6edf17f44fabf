"""A model's persistent buffers on this rank: whole on every rank that has them, and the same there, or the run is refused."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn

from paraxis.base.layout import place
from paraxis.base.seams import Staged
from paraxis.models.buffers import buffer_names, fill_buffers, first_buffers, persistent_buffers
from paraxis.parallel.mesh import Mesh
from paraxis.train.config import RunConfig
from paraxis.train.stages import Stages


@dataclass(frozen=True)
class Buffer:
    """A buffer that is part of the state: `copies` are those of this rank's stages, the first of which is saved.

    `replica` of `replicas` numbers the ranks that have it, in all stages.
    """

    name: str
    copies: Sequence[Tensor]
    replica: int
    replicas: int


def make_buffers(config: RunConfig, mesh: Mesh, stages: Stages | None, whole: nn.Module, models: Mapping[int, nn.Module]) -> list[Buffer]:
    """Gives this rank's `models` (by stage) the first values of their buffers, and returns those that are saved.

    `whole` is the model on the meta device. Raises ConfigError for a buffer without a value of its own.
    """
    if not buffer_names(whole):
        return []
    first = first_buffers(config.model.build, config.train.seed)
    for model in models.values():
        fill_buffers(model, first)
    here = {stage: dict(model.named_buffers(remove_duplicate=False)) for stage, model in models.items()}
    ranks_of = _pipeline_ranks(config, stages, whole)
    held = []
    for name, ranks in ranks_of.items():
        if mesh.at["pp"] not in ranks:
            continue
        where = place(name, tuple(first[name].shape), {}, mesh.degrees, mesh.at, frozen=True)
        copies = [buffers[name] for buffers in here.values() if name in buffers]
        held.append(Buffer(name, copies, ranks.index(mesh.at["pp"]) * where.replicas + where.replica, len(ranks) * where.replicas))
    return held


def _pipeline_ranks(config: RunConfig, stages: Stages | None, whole: nn.Module) -> dict[str, list[int]]:
    """By persistent buffer, the ranks along `pp` whose stages have it."""
    if stages is None:
        return {name: [0] for name in persistent_buffers(whole)}
    found: dict[str, set[int]] = {}
    for stage, layers in enumerate(stages.layers):
        with torch.device("meta"):
            model = config.model.build()
        assert isinstance(model, Staged)
        model.keep(layers)
        for name in persistent_buffers(cast(nn.Module, model)):
            found.setdefault(name, set()).add(stages.schedule.rank_of[stage])
    return {name: sorted(ranks) for name, ranks in found.items()}


def digests(buffers: Sequence[Buffer]) -> dict[str, list[str]]:
    """By buffer, the SHA-256 of each copy on this rank."""
    return {buffer.name: [_digest(copy) for copy in buffer.copies] for buffer in buffers}


def _digest(tensor: Tensor) -> str:
    return hashlib.sha256(tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8).numpy().data).hexdigest()
