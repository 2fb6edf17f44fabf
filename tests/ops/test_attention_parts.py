"""Attention to blocks of keys, merged, is attention to all of them, forward and backward."""

import pytest
import torch

from paraxis.base.device import CPU, Device
from paraxis.ops.attention import Reference, document_mask
from paraxis.ops.attention_parts import CpuFlashParts, CudnnParts, FlashParts, Merged, ReferenceParts, choose_parts

GPU = Device("cuda", 0, "NVIDIA H200", 141 << 30)
HALF_LENGTH = 6
FIRST, SECOND = slice(0, HALF_LENGTH), slice(HALF_LENGTH, 2 * HALF_LENGTH)
# Two square blocks on the diagonal and one below it: a causal mask over two pieces.
BLOCKS = [(FIRST, FIRST, True), (SECOND, FIRST, False), (SECOND, SECOND, True)]


def inputs(kv_heads=2, dtype=torch.float64, device="cpu", width=8):
    g = torch.Generator().manual_seed(kv_heads)
    made = [torch.randn(2, 2 * HALF_LENGTH, n, width, generator=g, dtype=torch.float64) for n in (4, kv_heads, kv_heads, 4)]
    q, k, v, cotangent = (x.to(device, dtype) for x in made)
    return [x.requires_grad_() for x in (q, k, v)], cotangent


def expected(qkv, cotangent, seen=None):
    q, k, v = qkv
    out = Reference()(q, k, v, seen)
    return [out, *torch.autograd.grad(out, qkv, cotangent)]


def in_blocks(parts, qkv, cotangent, seen=None, blocks=BLOCKS):
    q, k, v = (x.detach() for x in qkv)
    merged = Merged.nothing(q, v.shape[-1])
    for at, keys, causal in blocks:
        merged.add(at, *parts.forward(q[:, at], k[:, keys], v[:, keys], causal=causal, mask=None if seen is None else seen[:, at, keys]))
    out = merged.out_bthd.to(q.dtype)
    grads = [torch.zeros_like(x) for x in (q, k, v)]
    for at, keys, causal in blocks:
        args = (cotangent[:, at], q[:, at], k[:, keys], v[:, keys], out[:, at], merged.lse_bht[:, :, at])
        made = parts.backward(*args, causal=causal, mask=None if seen is None else seen[:, at, keys])
        for total, where, part in zip(grads, (at, keys, keys), made, strict=True):
            total[:, where] += part
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
def test_documents_that_end_at_a_block_leave_queries_without_keys(parts):
    qkv, cotangent = inputs()
    documents_bt = torch.tensor([[0] * HALF_LENGTH + [1] * HALF_LENGTH, [0] * 3 + [1] * 4 + [2] * 5])
    seen = document_mask(documents_bt)
    assert error(in_blocks(parts, qkv, cotangent, seen), expected(qkv, cotangent, seen)) < 1e-12


@pytest.mark.parametrize("parts", [ReferenceParts(), CpuFlashParts()])
def test_an_empty_block_merged_first_or_last_changes_nothing(parts):
    qkv, cotangent = inputs()
    nothing = torch.zeros(2, 2 * HALF_LENGTH, HALF_LENGTH, dtype=torch.bool)
    q, k, v = (x.detach() for x in qkv)
    out, lse = parts.forward(q, k[:, FIRST], v[:, FIRST], causal=False, mask=nothing)
    assert (out == 0).all()
    assert lse.isneginf().all()
    grads = parts.backward(cotangent, q, k[:, FIRST], v[:, FIRST], out, lse, causal=False, mask=nothing)
    assert all((g == 0).all() for g in grads)
    everything = slice(None)
    whole = parts.forward(q, k, v, causal=True, mask=None)
    for order in ([(out, lse), whole], [whole, (out, lse)]):
        merged = Merged.nothing(q, 8)
        for part in order:
            merged.add(everything, *part)
        assert torch.equal(merged.out_bthd, whole[0])
        assert torch.equal(merged.lse_bht, whole[1])


def test_parts_are_chosen_with_a_reason(caplog):
    caplog.set_level("INFO", logger="paraxis")
    assert isinstance(choose_parts(CPU, torch.float64, False, 64), CpuFlashParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, False, 128), CudnnParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, False, 192), FlashParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, True, 128), ReferenceParts)
    assert isinstance(choose_parts(GPU, torch.float32, False, 128), ReferenceParts)
    assert isinstance(choose_parts(GPU, torch.bfloat16, False, 12), ReferenceParts)
    assert "fp16, not torch.float32" in caplog.text
    assert "width 12" in caplog.text


@pytest.mark.gpu
@pytest.mark.parametrize("parts", [CudnnParts(), FlashParts()])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_cuda_kernels_equal_the_reference(parts, kv_heads):
    qkv, cotangent = inputs(kv_heads, torch.bfloat16, "cuda", width=64)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    assert error(in_blocks(parts, qkv, cotangent), expected(exact, cotangent.double())) < 2e-2
