"""The vocabulary projection and its loss, spread over tensor-parallel ranks that each hold a part of the vocabulary.

Source: Shoeybi et al. 2019 (Megatron-LM), section 3: only two numbers a token cross ranks, never logits.
"""

from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from paraxis.ops.loss import chunked_head_loss
from paraxis.parallel.collectives import gather_sequence, max_over, sum_over


class VocabularyParallelLoss:
    """A HeadLoss for ranks whose weight holds v/n vocabulary rows; every rank returns the whole loss.

    Their x is [b, t/n, m] under `sequence` parallelism, else [b, t, m], of whose gradient each rank then makes a summand.
    """

    def __init__(self, group: dist.ProcessGroup, *, sequence: bool, chunk_tokens: int, compiled: bool) -> None:
        self.group, self.sequence = group, sequence
        self.loss = partial(chunked_head_loss, chunk_tokens=chunk_tokens, compiled=compiled)

    def __call__(self, x_btm: Tensor, weight_vm: Tensor, targets_bt: Tensor) -> Tensor:
        first = self.group.rank() * weight_vm.shape[0]
        whole_btm = gather_sequence(x_btm, self.group) if self.sequence else x_btm
        return self.loss(whole_btm, weight_vm, targets_bt, first=first, merge=self._merge)

    def _merge(self, lse_n: Tensor, picked_n: Tensor) -> tuple[Tensor, Tensor]:
        largest_n = max_over(lse_n.clone(), self.group)
        total_n, picked_n = sum_over(torch.stack([(lse_n - largest_n).exp(), picked_n]), self.group)
        return largest_n + total_n.log(), picked_n
