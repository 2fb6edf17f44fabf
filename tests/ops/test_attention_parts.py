"""Attention to blocks of keys, merged, is attention to all of them, forward and backward."""

from itertools import pairwise

import pytest
import torch

from paraxis.base.device import CPU, Device
from paraxis.ops import flash4
from paraxis.ops.attention import Reference, document_mask
from paraxis.ops.attention_parts import CpuFlashParts, CudnnParts, FlashParts, Merged, ReferenceParts, Runs, VarlenParts, choose_parts

GPU = Device("cuda", 0, "NVIDIA H200", 141 << 30, (9, 0))
HALF_LENGTH = 6
FIRST, SECOND = slice(0, HALF_LENGTH), slice(HALF_LENGTH, 2 * HALF_LENGTH)
BOTH = slice(None)  # rows
# Two square blocks on the diagonal and one below it: a causal mask over two pieces.
BLOCKS = [(BOTH, FIRST, FIRST, True, None), (BOTH, SECOND, FIRST, False, None), (BOTH, SECOND, SECOND, True, None)]
# Documents of two rows that end on the cut, or not, some of one position; where they end within each half, rows end to end;
# and the one rectangle that is seen across the cut, in the second row.
DOCUMENTS = torch.tensor([[0] * 3 + [1] * 3 + [2] * 6, [0] + [1] * 8 + [2, 3, 4]])
ACROSS = (slice(1, 2), slice(HALF_LENGTH, HALF_LENGTH + 3), slice(1, HALF_LENGTH), False, None)
ENDS = [0, 3, 6, 7, 12], [0, 6, 9, 10, 11, 12]


def document_blocks(device="cpu"):
    first, second = (runs(ends, device) for ends in ENDS)
    return [(BOTH, SECOND, SECOND, True, second), ACROSS, (BOTH, FIRST, FIRST, True, first)]


def inputs(kv_heads=2, dtype=torch.float64, device="cpu", width=8):
    g = torch.Generator().manual_seed(kv_heads)
    made = [torch.randn(2, 2 * HALF_LENGTH, n, width, generator=g, dtype=torch.float64) for n in (4, kv_heads, kv_heads, 4)]
    q, k, v, cotangent = (x.to(device, dtype) for x in made)
    return [x.requires_grad_() for x in (q, k, v)], cotangent


def expected(qkv, cotangent, seen=None):
    q, k, v = qkv
    out = Reference()(q, k, v, seen)
    return [out, *torch.autograd.grad(out, qkv, cotangent)]


def runs(ends, device="cpu"):
    return Runs(torch.tensor(ends, dtype=torch.int32, device=device), max(b - a for a, b in pairwise(ends)))


def in_blocks(parts, qkv, cotangent, blocks=BLOCKS):
    q, k, v = (x.detach() for x in qkv)
    merged = Merged.nothing(q, v.shape[-1])
    for rows, at, keys, causal, documents in blocks:
        here = (q[rows, at], k[rows, keys], v[rows, keys])
        merged.add(rows, at, *parts.forward(*here, causal=causal, documents=documents))
    out = merged.out_bthd.to(q.dtype)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for rows, at, keys, causal, documents in blocks:
        here = (cotangent[rows, at], q[rows, at], k[rows, keys], v[rows, keys], out[rows, at], merged.lse_bht[rows, :, at])
        made = parts.backward(*here, causal=causal, documents=documents)
        for total, where, part in zip(grads, (at, keys, keys), made, strict=True):
            assert part.shape == total[rows, where].shape
            total[rows, where] += part
    return [out, *grads]


def error(ours, theirs) -> float:
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("parts", [ReferenceParts(), CpuFlashParts()])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_merged_blocks_equal_the_reference(parts, kv_heads, dtype, bound):
    qkv, cotangent = inputs(kv_heads, dtype)
    assert error(in_blocks(parts, qkv, cotangent), expected(qkv, cotangent)) < bound


@pytest.mark.parametrize("parts", [ReferenceParts(), CpuFlashParts()])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_documents_and_what_they_share_across_a_cut_equal_the_masked_reference(parts, kv_heads):
    qkv, cotangent = inputs(kv_heads)
    theirs = expected(qkv, cotangent, document_mask(DOCUMENTS))
    assert error(in_blocks(parts, qkv, cotangent, document_blocks()), theirs) < 1e-12


@pytest.mark.parametrize("parts", [ReferenceParts(), CpuFlashParts()])
@pytest.mark.parametrize("ends", [[0, 12, 24], list(range(25)), [0, 1, 12, 23, 24]])
def test_documents_of_a_block_are_independent(parts, ends):
    qkv, _ = inputs()
    q, k, v = (x.detach() for x in qkv)
    out, lse = parts.forward(q, k, v, causal=True, documents=runs(ends))
    flat_out, flat_lse = out.flatten(0, 1), lse.transpose(1, 2).flatten(0, 1)
    for begin, end in pairwise(ends):
        alone = [x.flatten(0, 1)[None, begin:end] for x in (q, k, v)]
        expected_out, expected_lse = ReferenceParts().forward(*alone, causal=True, documents=None)
        assert (flat_out[begin:end] - expected_out[0]).abs().max() < 1e-12
        assert (flat_lse[begin:end] - expected_lse[0].T).abs().max() < 1e-12


def test_a_part_that_saw_no_key_changes_nothing_merged_first_or_last():
    (q, k, v), _ = inputs()
    whole = CpuFlashParts().forward(q, k, v, causal=True, documents=None)
    nothing = torch.zeros_like(whole[0]), torch.full_like(whole[1], -torch.inf)
    for order in ([nothing, whole], [whole, nothing], [nothing, nothing, whole]):
        merged = Merged.nothing(q, 8)
        for part in order:
            merged.add(BOTH, slice(None), *part)
        assert torch.equal(merged.out_bthd, whole[0])
        assert torch.equal(merged.lse_bht, whole[1])


def test_parts_are_chosen_with_a_reason(caplog, monkeypatch):
    monkeypatch.setattr(flash4, "installed_version", lambda: None)
    caplog.set_level("INFO", logger="paraxis")
    assert isinstance(choose_parts(CPU, torch.float64, False, 64), CpuFlashParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, False, 128), CudnnParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, False, 192), FlashParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, True, 128), VarlenParts)
    assert isinstance(choose_parts(GPU, torch.float16, True, 192), VarlenParts)
    assert isinstance(choose_parts(GPU, torch.float32, True, 128), ReferenceParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, True, 12), ReferenceParts)
    assert isinstance(choose_parts(GPU, torch.float32, False, 128), ReferenceParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, False, 12), ReferenceParts)
    assert "fp16, not torch.float32" in caplog.text
    assert "width 12" in caplog.text
    assert "VarlenParts on NVIDIA H200: it takes the documents of a block in one call" in caplog.text


def test_the_kernel_for_documents_is_called_as_torch_declares_it():
    # As meta tensors, which check names, numbers and kinds of arguments but compute nothing.
    q, grad = (torch.empty(2, 12, 4, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    k, v = (torch.empty(2, 12, 2, 64, dtype=torch.bfloat16, device="meta") for _ in range(2))
    documents = Runs(torch.empty(5, dtype=torch.int32, device="meta"), 1)
    out, lse = VarlenParts().forward(q, k, v, causal=True, documents=documents)
    assert (out.shape, lse.shape, lse.dtype) == (q.shape, (2, 4, 12), torch.float32)
    grads = VarlenParts().backward(grad, q, k, v, out, lse, causal=True, documents=documents)
    assert [x.shape for x in grads] == [q.shape, k.shape, v.shape]


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [CudnnParts(), FlashParts()])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cuda_kernels_equal_the_reference(parts, kv_heads):
    qkv, cotangent = inputs(kv_heads, torch.bfloat16, "cuda", width=64)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    assert error(in_blocks(parts, qkv, cotangent), expected(exact, cotangent.double())) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [VarlenParts(), FlashParts()])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_cuda_kernels_keep_documents_apart_as_the_reference_does(parts, kv_heads, dtype):
    qkv, cotangent = inputs(kv_heads, dtype, "cuda", width=64)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    theirs = expected(exact, cotangent.double(), document_mask(DOCUMENTS.cuda()))
    assert error(in_blocks(parts, qkv, cotangent, document_blocks("cuda")), theirs) < 2e-2


@pytest.mark.gpu
@pytest.mark.parametrize("kv_heads", [4, 1])
@pytest.mark.parametrize("ends", [[0, 12, 24], list(range(25)), [0, 1, 12, 23, 24]])
def test_the_log_sum_exp_of_documents_on_cuda_is_the_reference_s(kv_heads, ends):
    qkv, _ = inputs(kv_heads, torch.bfloat16, "cuda", width=64)
    q, k, v = (x.detach() for x in qkv)
    ours = VarlenParts().forward(q, k, v, causal=True, documents=runs(ends, "cuda"))
    theirs = ReferenceParts().forward(q.double(), k.double(), v.double(), causal=True, documents=runs(ends, "cuda"))
    assert ours[1].dtype == torch.float32
    assert error(ours, theirs) < 1e-2
