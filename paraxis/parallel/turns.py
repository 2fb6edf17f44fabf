"""Attention whose heads are exchanged for positions a few at a time: what one turn sends travels while another one computes.

A sequence lies over n ranks in zigzag: of its 2n pieces, rank r holds r and 2n-1-r. `pieces` here are what the ranks hold, in that order,
[n, 2, ...]. Only the first turn's way in and the last one's way out have nothing to hide behind.

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

MOST_TURNS = 4  # three quarters of the messages are hidden then
LEAST_BYTES = 32 << 20  # of a turn's message: below that a host would ask for more kernels than the wait is worth


def turns_of(kv_heads: int, bytes: float) -> int:
    """In how many turns a rank that has so many key/value heads, and so many bytes to send for all heads, computes them."""
    return next(turns for turns in range(MOST_TURNS, 0, -1) if kv_heads % turns == 0 and (turns == 1 or bytes >= turns * LEAST_BYTES))


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


class _InTurns(torch.autograd.Function):
    """Causal attention of whole rows. Takes a message [n, x] with queries, keys and values for each turn; gives one with its output."""

    @staticmethod
    def forward(ctx, taken: Message, given: Message, parts: Parts, group: Group, *messages: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        coming = [exchange(message, group) for message in messages]
        kept, going = list[Tensor](), list[Tensor]()
        for message in coming:
            q, k, v = taken.join(arrived(message))
            out, lse = once(partial(parts.forward, q, k, v, causal=True, documents=None))
            going.append(exchange(given.split([out], group.size()), group))
            kept += [q, k, v, out, lse]
        ctx.save_for_backward(*kept)
        ctx.settings = taken, given, parts, group
        return tuple(arrived(message) for message in going)

    @staticmethod
    def backward(ctx, *grads: Tensor):  # type: ignore[override]
        taken, given, parts, group = ctx.settings
        coming = [exchange(grad, group) for grad in grads]
        saved, going = iter(ctx.saved_tensors), list[Tensor]()
        for message in coming:
            [grad] = given.join(arrived(message))
            q, k, v, out, lse = (next(saved) for _ in range(5))
            made = parts.backward(grad, q, k, v, out, lse, causal=True, documents=None)
            going.append(exchange(taken.split(made, group.size()), group))
        return None, None, None, None, *(arrived(message) for message in going)


def exchange_and_attend(messages: Sequence[Tensor], taken: Message, given: Message, parts: Parts, group: Group) -> tuple[Tensor, ...]:
    """Causal attention of whole rows, a few heads a turn: messages [n, x] with q, k and v as `taken` says become ones with its output."""
    return _InTurns.apply(taken, given, parts, group, *messages)


def messages_of(tensors: Sequence[Tensor], ranks: int, turns: int) -> tuple[list[Tensor], Message]:
    """What a rank with positions [b, t, h, d] of each tensor sends in each turn: the heads that the others compute then."""
    parts = []
    for x_bthd in tensors:
        x = x_bthd.unflatten(2, (ranks, turns, -1)).unflatten(1, (2, -1))  # [b, 2, u, n, turns, heads, d]
        parts.append(x.permute(4, 3, 1, 0, 2, 5, 6))
    messages = torch.cat([part.flatten(2) for part in parts], dim=2).contiguous()
    return list(messages.unbind()), Message(tuple(tuple(part.shape[2:]) for part in parts))


def outputs_of(messages: Sequence[Tensor], message: Message) -> Tensor:
    """The one tensor of messages that came back, as `messages_of` took it: [b, t, h, d]."""
    x = torch.stack([one.unflatten(1, message.shapes[0]) for one in messages])  # [turns, n, 2, b, u, heads, d]
    return x.permute(3, 2, 4, 1, 0, 5, 6).flatten(3, 5).flatten(1, 2)
