"""Linear layers whose matrix products are made in eight or four bits: the front of float8.py and fp4.py, and which device can."""

from collections.abc import Sequence

import torch
from torch import Tensor

from paraxis.base.device import Device
from paraxis.base.dtypes import LowPrecision
from paraxis.ops import float8, fp4

# Compute capability from which on a GPU has each kind of product, before which, and in words.
ABLE: dict[str, tuple[tuple[int, int], tuple[int, int], str]] = {
    "tensorwise": ((8, 9), (99, 0), "8.9 or more (Ada)"),
    "rowwise": ((9, 0), (99, 0), "9.0 or more (Hopper)"),
    "blockwise": ((9, 0), (10, 0), "9.0 (Hopper alone)"),
    "mxfp8": ((10, 0), (99, 0), "10.0 or more (Blackwell)"),
    "nvfp4": ((10, 0), (99, 0), "10.0 or more (Blackwell)"),
}
MOST_OFF = 0.03  # of a product of 384 summands, rounded to bf16; scales in a wrong order make it tens of per cent
# A small product in which every scale matters: rows, features, summed entries. Blocks of 128 are three and six, so no whole tiles.
TRIED = (384, 768, 384)


def scaled_linears(x: Tensor, weights: Sequence[Tensor], recipe: LowPrecision) -> tuple[Tensor, ...]:
    """What each weight [o, i] makes of x [..., i]: [..., o] in x's dtype. x is cast once for all, and they share one product.

    Tokens (the leading dimensions together), i and every o must be multiples of `recipe.multiple`.
    """
    make = fp4.fp4_linears if recipe.scaling == "nvfp4" else float8.float8_linears
    return tuple(y_no.view(*x.shape[:-1], -1) for y_no in make(x.flatten(0, -2), weights, recipe))


def scaling_problem(recipe: LowPrecision, device: Device) -> str | None:
    """Why this device cannot multiply as the recipe has it, or None. A CPU can, slowly: for tests and small trials."""
    if not device.is_cuda:
        return None
    least, below, needed = ABLE[recipe.scaling]
    if not least <= device.capability < below:
        has = f"{device.name} has {device.capability[0]}.{device.capability[1]}"
        return f"{recipe.scaling} products need an NVIDIA GPU of compute capability {needed}, and {has}"
    return kernel_problem(recipe, device) if device.torch.type == "cuda" else None  # a planner's device has no kernels to try


def kernel_problem(recipe: LowPrecision, device: Device) -> str | None:
    """Why the kernels of this torch cannot be trusted on the device, or None: they refuse a small layer, or are off."""
    products = f"{recipe.scaling} products of torch {torch.__version__} on {device.name}"
    try:
        off = error_of_kernel(recipe, device.torch)
    except (RuntimeError, ValueError) as error:
        return f"{products} fail: {str(error).splitlines()[0]}"
    return f"{products} are off by {100 * off:.3g}%" if not off <= MOST_OFF else None


def error_of_kernel(recipe: LowPrecision, device: torch.device) -> float:
    """How far outputs and gradients of a small layer are from those of the reference, over their size.

    Tried before a run trusts it: in what order a kernel reads scales differs between versions, and a wrong one says nothing.
    """
    random = torch.Generator().manual_seed(0)
    n, o, i = TRIED
    x = (torch.randn(n, i, generator=random) * torch.randn(n, 1, generator=random).exp()).bfloat16()
    weight = (torch.randn(o, i, generator=random) * torch.randn(o, 1, generator=random).exp()).bfloat16()
    gradient = torch.randn(n, o, generator=random).bfloat16()
    found = []
    for on in (device, torch.device("cpu")):
        own = [tensor.to(on).requires_grad_() for tensor in (x, weight)]
        with torch.enable_grad():
            y = scaled_linears(own[0], own[1:], recipe)[0]
            gradients = torch.autograd.grad(y, own, gradient.to(on))
        found.append([tensor.detach().double().cpu() for tensor in (y, *gradients)])
    return max(float((a - b).norm() / b.norm()) for a, b in zip(*found, strict=True))
