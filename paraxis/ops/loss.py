"""Vocabulary projection and cross-entropy: a readable reference, and one that walks over chunks of tokens.

With logits z = W x and target y, a token's loss is logsumexp(z) - z[y] and its gradient with respect to z is
softmax(z) - onehot(y). Both need only two numbers a token besides z: logsumexp(z) and z[y]. That is what makes the loss
easy to split: over tokens here, and over the vocabulary by combining those two numbers between ranks (`merge`).

n tokens of a chunk, v vocabulary entries, m model width.
"""

from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor
from torch.nn import functional as F

from paraxis.base.dtypes import at_least_fp32
from paraxis.base.seams import IGNORE
from paraxis.base.strategy import LOSS_TOKENS

Merge = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


def reference_head_loss(x_btm: Tensor, weight_vm: Tensor, targets_bt: Tensor) -> Tensor:
    """The summed loss over targets that are not IGNORE, with all logits in memory: what the fast path is held to."""
    logits_nv = at_least_fp32(F.linear(x_btm, weight_vm)).flatten(0, -2)
    return F.cross_entropy(logits_nv, targets_bt.flatten(), ignore_index=IGNORE, reduction="sum")


def vocabulary_statistics(logits_nv: Tensor, targets_n: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """logsumexp of each token's logits, and its target's logit (0 where the target is not among these columns).

    Column 0 is vocabulary entry `first`. Both [n], of at least fp32.
    """
    z_nv = at_least_fp32(logits_nv)
    inside_n, column_n1 = _columns(targets_n, first, logits_nv.shape[1])
    picked_n = torch.where(inside_n, z_nv.gather(1, column_n1).squeeze(1), 0)
    return z_nv.logsumexp(1), picked_n


def logit_gradient(logits_nv: Tensor, targets_n: Tensor, lse_n: Tensor, first: int) -> Tensor:
    """d(summed loss)/d(logits), in the logits' dtype; zero for tokens whose target is IGNORE."""
    z_nv = at_least_fp32(logits_nv)
    kept_n1 = (targets_n != IGNORE)[:, None]
    inside_n, column_n1 = _columns(targets_n, first, logits_nv.shape[1])
    gradient_nv = (z_nv - lse_n[:, None]).exp_().mul_(kept_n1).to(logits_nv.dtype)
    # The target's entry, p - 1, is rounded once and from full precision: in bf16 a p near 1 would leave nothing.
    target_n1 = ((z_nv.gather(1, column_n1) - lse_n[:, None]).exp() - inside_n[:, None].to(z_nv.dtype)) * kept_n1
    return gradient_nv.scatter_(1, column_n1, target_n1.to(logits_nv.dtype))


def exponentiate_(z_nv: Tensor, targets_n: Tensor, first: int) -> tuple[Tensor, Tensor, Tensor]:
    """`vocabulary_statistics` of logits of at least fp32, and the largest of each token's, [n].

    In place of the logits are then the exponentials of what they are above the largest: for `softmax_gradient_`, which so needs none.
    """
    inside_n, column_n1 = _columns(targets_n, first, z_nv.shape[1])
    picked_n = torch.where(inside_n, z_nv.gather(1, column_n1).squeeze(1), 0)
    largest_n = z_nv.amax(1)
    total_n = z_nv.sub_(largest_n[:, None]).exp_().sum(1)
    return total_n.log() + largest_n, picked_n, largest_n


def softmax_gradient_(e_nv: Tensor, targets_n: Tensor, lse_n: Tensor, largest_n: Tensor, first: int, dtype: torch.dtype) -> Tensor:
    """`logit_gradient` in `dtype`, from the exponentials that `exponentiate_` has left, which are written over."""
    inside_n, column_n1 = _columns(targets_n, first, e_nv.shape[1])
    scale_n1 = ((largest_n - lse_n).exp() * (targets_n != IGNORE))[:, None]
    target_n1 = e_nv.gather(1, column_n1) * scale_n1 - inside_n[:, None].to(e_nv.dtype)
    return e_nv.mul_(scale_n1).to(dtype).scatter_(1, column_n1, target_n1.to(dtype))


def chunked_head_loss(
    x_btm: Tensor,
    weight_vm: Tensor,
    targets_bt: Tensor,
    *,
    chunk_tokens: int = LOSS_TOKENS,
    compiled: bool = False,
    first: int = 0,
    merge: Merge | None = None,
) -> Tensor:
    """The summed loss, a scalar of at least fp32, holding the logits of `chunk_tokens` tokens at a time (0: of all).

    Gradients are made during forward, while a chunk's logits are there, so that they are computed only once.
    With `compiled` the work between matrix products is fused into two kernels; without, it is in place, with one exponential an entry.
    For a rank that holds the vocabulary's entries from `first` on, `merge` turns its (logsumexp, target logit) into those of all ranks;
    its gradient of x is then its own part of a sum over ranks.
    """
    x_nm, targets_n = x_btm.flatten(0, -2), targets_bt.flatten()
    return _ChunkedHeadLoss.apply(x_nm, weight_vm, targets_n, chunk_tokens, compiled, first, merge, torch.is_grad_enabled())


class _ChunkedHeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_nm, weight_vm, targets_n, chunk_tokens, compiled, first, merge, grad_enabled):
        wants_x, wants_weight = (grad_enabled and wanted for wanted in ctx.needs_input_grad[:2])
        accumulate = torch.promote_types(x_nm.dtype, torch.float32)
        loss = x_nm.new_zeros((), dtype=accumulate)
        grad_x = torch.empty_like(x_nm, memory_format=torch.contiguous_format) if wants_x else None
        grad_weight = torch.zeros_like(weight_vm, dtype=accumulate) if wants_weight else None
        at_once = chunk_tokens or x_nm.shape[0]
        for start in range(0, x_nm.shape[0], at_once):
            chunk = slice(start, start + at_once)
            x, targets = x_nm[chunk], targets_n[chunk]
            logits, largest = x @ weight_vm.t(), None
            if compiled:
                lse, picked = _compiled()[0](logits, targets, first)
            else:
                logits = at_least_fp32(logits)
                lse, picked, largest = exponentiate_(logits, targets, first)
            if merge is not None:
                lse, picked = merge(lse, picked)
            loss += torch.where(targets != IGNORE, lse - picked, 0).sum()
            if wants_x or wants_weight:
                if largest is None:
                    logits = _compiled()[1](logits, targets, lse, first)
                else:
                    logits = softmax_gradient_(logits, targets, lse, largest, first, weight_vm.dtype)
            if grad_x is not None:
                torch.mm(logits, weight_vm, out=grad_x[chunk])
            if grad_weight is not None:
                _add_product(grad_weight, logits.t(), x)
            del logits  # or the last chunk's would be there beside both gradients of the weight
        ctx.save_for_backward(grad_x, None if grad_weight is None else grad_weight.to(weight_vm.dtype))
        return loss

    @staticmethod
    def backward(ctx, *grad_outputs):
        grad_loss = grad_outputs[0]
        # In place: they are used once, and the weight's is a gigabyte for a vocabulary of 128k.
        scaled = [None if gradient is None else gradient.mul_(grad_loss) for gradient in ctx.saved_tensors]
        return *scaled, None, None, None, None, None, None


def _columns(targets_n: Tensor, first: int, columns: int) -> tuple[Tensor, Tensor]:
    """Whether each target is one of `columns` from `first` on, and its column (any valid one where it is not)."""
    column_n = targets_n - first
    inside_n = (column_n >= 0) & (column_n < columns) & (targets_n != IGNORE)
    return inside_n, torch.where(inside_n, column_n, 0)[:, None]


def _add_product(sum_vm: Tensor, left_vn: Tensor, right_nm: Tensor) -> None:
    """sum += left @ right, without rounding the product to half precision on the way."""
    if sum_vm.dtype == left_vn.dtype:
        sum_vm.addmm_(left_vn, right_nm)
    elif sum_vm.is_cuda:
        torch.addmm(sum_vm, left_vn, right_nm, out_dtype=sum_vm.dtype, out=sum_vm)
    else:  # the CPU has no product of half-precision inputs with an fp32 result
        sum_vm.add_(left_vn @ right_nm)


@cache
def _compiled() -> tuple[Callable[..., tuple[Tensor, Tensor]], Callable[..., Tensor]]:
    return torch.compile(vocabulary_statistics, fullgraph=True), torch.compile(logit_gradient, fullgraph=True)
