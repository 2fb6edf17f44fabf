"""Every attention backend computes what the reference computes."""

import logging
from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from paraxis.base.device import CPU, Device
from paraxis.base.errors import ConfigError
from paraxis.ops import attention, flash4
from paraxis.ops.attention import Flex, FusedSdpa, Reference, Sdpa, choose_attention, document_block_mask
from paraxis.parallel.world import this_device

GPU = Device("cuda", 0, "NVIDIA H200", 141 << 30, (9, 0))


def documents(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    """Document numbers of packed rows, with documents that end anywhere, some of one token."""
    ends = torch.rand(rows, length, generator=torch.Generator().manual_seed(seed)) < 0.15
    return ends.long().cumsum(1)


def inputs(length: int, heads: int, kv_heads: int, dtype: torch.dtype = torch.float64, device: str = "cpu", width: int = 8):
    g = torch.Generator().manual_seed(length * heads + kv_heads)
    return [
        torch.randn(2, length, n, width, generator=g, dtype=torch.float64).to(device, dtype).requires_grad_()
        for n in (heads, kv_heads, kv_heads)
    ]


def outcome(attend, qkv, documents_bt=None):
    """Output and gradients under one fixed cotangent."""
    out = attend(*qkv, attend.mask(documents_bt))
    cotangent = torch.randn(out.shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(out)
    return [out, *torch.autograd.grad(out, qkv, cotangent)]


def error(ours, theirs) -> float:
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize("masked", [False, True])
def test_sdpa_equals_the_reference_in_fp64(heads, kv_heads, masked):
    qkv = inputs(33, heads, kv_heads)
    docs = documents(2, 33) if masked else None
    assert error(outcome(Sdpa(), qkv, docs), outcome(Reference(), qkv, docs)) < 1e-12


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
def test_a_single_sdpa_kernel_equals_the_reference(backend):
    qkv = inputs(33, 4, 2)
    assert error(outcome(FusedSdpa(backend), qkv), outcome(Reference(), qkv)) < 1e-12


def test_a_document_gives_what_it_gives_alone():
    qkv = inputs(20, 4, 2)
    docs = torch.tensor([[0] * 7 + [1] * 13, [0] * 1 + [1] * 19])
    together = Reference()(*qkv, Reference().mask(docs))
    alone = Reference()(*(x[:1, 7:] for x in qkv), None)
    torch.testing.assert_close(together[:1, 7:], alone, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("attend", [Reference(), Sdpa()])
def test_the_last_queries_alone_give_the_last_outputs(attend):
    q, k, v = inputs(12, 4, 2)
    whole = attend(q, k, v, None)
    for queries in (1, 5):
        torch.testing.assert_close(attend(q[:, -queries:], k, v, None), whole[:, -queries:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [16, 40, 61])
def test_the_block_mask_is_the_one_flex_attention_makes_from_every_pair(length):
    docs = documents(3, length, seed=length)

    def sees(b, h, t, s):
        return (t >= s) & (docs[b, t] == docs[b, s])

    ours = document_block_mask(docs, 8)
    theirs = create_block_mask(sees, 3, None, length, length, device="cpu", BLOCK_SIZE=8)
    assert torch.equal(ours.to_dense(), theirs.to_dense())
    assert ours.seq_lengths == theirs.seq_lengths
    # No block that may be skipped is computed, and none is masked inside that need not be, apart from the diagonal's.
    assert torch.equal(ours.kv_num_blocks + ours.full_kv_num_blocks, theirs.kv_num_blocks + theirs.full_kv_num_blocks)


@pytest.mark.parametrize("compiled", [False, True])
def test_flex_equals_the_reference_with_documents(compiled, monkeypatch):
    monkeypatch.setattr(attention, "_compiled_flex", lambda: flex_attention)  # the CPU's own kernel takes long to build
    call = torch.compile(lambda *x: Flex()(*x), fullgraph=True, backend="eager") if compiled else Flex()
    qkv = [x.detach() for x in inputs(160, 4, 2, torch.float32, width=16)]  # and it has no backward
    for seed in (0, 1):
        docs = documents(2, 160, seed)
        assert error([call(*qkv, Flex().mask(docs))], [Reference()(*qkv, Reference().mask(docs))]) < 1e-5


@pytest.mark.parametrize(
    ("attend", "docs"),
    [(Sdpa(), None), (Sdpa(), documents(2, 16)), (FusedSdpa(SDPBackend.FLASH_ATTENTION), None), (Reference(), documents(2, 16))],
)
def test_every_backend_compiles_whole(attend, docs):
    qkv = inputs(16, 4, 2)
    mask = attend.mask(docs)
    compiled = torch.compile(lambda *x: attend(*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*qkv, mask), attend(*qkv, mask))


def chosen(request, device, documents, width=128, dtype=torch.bfloat16):
    return choose_attention(request, device, documents, width, dtype)


def test_auto_chooses_by_device_dtype_and_documents(caplog, monkeypatch):
    monkeypatch.setattr(flash4, "installed_version", lambda: None)
    caplog.set_level(logging.INFO, "paraxis")
    assert chosen("auto", GPU, False) == FusedSdpa(SDPBackend.CUDNN_ATTENTION)
    assert chosen("auto", GPU, False, width=256) == FusedSdpa(SDPBackend.FLASH_ATTENTION)
    assert isinstance(chosen("auto", GPU, True), Flex)
    assert isinstance(chosen("auto", GPU, True, dtype=torch.float64), Sdpa)
    assert isinstance(chosen("auto", GPU, False, dtype=torch.float32), Sdpa)
    assert isinstance(chosen("auto", CPU, True), Sdpa)
    assert "auto chose sdpa on CPU (not flash4: it needs a CUDA device" in caplog.text


def test_an_explicit_request_is_met_or_refused_with_the_reason():
    assert isinstance(chosen("reference", GPU, True), Reference)
    with pytest.raises(ConfigError, match=r"cudnn.*needs a CUDA device"):
        chosen("cudnn", CPU, False)
    with pytest.raises(ConfigError, match=r"flash.*an Ampere GPU or a newer one, this is Tesla V100"):
        chosen("flash", replace(GPU, name="Tesla V100", capability=(7, 0)), False)
    with pytest.raises(ConfigError, match=r"flash.*keep documents apart"):
        chosen("flash", GPU, True)
    with pytest.raises(ConfigError, match=r"no such backend.*flash4, cudnn, flash, flex, sdpa, reference"):
        chosen("fast", CPU, False)


def test_whole_row_kernels_refuse_documents():
    with pytest.raises(ConfigError, match="keeps documents apart"):
        FusedSdpa(SDPBackend.FLASH_ATTENTION).mask(documents(1, 8))


@pytest.mark.gpu
@pytest.mark.parametrize(("request_", "masked"), [("cudnn", False), ("flash", False), ("flex", True), ("sdpa", True)])
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_kernels_equal_the_reference_in_bf16(request_, masked, compiled):
    device = this_device(0)
    qkv = inputs(300, 8, 2, torch.bfloat16, "cuda", width=128)
    docs = documents(2, 300).cuda() if masked else None
    attend = choose_attention(request_, device, masked, 128, torch.bfloat16)
    mask = attend.mask(docs)
    call = torch.compile(lambda *x: attend(*x), fullgraph=True) if compiled else attend
    out = call(*qkv, mask)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    expected = Reference()(*exact, Reference().mask(docs))
    cotangent = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, qkv, cotangent)]
    theirs = [expected, *torch.autograd.grad(expected, exact, cotangent.double())]
    assert error(ours, theirs) < 2e-2
