"""Attention in blocks of queries and keys, where a row's positions are cut in pieces: which blocks there are, and their sum.

Attention is causal and confined to documents, which are runs of consecutive positions. So two pieces of a row have at most one
document in common, the earlier piece ends with it, the later one starts with it, and what the later sees of the earlier is a
rectangle of queries and keys with nothing to hide. Only a piece with itself has several documents, each causal. No block needs
a mask, and no block has a query without keys.

b batch rows, T positions of the sequence, t those of a rank, s keys, h query heads, g key/value heads, d head width.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise

import torch
from torch import Tensor

from paraxis.base.dtypes import at_least_fp32
from paraxis.ops.attention_parts import Gradients, Merged, Parts, Runs
from paraxis.parallel.collectives import Group, arrived, shift
from paraxis.parallel.once import once


@dataclass(frozen=True)
class Block:
    """Queries and keys, as slices of what the rank has at hand: all see all, or if `causal` those up to their own.

    `documents` are those of a causal block that has several in some row.
    """

    rows: slice
    queries: slice
    keys: slice
    causal: bool
    documents: Runs | None = None


@dataclass(frozen=True)
class Plan:
    """A rank's attention: the blocks to compute at each step; between steps, keys and values move one rank on."""

    steps: Sequence[Sequence[Block]]

    @property
    def whole(self) -> Block | None:
        """The one block that there is, where it is all that the rank has at hand: nothing is merged then."""
        blocks = [block for step in self.steps for block in step]
        return blocks[0] if [(block.rows, block.queries, block.keys) for block in blocks] == [(slice(None),) * 3] else None


class Documents:
    """Where the documents of each row [b, T] begin, kept on the host, and the blocks that they leave of `pieces` a row."""

    def __init__(self, documents_bT: Tensor, pieces: int):
        self._piece = documents_bT.shape[1] // pieces
        self._device = documents_bT.device
        changes = (documents_bT[:, 1:] != documents_bT[:, :-1]).cpu()  # one wait for the device in a forward
        # Of each row: where each document begins, and last where a next one would.
        self._begins = [[0, *(row.nonzero().flatten() + 1).tolist(), documents_bT.shape[1]] for row in changes]

    def blocks(self, query_pieces: Sequence[int], key_pieces: Sequence[int]) -> list[Block]:
        """What these pieces see of those, as slices of what the two lists hold."""
        blocks = []
        for at_q, q in enumerate(query_pieces):
            for at_k, k in enumerate(key_pieces):
                if k == q:
                    own = (slice(n * self._piece, (n + 1) * self._piece) for n in (at_q, at_k))
                    blocks.append(Block(slice(None), *own, causal=True, documents=self._runs(q)))
                elif k < q:
                    blocks += self._rectangles(at_q, q, at_k, k)
        return blocks

    def _rectangles(self, at_q: int, q: int, at_k: int, k: int) -> list[Block]:
        """What piece `q` sees of the earlier piece `k`: one rectangle for neighbouring rows in which it is the same."""
        blocks = []
        for (queries, keys), same in groupby(range(len(self._begins)), key=lambda row: self._shared(row, q, k)):
            rows = list(same)
            if keys:
                first_queries = slice(at_q * self._piece, at_q * self._piece + queries)
                last_keys = slice((at_k + 1) * self._piece - keys, (at_k + 1) * self._piece)
                blocks.append(Block(slice(rows[0], rows[-1] + 1), first_queries, last_keys, causal=False))
        return blocks

    def _shared(self, row: int, q: int, k: int) -> tuple[int, int]:
        """How many of the first positions of piece `q`, and of the last of the earlier piece `k`, are of one document."""
        begins, first = self._begins[row], q * self._piece
        following = bisect_right(begins, first)
        keys = (k + 1) * self._piece - max(begins[following - 1], k * self._piece)
        return (min(begins[following] - first, self._piece), keys) if keys > 0 else (0, 0)

    def _runs(self, piece: int) -> Runs | None:
        """The documents of one piece, its rows end to end; None where no row has two."""
        first, after = piece * self._piece, (piece + 1) * self._piece
        ends = [0]
        for row, begins in enumerate(self._begins):
            inner = begins[bisect_right(begins, first) : bisect_left(begins, after)]
            ends += [row * self._piece + end - first for end in (*inner, after)]
        if len(ends) == len(self._begins) + 1:
            return None
        longest = max(end - begin for begin, end in pairwise(ends))
        return Runs(torch.tensor(ends, dtype=torch.int32).to(self._device, non_blocking=True), longest)


def _pass_on(tensors: Sequence[Tensor], group: Group) -> Callable[[], list[Tensor]]:
    """Starts sending `tensors` to the next rank; the result waits for, and gives, what came from the one before.

    Not by isend and irecv: torch marks what those read and write as in use by their stream, and until the device has come that far a
    host that is ahead finds its memory taken.
    """
    travelling = [shift(x, 1, group) for x in tensors]
    return lambda: [arrived(x) for x in travelling]


class _BlockAttention(torch.autograd.Function):
    """Attention by the blocks of a plan. With several steps, keys and values (and, going back, their gradients) go round `group`."""

    @staticmethod
    def forward(ctx, q, k, v, plan: Plan, parts: Parts, group: Group | None) -> Tensor:  # type: ignore[override]
        out, lse = once(partial(_forward, q, k, v, plan, parts, group))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = plan, parts, group
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        saved = ctx.saved_tensors
        grads = _backward(grad.contiguous(), *saved, *ctx.settings)  # the kernels take no expanded gradient
        return *(x.to(given.dtype) for x, given in zip(grads, saved[:3], strict=True)), None, None, None


def _forward(q: Tensor, k: Tensor, v: Tensor, plan: Plan, parts: Parts, group: Group | None) -> tuple[Tensor, Tensor]:
    """The output, in the queries' dtype, and the log-sum-exp."""
    if block := plan.whole:
        out, lse = parts.forward(q, k, v, causal=block.causal, documents=block.documents)
        return out.to(q.dtype), at_least_fp32(lse)
    merged = Merged.nothing(q, v.shape[-1])
    k_v = [k, v]
    for number, blocks in enumerate(plan.steps):
        coming = _pass_on(k_v, group) if group and number + 1 < len(plan.steps) else None
        for block in blocks:
            at_q, (at_k, at_v) = q[block.rows, block.queries], (x[block.rows, block.keys] for x in k_v)
            part = parts.forward(at_q, at_k, at_v, causal=block.causal, documents=block.documents)
            merged.add(block.rows, block.queries, *part)
        k_v = coming() if coming else k_v
    return merged.out_bthd.to(q.dtype), merged.lse_bht


def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, plan: Plan, parts: Parts, group: Group | None
) -> Gradients:
    """The gradients of q, k and v, in at least fp32 where they are sums."""
    if block := plan.whole:
        return parts.backward(grad, q, k, v, out, lse, causal=block.causal, documents=block.documents)
    q_grad = torch.zeros_like(at_least_fp32(q))
    k_v, gone, grads = [k, v], None, []
    for number, blocks in enumerate(plan.steps):
        coming = _pass_on(k_v, group) if group and number + 1 < len(plan.steps) else None
        grads = [torch.zeros_like(at_least_fp32(x)) for x in k_v]
        for block in blocks:
            at_q, at_grad, at_out = (x[block.rows, block.queries] for x in (q, grad, out))
            at_k, at_v = (x[block.rows, block.keys] for x in k_v)
            at_lse = lse[block.rows, :, block.queries]
            made = parts.backward(at_grad, at_q, at_k, at_v, at_out, at_lse, causal=block.causal, documents=block.documents)
            for total, at, part in zip((q_grad, *grads), (block.queries, block.keys, block.keys), made, strict=True):
                total[block.rows, at] += part
        # What earlier ranks found out about these keys has travelled behind them, in at least fp32 since it is a sum over ranks.
        grads = [a + b for a, b in zip(grads, gone(), strict=True)] if gone else grads
        gone = _pass_on(grads, group) if group and len(plan.steps) > 1 else None
        k_v = coming() if coming else k_v
    k_grad, v_grad = gone() if gone else grads
    return q_grad, k_grad, v_grad


def attend_in_blocks(q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, plan: Plan, parts: Parts, group: Group | None) -> Tensor:
    """Attention as `plan` has it. Keys and values are those at hand in its first step; with several, they go round `group`."""
    return _BlockAttention.apply(q_bthd, k_bsgd, v_bsgd, plan, parts, group)
