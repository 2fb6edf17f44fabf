"""Collectives along the sequence, as a compiler sees them."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from functorch.compile import make_boxed_func
from torch import Tensor
from torch._dynamo.backends.common import aot_autograd

from paraxis.parallel.collectives import gather_sequence, sum_and_scatter_sequence, sum_summands
from tests.worlds import run_world


def _counted() -> list[tuple[int, int]]:
    """Collectives and waits in the forward and the backward graph of one of each."""
    found: list[tuple[int, int]] = []

    def count(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Any:
        names = [str(node.target) for node in graph.graph.nodes if "_c10d_functional" in str(node.target)]
        waits = sum("wait_tensor" in name for name in names)
        found.append((len(names) - waits, waits))
        return make_boxed_func(graph)

    def passes(x_btm: Tensor) -> Tensor:
        group = dist.group.WORLD
        assert group is not None
        return sum_summands(sum_and_scatter_sequence(gather_sequence(x_btm, group) * 2, group), group)

    x = torch.ones(1, 2, 3, requires_grad=True)
    compiled: Any = torch.compile(passes, backend=aot_autograd(fw_compiler=count, bw_compiler=count), fullgraph=True)
    compiled(x).sum().backward()
    assert x.grad is not None
    return found


def test_a_compiled_collective_is_waited_for_once():
    # What is waited for twice a compiler keeps for backward, needed or not.
    for graphs in run_world(_counted, 2):
        assert graphs == [(3, 3), (3, 3)]
