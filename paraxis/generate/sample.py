"""Choosing the next token from logits: greedy, by temperature, among the top k, among the top p."""

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from paraxis.base.dtypes import at_least_fp32
from paraxis.base.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How text is sampled."""

    max_tokens: Annotated[int, "tokens to add at most"] = 100
    temperature: Annotated[float, "logits are divided by it; 0 takes the likeliest token"] = 0.8
    top_k: Annotated[int, "choose among the k likeliest tokens; 0 means all"] = 0
    top_p: Annotated[float, "choose among the fewest likeliest tokens that hold this much probability; 1 means all"] = 1.0
    seed: Annotated[int, "seed of the choices"] = 0

    def __post_init__(self) -> None:
        if self.max_tokens < 1:
            raise ConfigError(f"max_tokens={self.max_tokens} must be at least 1")
        if self.temperature < 0:
            raise ConfigError(f"temperature={self.temperature} must be 0 (greedy) or more")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k} must be 0 (all tokens) or more")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p} must be over 0 and at most 1 (all tokens)")


def pick(logits_bv: Tensor, sampling: SamplingConfig, generator: torch.Generator) -> Tensor:
    """The next token of each row, int64 [b]."""
    if sampling.temperature == 0:
        return logits_bv.argmax(-1)
    probabilities_bv = (at_least_fp32(logits_bv) / sampling.temperature).softmax(-1)
    sorted_bv, token_bv = probabilities_bv.sort(dim=-1, descending=True)
    if sampling.top_k:
        sorted_bv[:, sampling.top_k :] = 0
    # A token stays while those likelier than it hold less than top_p, so the likeliest always does.
    likelier_bv = sorted_bv.cumsum(-1) - sorted_bv
    sorted_bv[likelier_bv >= sampling.top_p * sorted_bv.sum(-1, keepdim=True)] = 0
    place_b1 = torch.multinomial(sorted_bv, 1, generator=generator)
    return token_bv.gather(1, place_b1).squeeze(1)
