"""Steps of Megatron's, put together from the pieces of one traced rank."""

from dataclasses import replace
from pathlib import Path

import pytest

from paraxis.bench.megatron import HALF, MegatronStep, Pieces, Shape, trace_pieces
from paraxis.bench.published import clusters, of_megatron
from paraxis.models.gpt import GPTConfig
from paraxis.plan.hardware import Cluster
from paraxis.plan.operators import Operator
from paraxis.train.config import RunConfig

MODEL = GPTConfig(vocab_size=2048, width=256, layers=8, heads=4, max_seq_len=128)
MICRO_BATCH, ROWS = 2, 32
TOKENS = MICRO_BATCH * MODEL.max_seq_len
KNOWN: dict[Shape, Pieces] = {}  # traced once for all tests


def run(recompute: bool = True, rows: int = ROWS, **degrees: int) -> RunConfig:
    return of_megatron(MODEL, {"tp": 1, "dp": 1, "pp": 1, **degrees}, MICRO_BATCH, rows, recompute=recompute)


def cluster(*, free_links: bool = False, launch_s: float = 0.0) -> Cluster:
    """64 A100 of vTrain's, with a host that starts kernels in no time unless it is said to take some."""
    found = clusters(Path(__file__).parents[2] / "bench/published")["vtrain_a100"].with_devices(64)
    found = replace(found, accelerators={"a100": replace(found.accelerators["a100"], launch_s=launch_s)})
    if free_links:
        free = {"bytes_per_s": 1e18, "latency_s": 1e-15, "skew_s": 0.0, "exchanges": ()}
        found = replace(found, links={name: replace(link, **free) for name, link in found.links.items()})
    return found


def step(config: RunConfig, on: Cluster) -> MegatronStep:
    return MegatronStep(config, trace_pieces(config, KNOWN), on)


def flops(operators: list[Operator]) -> float:
    return sum(operator.flops for operator in operators)


@pytest.mark.parametrize("tp", [1, 2])
@pytest.mark.parametrize("recompute", [False, True])
def test_pieces_compute_what_a_block_and_a_head_do(tp: int, recompute: bool):
    pieces = trace_pieces(run(recompute, tp=tp), KNOWN)
    block = (24 * TOKENS * MODEL.width**2 + 4 * TOKENS * MODEL.max_seq_len * MODEL.width) / tp
    assert flops(pieces.forward) == pytest.approx(block)
    # Backward computes twice as much, and with recomputation once more all that comes before the last product of a block, or all of it.
    assert flops(pieces.backward) == pytest.approx((3 if recompute else 2) * block, rel=0.13 if recompute else 1e-6)
    assert flops(pieces.head) == pytest.approx(3 * 2 * TOKENS * MODEL.vocab_size * MODEL.width / tp)
    assert flops(pieces.embed) == flops(pieces.embed_backward) == 0


def test_tensor_parallel_blocks_sum_twice_in_each_pass_and_each_recomputation():
    def sums(operators: list[Operator]) -> int:
        return sum(operator.exchange == "all_reduce" and operator.bytes == HALF * TOKENS * MODEL.width for operator in operators)

    without, recomputing = (trace_pieces(run(recompute, tp=2), KNOWN) for recompute in (False, True))
    assert sums(without.forward) == sums(without.backward) == sums(recomputing.forward) == 2
    assert sums(recomputing.backward) in (3, 4)  # the second sum of a block ends it, and is not needed again


def test_runs_that_differ_in_depth_and_replicas_share_a_trace():
    known: dict[Shape, Pieces] = {}
    deep = replace(run(), model=replace(MODEL, layers=4 * MODEL.layers))
    assert trace_pieces(run(), known) is trace_pieces(run(dp=4, pp=2), known) is trace_pieces(deep, known)


def test_a_pipeline_takes_a_turn_of_its_slowest_stage_for_each_micro_batch_and_stage():
    on = cluster(free_links=True)
    for pp in (2, 4):
        piped = step(run(pp=pp), on)
        turns = ROWS // MICRO_BATCH + pp - 1
        slowest, fastest = (of(piped.forward_s(stage) + piped.backward_s(stage) for stage in range(pp)) for of in (max, min))
        messages_s = 2 * on.exchange_s("p2p", piped.message_bytes, [0, 1])  # what a message costs even where bytes cost nothing
        assert turns * fastest <= piped.passes_s <= turns * (slowest + messages_s)


def test_stages_have_all_blocks_one_embedding_and_one_head():
    on = cluster(free_links=True)
    whole, piped = step(run(), on), step(run(pp=4), on)
    sum_s = sum(piped.forward_s(stage) + piped.backward_s(stage) for stage in range(4))
    assert sum_s == pytest.approx(whole.forward_s(0) + whole.backward_s(0))
    assert piped.forward_s(0) > piped.forward_s(1) == piped.forward_s(3)
    assert piped.backward_s(3) > piped.backward_s(0) > piped.backward_s(1)


def test_a_host_that_is_slower_than_the_device_sets_the_pace():
    waiting = step(run(), cluster(launch_s=1e-3))
    pieces = trace_pieces(run(), KNOWN)
    a_block = len(pieces.forward) + len(pieces.backward)
    kernels = len(pieces.embed) + len(pieces.head) + len(pieces.embed_backward) + MODEL.layers * a_block
    batches = ROWS // MICRO_BATCH
    assert 0.9 * kernels * batches * 1e-3 < waiting.passes_s <= kernels * batches * 1e-3  # waits for exchanges are not started


def test_tensor_parallel_ranks_send_a_part_each():
    """Stages of 8 devices, so that messages cross hosts, and as many micro-batches each."""
    on = cluster()
    slow = replace(on, links={**on.links, "infiniband": replace(on.links["infiniband"], bytes_per_s=1e6, latency_s=1e-9)})

    def sending_s(tp: int) -> float:
        config = run(tp=tp, pp=2, dp=8 // tp, rows=4 * MICRO_BATCH * 8 // tp)
        return step(config, slow).passes_s - step(config, on).passes_s

    assert sending_s(4) == pytest.approx(sending_s(1) / 4, rel=0.05)


def test_replicas_sum_half_precision_gradients_after_the_last_backward():
    on = cluster()
    alone, replicated = step(run(), on), step(run(dp=2), on)
    parameters = 12 * MODEL.layers * MODEL.width**2 + MODEL.vocab_size * MODEL.width
    copies = 3 * on.accelerator_of(0).moving_s(2 * HALF * parameters)
    assert replicated.tail_s(0) - alone.tail_s(0) == pytest.approx(on.exchange_s("all_reduce", HALF * parameters, [0, 1]) + copies)
    assert replicated.step_s == replicated.passes_s + replicated.tail_s(0)


def test_both_ends_of_a_pipeline_sum_the_gradients_of_the_embedding_they_share():
    piped = step(run(pp=4), cluster())
    slow = step(run(pp=4), cluster(free_links=False))
    assert piped.rank_parameters(0) == piped.rank_parameters(3) == piped.rank_parameters(1) + MODEL.vocab_size * MODEL.width
    assert piped.tail_s(0) - piped.tail_s(1) > slow.cluster.exchange_s("all_reduce", HALF * MODEL.vocab_size * MODEL.width, [0, 3])
