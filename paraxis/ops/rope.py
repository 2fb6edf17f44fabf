"""Rotary position embedding, with Llama 3's scaling of long wavelengths or YaRN's.

Su et al. 2021, "RoFormer" (arXiv:2104.09864): pair i of a head of width d turns by the angle position * theta^(-2i/d).
`rotate` makes pair i of entries i and i + d/2, which checkpoints in Hugging Face's format are permuted for; DeepSeek's are not,
and `rotate_neighbours` makes it of entries 2i and 2i + 1 as the original does.

Both scalings stretch slow pairs so that they cover a longer context: some pairs stay, some turn `factor` times slower, and between
the two the frequency is blended linearly. Llama 3.1 (arXiv:2407.21783, section 3.4.2, and the code released with it) blends by how often
a pair turns within the original context; YaRN (Peng et al. 2023, arXiv:2309.00071, section 3.2, as DeepSeek-V2 and V3 have it) by the
pair's number, and it sharpens attention as the context grows (section 3.3).
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


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """How positions turn queries and keys under YaRN; `factor=1` leaves the frequencies as RoFormer has them, and all else too."""

    theta: Annotated[float, "base of the wavelengths"] = 10_000.0
    factor: Annotated[float, "how many times slower the slowest pairs turn; 1 turns YaRN off"] = 1.0
    beta_fast: Annotated[float, "pairs that turn more often than this within original_context are not scaled"] = 32.0
    beta_slow: Annotated[float, "pairs that turn less often than this within original_context are scaled in full"] = 1.0
    mscale: Annotated[float, "how much the rotated part of queries and keys grows with log(factor), over mscale_all_dim"] = 1.0
    mscale_all_dim: Annotated[float, "how much the softmax's scale grows with log(factor); 0 leaves it"] = 1.0
    original_context: Annotated[int, "positions the unscaled frequencies were trained for"] = 4096

    def __post_init__(self) -> None:
        if self.theta <= 1:
            raise ConfigError(f"rope.theta={self.theta} must be over 1; DeepSeek-V3 uses 10000")
        if self.factor < 1:
            raise ConfigError(f"rope.factor={self.factor} must be at least 1; use 1 for no scaling")
        if not 0 < self.beta_slow < self.beta_fast:
            raise ConfigError(
                f"rope.beta_slow={self.beta_slow} must be over 0 and under rope.beta_fast={self.beta_fast}; DeepSeek-V3 uses 1 and 32"
            )
        for name in ("mscale", "mscale_all_dim"):
            if getattr(self, name) < 0:
                raise ConfigError(f"rope.{name}={getattr(self, name)} must not be negative; DeepSeek-V3 uses 1")
        if self.original_context < 1:
            raise ConfigError(f"rope.original_context={self.original_context} must be at least 1; DeepSeek-V3 uses 4096")

    @property
    def table_scale(self) -> float:
        """Factor on cos and sin, and so on the rotated part of queries and keys."""
        return self._sharpened(self.mscale) / self._sharpened(self.mscale_all_dim)

    @property
    def score_scale(self) -> float:
        """Factor on the attention scores, beside 1 / sqrt(head width)."""
        return self._sharpened(self.mscale_all_dim) ** 2

    def _sharpened(self, by: float) -> float:
        return 1.0 + 0.1 * by * math.log(self.factor)


def frequencies(config: RopeConfig | YarnConfig, head_width: int, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Radians a position turns each pair by: [head_width / 2]."""
    exponents = torch.arange(0, head_width, 2, dtype=dtype, device=device) / head_width
    unscaled = 1.0 / config.theta**exponents
    kept = _kept_by_llama(config, unscaled) if isinstance(config, RopeConfig) else _kept_by_yarn(config, unscaled)
    return kept * unscaled + (1 - kept) * unscaled / config.factor


def _kept_by_llama(config: RopeConfig, unscaled: Tensor) -> Tensor:
    """1 for each pair that is not scaled, 0 for each that is in full, and between."""
    # How many turns a pair makes over the original context: few turns mean a long wavelength.
    turns = config.original_context * unscaled / (2 * math.pi)
    kept = (turns - config.low_frequency_factor) / (config.high_frequency_factor - config.low_frequency_factor)
    return kept.clamp(0, 1)


def _kept_by_yarn(config: YarnConfig, unscaled: Tensor) -> Tensor:
    """As above. The ramp starts and ends at whole pairs, which is how YaRN's authors and DeepSeek released it."""
    pairs = unscaled.numel()

    def pair_that_turns(times: float) -> float:
        """The number of the pair, if there were fractions of one, that turns so many times within the original context."""
        return pairs * math.log(config.original_context / (2 * math.pi * times)) / math.log(config.theta)

    first = max(math.floor(pair_that_turns(config.beta_fast)), 0)
    last = min(math.ceil(pair_that_turns(config.beta_slow)), 2 * pairs - 1)
    number = torch.arange(pairs, dtype=unscaled.dtype, device=unscaled.device)
    return 1 - ((number - first) / max(last - first, 0.001)).clamp(0, 1)  # never a division by 0


def rope_tables(positions_bt: Tensor, config: RopeConfig | YarnConfig, head_width: int, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin of every angle: two [b, t, head_width / 2] of `dtype`, made at least fp32 (bf16 cannot tell positions apart)."""
    dtype = torch.promote_types(dtype, torch.float32)
    turn_f = frequencies(config, head_width, dtype=dtype, device=positions_bt.device)
    angles_btf = positions_bt.to(dtype)[..., None] * turn_f
    cos_btf, sin_btf = angles_btf.cos(), angles_btf.sin()
    if isinstance(config, YarnConfig) and config.table_scale != 1:
        return cos_btf * config.table_scale, sin_btf * config.table_scale
    return cos_btf, sin_btf


def rotate(x_bthd: Tensor, cos_btf: Tensor, sin_btf: Tensor) -> Tensor:
    """`x` turned by its positions' angles, computed in the tables' dtype (at least fp32) and cast back. Pair i: entries i and i + d/2."""
    first, second = x_bthd.chunk(2, dim=-1)
    return torch.cat(_turned(first, second, cos_btf, sin_btf), dim=-1).to(x_bthd.dtype)


def rotate_neighbours(x_bthd: Tensor, cos_btf: Tensor, sin_btf: Tensor) -> Tensor:
    """As `rotate`, but pair i is made of entries 2i and 2i + 1."""
    first, second = x_bthd.unflatten(-1, (-1, 2)).unbind(-1)
    return torch.stack(_turned(first, second, cos_btf, sin_btf), dim=-1).flatten(-2).to(x_bthd.dtype)


def _turned(first: Tensor, second: Tensor, cos_btf: Tensor, sin_btf: Tensor) -> tuple[Tensor, Tensor]:
    assert cos_btf.dtype in (torch.float32, torch.float64), "something cast the rope tables (FSDP's cast_forward_inputs?)"
    cos_bt1f, sin_bt1f = cos_btf[:, :, None], sin_btf[:, :, None]
    return first * cos_bt1f - second * sin_bt1f, second * cos_bt1f + first * sin_bt1f
