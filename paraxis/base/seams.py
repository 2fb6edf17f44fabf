"""The one page on which rooms that never import each other meet: what a model, an attention, a loss and data must be.

b batch rows, t query positions, s key positions, h query heads, g key/value heads, d head width, m model width, v vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, ClassVar, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn

IGNORE = -100  # a target that is not trained on


@dataclass(frozen=True)
class Batch:
    """A micro-batch of rows. A recipe with other inputs may subclass it and add tensors whose first dimension is b.

    tokens_bt and targets_bt are int64, targets_bt is IGNORE where nothing is predicted. positions_bt counts from the
    start of each document when attention is confined to documents, else from the start of the row. documents_bt
    numbers the document each position belongs to within its row, or is None where attention sees the whole row.
    """

    tokens_bt: Tensor
    targets_bt: Tensor
    positions_bt: Tensor
    documents_bt: Tensor | None = None

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`, copied without blocking where the source is pinned."""
        moved = {f.name: value.to(device, non_blocking=True) for f in fields(self) if isinstance(value := getattr(self, f.name), Tensor)}
        return replace(self, **moved)

    @property
    def target_count(self) -> Tensor:
        """How many positions are trained on: an int64 scalar on the batch's device."""
        return (self.targets_bt != IGNORE).sum()


class Attend(Protocol):
    """Causal attention. `mask` prepares, once a forward, whatever `__call__` needs to keep documents apart."""

    def mask(self, documents_bt: Tensor | None) -> Any: ...

    def __call__(self, q_bthd: Tensor, k_bsgd: Tensor, v_bsgd: Tensor, mask: Any) -> Tensor: ...


class HeadLoss(Protocol):
    """Projection to the vocabulary and cross-entropy in one: the summed loss over targets, a scalar of at least fp32."""

    def __call__(self, x_btm: Tensor, weight_vm: Tensor, targets_bt: Tensor) -> Tensor: ...


@runtime_checkable
class HasAttention(Protocol):
    """A model whose attention can be exchanged: for a faster kernel, or one spread over ranks."""

    def use_attention(self, attend: Attend) -> None: ...


@runtime_checkable
class HasHeadLoss(Protocol):
    """A model that ends in a vocabulary projection whose loss can be exchanged: chunked, vocabulary-parallel."""

    def use_head_loss(self, head_loss: HeadLoss) -> None: ...


@runtime_checkable
class Staged(Protocol):
    """A model that a pipeline can cut. Parameter names stay as they are, so that checkpoints do not depend on the cut.

    `forward(batch, x)` takes the activations [b, t, m] of the stage before (None for the first stage) and returns activations, or the
    summed loss from the last stage. A tied embedding may stay in both the first and the last stage: training keeps the two equal.
    """

    def forward(self, batch: Batch, x_btm: Tensor | None = None) -> Tensor: ...

    def keep(self, layers: range) -> None:
        """Becomes one stage: drops all other blocks, what precedes block 0 unless it is kept, and what follows the last unless that is."""
        ...


class Dispatch(Protocol):
    """Runs experts on rows sorted by expert, wherever the experts live; the outputs come back in the same order.

    The first counts_e[0] rows of x_sm are for expert 0, and so on. `experts(x, counts)` runs those of this rank.
    """

    def __call__(self, x_sm: Tensor, counts_e: Tensor, experts: Callable[[Tensor, Tensor], Tensor]) -> Tensor: ...


class Routed(Protocol):
    """A mixture-of-experts layer, as training sees it; e experts. `routed_layers` finds them.

    `experts` holds parameters stacked over experts in dimension 0. `tally_s` is float64 [e + 1]: how often each expert was chosen since
    `begin_step`, and the summed entropy, in nats, of the tokens' probabilities.
    """

    experts: nn.Module
    tally_s: Tensor

    def use_dispatch(self, dispatch: Dispatch) -> None: ...

    def share_rows(self, parts: int, sum_counts: Callable[[Tensor], Tensor]) -> None:
        """Every packed row is spread over `parts` ranks; `sum_counts` sums an int64 tensor over them."""
        ...

    def begin_step(self, scale: Tensor) -> None:
        """Zeroes the tally. Auxiliary losses, summed over rows, are scaled by 1 / (rows of the step x ranks that repeat the layer)."""
        ...

    def end_step(self, counts_e: Tensor) -> None:
        """Moves the selection bias by the step's global counts, float64 [e], where the model balances its experts so."""
        ...


def routed_layers(model: nn.Module) -> dict[str, Routed]:
    """The mixture-of-experts layers of a model by name, in order.

    Not by `isinstance`: a protocol looks at the class, which does not say what modules and buffers its instances hold.
    """
    modules: dict[str, Any] = dict(cast(Any, model).named_modules())
    return {name: module for name, module in modules.items() if hasattr(module, "begin_step")}


class Model(Protocol):
    """What training needs of an `nn.Module`: `forward(batch)` returns the loss *summed* over targets.

    `layout` says where tensors may be split, `init` how parameters start (patterns to `Init` rules, see models/init.py),
    `keys` maps our names to Hugging Face's; `blocks()` lists the repeated units that are compiled,
    recomputed and gathered one at a time. `ends()`, where there is one, lists what else may be gathered by itself: `forward` has to
    reach the parameters of these modules by calling them.
    """

    layout: ClassVar[Mapping[str, Any]]

    def forward(self, batch: Batch) -> Tensor: ...

    def blocks(self) -> Sequence[nn.Module]: ...


class ModelConfig(Protocol):
    """A frozen dataclass that builds its model. `build` runs under `torch.device("meta")`: no values, no memory."""

    @property
    def vocab_size(self) -> int: ...

    def build(self) -> nn.Module: ...

    def flops_per_token(self, seq_len: int) -> float:
        """Floating-point operations of one trained token, forward and backward, causal attention counted once."""
        ...


class Rows(Protocol):
    """Training rows as a pure function of their index, the same on every rank: position is one integer.

    `row(i)` returns int64 arrays of length seq_len by Batch field name ("tokens_bt", ...). `length` is the number of rows of one
    pass, for held-out data; training rows go on for ever, pass after pass.
    """

    fingerprint: str
    length: int
    vocab_size: int

    def row(self, index: int) -> Mapping[str, Any]: ...


class RowsConfig(Protocol):
    """What a recipe's own `data` section must offer in place of `data.config.DataConfig`: a frozen dataclass."""

    @property
    def seq_len(self) -> int: ...

    def rows(self, seed: int) -> Rows: ...

    def held_out(self) -> Rows | None: ...


Forward = Callable[[Batch], Tensor]  # a batch to its summed loss
