"""A pipeline gives the gradients of running its stages one after another in one process."""

import pytest
import torch
import torch.distributed as dist
from torch import nn

from paraxis.base.axes import Degrees
from paraxis.base.dtypes import PRECISIONS
from paraxis.base.schedules import Plan, build_schedule
from paraxis.base.seams import Batch
from paraxis.parallel.fsdp import PipelineReduction, shard_parameters
from paraxis.parallel.mesh import Mesh, build_mesh
from paraxis.parallel.pipeline import Pipeline, build_lines
from tests.measure import this_world
from tests.worlds import run_world

WIDTH, ROWS, LENGTH = 6, 2, 3


class Stage(nn.Module):
    """Mixes positions and features; the first makes activations of tokens, the last a loss of targets."""

    def __init__(self, number: int, stages: int) -> None:
        super().__init__()
        torch.manual_seed(number)
        self.first, self.last = number == 0, number == stages - 1
        self.table = nn.Parameter(torch.randn(11, WIDTH, dtype=torch.float64)) if self.first else None
        self.inner, self.outer = (nn.Linear(WIDTH, WIDTH, dtype=torch.float64) for _ in range(2))
        self.gain = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))

    def forward(self, batch: Batch, x: torch.Tensor | None = None) -> torch.Tensor:
        if self.table is not None:
            x = self.table[batch.tokens_bt]
        assert x is not None
        x = self.outer(torch.tanh(self.inner(x * self.gain))) + x
        return (x[..., 0] - batch.targets_bt).square().sum() if self.last else x


def batch(number: int) -> Batch:
    drawn = torch.Generator().manual_seed(100 + number)
    tokens, targets = (torch.randint(0, 11, (ROWS, LENGTH), generator=drawn) for _ in range(2))
    return Batch(tokens, targets, torch.zeros_like(tokens))


def in_one_process(stages: int, micro_batches: int) -> tuple[float, dict[str, torch.Tensor]]:
    modules = [Stage(number, stages) for number in range(stages)]
    total = 0.0
    for number in range(micro_batches):
        x = None
        for module in modules:
            x = module(batch(number), x)
        loss = x * 0.1
        loss.backward()
        total += loss.item()
    return total, gradients(dict(enumerate(modules)))


def gradients(modules: dict[int, nn.Module]) -> dict[str, torch.Tensor]:
    return {f"{number}.{name}": p.grad for number, module in modules.items() for name, p in module.named_parameters()}


class Noted:
    """Notes when each stage's gradients were said to be complete, and that nothing was added to them after."""

    def __init__(self, numbers: dict[nn.Module, int]) -> None:
        self.numbers, self.complete = numbers, []

    def before_backward(self, module: nn.Module, last: bool) -> None:
        assert self.numbers[module] not in self.complete
        if last:
            self.complete.append(self.numbers[module])

    def gradients_added(self, module: nn.Module) -> None:
        assert self.numbers[module] not in self.complete

    def gradients_complete(self, module: nn.Module) -> None:
        assert self.numbers[module] not in self.complete
        self.complete.append(self.numbers[module])


def mesh_of(degrees: Degrees) -> Mesh:
    return build_mesh(this_world(), degrees)


def pipelined(name: str, plan: Plan) -> tuple[float, dict[str, torch.Tensor], list[int]]:
    schedule = build_schedule(name, plan)
    rank = dist.get_rank()
    lines = build_lines(mesh_of(Degrees(pp=plan.ranks)), schedule, ends_talk=False)
    modules = {stage: Stage(stage, schedule.stages) for stage, holder in enumerate(schedule.rank_of) if holder == rank}
    numbers = {module: stage for stage, module in modules.items()}
    pipeline = Pipeline(modules, schedule, lines, torch.device("cpu"))
    for _ in range(2):  # a second step finds everything as the first did
        for module in modules.values():
            module.zero_grad()
        noted = Noted(numbers)
        loss = pipeline.forward_backward(
            [batch(number) for number in range(plan.micro_batches)],
            torch.tensor(0.1, dtype=torch.float64),
            noted,
        )
    return loss.item(), gradients(modules), noted.complete


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("gpipe", Plan(2, 3, 1)),
        ("1f1b", Plan(2, 5, 1)),
        ("1f1b", Plan(4, 6, 1)),
        ("interleaved", Plan(2, 4, 2)),
        ("interleaved", Plan(4, 8, 2)),
        ("bfs", Plan(2, 3, 3)),
        ("1f1b", Plan(1, 3, 1)),
        ("zbh1", Plan(2, 4, 1)),
        ("zbh1", Plan(4, 6, 1)),
        ("zbv", Plan(2, 5, 2)),
        ("zbv", Plan(4, 8, 2)),
        ("dualpipev", Plan(2, 4, 2)),
        ("dualpipev", Plan(4, 9, 2)),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{value.ranks}_ranks_{value.stages_a_rank}_stages",
)
def test_a_pipeline_gives_the_loss_and_gradients_of_one_process(name, plan):
    results = run_world(pipelined, plan.ranks, name, plan)
    loss, expected = in_one_process(plan.ranks * plan.stages_a_rank, plan.micro_batches)
    assert sum(result[0] for result in results) == pytest.approx(loss, rel=1e-12)
    found = {key: grad for result in results for key, grad in result[1].items()}
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(("name", "plan"), [("interleaved", Plan(2, 4, 2)), ("zbv", Plan(2, 4, 2)), ("dualpipev", Plan(2, 4, 2))])
def test_every_stage_s_gradients_are_said_to_be_complete_once_and_at_the_end(name, plan):
    results = run_world(pipelined, 2, name, plan)
    assert sorted(stage for result in results for stage in result[2]) == [0, 1, 2, 3]


def sharded(name: str, plan: Plan) -> dict[str, torch.Tensor]:
    """The gradients of a pipeline whose stages are sharded two ways; the two shards read different micro-batches."""
    mesh = mesh_of(Degrees(pp=plan.ranks, fsdp=2))
    schedule = build_schedule(name, plan)
    lines = build_lines(mesh, schedule, ends_talk=False)
    modules = {stage: Stage(stage, schedule.stages) for stage, holder in enumerate(schedule.rank_of) if holder == mesh.at["pp"]}
    for module in modules.values():
        shard_parameters(module, [], [], mesh, PRECISIONS["fp64"], {}, True, False)
    pipeline = Pipeline(modules, schedule, lines, torch.device("cpu"))
    own = [batch(2 * number + mesh.at["fsdp"]) for number in range(plan.micro_batches)]
    for _ in range(2):
        for module in modules.values():
            module.zero_grad()
        pipeline.forward_backward(own, torch.tensor(0.1, dtype=torch.float64), PipelineReduction())
    return {name: grad.full_tensor() for name, grad in gradients(modules).items()}


@pytest.mark.parametrize(
    ("name", "plan"), [("1f1b", Plan(2, 4, 1)), ("interleaved", Plan(2, 4, 2)), ("zbh1", Plan(2, 4, 1)), ("zbv", Plan(2, 4, 2))]
)
def test_a_sharded_pipeline_sums_every_gradient_once(name, plan):
    results = run_world(sharded, 2 * plan.ranks, name, plan)
    _, expected = in_one_process(plan.ranks * plan.stages_a_rank, 2 * plan.micro_batches)
    found = {key: grad for result in results for key, grad in result.items()}
    assert found.keys() == expected.keys()
    for key, grad in expected.items():
        torch.testing.assert_close(found[key], grad, rtol=1e-10, atol=1e-12)
