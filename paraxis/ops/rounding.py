"""Stochastic rounding to bf16: up or down at random, so that on average nothing is lost (Gupta et al. 2015, arXiv 1502.02551).

An update smaller than half a step of bf16 would never move a number that is rounded to nearest; rounded so, it does, now and then. What
is random is a function of the number's place in the whole tensor, the tensor's name, a seed and a count: the same on every layout and
device, and after a resume. It is a hash of 32 bits (lowbias32 of Wellons' hash-prospector), of operations that Triton has too
(`triton_adamw.py`).
"""

from collections.abc import Sequence
from typing import NamedTuple
from zlib import crc32

import torch
from torch import Tensor

from paraxis.base.layout import Box

WORD = 0xFFFFFFFF
FACTORS = 0x7FEB352D, 0x846CA68B
HIGH, AGAIN = 0x85EBCA6B, 0x9E3779B9  # odd numbers that set the high word of an index, and a second hash, apart from the first


class Place(NamedTuple):
    """Where the entries of a part stand in the whole tensor: entry i of the part (row-major) is number

        offset + i // (middle * inner) * outer_stride + i // inner % middle * middle_stride + i % inner

    of the whole. `salt` tells tensors apart.
    """

    salt: int
    offset: int
    inner: int
    middle: int
    middle_stride: int
    outer_stride: int

    @property
    def depth(self) -> int:
        """How many of inner, middle and outer there are."""
        return 1 + bool(self.middle_stride) + bool(self.outer_stride)


def place_of(name: str, shape: Sequence[int], box: Box, seed: int) -> Place:
    """The place of the part `box` of a tensor. A dimension that the part has all of is one with the next outer dimension."""
    runs: list[list[int]] = []  # [entries of the part, stride in the whole], innermost first
    stride, offset, whole = 1, 0, False
    for size, start, held in zip(reversed(shape), reversed(box.offsets), reversed(box.sizes), strict=True):
        if runs and whole:
            runs[-1][0] *= held
        else:
            runs.append([held, stride])
        offset += start * stride
        whole = held == size
        stride *= size
    assert len(runs) <= 3, f"{name} is cut along {len(runs)} dimensions"
    (inner, _), (middle, middle_stride), (_, outer_stride) = (*(tuple(run) for run in runs), *((1, 0),) * (3 - len(runs)))
    salt = crc32(f"{seed} {name}".encode()) >> 1  # Triton takes numbers of 32 bits and of 31 as of two types
    return Place(salt, offset, inner, middle, middle_stride, outer_stride)


def bits_of(place: Place, like: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits for each entry of a part, int64 in its shape. `count`: a scalar, another one for other bits."""
    i = torch.arange(like.numel(), device=like.device)
    at = place.offset + i % place.inner
    if place.depth > 1:
        at += i // place.inner % place.middle * place.middle_stride + i // (place.inner * place.middle) * place.outer_stride
    key = hashed(hashed(count.long()) ^ place.salt)
    first = hashed((at & WORD) ^ ((at >> 32) * HIGH & WORD) ^ key)
    return first.view(like.shape), hashed(first ^ AGAIN).view(like.shape)


def round_at_random(x: Tensor, bits: Tensor) -> Tensor:
    """fp32 `x` in bf16: of the two neighbours one, each the likelier the nearer it is. `bits`: int64, the low 16 of which are random."""
    raised = (x.view(torch.int32) + (bits & 0xFFFF).int()) & -0x10000
    return torch.where(x.isfinite(), raised.view(torch.float32), x).to(torch.bfloat16)


def hashed(x: Tensor) -> Tensor:
    """Words of 32 bits, int64, each as another one that looks random."""
    x = (x ^ (x >> 16)) * FACTORS[0] & WORD
    x = (x ^ (x >> 15)) * FACTORS[1] & WORD
    return x ^ (x >> 16)
