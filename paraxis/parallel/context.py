"""Context parallelism's attention: a sequence spread over ranks, each query still seeing every key before it.

Positions are cut in zigzag: 2n pieces, of which rank r holds r and 2n-1-r, so that under a causal mask every rank has the same
work (Brandon et al., 2023, "Striped Attention", arXiv:2311.09431, has the problem; the halves are from Llama 3, arXiv:2407.21783).

- `RingAttention` (Liu et al., 2023, arXiv:2310.01889): keys and values travel from rank to rank, blocks are merged.
- `UlyssesAttention` (Jacobs et al., 2023, arXiv:2309.14509): each rank gets all positions of some heads.
- `usp_attention` (Fang and Zhao, 2024, arXiv:2405.07719): Ulysses among neighbours, a ring across them.
- `AllGatherAttention`: each rank gets all keys and values.

b batch rows, T positions of the sequence, t = T/n those of a rank, h query heads, g key/value heads, d head width.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.base.errors import ConfigError
from paraxis.base.seams import Attend, Batch
from paraxis.ops.attention_parts import Parts
from paraxis.parallel.blocks import Block, Documents, Plan, attend_in_blocks
from paraxis.parallel.collectives import Group, gather_sequence
from paraxis.parallel.heads import Message, exchange_and_attend, in_natural_order, in_pieces, message_of, output_of
from paraxis.parallel.mesh import Mesh

_Made = TypeVar("_Made")


def zigzag_positions(length: int, ranks: int, rank: int) -> Tensor:
    """Which of `length` positions `rank` holds, int64 [length / ranks], rising. Raises ConfigError where they do not divide."""
    if length % (2 * ranks):
        below = length - length % (2 * ranks)
        nearest = " or ".join(str(n) for n in (below, below + 2 * ranks) if n)
        raise ConfigError(
            f"data.seq_len={length} cannot be split over cp={ranks}: it must be a multiple of 2 x cp = {2 * ranks}; the nearest: {nearest}"
        )
    piece = length // (2 * ranks)
    return torch.cat([torch.arange(number * piece, (number + 1) * piece) for number in _pieces_of(rank, ranks)])


def split_zigzag(x: Tensor, ranks: int) -> Tensor:
    """[b, T, ...] in natural order to [n, b, t, ...]: each rank's positions."""
    zigzag_positions(x.shape[1], ranks, 0)  # refuses a length that does not divide
    return torch.stack([torch.cat(pieces, dim=1) for pieces in in_pieces(x, ranks)])


def join_zigzag(shards: Tensor) -> Tensor:
    """[n, b, t, ...], each rank's positions, to [b, T, ...] in natural order."""
    return in_natural_order([shard.chunk(2, dim=1) for shard in shards])


def gather_zigzag(x: Tensor, group: Group) -> Tensor:
    """[b, t, ...], this rank's positions, to [b, T, ...] in natural order. Backward sums the ranks' gradients of this rank's positions."""
    return join_zigzag(gather_sequence(x, group).unflatten(1, (group.size(), -1)).movedim(1, 0))


def own_part(batch: Batch, ranks: int, rank: int) -> Batch:
    """The same rows with this rank's positions alone, of every field that has one value a position."""
    if ranks == 1:
        return batch
    tensors = {f.name: x for f in fields(batch) if isinstance(x := getattr(batch, f.name), Tensor)}
    sequences = {name: x for name, x in tensors.items() if x.shape[:2] == batch.tokens_bt.shape}
    return replace(batch, **{name: split_zigzag(x, ranks)[rank].contiguous() for name, x in sequences.items()})


def _pieces_of(rank: int, ranks: int) -> tuple[int, int]:
    return rank, 2 * ranks - 1 - rank


def _plan(documents_bt: Tensor | None, group: Group, key_pieces: Iterable[Sequence[int]]) -> Plan | None:
    """What this rank's queries see, step by step, of the pieces of keys that each step has at hand; None where rows are whole."""
    if documents_bt is None:
        return None
    ranks, rank = group.size(), group.rank()
    documents = Documents(gather_zigzag(documents_bt, group), 2 * ranks)
    return Plan([documents.blocks(_pieces_of(rank, ranks), pieces) for pieces in key_pieces])


@dataclass(frozen=True)
class RingAttention:
    """Keys and values travel round the ring, the next ones on their way while these are computed with."""

    group: Group
    parts: Parts
    _attend: Callable[..., Tensor] = field(init=False, repr=False, default_factory=lambda: _untraced(attend_in_blocks))

    def mask(self, documents_bt: Tensor | None) -> Plan | None:
        """Gathers all ranks' document numbers; the plan leaves out what has no document in common."""
        return _plan(documents_bt, self.group, [_pieces_of(source, self.group.size()) for source in self._sources()])

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: Plan | None) -> Tensor:
        plan = mask or Plan([[self._whole_block(source, q_bthd.shape[1])] for source in self._sources()])
        return self._attend(q_bthd, k_bsgd, v_bsgd, plan, self.parts, self.group)

    def _sources(self) -> list[int]:
        """Whose keys are at hand, step by step."""
        ranks, rank = self.group.size(), self.group.rank()
        return [(rank - step) % ranks for step in range(ranks)]

    def _whole_block(self, source: int, length: int) -> Block:
        """All that this rank's queries see of the keys of `source`: always one block, always half the work or less."""
        rank, rows, everything, half = self.group.rank(), slice(None), slice(0, length), length // 2
        if source == rank:
            return Block(rows, everything, everything, causal=True)  # the shard's positions rise, so its own mask is an ordinary one
        if source < rank:
            return Block(rows, everything, slice(0, half), causal=False)  # its early piece is before, its late piece after all queries
        return Block(rows, slice(half, length), everything, causal=False)  # only our late piece is after its pieces


@dataclass(frozen=True)
class AllGatherAttention:
    """Every rank gets all keys and values, and attends from its own positions. Memory for keys does not fall with ranks."""

    group: Group
    parts: Parts
    _attend: Callable[..., Tensor] = field(init=False, repr=False, default_factory=lambda: _untraced(attend_in_blocks))

    def mask(self, documents_bt: Tensor | None) -> Plan | None:
        """Gathers all ranks' document numbers; the plan leaves out what has no document in common."""
        return _plan(documents_bt, self.group, [range(2 * self.group.size())])

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: Plan | None) -> Tensor:
        k, v = (gather_zigzag(x, self.group) for x in (k_bsgd, v_bsgd))
        return self._attend(q_bthd, k, v, mask or Plan([self._whole_blocks(q_bthd.shape[1] // 2)]), self.parts, None)

    def _whole_blocks(self, piece: int) -> list[Block]:
        blocks = []
        for at, number in enumerate(_pieces_of(self.group.rank(), self.group.size())):
            queries, before = slice(at * piece, (at + 1) * piece), number * piece
            if before:
                blocks.append(Block(slice(None), queries, slice(0, before), causal=False))
            blocks.append(Block(slice(None), queries, slice(before, before + piece), causal=True))
        return blocks


@dataclass(frozen=True)
class UlyssesAttention:
    """All positions of h/n heads on each rank, in natural order: whole rows for `parts`, in one message each way, else for `attend`.

    Where there are fewer key/value heads than ranks, or they do not divide, each is repeated as little as makes every rank
    get its own; going back, the copies' gradients are summed.
    """

    group: Group
    attend: Attend
    parts: Parts | None = None
    _exchange: Callable[..., Tensor] = field(init=False, repr=False, default_factory=lambda: _untraced(_all_to_all))
    _whole_rows: Callable[..., Tensor] = field(init=False, repr=False, default_factory=lambda: _untraced(exchange_and_attend))

    def mask(self, documents_bt: Tensor | None) -> Any:
        """Whatever `attend` makes of the document numbers of all positions."""
        if documents_bt is None:
            return self.attend.mask(None)
        return self.attend.mask(gather_zigzag(documents_bt, self.group))

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: Any) -> Tensor:
        copies = kv_copies(q_bthd.shape[2], k_bsgd.shape[2], self.group.size())
        k_bsgd, v_bsgd = (x.repeat_interleave(copies, dim=2) if copies > 1 else x for x in (k_bsgd, v_bsgd))
        if self.parts is not None and mask is None:
            return self._attend_whole_rows((q_bthd, k_bsgd, v_bsgd), self.parts)
        q, k, v = (self._to_heads(x) for x in (q_bthd, k_bsgd, v_bsgd))
        return self._to_positions(self.attend(q, k, v, mask))

    def _attend_whole_rows(self, q_k_v: Sequence[Tensor], parts: Parts) -> Tensor:
        sent, taken = message_of(q_k_v, self.group.size())
        given = Message(((*taken.shapes[0][:-1], taken.shapes[2][-1]),))  # the output is as wide as values are
        return output_of(self._whole_rows(sent, taken, given, parts, self.group), given)

    def _to_heads(self, x_bthd: Tensor) -> Tensor:
        """[b, t, h, d] to [b, T, h/n, d], positions in natural order."""
        by_rank = x_bthd.unflatten(2, (self.group.size(), -1)).movedim(2, 0)
        return join_zigzag(self._exchange(by_rank, self.group))

    def _to_positions(self, x_bThd: Tensor) -> Tensor:
        """[b, T, h/n, d] to [b, t, h, d]."""
        by_rank = self._exchange(split_zigzag(x_bThd, self.group.size()), self.group)
        return by_rank.movedim(0, 2).flatten(2, 3)


def kv_copies(heads: int, kv_heads: int, ranks: int) -> int:
    """How often each key/value head is repeated so that `ranks` ranks each get the ones their query heads read.

    Raises ConfigError where the query heads do not divide over the ranks.
    """
    if heads % ranks:
        raise ConfigError(
            f"{ranks} context ranks exchange heads (parallel.cp with cp_kind=ulysses, or parallel.cp_ulysses), which does not divide "
            f"a rank's {heads} query heads; choose a smaller number, or parallel.cp_kind=ring"
        )
    per_kv_head = heads // kv_heads
    return next(n for n in range(1, per_kv_head + 1) if per_kv_head % n == 0 and kv_heads * n % ranks == 0)


def context_attention(kind: str, ulysses: int, mesh: Mesh, parts: Parts, whole: Parts | None, attend: Attend) -> Attend:
    """The attention called `kind` over the `cp` ranks: `parts` in rings; in Ulysses `whole`, if any, for whole rows, and else `attend`."""
    if kind == "ulysses":
        return UlyssesAttention(mesh.cp, attend, whole)
    if kind == "usp":
        inner, outer = mesh.context_grid(ulysses)
        return usp_attention(inner, outer, parts)
    return RingAttention(mesh.cp, parts) if kind == "ring" else AllGatherAttention(mesh.cp, parts)


def usp_attention(inner: Group, outer: Group, parts: Parts) -> UlyssesAttention:
    """Ulysses among the neighbours of `inner`, a ring across `outer`: rank = outer rank x inner size + inner rank.

    No more needs doing: neighbours' zigzag shards, joined in natural order, are the zigzag shard of their place in the outer ring.
    """
    return UlyssesAttention(inner, RingAttention(outer, parts))


class _AllToAll(torch.autograd.Function):
    """[n, ...]: entry i goes to rank i, and comes back when going back."""

    @staticmethod
    def forward(ctx, x: Tensor, group: Group) -> Tensor:  # type: ignore[override]
        ctx.group = group
        out = x.new_empty(x.shape)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx, grad: Tensor):  # type: ignore[override]
        return _AllToAll.apply(grad, ctx.group), None


def _all_to_all(x: Tensor, group: Group) -> Tensor:
    return _AllToAll.apply(x, group)


def _untraced(function: Callable[..., _Made]) -> Callable[..., _Made]:
    """`function`, around which a compiled block is cut in two: sends cannot be traced, and torch 2.11 traces all_to_all_single wrong.

    Wanted only when building, for it loads the compiler, which takes a second.
    """
    return cast("Callable[..., _Made]", torch.compiler.disable(function))
