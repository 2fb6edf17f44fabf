"""How a run becomes a pipeline: the order of work, and which layers each stage has."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import nn

from paraxis.base.axes import Degrees
from paraxis.base.errors import ConfigError
from paraxis.base.partition import cut_stages
from paraxis.base.schedule import Schedule, read_csv
from paraxis.base.schedules import SCHEDULES, Plan, build_schedule
from paraxis.base.seams import Staged
from paraxis.train.config import RunConfig

log = logging.getLogger("paraxis")


@dataclass(frozen=True)
class Stages:
    """A pipeline's order of work, and the layers of each stage."""

    schedule: Schedule
    layers: Sequence[range]


def build_stages(config: RunConfig, degrees: Degrees, model: nn.Module) -> Stages | None:
    """The stages that `config` asks for, of `model` (on the meta device); None without a pipeline.

    Raises ConfigError for what cannot run.
    """
    if degrees.pp == 1:
        return None
    if not isinstance(model, Staged) or not hasattr(model, "blocks"):
        raise ConfigError(
            f"parallel.pp={degrees.pp} cuts a model into stages, but {type(model).__name__} has no keep(layers) and blocks(); "
            "see docs/how-to-add-a-model.md, or use pp=1"
        )
    schedule = build_order(config, degrees)
    costs = layer_costs(config, model)
    cuts = config.parallel.cuts
    if not cuts:
        return Stages(schedule, cut_stages(costs, schedule.stages))
    if len(cuts) != schedule.stages or sum(cuts) != len(costs):
        raise ConfigError(
            f"parallel.cuts={','.join(map(str, cuts))} gives {len(cuts)} stages {sum(cuts)} layers in all; "
            f"{schedule.name} on pp={degrees.pp} has {schedule.stages} stages, and the model {len(costs)} layers"
        )
    firsts = [sum(cuts[:stage]) for stage in range(len(cuts))]
    return Stages(schedule, [range(first, first + layers) for first, layers in zip(firsts, cuts, strict=True)])


def build_order(config: RunConfig, degrees: Degrees) -> Schedule:
    """The pipeline schedule for this run's micro-batches, proved legal."""
    parallel = config.parallel
    micro_batches = config.rows_per_step(degrees) // (degrees.data_ranks * config.train.micro_batch)
    name = "1f1b" if parallel.schedule == "auto" else parallel.schedule
    if name not in SCHEDULES and name.endswith(".csv"):
        schedule = read_csv(Path(name))
        if (schedule.ranks, schedule.micro_batches) != (degrees.pp, micro_batches):
            raise ConfigError(
                f"parallel.schedule={name} is for {schedule.ranks} pipeline ranks and {schedule.micro_batches} micro-batches; this run has "
                f"parallel.pp={degrees.pp} and {micro_batches}"
            )
    else:
        usual = SCHEDULES[name].stages_a_rank or 2 if name in SCHEDULES else 1
        schedule = build_schedule(name, Plan(degrees.pp, micro_batches, parallel.stages_a_rank or usual))
    if schedule.splits_backward and config.compile not in ("auto", "none"):
        raise ConfigError(
            f"compile={config.compile} cannot split a backward in two, which parallel.schedule={name} does; "
            "use compile=none (auto chooses it), or a schedule with whole backwards: 1f1b, interleaved, gpipe, bfs"
        )
    if schedule.splits_backward and parallel.reduce == "micro_batch":
        raise ConfigError(
            f"parallel.reduce=micro_batch sums a stage's gradients after each backward, which parallel.schedule={name} splits in two; "
            "use parallel.reduce=step (auto chooses it), or a schedule with whole backwards: 1f1b, interleaved, gpipe, bfs"
        )
    return schedule


def layer_costs(config: RunConfig, model: nn.Module) -> list[float]:
    """Relative time of each block, the head counted with the last: by matrix entries, or by operations where the configuration knows.

    With operations, which count attention and only the experts that a token is sent to, blocks share equally what is not the head's.
    """
    blocks: list[nn.Module] = list(model.blocks())  # type: ignore[operator]
    operations = getattr(config.model, "flops_per_token", None)
    width = getattr(config.model, "width", None)
    if operations is not None and width is not None:
        head = 6.0 * config.model.vocab_size * width
        costs = [(operations(config.data.seq_len) - head) / len(blocks)] * len(blocks)
    else:
        costs = [float(matrix_entries(block)) for block in blocks]
        head = (matrix_entries(model) - sum(costs)) / 2  # the other half is an embedding, which is looked up, not multiplied
    return [*costs[:-1], costs[-1] + head]


def matrix_entries(module: nn.Module) -> int:
    """Entries of a module's matrices, which is what its time is spent on."""
    return sum(parameter.numel() for parameter in module.parameters() if parameter.dim() > 1)
