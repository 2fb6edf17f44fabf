"""The same numbers on every layout: loss, gradient norm, every gradient and the trained weights equal one process's."""

from dataclasses import replace
from functools import cache

import pytest
import torch

from paraxis.base.strategy import RematConfig
from paraxis.data.config import DataConfig
from paraxis.models.init import initialise
from paraxis.models.llama import LlamaConfig
from paraxis.ops.loss import reference_head_loss
from paraxis.optim.config import OptimConfig
from paraxis.train.config import RunConfig, TrainConfig
from tests.measure import MadeRows, Measured, batches_of, measure, placed_whole, worst_difference
from tests.worlds import run_world

ROWS_A_STEP, SEQ_LEN, VOCAB = 8, 32, 64
LAYOUTS = ["dp2", "dp4", "fsdp2", "fsdp4", "dp2 x fsdp2", "tp2", "tp4", "fsdp2 x tp2"]

# Every tolerance of max|a-b| / max|b|: loss, norm and gradients; weights after two steps of SGD with momentum.
TOLERANCES = {"fp64": (1e-10, 1e-9), "fp32": (1e-5, 1e-5)}

GROUPED = LlamaConfig(vocab_size=VOCAB, width=32, layers=2, heads=4, kv_heads=4, mlp_width=64)
TIED = replace(GROUPED, tied=True)

# Clipping acts (the norm is far above it), and accumulation too: a step has more rows than a micro-batch on every layout.
BASE = RunConfig(
    model=GROUPED,
    data=DataConfig(seq_len=SEQ_LEN),
    train=TrainConfig(micro_batch=1, global_tokens=ROWS_A_STEP * SEQ_LEN),
    optim=OptimConfig(name="sgd", lr=0.1, momentum=0.9, clip_norm=0.05),
    precision="fp64",
)
OPTIONS = {
    "accumulation": BASE,
    "one micro-batch": replace(BASE, train=replace(BASE.train, micro_batch=2)),
    "gradients reduced each micro-batch": replace(BASE, parallel=replace(BASE.parallel, reduce="micro_batch")),
    "parameters kept gathered": replace(BASE, parallel=replace(BASE.parallel, reshard="never")),
    "selective recomputation": replace(BASE, remat=RematConfig(mode="selective")),
    "full recomputation": replace(BASE, remat=RematConfig(mode="full")),
    "every second block recomputed": replace(BASE, remat=RematConfig(mode="full", every=2)),
    "compiled": replace(BASE, compile="aot_eager"),
    "compiled, recomputed": replace(BASE, compile="aot_eager", remat=RematConfig(mode="selective")),
    "documents": replace(BASE, data=DataConfig(seq_len=SEQ_LEN, document_mask=True)),
    "tied": replace(BASE, model=TIED),
    "grouped heads": replace(BASE, model=replace(GROUPED, heads=8, kv_heads=4, head_size=4)),
    "tied, documents, compiled": replace(BASE, model=TIED, data=DataConfig(seq_len=SEQ_LEN, document_mask=True), compile="aot_eager"),
}

# What CI covers: every layout, every option on two kinds of splitting, compilation on each axis and on their product.
COVERED = {(layout, "accumulation") for layout in LAYOUTS}
COVERED |= {(layout, option) for option in OPTIONS if "compiled" not in option for layout in ("fsdp2", "fsdp2 x tp2")}
COVERED |= {("tp2", "compiled"), ("fsdp2 x tp2", "compiled, recomputed")}
COVERED |= {(layout, "tied, documents, compiled") for layout in ("dp2", "tp2")}
MATRIX = [
    pytest.param(layout, option, marks=() if (layout, option) in COVERED else pytest.mark.full, id=f"{layout}-{option}".replace(" ", "_"))
    for layout in LAYOUTS
    for option in OPTIONS
]


def rows_for(config: RunConfig) -> MadeRows:
    return MadeRows(VOCAB, SEQ_LEN, documents=config.data.document_mask)


@cache
def one_process(config: RunConfig) -> Measured:
    """The reference of an option: eager, nothing recomputed, no axis."""
    return measure(config=plain(config), layout="", rows=rows_for(config))


def plain(config: RunConfig) -> RunConfig:
    return replace(config, compile="none", remat=RematConfig(), parallel=replace(config.parallel, reduce="auto", reshard="auto"))


def assert_same(found: Measured, expected: Measured, precision: str) -> None:
    """Compares by max|a-b| / max|b|, and names the worst parameter."""
    tolerance, after_steps = TOLERANCES[precision]
    assert found.losses == pytest.approx(expected.losses, rel=after_steps)
    assert found.norms == pytest.approx(expected.norms, rel=after_steps)
    assert worst_difference(found.grads, expected.grads) < (tolerance, "")
    assert worst_difference(found.weights, expected.weights) < (after_steps, "")


@pytest.mark.parametrize(("layout", "option"), MATRIX)
def test_a_layout_gives_the_gradients_and_weights_of_one_process_in_fp64(layout, option):
    config = OPTIONS[option]
    assert_same(measure(config=config, layout=layout, rows=rows_for(config)), one_process(plain(config)), "fp64")


@pytest.mark.parametrize("option", ["selective recomputation", "full recomputation", "compiled", "gradients reduced each micro-batch"])
def test_an_option_changes_no_number_on_one_process(option):
    config = OPTIONS[option]
    assert_same(measure(config=config, layout="", rows=rows_for(config)), one_process(plain(config)), "fp64")


@pytest.mark.parametrize("layout", ["dp2", "fsdp4", "tp2", pytest.param("tp4", marks=pytest.mark.full), "fsdp2 x tp2"])
def test_a_layout_gives_the_gradients_and_weights_of_one_process_in_fp32(layout):
    config = replace(BASE, precision="fp32")
    assert_same(measure(config=config, layout=layout, rows=rows_for(config)), one_process(config), "fp32")


@pytest.mark.parametrize("layout", ["fsdp2", "tp2"])
def test_inductor_gives_the_numbers_of_eager(layout):
    config = replace(BASE, precision="fp32", compile="inductor")
    assert_same(measure(config=config, layout=layout, rows=rows_for(config), timeout=300), one_process(plain(config)), "fp32")


def test_one_process_gives_the_numbers_of_a_plain_pytorch_loop():
    def loop():
        torch.set_default_dtype(torch.float64)
        model = GROUPED.build()
        model.use_head_loss(reference_head_loss)
        for name, parameter in model.named_parameters():
            initialise(model, parameter.data, placed_whole(name, parameter), BASE.train.seed)
        optimizer = torch.optim.SGD(model.parameters(), lr=BASE.optim.lr, momentum=BASE.optim.momentum)
        decayed = [parameter for parameter in model.parameters() if parameter.dim() > 1]
        losses, norms = [], []
        for step in range(2):
            batch = batches_of(rows_for(BASE), step * ROWS_A_STEP, ROWS_A_STEP)
            loss = model(batch) / batch.target_count
            loss.backward()
            norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), BASE.optim.clip_norm)))
            losses.append(loss.item())
            for parameter in decayed:
                if parameter is not model.embed.weight:  # embeddings, norms and biases do not decay
                    parameter.grad.add_(parameter, alpha=BASE.optim.weight_decay)
            optimizer.step()
            optimizer.zero_grad()
        return losses, norms, {name: parameter.detach() for name, parameter in model.named_parameters()}

    [(losses, norms, weights)] = run_world(loop, 1)
    ours = one_process(BASE)
    assert ours.losses == pytest.approx(losses, rel=1e-10)
    assert ours.norms == pytest.approx(norms, rel=1e-10)
    assert worst_difference(ours.weights, weights) < (1e-9, "")


def test_compiled_blocks_of_one_kind_are_compiled_once():
    config = replace(BASE, compile="aot_eager", model=replace(GROUPED, layers=6))

    def compilations():
        from torch._dynamo.utils import counters

        from tests.measure import measure_rank

        counters.clear()
        measure_rank(config, rows_for(config), 2)
        return counters["stats"]["unique_graphs"]

    assert run_world(compilations, 1, timeout=100) == [1]
