"""The sum of several parts in a wider dtype than theirs, in one pass over memory."""

import torch
from torch import Tensor


# An operator of its own, so that a planner sees what it reads and writes, not the kernel.
@torch.library.custom_op("paraxis::sum_parts", mutates_args=("out_n",))
def sum_parts(parts_rn: Tensor, out_n: Tensor) -> None:
    """Writes the sum of r parts, contiguous, into `out_n`. Every addition is in its dtype, first part first."""
    if not parts_rn.is_cuda:
        reference_sum_parts(parts_rn, out_n)
        return
    from paraxis.ops.triton_sum import add_parts  # only a CUDA build of torch brings Triton

    add_parts(parts_rn, out_n)


@sum_parts.register_fake
def _(parts_rn: Tensor, out_n: Tensor) -> None: ...


def reference_sum_parts(parts_rn: Tensor, out_n: Tensor) -> None:
    """The same, part after part: what the kernel is held to."""
    out_n.copy_(parts_rn[0])
    for part_n in parts_rn[1:]:
        out_n.add_(part_n)
