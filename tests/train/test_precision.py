"""bf16 means the same on every layout: products in bf16, gradients summed in fp32, weights and optimizer state kept in fp32."""

from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paraxis.base.errors import ConfigError
from paraxis.optim.config import OptimConfig
from paraxis.parallel.grads import sum_copies
from paraxis.recipes import RECIPES
from paraxis.train.config import RunConfig
from paraxis.train.step import count_targets, train_step
from tests.measure import MadeRows, run_of, with_layout

LAYOUTS = ("", "tp2", "fsdp2", "dp2", "fsdp2xtp2")
COVERING = ("", "tp2", "fsdp2xtp2")
layouts = pytest.mark.parametrize(
    "layout",
    [name if name in COVERING else pytest.param(name, marks=pytest.mark.full) for name in LAYOUTS],
    ids=lambda name: name or "one process",
)

PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_dot_product")
REDUCTIONS = ("reduce_scatter", "_reduce_scatter", "allreduce_", "all_reduce")
GATHERS = ("allgather", "_allgather", "all_gather")

Seen = Counter[tuple[str, str, tuple[torch.dtype, ...]]]
World = Callable[..., list[Any]]


def tiny(layout: str, precision: str = "bf16", micro_batches: int = 2) -> tuple[RunConfig, MadeRows]:
    """A run of four rows a step on `layout`, at least two of them one after another on each data rank."""
    config = RECIPES["debug"]()
    config = replace(
        config,
        model=replace(config.model, vocab_size=96, width=32, layers=2, mlp_width=64),
        data=replace(config.data, seq_len=16),
        train=replace(config.train, micro_batch=1, global_tokens=16 * micro_batches * 2),
        precision=precision,
    )
    return with_layout(config, layout), MadeRows(96, 16)


class Watch(TorchDispatchMode):
    """Notes, for every operator that is called, the floating dtypes that go into it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: Seen = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.is_floating_point()]
        # The first four: what attention's backward takes beyond them is its softmax's statistic, kept in fp32.
        dtypes = tuple({x.dtype: None for x in tensors[:4]})
        if dtypes:
            self.seen[func.namespace, func._schema.name.partition("::")[2], dtypes] += 1
        return func(*args, **(kwargs or {}))


def watched_step(config: RunConfig, rows: MadeRows) -> tuple[Seen, set[torch.dtype], set[torch.dtype]]:
    """What one step calls, and the dtypes of the weights and of the optimizer's state after it."""
    run = run_of(config, rows)
    loader = run.loader()
    try:
        with Watch() as watch:
            train_step(run, next(loader), lr=1e-3)
    finally:
        loader.close()
    weights = {shard.local.dtype for shard in run.shards}
    state = {tensor.dtype for tensors in run.optimizer.state().values() for tensor in tensors.values()}
    return watch.seen, weights, state


def called(seen: Seen, names: tuple[str, ...], *, collective: bool) -> dict[tuple[str, tuple[torch.dtype, ...]], int]:
    """The operators whose names begin so, with the dtypes of their inputs."""
    return {
        (name, dtypes): count
        for (namespace, name, dtypes), count in seen.items()
        if name.startswith(names) and namespace.startswith(("c10d", "_c10d")) == collective
    }


@layouts
@pytest.mark.parametrize(("precision", "compute"), [("bf16", torch.bfloat16), ("fp32", torch.float32), ("fp64", torch.float64)])
def test_every_matrix_product_of_a_step_is_in_the_compute_dtype(layout: str, precision: str, compute: torch.dtype, world: World):
    config, rows = tiny(layout, precision)
    for seen, _, _ in world(config.parallel.degrees.ranks, watched_step, config, rows):
        products = called(seen, PRODUCTS, collective=False)
        assert {dtypes for _, dtypes in products} == {(compute,)}, products
        # Two micro-batches, two layers: seven linear layers and attention each forward, twice as many products backward; the head.
        assert sum(products.values()) >= 2 * (2 * (7 * 3 + 2) + 3), products


@layouts
@pytest.mark.parametrize(
    ("precision", "state", "stored", "kept"),
    [
        ("bf16", "as_weights", torch.float32, torch.float32),
        ("bf16", "bf16", torch.float32, torch.bfloat16),
        ("bf16_weights", "as_weights", torch.bfloat16, torch.bfloat16),
    ],
    ids=["bf16", "bf16 state", "bf16 weights"],
)
def test_weights_and_optimizer_state_are_stored_as_the_precision_says(
    layout: str, precision: str, state: Any, stored: torch.dtype, kept: torch.dtype, world: World
):
    config, rows = tiny(layout, precision)
    config = replace(config, optim=replace(config.optim, state=state))
    for _, weights, states in world(config.parallel.degrees.ranks, watched_step, config, rows):
        assert weights == {stored}
        assert states == {kept}


def test_gradients_cross_data_ranks_in_fp32_and_parameters_in_bf16(world: World):
    config, rows = tiny("fsdp2")
    for seen, _, _ in world(2, watched_step, config, rows):
        scattered = called(seen, ("_reduce_scatter", "reduce_scatter"), collective=True)
        assert {dtypes for _, dtypes in scattered} == {(torch.float32,)}, scattered
        gathered = called(seen, GATHERS, collective=True)
        assert (torch.bfloat16,) in {dtypes for _, dtypes in gathered}, gathered


def test_replicas_sum_gradients_in_fp32(world: World):
    config, rows = tiny("dp2")
    for seen, _, _ in world(2, watched_step, config, rows):
        summed = called(seen, REDUCTIONS, collective=True)
        assert summed
        assert all(torch.bfloat16 not in dtypes for _, dtypes in summed), summed


def test_tensor_parallel_activations_cross_ranks_in_bf16(world: World):
    """Of the collectives along the sequence none is in fp32: those are summed statistics of the loss, and gradients, alone."""
    config, rows = tiny("tp2")
    for seen, _, _ in world(2, watched_step, config, rows):
        gathered = called(seen, ("all_gather",), collective=True)
        scattered = called(seen, ("reduce_scatter",), collective=True)
        assert {dtypes for _, dtypes in {**gathered, **scattered}} == {(torch.bfloat16,)}, (gathered, scattered)
        # A micro-batch gathers before attention and MLP of both layers and before the head, and again backward.
        assert sum(gathered.values()) >= 2 * 2 * 5
        assert sum(scattered.values()) >= 2 * 2 * 5


def accumulated_and_summed(config: RunConfig, rows: MadeRows) -> list[tuple[str, Tensor, Tensor]]:
    """Each gradient of a step's micro-batches at once, and the sum in fp32 of theirs one by one."""
    run = run_of(config, rows)
    loader = run.loader()
    try:
        batches = next(loader)
    finally:
        loader.close()
    scale = count_targets(batches, run.mesh).double().reciprocal()

    def gradients(some: list[Any]) -> list[Tensor]:
        run.passes.forward_backward(some, scale)
        for shard in run.shards:
            shard.take_gradient()
        sum_copies(run.shards, run.mesh)
        taken = [shard.local.grad.clone() for shard in run.shards if shard.local.grad is not None]
        for shard in run.shards:
            shard.drop_gradient()
        return taken

    whole = gradients(batches)
    parts = [gradients([batch]) for batch in batches]
    return [(shard.placed.name, a, torch.stack(b).sum(0)) for shard, a, b in zip(run.shards, whole, zip(*parts, strict=True), strict=True)]


@layouts
@pytest.mark.parametrize("reduce", ["step", "micro_batch"])
def test_gradients_of_micro_batches_add_up_in_fp32(layout: str, reduce: str, world: World):
    config, rows = tiny(layout, micro_batches=4)
    config = replace(config, parallel=replace(config.parallel, reduce=reduce))
    for gradients in world(config.parallel.degrees.ranks, accumulated_and_summed, config, rows):
        for name, accumulated, summed in gradients:
            if not summed.numel():
                continue
            assert accumulated.dtype == torch.float32
            difference = float((accumulated - summed).abs().max() / summed.abs().max())
            assert difference < 1e-5, f"{name}: {difference:g}, where bf16 would give about 1e-3"


@pytest.mark.parametrize("layout", ["", "fsdp2"])
@pytest.mark.parametrize(("precision", "dtype"), [("bf16", torch.float32), ("bf16_weights", torch.bfloat16)])
def test_gradients_are_kept_in_the_dtype_of_weights(layout: str, precision: str, dtype: torch.dtype, world: World):
    config, rows = tiny(layout, precision)
    for gradients in world(config.parallel.degrees.ranks, accumulated_and_summed, config, rows):
        assert {accumulated.dtype for _, accumulated, _ in gradients} == {dtype}


def test_what_cannot_be_stored_in_bf16_is_refused():
    config, _ = tiny("")
    with pytest.raises(ConfigError, match=r"precision=bf16_weights keeps weights in bf16.*use adamw"):
        replace(config, precision="bf16_weights", optim=OptimConfig(name="sgd"))
    with pytest.raises(ConfigError, match=r"optim.state=bf16 has AdamW computed in fp32.*use optim.state=as_weights"):
        replace(config, precision="fp64", optim=OptimConfig(state="bf16"))
    with pytest.raises(ConfigError, match=r"optim.state=bf16 is read by optim.name=adamw only"):
        OptimConfig(name="sgd", state="bf16")
