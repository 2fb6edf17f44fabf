"""Routing by hand-computed cases, and auxiliary losses whose gradients are those of their formulas."""

import math

import pytest
import torch

from paraxis.base.errors import ConfigError
from paraxis.ops.routing import (
    RoutingConfig,
    balance_loss,
    count_experts,
    entropy,
    inject,
    reorder,
    route,
    router_logits,
    sort_by_expert,
    tally_in_backward,
    z_loss,
)

F64 = torch.float64


def logits_of(*probabilities):
    """Logits whose softmax is exactly these rows."""
    return torch.tensor(probabilities, dtype=F64).log()


def test_softmax_gate_takes_the_most_probable_and_normalises():
    logits = logits_of([0.1, 0.4, 0.2, 0.3], [0.7, 0.05, 0.15, 0.1])
    routing = route(logits, RoutingConfig(experts=4, chosen=2))
    assert routing.expert_nk.tolist() == [[1, 3], [0, 2]]
    torch.testing.assert_close(routing.weight_nk, torch.tensor([[4 / 7, 3 / 7], [0.7 / 0.85, 0.15 / 0.85]], dtype=F64))
    assert routing.counts_e.tolist() == [1, 1, 1, 1]
    assert routing.counts_e.dtype == torch.int64


def test_without_normalising_weights_are_the_scaled_probabilities():
    routing = route(logits_of([0.1, 0.4, 0.2, 0.3]), RoutingConfig(experts=4, chosen=2, normalise=False, scale=16.0))
    torch.testing.assert_close(routing.weight_nk, torch.tensor([[6.4, 4.8]], dtype=F64))


def test_sigmoid_gate_scores_each_expert_alone():
    score = torch.tensor([[0.2, 0.8, 0.5, 0.6]], dtype=F64)
    routing = route(score.logit(), RoutingConfig(experts=4, chosen=2, gate="sigmoid", scale=2.5))
    assert routing.expert_nk.tolist() == [[1, 3]]
    torch.testing.assert_close(routing.weight_nk, torch.tensor([[2.5 * 0.8 / 1.4, 2.5 * 0.6 / 1.4]], dtype=F64))
    torch.testing.assert_close(routing.probability_ne, score / 2.1)


def test_the_bias_chooses_but_is_not_in_the_weights():
    score = torch.tensor([[0.2, 0.8, 0.5, 0.6]], dtype=F64)
    bias = torch.tensor([0.5, 0.0, 0.0, 0.0], dtype=F64)
    routing = route(score.logit(), RoutingConfig(experts=4, chosen=2, gate="sigmoid", normalise=False), bias)
    assert routing.expert_nk.tolist() == [[1, 0]]
    torch.testing.assert_close(routing.weight_nk, torch.tensor([[0.8, 0.2]], dtype=F64))


@pytest.mark.parametrize(("group_score", "expected"), [("max", [4, 0]), ("top2", [2, 3])])
def test_only_experts_of_the_best_groups_are_chosen(group_score, expected):
    # Groups {0, 1}, {2, 3}, {4, 5}: by their best expert 0.9 and 0.7 win, by the sum of two 1.2 wins over 1.0 and 0.75.
    score = torch.tensor([[0.7, 0.05, 0.6, 0.6, 0.9, 0.1]], dtype=F64)
    groups = 2 if group_score == "max" else 1
    config = RoutingConfig(experts=6, chosen=2, gate="sigmoid", groups=3, chosen_groups=groups, group_score=group_score)
    assert sorted(route(score.logit(), config).expert_nk[0].tolist()) == sorted(expected)


def test_a_bias_below_zero_does_not_let_other_groups_in():
    score = torch.tensor([[0.9, 0.1, 0.2, 0.3]], dtype=F64)
    bias = torch.tensor([0.0, -5.0, -1.0, -1.0], dtype=F64)
    config = RoutingConfig(experts=4, chosen=2, gate="sigmoid", groups=2, chosen_groups=1)
    assert sorted(route(score.logit(), config, bias).expert_nk[0].tolist()) == [0, 1]


def test_weights_are_of_at_least_fp32():
    config = RoutingConfig(experts=4, chosen=2)
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)):
        routing = route(torch.randn(3, 4).to(dtype), config)
        assert routing.weight_nk.dtype == routing.probability_ne.dtype == expected


def test_counts_are_per_row():
    expert_nk = torch.tensor([[0, 1], [0, 2], [2, 1], [2, 0]])
    assert count_experts(expert_nk, 4, rows=2).tolist() == [[2, 1, 1, 0], [1, 1, 2, 0]]


def test_balance_loss_of_each_row_by_hand():
    # Row 0: both tokens choose expert 0 of 2; f = (2, 0), P = (0.7, 0.3). Row 1: one each; f = (1, 1), so 1 whatever P is.
    probability = torch.tensor([[0.8, 0.2], [0.6, 0.4], [0.9, 0.1], [0.3, 0.7]], dtype=F64)
    counts = torch.tensor([[2, 0], [1, 1]])
    torch.testing.assert_close(balance_loss(probability, counts), torch.tensor(2 * 0.7 + 1.0, dtype=F64))


@pytest.mark.parametrize("parts", [2, 3])
def test_the_losses_of_a_rows_parts_add_up_to_the_rows(parts):
    logits = torch.randn(2, 6, 4, generator=torch.Generator().manual_seed(0), dtype=F64)
    counts = count_experts(logits.topk(2).indices.flatten(0, 1), 4, rows=2)

    def losses(logits_bte, parts):
        flat = logits_bte.flatten(0, 1)
        return torch.stack([balance_loss(flat.softmax(-1), counts, parts), z_loss(flat, 2, parts)])

    cut = torch.stack([losses(part, parts) for part in logits.chunk(parts, 1)]).sum(0)
    torch.testing.assert_close(cut, losses(logits, 1), rtol=1e-14, atol=0)


def test_entropy_is_summed_over_tokens_and_zero_where_an_expert_is_certain():
    probability = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0]], requires_grad=True)
    found = entropy(probability)
    assert found.dtype == F64
    assert not found.requires_grad
    assert found.item() == pytest.approx(math.log(4), rel=1e-7)


def test_z_loss_is_the_rows_mean_square_of_logsumexp():
    logits = torch.zeros(6, 4, dtype=F64)
    torch.testing.assert_close(z_loss(logits, rows=3), torch.tensor(3 * math.log(4) ** 2, dtype=F64))


@pytest.mark.parametrize("gate", ["softmax", "sigmoid"])
def test_injected_losses_have_the_gradient_of_the_formula_whatever_comes_from_above(gate):
    config = RoutingConfig(experts=8, chosen=2, gate=gate)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(12, 5, generator=g, dtype=F64)
    weight = torch.randn(8, 5, generator=g, dtype=F64)

    def explicit(w):
        logits = x @ w.T
        score = logits.softmax(-1) if gate == "softmax" else logits.sigmoid()
        chosen = torch.zeros_like(score).scatter(1, score.topk(2).indices, 1.0)
        total = 0
        for row in range(3):
            at = slice(4 * row, 4 * row + 4)
            share = chosen[at].sum(0) * 8 / (2 * 4)
            mean = (score / score.sum(-1, keepdim=True))[at].mean(0)
            total = total + 0.3 * (share * mean).sum() + 0.7 * (logits[at].exp().sum(-1).log() ** 2).mean()
        return 0.25 * total

    def probability_and_counts(logits, config):
        routing = route(logits, config)
        return routing.probability_ne, count_experts(routing.expert_nk, 8, rows=3)

    w = weight.clone().requires_grad_()
    (expected,) = torch.autograd.grad(explicit(w), w)

    for upstream in (1.0, 0.0, 100.0):
        w, passed = weight.clone().requires_grad_(), x.clone().requires_grad_()
        logits = x @ w.T
        loss = 0.3 * balance_loss(*probability_and_counts(logits, config)) + 0.7 * z_loss(logits, rows=3)
        y = inject(passed, 0.25 * loss)
        assert torch.equal(y, x)
        (upstream * y.sum()).backward()
        torch.testing.assert_close(w.grad, expected, rtol=1e-12, atol=1e-14)
        assert torch.equal(passed.grad, torch.full_like(x, upstream))


def test_a_tally_grows_in_backward_and_only_there():
    x, tally = torch.ones(3, requires_grad=True), torch.zeros(2)
    y = tally_in_backward(x, tally, torch.tensor([1.0, 2.0]))
    assert torch.equal(y, x)
    assert not tally.any()
    (5 * y.sum()).backward()
    assert x.grad.tolist() == [5, 5, 5]
    assert tally.tolist() == [1, 2]


@pytest.mark.parametrize(("dtype", "tolerance"), [(F64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 1e-2)])
def test_router_logits_are_a_product_in_at_least_fp32_that_keeps_its_operands_as_they_came(dtype, tolerance):
    g = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 16, generator=g, dtype=F64).to(dtype).requires_grad_() for n in (12, 4))
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.dtype) or t, lambda t: t):
        logits = router_logits(x, w)
    exact_x, exact_w = (t.detach().double().requires_grad_() for t in (x, w))
    exact = exact_x @ exact_w.T
    assert logits.dtype == (F64 if dtype == F64 else torch.float32)
    assert (logits - exact).abs().max() <= min(tolerance, 1e-6) * exact.abs().max()
    assert kept == [dtype, dtype]
    gradient = torch.randn(12, 4, generator=g, dtype=F64)
    logits.backward(gradient.to(logits.dtype))
    exact.backward(gradient)
    for ours, theirs in ((x, exact_x), (w, exact_w)):
        assert ours.grad.dtype == dtype
        assert (ours.grad - theirs.grad).abs().max() <= tolerance * theirs.grad.abs().max()


def test_pairs_are_sorted_by_expert_and_come_back_and_gradients_with_them():
    expert = torch.tensor([2, 0, 2, 1, 0, 1])
    order, inverse = sort_by_expert(expert)
    assert order.tolist() == [1, 4, 3, 5, 0, 2]  # equals as they stood
    assert torch.equal(order[inverse], torch.arange(6))
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, generator=g, dtype=F64, requires_grad=True)  # two pairs a token
    there = reorder(x, order, inverse, copies=2)
    assert torch.equal(there, x[order // 2])
    assert torch.equal(reorder(there, inverse, order), x.repeat_interleave(2, 0))
    assert torch.autograd.gradcheck(lambda x: reorder(x, order, inverse, 2), x)
    assert torch.autograd.gradcheck(lambda x: reorder(x, inverse, order), there.detach().requires_grad_())


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        ({"experts": 0}, "routing.experts=0"),
        ({"chosen": 9}, "routing.chosen=9 is more than the 8 experts"),
        ({"groups": 3}, "routing.groups=3 does not divide"),
        ({"groups": 4, "chosen_groups": 5}, "routing.chosen_groups=5"),
        ({"groups": 4, "chosen": 3}, "more than the 2 experts"),
        ({"groups": 8, "chosen_groups": 8, "group_score": "top2"}, "two experts in each"),
        ({"gate": "tanh"}, "routing.gate='tanh'"),
        ({"scale": 0.0}, "routing.scale"),
        ({"z_loss": -1.0}, "routing.z_loss=-1.0"),
        ({"bias_rate": -0.1}, "routing.bias_rate=-0.1"),
    ],
)
def test_nonsense_is_refused_by_name(wrong, said):
    with pytest.raises(ConfigError, match=said):
        RoutingConfig(**{"experts": 8, "chosen": 2} | wrong)
