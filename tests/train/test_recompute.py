"""`remat.mode=budget` and `auto` on whole runs: the numbers of one process, within the memory that was given, or a refusal."""

from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor

from paraxis.base.axes import Degrees
from paraxis.base.device import Device
from paraxis.base.dtypes import PRECISIONS
from paraxis.base.errors import ConfigError
from paraxis.base.replaced import replaced
from paraxis.base.strategy import RematConfig, Strategy
from paraxis.data.config import DataConfig
from paraxis.models.llama import LlamaConfig
from paraxis.models.qwen3 import Qwen3MoEConfig
from paraxis.ops.attention_parts import CpuFlashParts
from paraxis.ops.routing import RoutingConfig
from paraxis.optim.config import OptimConfig
from paraxis.parallel.once import CALL
from paraxis.train import recompute
from paraxis.train.config import RunConfig, TrainConfig
from paraxis.train.recompute import fill_blocks
from paraxis.train.step import train_step
from tests.measure import MadeRows, Measured, measure, run_of, with_layout, worst_difference
from tests.worlds import WorldError, run_world

SEQ_LEN, VOCAB = 32, 64
GIB = 2**30
DENSE = LlamaConfig(vocab_size=VOCAB, width=32, layers=4, heads=4, kv_heads=2, mlp_width=64)
MORE_KEYS = replace(DENSE, kv_heads=4)
BALANCED = RoutingConfig(experts=4, chosen=2, balance_loss=0.1, z_loss=0.1)
EXPERTS = Qwen3MoEConfig(vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=2, head_size=8, mlp_width=16, routing=BALANCED)


def config_of(model: Any, kib: float, compile: str = "none") -> RunConfig:
    return RunConfig(
        model=model,
        data=DataConfig(seq_len=SEQ_LEN),
        train=TrainConfig(global_tokens=4 * SEQ_LEN),
        optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.05),
        precision="fp64",
        compile=compile,  # type: ignore[arg-type]
        remat=RematConfig(mode="budget", budget=kib * 1024 / GIB) if kib else RematConfig(),
    )


@cache
def one_process(model: Any) -> Measured:
    return measure(config=config_of(model, 0), layout="", rows=MadeRows(VOCAB, SEQ_LEN))


# KiB that leave some operators of some blocks to be computed again: a block's input takes 8 KiB a row, all that its backward reads 124.
CASES = [
    ("fsdp2", DENSE, 200, "aot_eager"),
    ("tp2", DENSE, 100, "none"),
    ("pp2", DENSE, 200, "none"),
    ("cp2.ring", DENSE, 120, "none"),
    ("cp2.ring", DENSE, 135, "aot_eager"),  # by its own table the first rank would keep a block more than the second
    ("cp2.ulysses", DENSE, 135, "aot_eager"),  # two blocks keep nothing but their attention
    ("cp2.ulysses", MORE_KEYS, 40, "aot_eager"),  # and here all of them
    ("fsdp2 x ep2", EXPERTS, 150, "none"),
]
MORE = [
    ("", DENSE, 200, "none"),
    ("tp2", DENSE, 100, "aot_eager"),
    ("pp2 x tp2", DENSE, 150, "aot_eager"),
    ("pp2.zbv", DENSE, 400, "none"),
    ("cp2.ulysses", DENSE, 120, "none"),
    ("pp2 x cp2.ring", DENSE, 200, "aot_eager"),
    ("fsdp2 x ep2", EXPERTS, 150, "aot_eager"),
]


@pytest.mark.parametrize(("layout", "model", "kib", "compile"), [*CASES, *(pytest.param(*case, marks=pytest.mark.full) for case in MORE)])
def test_a_budget_changes_no_number_on_any_axis(layout: str, model: Any, kib: float, compile: str):
    config = config_of(model, kib, compile)
    found = measure(config=config, layout=layout, rows=MadeRows(VOCAB, SEQ_LEN))
    expected = one_process(model)
    assert found.losses == pytest.approx(expected.losses, rel=1e-10)
    assert worst_difference(found.grads, expected.grads) < (1e-10, "")
    assert worst_difference(found.weights, expected.weights) < (1e-9, "")


def choices_of(config: RunConfig, layout: str = "", ranks: int = 1) -> list[list[Any]]:
    """What each rank's blocks keep, first stage to last."""

    def rank() -> list[Any]:
        chosen: list[Any] = []

        def note(tables: Any, budget: int) -> Any:
            found = fill_blocks(tables, budget)
            chosen.append((budget, found))
            return found

        with replaced(recompute, "fill_blocks", note):
            run_of(with_layout(config, layout), MadeRows(VOCAB, SEQ_LEN))
        return chosen

    return run_world(rank, ranks)


def test_blocks_keep_what_fits_in_the_budget_and_less_for_more_micro_batches_at_once():
    [[(budget, found)]] = choices_of(config_of(DENSE, 200))
    assert budget == 200 * 1024
    assert sum(choice.bytes for choice in found) <= budget
    assert {choice.kept for choice in found} - {None, ()}, "some operators are kept, and some are not"
    [first], [last] = choices_of(config_of(DENSE, 200), "pp2", ranks=2)
    assert (first[0], last[0]) == (budget // 2, budget)  # 1F1B: the first rank keeps two micro-batches at once, the last one
    assert sum(choice.seconds for choice in first[1]) > sum(choice.seconds for choice in last[1])


def test_ranks_with_unlike_tables_keep_what_the_one_with_least_room_for_them_found():
    config = config_of(DENSE, 135, "aot_eager")

    def rank() -> tuple[list[Any], list[Any]]:
        found: list[Any] = []
        agreed: list[Any] = []
        decide = recompute._Budget.__call__

        def note(tables: Any, budget: int) -> Any:
            found.extend(fill_blocks(tables, budget) or ())
            return found

        def decided(self: Any, model: Any) -> Any:
            agreed.extend(decide(self, model))
            return agreed

        with replaced(recompute, "fill_blocks", note), replaced(recompute._Budget, "__call__", decided):
            run_of(with_layout(config, "cp2.ring"), MadeRows(VOCAB, SEQ_LEN))
        return [choice.kept for choice in found], agreed

    [(first, agreed), (second, too)] = run_world(rank, 2)
    assert (first.count(None), second.count(None)) == (2, 1)
    assert agreed == too == second


def calls_of_attention(config: RunConfig, layout: str) -> tuple[list[Any], int]:
    """What this rank's blocks keep, and how many parts of attention are computed in the forwards of a step."""
    calls: list[None] = []
    decide, forward = recompute._Budget.__call__, CpuFlashParts.forward
    kept: list[Any] = []

    def decided(self: Any, model: Any) -> Any:
        kept.extend(decide(self, model))
        calls.clear()
        return kept

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls.append(None)
        return forward(*args, **kwargs)

    with replaced(recompute._Budget, "__call__", decided), replaced(CpuFlashParts, "forward", counted):
        run = run_of(with_layout(config, layout), MadeRows(VOCAB, SEQ_LEN))
        loader = run.loader()
        train_step(run, [run.take(batch) for batch in next(loader)], lr=0.1)
        loader.close()
    return kept, len(calls)


@pytest.mark.parametrize("layout", ["cp2.ring", "cp2.ulysses"])
def test_compiled_blocks_may_keep_their_attention_across_ranks_and_compute_all_else_again(layout: str):
    parts = 2 if layout == "cp2.ring" else 1
    for kib, computed in ((16, 2), (40, 1)):  # in the first a block has room for its input alone, in the second for its attention too
        for kept, calls in run_world(calls_of_attention, 2, config_of(MORE_KEYS, kib, "aot_eager"), layout):
            assert set(kept) == {((CALL, 0),) if computed == 1 else ()}
            assert calls == 4 * 4 * parts * computed  # four rows, one at a time, through four blocks


def runs_of_pieces(layout: str, model: Any, mode: Any) -> int:
    """How often a piece of a block that was compiled runs in a step, backward included."""
    runs: list[None] = []

    def counted(graph: Any, inputs: Any) -> Any:
        def run(*args: Any) -> Any:
            runs.append(None)
            return graph.forward(*args)

        return run

    torch._dynamo.register_backend(counted, name="counted")
    run = run_of(with_layout(replace(config_of(model, 0, "counted"), remat=RematConfig(mode=mode)), layout), MadeRows(VOCAB, SEQ_LEN))
    loader = run.loader()
    train_step(run, [run.take(batch) for batch in next(loader)], lr=0.1)
    loader.close()
    return len(runs)


@pytest.mark.parametrize(("layout", "model"), [("cp2.ring", DENSE), ("cp2.ulysses", DENSE), ("fsdp2 x ep2", EXPERTS)])
def test_blocks_in_pieces_that_are_computed_again_are_so_by_their_compiled_pieces(layout: str, model: Any):
    once, again = (run_world(runs_of_pieces, 2, layout, model, mode)[0] for mode in ("none", "full"))
    assert again > once > 0  # not all of them twice: what follows the last that backward needs is left out


def kept_by_second_block() -> int:
    """Bytes that a compiled block which recomputes everything keeps on this rank of two with half a tensor each, its input left out."""
    config = replace(config_of(DENSE, 0, "aot_eager"), remat=RematConfig(mode="full"))
    run = run_of(with_layout(config, "tp2"), MadeRows(VOCAB, SEQ_LEN))
    block: Any = run.modules[0].blocks()[1]  # type: ignore[operator]
    forward, saved = block.forward, dict[int, Tensor]()

    def followed(*args: Any) -> Any:
        def pack(x: Tensor) -> Tensor:
            saved[x.untyped_storage()._cdata] = x
            return x

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            out = forward(*args)
        for x in (*args, *run.modules[0].parameters()):
            if isinstance(x, Tensor):
                saved.pop(x.untyped_storage()._cdata, None)
        return out

    block.forward = followed
    loader = run.loader()
    train_step(run, [run.take(batch) for batch in next(loader)], lr=0.1)
    loader.close()
    return sum(x.untyped_storage().nbytes() for x in saved.values() if x.dtype != torch.uint8)  # its random state is bytes


def test_compiled_blocks_that_recompute_everything_keep_nothing_that_ranks_gathered():
    # Gathering is an autograd function, of whose operators torch 2.11's compiler has to be told.
    assert run_world(kept_by_second_block, 2) == [0, 0]


def test_a_budget_below_what_full_recomputation_keeps_is_refused_with_what_it_lacks():
    with pytest.raises(
        WorldError, match=r"GiB is less .* inputs of 4 blocks for 1 micro-batches take 3.052e-05 GiB; give 1.9\d*e-06 GiB more"
    ):
        choices_of(config_of(DENSE, 30))


def test_what_a_budget_cannot_mean_is_refused():
    for settings, why in (
        ({"mode": "full", "budget": 4.0}, "is read by remat.mode=budget, not full"),
        ({"mode": "budget", "budget": 0.0}, "more than 0"),
        ({"mode": "budget", "every": 2}, "remat.every=2 is read by"),
    ):
        with pytest.raises(ConfigError, match=why):
            RematConfig(**settings)  # type: ignore[arg-type]
    with pytest.raises(WorldError, match=r"remat\.budget=auto needs a GPU"):
        choices_of(replace(config_of(DENSE, 0), remat=RematConfig(mode="budget")))
    assert choices_of(replace(config_of(DENSE, 0), remat=RematConfig(mode="auto"))) == [[]]  # on a CPU: everything is kept


@pytest.mark.parametrize(("name", "tflops"), [("bf16", 989.4), ("bf16_weights", 989.4), ("float8_rowwise", 1978.9)])
def test_what_is_computed_again_is_priced_by_the_peak_of_the_precisions_products(name: str, tflops: float):
    gpu = Device("cuda", 0, "NVIDIA H200", 0, (9, 0))
    assert recompute._peak(gpu, Strategy(degrees=Degrees(), precision=PRECISIONS[name])) == pytest.approx(tflops * 1e12)
