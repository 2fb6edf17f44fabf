"""Attention whose heads are exchanged for positions, there and back in one message each.

A sequence lies over n ranks in zigzag: of its 2n pieces, rank r holds r and 2n-1-r. `pieces` here are what the ranks hold, in that order,
[n, 2, ...].

b batch rows, T positions of the sequence, u = T/2n those of a piece, h query heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from math import prod

import torch
from torch import Tensor

from paraxis.ops.attention_parts import Parts
from paraxis.parallel.collectives import Group, arrived, exchange
from paraxis.parallel.once import once


def in_natural_order(pieces: Sequence[Sequence[Tensor]]) -> Tensor:
    """[n, 2] pieces, each [b, u, ...], to [b, T, ...]."""
    return torch.cat([*(early for early, _ in pieces), *(late for _, late in reversed(pieces))], dim=1)


def in_pieces(x: Tensor, ranks: int) -> list[list[Tensor]]:
    """[b, T, ...] in natural order to [n, 2] pieces, each [b, u, ...]: views."""
    pieces = x.unflatten(1, (2 * ranks, -1)).unbind(1)
    return [[pieces[rank], pieces[-1 - rank]] for rank in range(ranks)]


@dataclass(frozen=True)
class Message:
    """Tensors of some heads, end to end: one row for each rank. `shapes` are those of a rank's part: [2, b, u, heads, width] each."""

    shapes: tuple[tuple[int, ...], ...]

    def join(self, row_nx: Tensor) -> list[Tensor]:
        """Each tensor of all positions, [b, T, heads, width]."""
        parts = row_nx.split([prod(shape) for shape in self.shapes], dim=1)
        return [in_natural_order([x.unbind() for x in part.unflatten(1, shape)]) for part, shape in zip(parts, self.shapes, strict=True)]

    def split(self, tensors: Sequence[Tensor], ranks: int) -> Tensor:
        """The message [n, x] that `join` takes apart."""
        by_rank = zip(*(in_pieces(x, ranks) for x in tensors), strict=True)
        return torch.cat([piece.flatten() for one in by_rank for pieces in one for piece in pieces]).view(ranks, -1)


class _OverAllPositions(torch.autograd.Function):
    """Causal attention of whole rows. Takes a message [n, x] with queries, keys and values; gives one with its output."""

    @staticmethod
    def forward(ctx, message: Tensor, taken: Message, given: Message, parts: Parts, group: Group) -> Tensor:  # type: ignore[override]
        q, k, v = taken.join(arrived(exchange(message, group)))
        out, lse = once(partial(parts.forward, q, k, v, causal=True, documents=None))
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = taken, given, parts, group
        return arrived(exchange(given.split([out], group.size()), group))

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        taken, given, parts, group = ctx.settings
        [grad] = given.join(arrived(exchange(grad, group)))
        grads = parts.backward(grad, *ctx.saved_tensors, causal=True, documents=None)
        return arrived(exchange(taken.split(grads, group.size()), group)), None, None, None, None


def exchange_and_attend(message: Tensor, taken: Message, given: Message, parts: Parts, group: Group) -> Tensor:
    """Causal attention of whole rows, over some heads on each rank: q, k and v as `taken` says become an output as `given` says."""
    return _OverAllPositions.apply(message, taken, given, parts, group)


def message_of(tensors: Sequence[Tensor], ranks: int) -> tuple[Tensor, Message]:
    """What a rank with positions [b, t, h, d] of each tensor sends: to each rank its heads."""
    parts = []
    for x_bthd in tensors:
        x = x_bthd.unflatten(2, (ranks, -1)).unflatten(1, (2, -1))  # [b, 2, u, n, heads, d]
        parts.append(x.permute(3, 1, 0, 2, 4, 5))
    return torch.cat([part.flatten(1) for part in parts], dim=1), Message(tuple(tuple(part.shape[1:]) for part in parts))


def output_of(message: Tensor, given: Message) -> Tensor:
    """The one tensor of a message that came back, as `message_of` took it: [b, t, h, d]."""
    [shape] = given.shapes
    x = message.unflatten(1, shape)  # [n, 2, b, u, heads, d]
    return x.permute(2, 1, 3, 0, 4, 5).flatten(3, 4).flatten(1, 2)
