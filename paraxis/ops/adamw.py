"""AdamW in one pass over memory, gradients scaled as they are read. What it is held to are torch's kernels, in `optim/build.py`."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from paraxis.base.device import Device

DTYPES = (torch.float32, torch.bfloat16)  # those whose steps are computed in fp32


def can_step(parameter: Tensor, device: Device) -> bool:
    """Whether `step_adamw` steps this parameter on this device."""
    # A torch that was built without CUDA brings no Triton, and computes on no GPU: it only plans for one.
    has_triton = torch.version.cuda is None or find_spec("triton") is not None
    return device.is_cuda and has_triton and parameter.is_contiguous() and parameter.dtype in DTYPES


# An operator of its own, so that a planner sees what it reads and writes, not the kernel.
@torch.library.custom_op("paraxis::step_adamw", mutates_args=("parameters", "exp_avgs", "exp_avg_sqs"))
def step_adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    updates: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Steps parameters that it `can_step`, none empty, and their running means, contiguous too; gradients are only read.

    Scalars on their device: `updates` (fp32) counts this one too; gradients are multiplied by `scale`; where `found_inf` (fp32) is 1,
    everything stays bitwise as it is. No host synchronisation.
    """
    from paraxis.ops.triton_adamw import step_tensor  # only a CUDA build of torch brings Triton

    scalars = (
        updates.new_ones(()) if scale is None else scale.float(),
        updates.new_zeros(()) if found_inf is None else found_inf,
        1 - beta_1**updates,
        (1 - beta_2**updates).sqrt(),
    )
    for p, g, m, v in zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True):
        step_tensor(p, g.contiguous(), m, v, scalars, (lr, beta_1, beta_2, eps, weight_decay))


@step_adamw.register_fake
def _(*args: object, **kwargs: object) -> None: ...
