"""FlashAttention-4 as an operator: what is asked of the package, what compilers and the planner are told, and when it is chosen."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from paraxis.base.device import Device
from paraxis.base.errors import ConfigError
from paraxis.ops import flash4
from paraxis.ops.attention import Flash4, Flex, FusedSdpa, Reference, choose_attention, document_mask
from paraxis.ops.attention_parts import CudnnParts, Flash4Parts, ReferenceParts, Runs, VarlenParts, choose_parts
from paraxis.parallel.remat import KEPT
from paraxis.parallel.tabulate import call_name
from paraxis.parallel.world import this_device
from paraxis.plan.operators import describe
from tests.ops.test_attention import documents, error, inputs, outcome
from tests.ops.test_attention_parts import DOCUMENTS, document_blocks, expected, in_blocks, runs
from tests.ops.test_attention_parts import inputs as block_inputs

HOPPER = Device("cuda", 0, "NVIDIA H200", 141 << 30, (9, 0))
AMPERE = Device("cuda", 0, "NVIDIA A100", 80 << 30, (8, 0))


def _runs(ends, longest):
    return None if ends is None else Runs(ends, longest)


def _rows(x, packed):
    return x[None] if packed else x


def _forward(q, k, v, *, causal, return_lse, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0):
    """In the place of the package's: [b, t, h, d], or of documents [n, h, d]; it has more to return than is wanted."""
    packed = cu_seqlens_q is not None
    assert return_lse
    assert (cu_seqlens_q is cu_seqlens_k, max_seqlen_q) == (True, max_seqlen_k)
    q, k, v = (_rows(x, packed) for x in (q, k, v))
    out, lse = ReferenceParts().forward(q, k, v, causal=causal, documents=_runs(cu_seqlens_q, max_seqlen_q))
    out, lse = out.to(q.dtype).contiguous(), lse.float().contiguous()
    return (out[0], lse[0], None) if packed else (out, lse, None)


def _backward(q, k, v, out, grad, lse, *, causal, deterministic, cu_seqlens_q=None, cu_seqlens_k=None, max_seqlen_q=0, max_seqlen_k=0):
    packed = cu_seqlens_q is not None
    q, k, v, out, grad, lse = (_rows(x, packed) for x in (q, k, v, out, grad, lse))
    made = ReferenceParts().backward(grad, q, k, v, out, lse, causal=causal, documents=_runs(cu_seqlens_q, max_seqlen_q))
    return tuple(x.to(q.dtype)[0] if packed else x.to(q.dtype) for x in made)


@pytest.fixture
def stand_in(monkeypatch):
    monkeypatch.setattr(flash4, "_kernels", lambda: SimpleNamespace(_flash_attn_fwd=_forward, _flash_attn_bwd=_backward))


@pytest.fixture
def installed(monkeypatch):
    monkeypatch.setattr(flash4, "installed_version", lambda: "4.0")


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_it_is_asked_for_what_the_reference_computes(stand_in, compiled, heads, kv_heads):
    qkv = inputs(33, heads, kv_heads, torch.float32)
    attend: Any = Flash4()
    if compiled:
        attend = torch.compile(lambda *x: Flash4()(*x), fullgraph=True, backend="aot_eager")
        attend.mask = Flash4().mask
    assert error(outcome(attend, qkv), outcome(Reference(), qkv)) < 1e-5


@pytest.mark.parametrize("turned", [False, True])
def test_fake_tensors_are_laid_out_as_real_ones(stand_in, turned):
    q, k, v = (x.detach().transpose(1, 2) for x in inputs(33, 4, 2, torch.float32))
    if turned:
        q, k, v = (x.contiguous() for x in (q, k, v))
    torch.library.opcheck(flash4.flash_attention_4, (q, k, v, True, None, 0))
    out, lse = flash4.flash_attention_4(q, k, v, True, None, 0)
    torch.library.opcheck(flash4.flash_attention_4_backward, (torch.randn_like(out), q, k, v, out, lse, True, None, 0))


def test_the_planner_prices_it_as_the_attention_that_it_is_and_checkpoints_keep_it():
    q, k, v = (torch.empty(2, heads, 96, 64, dtype=torch.bfloat16, device="meta") for heads in (8, 2, 2))
    theirs = torch.ops.aten._scaled_dot_product_flash_attention.default
    out, lse = flash4.flash_attention_4(q, k, v, True, None, 0)
    calls = {
        theirs: (q, k, v, 0.0, True),
        flash4.flash_attention_4._opoverload: (q, k, v, True, None, 0),
        flash4.flash_attention_4_backward._opoverload: (torch.empty_like(out), q, k, v, out, lse, True, None, 0),
    }
    known, ours, back = (
        describe(func, args, {}, func(*args), lambda x: x.untyped_storage()._cdata, "compute") for func, args in calls.items()
    )
    assert known is not None
    assert ours is not None
    assert back is not None
    assert (ours.sort, ours.sizes, ours.causal, ours.backward) == (known.sort, known.sizes, True, False)
    assert (back.sort, back.sizes, back.causal, back.backward) == ("attention", known.sizes, True, True)
    assert call_name(flash4.flash_attention_4._opoverload) == call_name(theirs) == "attention"
    assert flash4.flash_attention_4._opoverload in KEPT


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
def test_blocks_merged_are_attention_to_all_keys(stand_in, kv_heads):
    qkv, cotangent = block_inputs(kv_heads, torch.float32)
    assert error(in_blocks(Flash4Parts(), qkv, cotangent), expected(qkv, cotangent)) < 1e-5
    theirs = expected(qkv, cotangent, document_mask(DOCUMENTS))
    assert error(in_blocks(Flash4Parts(), qkv, cotangent, document_blocks()), theirs) < 1e-5


def test_auto_takes_it_for_whole_rows_where_it_is_installed(installed):
    def chosen(device=HOPPER, documents=False, width: int | None = 128, dtype=torch.bfloat16):
        return choose_attention("auto", device, documents, width, dtype)

    assert isinstance(chosen(), Flash4)
    assert isinstance(chosen(width=64, dtype=torch.float16), Flash4)
    assert isinstance(chosen(documents=True), Flex)
    for other in (chosen(AMPERE), chosen(width=192), chosen(width=None)):
        assert isinstance(other, FusedSdpa)
    assert isinstance(choose_parts(HOPPER, torch.bfloat16, True, 128), Flash4Parts)
    assert isinstance(choose_parts(HOPPER, torch.float32, False, 128), ReferenceParts)
    assert not isinstance(choose_parts(AMPERE, torch.bfloat16, False, 128), Flash4Parts)


def test_it_is_not_taken_for_blocks_where_another_was_asked_for(installed):
    assert isinstance(choose_parts(HOPPER, torch.bfloat16, False, 128, "cudnn"), CudnnParts)
    assert isinstance(choose_parts(HOPPER, torch.bfloat16, True, 128, "flex"), VarlenParts)
    assert isinstance(choose_parts(HOPPER, torch.bfloat16, False, 128, "flash4"), Flash4Parts)


def test_a_request_that_cannot_be_met_is_refused_with_the_reason(monkeypatch):
    def asked(device, width=128, masked=False):
        return choose_attention("flash4", device, masked, width, torch.bfloat16)

    monkeypatch.setattr(flash4, "installed_version", lambda: None)
    with pytest.raises(ConfigError, match=r"flash4.*the package flash-attn-4 is not installed"):
        asked(HOPPER)
    with pytest.raises(ConfigError, match=r"flash4.*Hopper and Blackwell GPUs, this is NVIDIA A100"):
        asked(AMPERE)
    with pytest.raises(ConfigError, match=r"flash4.*width 12 are not a multiple of 8"):
        asked(HOPPER, width=12)
    with pytest.raises(ConfigError, match=r"flash4.*keep documents apart"):
        asked(HOPPER, masked=True)
    with pytest.raises(ConfigError, match="flash4 sees whole rows"):
        Flash4().mask(documents(1, 8))


needs_package = pytest.mark.skipif(not flash4.installed_version(), reason=f"needs the package {flash4.PACKAGE}")


@pytest.mark.gpu
@needs_package
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize("compiled", [False, True])
def test_its_kernels_equal_the_reference_in_bf16(width, compiled):
    device = this_device(0)
    qkv = inputs(300, 8, 2, torch.bfloat16, "cuda", width=width)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    attend = choose_attention("flash4", device, False, width, torch.bfloat16)
    call = torch.compile(lambda *x: attend(*x), fullgraph=True) if compiled else attend
    out, theirs = call(*qkv, None), Reference()(*exact, None)
    cotangent = torch.randn_like(out)
    ours = [out, *torch.autograd.grad(out, qkv, cotangent)]
    assert error(ours, [theirs, *torch.autograd.grad(theirs, exact, cotangent.double())]) < 2e-2


@pytest.mark.gpu
@needs_package
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("masked", [False, True])
def test_its_blocks_equal_the_reference_in_bf16(kv_heads, masked):
    qkv, cotangent = block_inputs(kv_heads, torch.bfloat16, "cuda", width=64)
    exact = [x.detach().double().requires_grad_() for x in qkv]
    blocks = {"blocks": document_blocks("cuda")} if masked else {}
    theirs = expected(exact, cotangent.double(), document_mask(DOCUMENTS.cuda()) if masked else None)
    assert error(in_blocks(Flash4Parts(), qkv, cotangent, **blocks), theirs) < 2e-2


@pytest.mark.gpu
@needs_package
@pytest.mark.parametrize("ends", [[0, 12, 24], list(range(25)), [0, 1, 12, 23, 24]])
def test_its_log_sum_exp_of_documents_is_the_reference_s(ends):
    q, k, v = (x.detach() for x in block_inputs(2, torch.bfloat16, "cuda", width=64)[0])
    ours = Flash4Parts().forward(q, k, v, causal=True, documents=runs(ends, "cuda"))
    theirs = ReferenceParts().forward(q.double(), k.double(), v.double(), causal=True, documents=runs(ends, "cuda"))
    assert error(ours, theirs) < 1e-2


@pytest.mark.gpu
@needs_package
def test_its_gradients_are_the_same_twice_where_they_must_be():
    torch.use_deterministic_algorithms(True)
    try:
        qkv = inputs(2000, 8, 2, torch.bfloat16, "cuda", width=128)
        first, second = (outcome(Flash4(), qkv) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
