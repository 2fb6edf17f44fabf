"""Rotary position embedding in Hugging Face's half-split convention, with Llama 3's scaling of long wavelengths.

Su et al. 2021, "RoFormer" (arXiv:2104.09864): pair i of a head of width d turns by the angle position * theta^(-2i/d).
Here pair i is made of entries i and i + d/2 (the original interleaves 2i and 2i + 1): checkpoints in Hugging Face's
format are permuted for it.

Llama 3.1 (arXiv:2407.21783, section 3.4.2, and the code released with it) stretches slow pairs so that they cover a longer
context: pairs of a wavelength under original_context / high_frequency_factor stay, those over
original_context / low_frequency_factor turn `factor` times slower, and between the two the frequency is blended linearly.
"""

import math
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from paraxis.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class RopeConfig:
    """How positions turn queries and keys; `factor=1` leaves the frequencies as RoFormer has them."""

    theta: Annotated[float, "base of the wavelengths"] = 500_000.0
    factor: Annotated[float, "how many times slower the slowest pairs turn (Llama 3's scaling); 1 turns scaling off"] = 1.0
    low_frequency_factor: Annotated[float, "pairs of wavelength over original_context / this are scaled in full"] = 1.0
    high_frequency_factor: Annotated[float, "pairs of wavelength under original_context / this are not scaled"] = 4.0
    original_context: Annotated[int, "positions the unscaled frequencies were trained for"] = 8192

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ConfigError(f"rope.theta={self.theta} must be over 1; Llama 3 uses 500000")
        if self.factor < 1:
            raise ConfigError(f"rope.factor={self.factor} must be at least 1; use 1 for no scaling")
        if not 0 < self.low_frequency_factor < self.high_frequency_factor:
            raise ConfigError(
                f"rope.low_frequency_factor={self.low_frequency_factor} must be over 0 and under "
                f"rope.high_frequency_factor={self.high_frequency_factor}; Llama 3 uses 1 and 4"
            )
        if self.original_context < 1:
            raise ConfigError(f"rope.original_context={self.original_context} must be at least 1; Llama 3 uses 8192")


def frequencies(config: RopeConfig, head_width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians a position turns each pair by: [head_width / 2]."""
    exponents = torch.arange(0, head_width, 2, dtype=dtype, device=device) / head_width
    unscaled = 1.0 / config.theta**exponents
    # How many turns a pair makes over the original context: few turns mean a long wavelength.
    turns = config.original_context * unscaled / (2 * math.pi)
    kept = (turns - config.low_frequency_factor) / (config.high_frequency_factor - config.low_frequency_factor)
    kept = kept.clamp(0, 1)
    return kept * unscaled + (1 - kept) * unscaled / config.factor


def rope_tables(positions_bt: Tensor, config: RopeConfig, head_width: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: two [b, t, head_width / 2] of `dtype`, made at least fp32 (bf16 cannot tell positions apart)."""
    dtype = torch.promote_types(dtype, torch.float32)
    turn_f = frequencies(config, head_width, dtype=dtype, device=positions_bt.device)
    angles_btf = positions_bt.to(dtype)[..., None] * turn_f
    return angles_btf.cos(), angles_btf.sin()


def rotate(x_bthd: Tensor, cos_btf: Tensor, sin_btf: Tensor) -> Tensor:
    """`x` turned by its positions' angles, computed in the tables' dtype (at least fp32) and cast back."""
    assert cos_btf.dtype in (torch.float32, torch.float64), "something cast the rope tables (FSDP's cast_forward_inputs?)"
    cos_bt1f, sin_bt1f = cos_btf[:, :, None], sin_btf[:, :, None]
    first, second = x_bthd.chunk(2, dim=-1)
    turned = torch.cat((first * cos_bt1f - second * sin_bt1f, second * cos_bt1f + first * sin_bt1f), dim=-1)
    return turned.to(x_bthd.dtype)
