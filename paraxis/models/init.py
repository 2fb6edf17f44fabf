"""First values of parameters, from counters: the same on every layout, and each rank makes only its own part.

An element's value is a pure function of (seed, parameter name, flat index in the whole parameter). The index is hashed with
splitmix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"), started from a SHA-256 of seed and
name; 33 bits of the hash become a sign and a probability, and the inverse normal distribution makes a normal deviate of them.
All of it is element-wise, so how a parameter is cut into boxes cannot matter.
"""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from paraxis.base.layout import Box, Placed, matching

# Elements made at a time: a few tens of MiB of temporaries however large the parameter is.
CHUNK = 1 << 22


@dataclass(frozen=True)
class Normal:
    """Independent normal deviates of mean 0."""

    std: float


@dataclass(frozen=True)
class Ones:
    """All ones."""


@dataclass(frozen=True)
class Zeros:
    """All zeros."""


Init = Normal | Ones | Zeros
InitTable = Mapping[str, Init]


def initialise(model: nn.Module, local: Tensor, placed: Placed, seed: int) -> None:
    """Gives `local`, the stored part of one parameter, its first values by the model's `init` table, or else the default rule."""
    rule = matching(getattr(model, "init", {}), placed.name) or default_rule(placed.name, placed.shape)
    assert isinstance(rule, Init), f"init[{placed.name!r}] is {rule!r}, not a rule of models/init.py"
    fill_(local, rule, seed=seed, name=placed.name, shape=placed.shape, box=placed.stored)


def default_rule(name: str, shape: tuple[int, ...]) -> Init:
    """Zero biases, other vectors (the weights of norms) one, matrices Normal(0.02)."""
    if name.rpartition(".")[2] == "bias":
        return Zeros()
    return Normal(0.02) if len(shape) > 1 else Ones()


@torch.no_grad()
def fill_(local: Tensor, rule: Init, *, seed: int, name: str, shape: tuple[int, ...], box: Box) -> None:
    """Writes into `local` the values that `box` has in the whole parameter `name` of global `shape`.

    Values are made in fp32 and rounded to the dtype of `local`.
    """
    assert tuple(local.shape) == box.sizes, (name, local.shape, box)
    if isinstance(rule, Ones | Zeros):
        local.fill_(1 if isinstance(rule, Ones) else 0)
        return
    flat = local.view(-1) if local.is_contiguous() else local.new_empty(local.numel())
    key = _key(seed, name)
    for start in range(0, flat.numel(), CHUNK):
        part = flat[start : start + CHUNK]
        index = _flat_index(start, part.numel(), shape, box, local.device)
        part.copy_(_standard_normal(_hash(index, key)).mul_(rule.std))
    if not local.is_contiguous():
        local.copy_(flat.view(local.shape))


def _key(seed: int, name: str) -> int:
    """A signed 64-bit starting point from seed and name."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big", signed=True)


def _flat_index(start: int, count: int, shape: tuple[int, ...], box: Box, device: torch.device) -> Tensor:
    """Where elements start .. start + count of the flattened box lie in the flattened whole parameter: int64."""
    position = torch.arange(start, start + count, device=device)
    if box.sizes[1:] == shape[1:]:  # whole rows lie together
        return position.add_(box.offsets[0] * (box.numel // box.sizes[0])) if shape else position
    index = torch.zeros_like(position)
    stride = 1
    for offset, size, whole in zip(reversed(box.offsets), reversed(box.sizes), reversed(shape), strict=True):
        index += (position % size + offset) * stride
        position //= size
        stride *= whole
    return index


def _signed(constant: int) -> int:
    """A 64-bit pattern as the int64 that torch takes."""
    return constant - (1 << 64) if constant >= 1 << 63 else constant


def _hash(index: Tensor, key: int) -> Tensor:
    """splitmix64 of key + index: 64 well-mixed bits. Products of int64 wrap around, which is arithmetic modulo 2^64."""
    bits = index.mul_(_signed(0x9E3779B97F4A7C15)).add_(key)
    bits = _xor_shift(bits, 30).mul_(_signed(0xBF58476D1CE4E5B9))
    bits = _xor_shift(bits, 27).mul_(_signed(0x94D049BB133111EB))
    return _xor_shift(bits, 31)


def _xor_shift(bits: Tensor, by: int) -> Tensor:
    """bits ^ (bits >> by), shifting zeros in: int64's own shift repeats the sign, which the mask takes off."""
    return bits.bitwise_xor_((bits >> by).bitwise_and_((1 << (64 - by)) - 1))


def _standard_normal(bits: Tensor) -> Tensor:
    """A normal deviate in fp32 from each 64 bits: the top 32 choose a probability under a half, the lowest one the sign.

    Small probabilities keep fp32's relative precision, so both tails reach 6.3 standard deviations, finely.
    """
    sign = (bits & 1).mul_(2).sub_(1).float()
    below_half = (bits >> 32).bitwise_and_((1 << 32) - 1).float().add_(0.5).mul_(2.0**-33)
    return torch.special.ndtri(below_half).mul_(sign)
