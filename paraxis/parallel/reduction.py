"""How the gradients of ranks that share parameters are summed: what FSDP2 asks of a reduce-scatter.

The other place of FSDP2's private parts, beside fsdp.py: what a group of parameters holds when it asks for memory.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.fsdp._fully_shard._fsdp_collectives import DefaultReduceScatter

from paraxis.ops.sum import sum_parts


class Reduction(DefaultReduceScatter):
    """Sums one group's gradients, in the reduce dtype, into memory of the stream that computes.

    `travels`, where it is narrower than the reduce dtype, is the dtype in which gradients are computed. They can then travel in it: every
    rank sends every other one its part, and each sums the parts that it gets. That is as exact as a reduce-scatter in the reduce dtype
    and half the bytes, unless gradients of several micro-batches were added before (`as_computed` says that they were not).
    """

    as_computed = False

    def __init__(self, group: Any, travels: torch.dtype | None, replicas: int) -> None:
        self._group, self._travels, self._replicas = group, travels, replicas
        self._computing: Any = None  # the stream on which FSDP asked for a reduction's input, until it asks for its output

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        """A reduction's input, then its output: FSDP asks for them in turn, for the second on a stream of its own.

        Memory of that stream is of no use to activations, which would have to do without what gradients took in the step before.
        """
        streams = torch.get_device_module(device)
        if self._computing is None:
            self._computing = streams.current_stream()
            travels = self._travels if self._travels is not None and self.as_computed else dtype
            return super().allocate(size, dtype=travels, device=device)
        computing, self._computing = self._computing, None
        if self._is_let_go(dtype):
            return super().allocate(size, dtype=dtype, device=device)
        # FSDP's stream has waited for all that computing was asked for so far, so whatever this memory held is done with.
        with streams.stream(computing):
            return super().allocate(size, dtype=dtype, device=device)

    def __call__(self, output_tensor: Tensor, input_tensor: Tensor, group: Any, op: Any, async_op: bool = False) -> Any:
        """Sums `input_tensor` [ranks x part], of which every rank has one, and leaves this rank's part in `output_tensor`.

        FSDP never asks for an `async_op`.
        """
        if input_tensor.dtype == output_tensor.dtype:
            return super().__call__(output_tensor, input_tensor, group, op, async_op)
        assert op == dist.ReduceOp.SUM, op
        parts = torch.empty_like(input_tensor)
        dist.all_to_all_single(parts, input_tensor, group=group)
        sum_parts(parts.view(group.size(), -1), output_tensor)
        return None

    def _is_let_go(self, dtype: torch.dtype) -> bool:
        """Whether FSDP drops the output while its stream may still read it, so that only that stream may have its memory next.

        Gradients that are added to earlier ones, or cast, or whose sum over replicas is put off.
        """
        added = any(held.sharded_param.grad is not None for held in self._group.fsdp_params)
        put_off = self._replicas > 1 and not self._group.all_reduce_grads
        return added or put_off or dtype != self._group._orig_dtype
