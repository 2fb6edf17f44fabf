"""Attention over a sequence that is spread over ranks equals attention on one, forward and backward."""

import pytest
import torch
import torch.distributed as dist
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from paraxis.base.errors import ConfigError
from paraxis.ops.attention import Reference, Sdpa, document_mask
from paraxis.ops.attention_parts import CpuFlashParts, ReferenceParts, VarlenParts
from paraxis.parallel.blocks import Documents, Plan, attend_in_blocks
from paraxis.parallel.context import (
    AllGatherAttention,
    RingAttention,
    UlyssesAttention,
    join_zigzag,
    kv_copies,
    split_zigzag,
    usp_attention,
    zigzag_positions,
)
from tests.order import Order
from tests.worlds import run_world

LENGTH = 32
KINDS = ["ring", "ulysses", "usp", "allgather"]


def build(kind, parts):
    """The attention called `kind` over the whole world; usp is Ulysses over pairs and a ring across them."""
    world = dist.distributed_c10d._get_default_group()
    if kind == "ring":
        return RingAttention(world, parts)
    if kind == "allgather":
        return AllGatherAttention(world, parts)
    if kind == "ulysses":
        return UlyssesAttention(world, Sdpa(), parts)
    rank, pairs = dist.get_rank(), dist.get_world_size() // 2
    inner = [dist.new_group([2 * n, 2 * n + 1]) for n in range(pairs)][rank // 2]
    outer = [dist.new_group(list(range(n, 2 * pairs, 2))) for n in range(2)][rank % 2]
    return usp_attention(inner, outer, parts)


def inputs(kv_heads, dtype, length=LENGTH, rows=2):
    g = torch.Generator().manual_seed(kv_heads)
    made = [torch.randn(rows, length, n, 8, generator=g, dtype=torch.float64) for n in (4, kv_heads, kv_heads, 4)]
    return [x.to(dtype) for x in made]


def documents(name, length=LENGTH):
    """Document numbers of two rows."""
    if name == "whole":
        return None
    if name == "at splits":  # every document ends where a piece of 2, 4 or 8 ranks' zigzag does, or of none
        return torch.stack([torch.arange(length) // (length // 4), torch.arange(length) // (length // 2)])
    if name == "tiny":  # of 1 to 3 positions, beside one document of the whole row
        return torch.stack([torch.arange(length) * 2 // 3, torch.zeros(length, dtype=torch.int64)])
    ends = torch.rand(2, length, generator=torch.Generator().manual_seed(3)) < 0.15
    return ends.long().cumsum(1)


def outcome(attend, qkv, cotangent, documents_bt):
    qkv = [x.detach().requires_grad_() for x in qkv]
    out = attend(*qkv, attend.mask(documents_bt))
    return [out.detach(), *torch.autograd.grad(out, qkv, cotangent)]


def on_rank(kind, parts, cases):
    """Output and gradients of this rank's positions for each (kv_heads, dtype, documents)."""
    attend = build(kind, parts)
    rank, ranks = dist.get_rank(), dist.get_world_size()
    results = []
    for kv_heads, dtype, name in cases:
        *qkv, cotangent = (split_zigzag(x, ranks)[rank] for x in inputs(kv_heads, dtype))
        whole = documents(name)
        results.append(outcome(attend, qkv, cotangent, None if whole is None else split_zigzag(whole, ranks)[rank]))
    return results


def check(kind, ranks, cases, parts=None, timeout=60.0):
    per_rank = run_world(on_rank, ranks, kind, parts or CpuFlashParts(), cases, timeout=timeout)
    for number, (kv_heads, dtype, name) in enumerate(cases):
        *qkv, cotangent = (x.double() for x in inputs(kv_heads, dtype))
        theirs = outcome(Reference(), qkv, cotangent, documents(name))
        bound = 1e-10 if dtype == torch.float64 else 1e-5
        for what, position in zip(("out", "dq", "dk", "dv"), range(4), strict=True):
            ours = join_zigzag(torch.stack([results[number][position] for results in per_rank]))
            assert ours.dtype == dtype
            error = ((ours.double() - theirs[position]).abs().max() / theirs[position].abs().max()).item()
            assert error < bound, f"{kind} on {ranks} ranks, {kv_heads} kv heads, {name}, {dtype}: {what} is off by {error:.1e}"


NAMES = ["whole", "at splits", "tiny", "random"]
FP64 = [(4, torch.float64, "whole"), *((kv_heads, torch.float64, name) for kv_heads in (2, 1) for name in NAMES)]
FP32 = [(2, torch.float32, "whole"), (2, torch.float32, "random")]


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("kind", KINDS)
def test_spread_attention_equals_one_process(kind, ranks):
    check(kind, ranks, FP64 + FP32)


@pytest.mark.full
@pytest.mark.parametrize("kind", ["ring", "allgather", "usp"])
@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_spread_attention_from_the_reference_equals_one_process(kind, ranks):
    if kind == "usp" and ranks < 2:
        pytest.skip("usp has at least a pair of neighbours")
    check(kind, ranks, [*FP64, *FP32], ReferenceParts())


def test_ulysses_of_whole_rows_sends_one_message_each_way():
    for order in run_world(order_of_messages, 2):
        for seen in order:
            assert seen == ["send", "wait", "attention", "send", "wait"]


def order_of_messages():
    attend = build("ulysses", CpuFlashParts())
    qkv = [torch.randn(2, 4, heads, 8, requires_grad=True) for heads in (16, 8, 8)]
    with Order() as forward:
        out = attend(*qkv, None)
    with Order() as backward:
        out.backward(torch.randn(out.shape))
    return forward.seen, backward.seen


def compiled_on_rank(kind):
    """How far compiled output and gradients are from eager ones, whole rows and documents."""
    attend = build(kind, CpuFlashParts())
    rank, ranks = dist.get_rank(), dist.get_world_size()
    *qkv, cotangent = (split_zigzag(x, ranks)[rank] for x in inputs(2, torch.float64))
    qkv = [x.requires_grad_() for x in qkv]

    def block(q, k, v, mask):
        return attend(q * 2, k + 1, v, mask).sin()

    differences = []
    for mask in (attend.mask(None), attend.mask(split_zigzag(documents("random"), ranks)[rank])):
        results = []
        for run in (block, torch.compile(block, backend="aot_eager")):
            out = run(*qkv, mask)
            results.append([out, *torch.autograd.grad(out, qkv, cotangent)])
        differences += [(a - b).abs().max().item() for a, b in zip(*results, strict=True)]
    return max(differences)


@pytest.mark.parametrize("kind", ["ring", "ulysses", *(pytest.param(kind, marks=pytest.mark.full) for kind in ("usp", "allgather"))])
def test_spread_attention_may_stand_in_a_compiled_block(kind):
    assert max(run_world(compiled_on_rank, 2, kind)) < 1e-12


class Largest(TorchDispatchMode):
    """The number of elements of the largest tensor any operator gave."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return out


def largest_on_rank(kind, name, length):
    rank, ranks = dist.get_rank(), dist.get_world_size()
    attend = build(kind, CpuFlashParts())
    *qkv, cotangent = (split_zigzag(x[:1], ranks)[rank] for x in inputs(1, torch.float32, length))
    whole = documents(name, length)
    documents_bt = None if whole is None else split_zigzag(whole[:1], ranks)[rank]
    with Largest() as largest:
        outcome(attend, qkv, cotangent, documents_bt)
    return largest.elements


@pytest.mark.parametrize("kind", ["ring", "allgather", "usp"])
@pytest.mark.parametrize("name", ["whole", "random"])
def test_no_rank_holds_a_score_or_a_mask_for_every_pair_of_positions(kind, name):
    length = 256
    assert max(run_world(largest_on_rank, 4, kind, name, length)) < length * length


@pytest.mark.parametrize("name", ["whole", "at splits", "random"])
def test_a_ring_of_more_ranks_holds_proportionally_less(name):
    two, four = (max(run_world(largest_on_rank, ranks, "ring", name, 256)) for ranks in (2, 4))
    assert four <= two / 2


def blocks_on_rank(kind, name):
    """Each block's rows and whether it has several documents, of all steps."""
    rank, ranks = dist.get_rank(), dist.get_world_size()
    plan = build(kind, CpuFlashParts()).mask(split_zigzag(documents(name), ranks)[rank])
    return [(block.rows, block.documents is not None) for blocks in plan.steps for block in blocks]


@pytest.mark.parametrize("kind", ["ring", "allgather"])
def test_documents_that_end_at_splits_cost_their_own_blocks_only(kind):
    # 8 pieces of 4 positions, documents of 8 in one row and of 16 in the other. A piece and itself: 8. Pieces of one document: 12 pairs
    # in the second row, of which 4 in the first row too, and then in one block.
    blocks = [block for blocks in run_world(blocks_on_rank, 4, kind, "at splits") for block in blocks]
    assert len(blocks) == 8 + 12
    assert not any(several for _, several in blocks)
    assert sum(rows == slice(0, 2) for rows, _ in blocks) == 4


def pairs_seen(blocks, rows, positions, length):
    """How often each query sees each key, [rows, length, length], by what the blocks of one rank's positions say."""
    seen = torch.zeros(rows, length, length, dtype=torch.int64)
    for block in blocks:
        queries, keys = positions[block.queries], torch.arange(length)[block.keys]
        here = torch.ones(rows, len(queries), len(keys), dtype=torch.bool)[block.rows]
        if block.causal:
            here = here.tril()
        if block.documents:
            numbers = block.documents.numbers(rows, len(queries))
            here = here & (numbers[:, :, None] == numbers[:, None, :])
        else:
            assert here.any(-1).all(), "a query without keys"
        seen[block.rows, queries[:, None], keys] += here
    return seen


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("often", [0.0, 0.05, 0.2, 0.5, 1.0])
@pytest.mark.parametrize("piece", [1, 2, 5])
def test_blocks_show_each_query_its_document_s_keys_once(ranks, often, piece):
    begins = torch.rand(3, 2 * ranks * piece, generator=torch.Generator().manual_seed(ranks)) < often
    documents_bt = begins.long().cumsum(1)
    rows, length = documents_bt.shape
    blocks = Documents(documents_bt, 2 * ranks)
    seen = torch.zeros(rows, length, length, dtype=torch.int64)
    for rank in range(ranks):
        pieces = (rank, 2 * ranks - 1 - rank)
        seen += pairs_seen(blocks.blocks(pieces, range(2 * ranks)), rows, zigzag_positions(length, ranks, rank), length)
    assert torch.equal(seen, document_mask(documents_bt).long())


def on_one_device(parts, qkv, cotangent, documents_bt, ranks):
    """Output and gradients of each rank in turn, in natural order, from all keys and values and no group."""
    plans = Documents(documents_bt, 2 * ranks)
    q, k, v, cotangents = qkv[0], *(x.detach().requires_grad_() for x in qkv[1:]), split_zigzag(cotangent, ranks)
    outs, q_grads, kv_grads = [], [], []
    for rank, own in enumerate(split_zigzag(q, ranks)):
        own = own.detach().requires_grad_()
        plan = Plan([plans.blocks((rank, 2 * ranks - 1 - rank), range(2 * ranks))])
        out = attend_in_blocks(own, k, v, plan, parts, None)
        q_grad, *kv_grad = torch.autograd.grad(out, (own, k, v), cotangents[rank])
        outs.append(out.detach())
        q_grads.append(q_grad)
        kv_grads.append(kv_grad)
    sums = [torch.stack([x.double() for x in grads]).sum(0) for grads in zip(*kv_grads, strict=True)]
    return [join_zigzag(torch.stack(outs)), join_zigzag(torch.stack(q_grads)), *sums]


def check_one_device(parts, name, kv_heads, dtype, device, bound, length=LENGTH, width=8):
    g = torch.Generator().manual_seed(kv_heads)
    made = [torch.randn(2, length, n, width, generator=g, dtype=torch.float64) for n in (4, kv_heads, kv_heads, 4)]
    *qkv, cotangent = (x.to(device, dtype) for x in made)
    documents_bt = documents(name, length).to(device)
    ours = on_one_device(parts, qkv, cotangent, documents_bt, 4)
    theirs = outcome(Reference(), [x.double() for x in qkv], cotangent.double(), documents_bt)
    for what, a, b in zip(("out", "dq", "dk", "dv"), ours, theirs, strict=True):
        error = ((a.double() - b).abs().max() / b.abs().max()).item()
        assert error < bound, f"{what} is off by {error:.1e}"


@pytest.mark.parametrize("parts", [ReferenceParts(), CpuFlashParts()])
@pytest.mark.parametrize("name", NAMES[1:])
def test_every_rank_s_blocks_add_up_to_whole_attention(parts, name):
    check_one_device(parts, name, 2, torch.float64, "cpu", 1e-12)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("length", [LENGTH, 1024])
def test_every_rank_s_blocks_on_cuda_add_up_to_whole_attention(kv_heads, name, length):
    check_one_device(VarlenParts(), name, kv_heads, torch.bfloat16, "cuda", 2e-2, length, width=64)


@pytest.mark.gpu
def test_long_rows_of_documents_need_no_score_or_mask_of_pairs_on_cuda():
    length, device = 32768, torch.device("cuda")
    ends = torch.rand(1, length, generator=torch.Generator().manual_seed(0)) < 1e-3
    documents_bt = ends.long().cumsum(1).to(device)
    q, k, v, cotangent = (torch.randn(1, length, n, 64, device=device, dtype=torch.bfloat16) for n in (4, 2, 2, 4))
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    on_one_device(VarlenParts(), [q, k, v], cotangent, documents_bt, 2)
    piece = length // 4
    assert torch.cuda.max_memory_allocated() - before < 4 * piece * piece * 2  # bytes of two heads' scores of one block, in fp32


def test_every_rank_has_the_same_positions_early_and_late():
    held = [zigzag_positions(24, 3, rank).tolist() for rank in range(3)]
    assert held[0] == [0, 1, 2, 3, 20, 21, 22, 23]
    assert sorted(position for positions in held for position in positions) == list(range(24))
    assert len({sum(positions) for positions in held}) == 1
    x = torch.arange(48).view(2, 24)
    shards = split_zigzag(x, 3)
    assert [shard[0].tolist() for shard in shards] == held
    assert torch.equal(join_zigzag(shards), x)


def test_lengths_that_do_not_divide_are_refused_with_the_nearest():
    with pytest.raises(ConfigError, match=r"data\.seq_len=30 .* 2 x cp = 8; the nearest: 24 or 32"):
        zigzag_positions(30, 4, 0)


def test_kv_heads_are_repeated_no_more_than_ranks_need():
    assert [kv_copies(8, 4, 2), kv_copies(8, 2, 4), kv_copies(8, 1, 8), kv_copies(6, 3, 2)] == [1, 2, 8, 2]
    with pytest.raises(ConfigError, match=r"4 context ranks exchange heads .* a rank's 6 query heads"):
        kv_copies(6, 2, 4)
