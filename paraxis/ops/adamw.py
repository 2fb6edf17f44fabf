"""AdamW in one pass over memory, gradients scaled as they are read; what is stored in bf16 is rounded stochastically.

Two ways: a kernel in Triton, and torch's own operators, which the kernel is held to. Both compute in fp32.
"""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from paraxis.base.device import Device
from paraxis.ops.rounding import Place, bits_of, round_at_random

DTYPES = (torch.float32, torch.bfloat16)  # those whose steps are computed in fp32


def has_kernel(parameter: Tensor, device: Device) -> bool:
    """Whether `step_adamw` steps this parameter on this device by a kernel."""
    # A torch that was built without CUDA brings no Triton, and computes on no GPU: it only plans for one.
    has_triton = torch.version.cuda is None or find_spec("triton") is not None
    return device.is_cuda and has_triton and parameter.is_contiguous() and parameter.dtype in DTYPES


# An operator of its own, so that a planner sees what it reads and writes, not how.
@torch.library.custom_op("paraxis::step_adamw", mutates_args=("parameters", "exp_avgs", "exp_avg_sqs"))
def step_adamw(
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    places: Sequence[int],
    kernel: bool,
    updates: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    lr: float,
    beta_1: float,
    beta_2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Steps parameters in fp32 or bf16, none empty, and their running means; gradients are only read.

    `places` has the numbers of each parameter's `Place`, one after another. `kernel`: whether all of them have one (`has_kernel`).
    Scalars on their device: `updates` (fp32) counts this one too; gradients are multiplied by `scale`; where `found_inf` (fp32) is 1,
    everything stays bitwise as it is. No host synchronisation.
    """
    if kernel:
        from paraxis.ops.triton_adamw import step_tensor  # only a CUDA build of torch brings Triton
    else:
        step_tensor = reference_step
    scalars = (
        updates.new_ones(()) if scale is None else scale.float(),
        updates.new_zeros(()) if found_inf is None else found_inf,
        1 - beta_1**updates,
        (1 - beta_2**updates).sqrt(),
        updates,
    )
    size = len(Place._fields)
    for number, (p, g, m, v) in enumerate(zip(parameters, gradients, exp_avgs, exp_avg_sqs, strict=True)):
        place = Place(*places[number * size : (number + 1) * size])
        step_tensor(p, g, m, v, place, scalars, (lr, beta_1, beta_2, eps, weight_decay))


@step_adamw.register_fake
def _(*args: object, **kwargs: object) -> None: ...


def reference_step(
    p: Tensor, g: Tensor, m: Tensor, v: Tensor, place: Place, scalars: tuple[Tensor, ...], numbers: tuple[float, ...]
) -> None:
    """What `triton_adamw.step_tensor` does, for tensors of any strides."""
    (scale, found_inf, correction_1, root_correction_2, updates), (lr, beta_1, beta_2, eps, weight_decay) = scalars, numbers
    gradient = g.float() * scale
    mean = torch.lerp(gradient, m.float(), beta_1)
    mean_square = torch.lerp(gradient.square(), v.float(), beta_2)
    parameter = p.float() * (1 - lr * weight_decay) - lr / correction_1 * mean / (mean_square.sqrt() / root_correction_2 + eps)
    of_means, of_parameter = bits_of(place, p, updates)
    for tensor, value, bits in ((p, parameter, of_parameter), (m, mean, of_means), (v, mean_square, of_means >> 16)):
        stored = round_at_random(value, bits) if tensor.dtype == torch.bfloat16 else value
        tensor.copy_(torch.where(found_inf == 1, tensor, stored))
