"""The chunked loss is the reference's, value and gradients, whatever the chunks, and never holds all logits."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from paraxis.base.seams import IGNORE
from paraxis.ops.loss import (
    chunked_head_loss,
    exponentiate_,
    logit_gradient,
    reference_head_loss,
    softmax_gradient_,
    vocabulary_statistics,
)


def inputs(dtype=torch.float64, rows=3, length=7, width=16, vocabulary=50, device="cpu"):
    g = torch.Generator().manual_seed(0)
    x = torch.randn(rows, length, width, generator=g, dtype=torch.float64)
    weight = torch.randn(vocabulary, width, generator=g, dtype=torch.float64)
    targets = torch.randint(vocabulary, (rows, length), generator=g)
    targets[0, 2:5] = IGNORE
    return x.to(device, dtype).requires_grad_(), weight.to(device, dtype).requires_grad_(), targets.to(device)


def outcome(head_loss, x, weight, targets, scale=0.125):
    loss = head_loss(x, weight, targets)
    return [loss, *torch.autograd.grad(loss * scale, (x, weight))]


def error(ours, theirs) -> float:
    return max(((a.double() - b.double()).abs().max() / b.double().abs().max()).item() for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
@pytest.mark.parametrize("chunk_tokens", [1, 4, 21, 1000])
def test_loss_and_gradients_equal_the_reference(dtype, tolerance, chunk_tokens):
    x, weight, targets = inputs(dtype)
    ours = outcome(lambda *a: chunked_head_loss(*a, chunk_tokens=chunk_tokens), x, weight, targets)
    exact = [t.detach().double().requires_grad_() for t in (x, weight)]
    assert error(ours, outcome(reference_head_loss, *exact, targets)) < tolerance
    assert ours[0].dtype == torch.promote_types(dtype, torch.float32)
    assert [g.dtype for g in ours[1:]] == [dtype, dtype]


def test_rows_without_any_target_add_nothing():
    x, weight, targets = inputs()
    loss, grad_x, grad_weight = outcome(lambda *a: chunked_head_loss(*a, chunk_tokens=7), x, weight, torch.full_like(targets, IGNORE))
    assert loss == 0
    assert not grad_x.any()
    assert not grad_weight.any()


def test_huge_logits_stay_finite():
    x, weight, targets = inputs(torch.float32)
    ours = outcome(chunked_head_loss, (x.detach() * 1e4).requires_grad_(), weight, targets)
    assert all(t.isfinite().all() for t in ours)


def test_without_gradients_only_the_loss_is_computed():
    x, weight, targets = inputs()
    with torch.no_grad(), Largest() as largest:
        loss = chunked_head_loss(x, weight, targets, chunk_tokens=2)
    assert not loss.requires_grad
    assert largest.elements < weight.numel()
    torch.testing.assert_close(loss, reference_head_loss(x, weight, targets))


def test_a_frozen_head_gets_no_gradient():
    x, weight, targets = inputs()
    frozen = weight.detach()
    (grad_x,) = torch.autograd.grad(chunked_head_loss(x, frozen, targets), x)
    torch.testing.assert_close(grad_x, torch.autograd.grad(reference_head_loss(x, frozen, targets), x)[0])


class Largest(TorchDispatchMode):
    """Remembers the largest tensor any operator made."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if isinstance(out, torch.Tensor) and not func.is_view:
            self.elements = max(self.elements, out.numel())
        return out


def test_the_logits_of_all_tokens_are_never_held():
    tokens, width, vocabulary, chunk = 64, 4, 100, 8
    x, weight, targets = inputs(rows=1, length=tokens, width=width, vocabulary=vocabulary)
    with Largest() as largest:
        outcome(lambda *a: chunked_head_loss(*a, chunk_tokens=chunk), x, weight, targets)
    assert largest.elements == chunk * vocabulary


def test_backward_does_not_change_its_answer_silently_when_run_twice():
    x, weight, targets = inputs()
    loss = chunked_head_loss(x, weight, targets)
    loss.mul(0.5).backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.mul(0.5).backward()


def test_two_halves_of_the_vocabulary_merge_into_the_whole_loss():
    x, weight, targets = inputs()
    halves = weight.detach()[:20], weight.detach()[20:]
    parts = [(half, first) for half, first in zip(halves, (0, 20), strict=True)]
    flat = targets.flatten()
    own = [vocabulary_statistics(x.detach().flatten(0, 1) @ half.t(), flat, first) for half, first in parts]
    lse = torch.stack([lse for lse, _ in own]).logsumexp(0)
    picked = own[0][1] + own[1][1]
    expected = outcome(reference_head_loss, x, weight, targets, scale=1.0)
    grad_x = torch.zeros_like(x)
    for half, first in parts:
        leaf_x, leaf_half = x.detach().requires_grad_(), half.clone().requires_grad_()
        loss = chunked_head_loss(leaf_x, leaf_half, targets, first=first, merge=lambda *_: (lse, picked))
        part_x, grad_half = torch.autograd.grad(loss, (leaf_x, leaf_half))
        grad_x += part_x
        assert error([loss, grad_half], [expected[0], expected[2][first : first + len(half)]]) < 1e-12
    assert error([grad_x], [expected[1]]) < 1e-12


@pytest.mark.parametrize("in_place", [False, True])
def test_a_likely_target_keeps_its_small_gradient_in_bf16(in_place: bool):
    logits = torch.tensor([[8.0, 0.0, 0.0]], dtype=torch.bfloat16)
    target = torch.tensor([0])
    if in_place:
        wide = logits.float()
        lse, _, largest = exponentiate_(wide, target, 0)
        gradient = softmax_gradient_(wide, target, lse, largest, 0, logits.dtype)
    else:
        lse, _ = vocabulary_statistics(logits, target, 0)
        gradient = logit_gradient(logits, target, lse, 0)
    assert gradient.dtype == torch.bfloat16
    assert gradient[0, 0].item() == pytest.approx(-2 * 2.718281828**-8, rel=1e-2)


def test_compiled_chunks_give_the_same():
    x, weight, targets = inputs(torch.float32)
    ours = outcome(lambda *a: chunked_head_loss(*a, chunk_tokens=7, compiled=True), x, weight, targets)
    assert error(ours, outcome(reference_head_loss, x, weight, targets)) < 1e-6


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_loss_and_gradients_equal_the_reference_in_fp64(compiled):
    x, weight, targets = inputs(torch.float64, length=64, width=64, vocabulary=512, device="cuda")
    ours = outcome(lambda *a: chunked_head_loss(*a, chunk_tokens=50, compiled=compiled), x, weight, targets)
    assert error(ours, outcome(reference_head_loss, x, weight, targets)) < 1e-12


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_gpu_loss_and_gradients_are_as_exact_as_the_reference_in_bf16(compiled):
    """Rounding logits to bf16 decides the error of both; ours may add what it rounds elsewhere."""
    x, weight, targets = inputs(torch.bfloat16, length=64, width=64, vocabulary=512, device="cuda")
    ours = outcome(lambda *a: chunked_head_loss(*a, chunk_tokens=50, compiled=compiled), x, weight, targets)
    exact = outcome(reference_head_loss, *[t.detach().double().requires_grad_() for t in (x, weight)], targets)
    assert error(ours, exact) < 1.25 * error(outcome(reference_head_loss, x, weight, targets), exact)
