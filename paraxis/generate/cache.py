"""Keys and values kept between generated tokens, attached to a model through its attention seam."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, runtime_checkable

from torch import Tensor

from paraxis.base.seams import Attend, HasAttention
from paraxis.ops.attention import Sdpa


@runtime_checkable
class Cacheable(HasAttention, Protocol):
    """A model whose attention can be exchanged and put back, and whose logits may start at any position."""

    attend: Attend

    def logits(self, tokens_bt: Tensor, positions_bt: Tensor) -> Tensor: ...


class CachedAttention:
    """Attention of new tokens to all tokens so far. Layers are told apart by the order in which a forward calls them."""

    def __init__(self, length: int) -> None:
        self._length = length
        self._kept: list[tuple[Tensor, Tensor]] = []  # of each layer, its keys and values: [b, length, g, d]
        self._seen = 0  # positions kept before this forward
        self._new = 0
        self._layer = 0
        self._attend = Sdpa()

    def mask(self, documents_bt: Tensor | None) -> None:
        """Begins a forward."""
        assert documents_bt is None, "generated text is one document"
        self._seen, self._new, self._layer = self._seen + self._new, 0, 0

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: None) -> Tensor:
        if self._layer == len(self._kept):
            shape = (k_bsgd.shape[0], self._length, *k_bsgd.shape[2:])
            self._kept.append((k_bsgd.new_empty(shape), v_bsgd.new_empty(shape)))
        keys, values = self._kept[self._layer]
        end = self._seen + k_bsgd.shape[1]
        keys[:, self._seen : end] = k_bsgd
        values[:, self._seen : end] = v_bsgd
        self._layer, self._new = self._layer + 1, k_bsgd.shape[1]
        return self._attend(q_bthd, keys[:, :end], values[:, :end], None)


@contextmanager
def cached(model: Cacheable, length: int) -> Iterator[None]:
    """Within it, `model.logits` of a few tokens continues the text so far, up to `length` positions; then attention is put back."""
    before = model.attend
    model.use_attention(CachedAttention(length))
    try:
        yield
    finally:
        model.use_attention(before)
