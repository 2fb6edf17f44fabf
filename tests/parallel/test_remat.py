"""What blocks keep for backward: whatever is chosen, the gradients are the same, and what is kept is what the table says."""

import gc
import shutil
import weakref
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import min_cut_rematerialization_partition, nop
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paraxis.base.dtypes import PRECISIONS, Float8Config, low_precision
from paraxis.base.seams import Batch, routed_layers
from paraxis.base.strategy import RematConfig
from paraxis.models.llama import LlamaConfig
from paraxis.ops.rope import rope_tables
from paraxis.parallel.apply import compile_blocks
from paraxis.parallel.knapsack import BlockTable, Choice, choices, fill
from paraxis.parallel.lowp import convert_linears
from paraxis.parallel.remat import Kept, checkpoint_blocks, kept_by
from paraxis.parallel.tabulate import Setting, rates, tabulate

ROWS, LENGTH, WIDTH, VOCAB = 2, 16, 32, 64
DENSE = LlamaConfig(vocab_size=VOCAB, width=WIDTH, layers=2, heads=4, kv_heads=2, mlp_width=48)


def batch() -> Batch:
    tokens = torch.randint(VOCAB, (ROWS, LENGTH + 1), generator=torch.Generator().manual_seed(1))
    return Batch(tokens[:, :-1], tokens[:, 1:], torch.arange(LENGTH).expand(ROWS, -1))


def tables_of(config: Any, *, fused: bool) -> list[BlockTable]:
    with torch.device("meta"):
        model = config.build()
    setting = Setting(torch.device("cpu"), torch.float64, (ROWS, LENGTH, WIDTH), rates(1e12), fused, opaque=False, spread=False)
    return tabulate(model, batch(), setting, first=True)


def model_keeping(config: Any, kept: Kept, backend: str = "none") -> nn.Module:
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = config.build().to(torch.float64)
    checkpoint_blocks(model.blocks(), [kept] * len(model.blocks()), lambda block: backend != "none")
    compile_blocks(model.blocks(), backend, whole=True)
    for layer in routed_layers(model).values():
        layer.begin_step(torch.ones(()) / ROWS)
    return model


def gradients(model: nn.Module) -> list[Tensor]:
    model(batch()).backward()
    return [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


class Alive(TorchDispatchMode):
    """The memory that was made while this was active, and is still held."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[int, weakref.ref[Any]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, Tensor):
                storage = x.untyped_storage()
                self.found[storage._cdata] = weakref.ref(storage)
        return out

    def bytes(self, besides: Iterable[Tensor]) -> int:
        """How many bytes are held in all, but for those of the tensors `besides`."""
        gc.collect()
        others = {x.untyped_storage()._cdata for x in besides}
        held = {number: storage.nbytes() for number, ref in self.found.items() if (storage := ref()) is not None}
        return sum(size for number, size in held.items() if number not in others)


def kept_bytes(model: nn.Module, compiled: bool, dtype: torch.dtype = torch.float64, width: int = WIDTH) -> int:
    """What the first block holds between its forward and its backward, its input counted."""
    x = torch.randn(ROWS, LENGTH, width, dtype=dtype, requires_grad=True)
    tables = rope_tables(batch().positions_bt, model.rope, model.rope_width, dtype=dtype)
    shared, packed = [*model.parameters(), *tables], {}

    def pack(saved: Tensor) -> Tensor:
        packed[saved.untyped_storage()._cdata] = saved
        return saved

    if not compiled:
        with Alive() as alive:
            out = model.blocks()[0](x, *tables, None)
        return alive.bytes(besides=[*shared, x, out]) + x.untyped_storage().nbytes()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda saved: saved):
        model.blocks()[0](x, *tables, None)
    own = {x.untyped_storage()._cdata for x in shared}
    # A compiled block on a CPU saves its random state too, in bytes.
    return sum(x.untyped_storage().nbytes() for n, x in packed.items() if n not in own and x.dtype != torch.uint8)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch compiles for a CPU with g++")
def test_a_compiled_block_is_found_in_torchs_cache_again_by_what_it_keeps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    found = []
    for kept in ("costly", "costly", (), (("mm", 0),), (("mm", 0),)):
        counters.clear()
        model = model_keeping(DENSE, kept, "inductor").to(torch.float32)
        tables = rope_tables(batch().positions_bt, model.rope, model.rope_width, dtype=torch.float32)
        model.blocks()[0](torch.ones(ROWS, LENGTH, WIDTH, requires_grad=True), *tables, None).sum().backward()
        found.append((counters["aot_autograd"]["autograd_cache_hit"], counters["aot_autograd"]["autograd_cache_miss"]))
    assert found == [(0, 1), (1, 0), (0, 1), (0, 1), (1, 0)]


def some(found: Sequence[Choice]) -> list[Choice]:
    """The first, the last but one, which keeps all that is costly, and two between."""
    return [found[0], found[len(found) // 3], found[2 * len(found) // 3], found[-2]]


@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_a_block_keeps_the_bytes_that_its_table_says(backend: str):
    compiled = backend != "none"
    [table, same] = tables_of(DENSE, fused=compiled)
    assert table is same, "blocks of one kind share a table"
    found = choices(table)
    assert len(found) > 10
    for choice in some(found):
        assert kept_bytes(model_keeping(DENSE, choice.kept, backend), compiled) == choice.bytes, choice
    if not compiled:
        assert kept_bytes(model_keeping(DENSE, None), compiled) == table.whole_bytes == found[-1].bytes


@pytest.mark.parametrize("precision", ["bf16", "float8_tensorwise", "float8_rowwise"])
def test_a_compiled_block_that_keeps_everything_keeps_what_its_table_says(precision: str):
    """Within 1 %: where two things are as good for backward, a compiler may keep the smaller."""
    config, recipe = replace(DENSE, width=64, mlp_width=128), low_precision(PRECISIONS[precision], Float8Config())

    def built(device: str) -> nn.Module:
        with torch.device(device):
            model = config.build().bfloat16()
        if recipe is not None:
            convert_linears(model, model.layout, recipe)
        return model

    setting = Setting(torch.device("cpu"), torch.bfloat16, (ROWS, LENGTH, 64), rates(1e12), fused=True, opaque=False, spread=False)
    table = tabulate(built("meta"), batch(), setting, first=True)[0]
    torch._dynamo.reset()
    model = built("cpu")
    # Inductor's choice of what to keep, without its kernels.
    compile_blocks(model.blocks(), aot_autograd(fw_compiler=nop, partition_fn=min_cut_rematerialization_partition), whole=True)  # type: ignore[arg-type]
    assert kept_bytes(model, True, torch.bfloat16, 64) == pytest.approx(table.whole_bytes, rel=0.01)


@pytest.mark.parametrize("backend", ["none", "aot_eager"])
def test_every_choice_gives_the_gradients_of_keeping_everything(backend: str):
    expected = gradients(model_keeping(DENSE, None))
    for choice in some(choices(tables_of(DENSE, fused=backend != "none")[0])):
        found = gradients(model_keeping(DENSE, choice.kept, backend))
        assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True)), choice


def test_a_product_whose_output_backward_never_reads_is_never_kept():
    for fused in (False, True):
        [table, _] = tables_of(DENSE, fused=fused)
        calls = [operator.call for operator in table.operators]
        assert calls == [*(("aten.mm.default", n) for n in range(3)), ("attention", 0), *(("aten.mm.default", n) for n in range(3, 7))]
        kept = {call for choice in choices(table) for call in choice.kept or ()}
        assert kept == set(calls[:-1])  # the last is the down projection
    assert table.operators[3].needs == {0, 1, 2}  # attention, of queries, keys and values by way of cheap rotations


@pytest.mark.parametrize("share", [0.2, 0.5, 0.8])
def test_what_all_blocks_keep_together_is_what_was_chosen_for_them(share: float):
    config = replace(DENSE, layers=5)
    tables = tables_of(config, fused=False)
    [mix] = fill([(choices(tables[0]), len(tables))], int(share * sum(table.whole_bytes for table in tables))) or []
    model = config.build().to(torch.float64)
    checkpoint_blocks(model.blocks(), [choice.kept for choice in mix.choices], lambda block: False)
    rope = rope_tables(batch().positions_bt, model.rope, model.rope_width, dtype=torch.float64)
    x = first = torch.randn(ROWS, LENGTH, WIDTH, dtype=torch.float64, requires_grad=True)
    with Alive() as alive:
        for block in model.blocks():
            x = block(x, *rope, None)
    held = alive.bytes(besides=[*model.parameters(), *rope, first, x]) + first.untyped_storage().nbytes()
    assert held == mix.bytes <= share * sum(table.whole_bytes for table in tables)


def test_modes_that_say_so_for_all_blocks():
    assert kept_by(RematConfig(), 2) == [None, None]
    assert kept_by(RematConfig(mode="full", every=2), 3) == [(), None, ()]
    assert kept_by(RematConfig(mode="selective"), 1) == ["costly"]
