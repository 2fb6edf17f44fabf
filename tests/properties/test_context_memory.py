"""What a rank keeps of a row falls as 1/cp, and nobody makes a tensor for every pair of positions."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paraxis.data.config import DataConfig
from paraxis.models.llama import LlamaConfig
from paraxis.train.config import RunConfig, TrainConfig
from paraxis.train.run import Run
from paraxis.train.step import make_gradients
from tests.measure import MadeRows, run_of, with_layout
from tests.worlds import run_world

SEQ_LEN, VOCAB = 256, 64
MODEL = LlamaConfig(vocab_size=VOCAB, width=32, layers=2, heads=8, kv_heads=4, head_size=4, mlp_width=64)


def config_of(layout: str, documents: bool) -> RunConfig:
    data, train = DataConfig(seq_len=SEQ_LEN, document_mask=documents), TrainConfig(micro_batch=1, global_tokens=SEQ_LEN)
    return with_layout(RunConfig(model=MODEL, data=data, train=train, precision="fp64"), layout)


def first_batch(run: Run):
    loader = run.loader()
    try:
        return [run.take(batch) for batch in next(loader)]
    finally:
        loader.close()


def kept_bytes(config: RunConfig) -> int:
    """The bytes that one rank keeps for the backward of one row: each storage once, parameters left out."""
    run = run_of(config, MadeRows(VOCAB, SEQ_LEN, config.data.document_mask))
    sizes: dict[int, int] = {}
    kept: list[torch.Tensor] = []  # so that no address is used twice

    def keep(x: torch.Tensor) -> torch.Tensor:
        gathered = [p for module in run.modules for p in module.parameters() if not isinstance(p, DTensor)]
        parameters = {parameter.untyped_storage().data_ptr() for parameter in gathered}
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            sizes[storage.data_ptr()] = storage.nbytes()
            kept.append(x)
        return x

    with saved_tensors_hooks(keep, lambda x: x):
        make_gradients(run, first_batch(run))
    return sum(sizes.values())


@cache
def kept_by_one_process() -> int:
    return run_world(kept_bytes, 1, config_of("", documents=False))[0]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", ["ring", "ulysses"])
def test_activations_of_a_rank_fall_as_one_over_cp(kind: str, ranks: int):
    each = run_world(kept_bytes, ranks, config_of(f"cp{ranks}.{kind}", documents=False))
    assert len(set(each)) == 1
    assert each[0] / kept_by_one_process() == pytest.approx(1 / ranks, rel=0.15)


class Largest(TorchDispatchMode):
    """The most elements of any tensor made."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        self.numel = max([self.numel, *(x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor))])
        return out


def largest(config: RunConfig) -> int:
    run = run_of(config, MadeRows(VOCAB, SEQ_LEN, config.data.document_mask))
    batches = first_batch(run)
    with Largest() as seen:
        make_gradients(run, batches)
    return seen.numel


@pytest.mark.parametrize("ranks", [2, 4])
def test_a_ring_with_documents_makes_no_tensor_for_every_pair_of_positions(ranks: int):
    everywhere = run_world(largest, ranks, config_of(f"cp{ranks}.ring", documents=True))
    assert max(everywhere) < SEQ_LEN * SEQ_LEN // ranks


def test_one_process_does_make_one():
    """Or the test above would not have seen it."""
    assert run_world(largest, 1, replace(config_of("", documents=True), attention="sdpa"))[0] >= SEQ_LEN * SEQ_LEN
