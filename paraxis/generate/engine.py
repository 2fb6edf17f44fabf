"""Continuing text, token by token."""

from collections.abc import Collection, Iterator
from contextlib import nullcontext
from typing import Protocol

import torch
from torch import Tensor

from paraxis.base.errors import ConfigError
from paraxis.generate.cache import Cacheable, cached
from paraxis.generate.sample import SamplingConfig, pick


class HasLogits(Protocol):
    """All that generation needs of a model: what it predicts to follow each token, [b, t, v]."""

    def logits(self, tokens_bt: Tensor) -> Tensor: ...


@torch.no_grad()
def generate(model: HasLogits, prompt_bt: Tensor, sampling: SamplingConfig, stop: Collection[int] = ()) -> Iterator[Tensor]:
    """Yields the next token of every row, int64 [b], up to `sampling.max_tokens` times.

    Ends early when every row has produced a `stop` token; a row that has repeats it. `prompt_bt` has at least one token a row.
    Keys and values are kept between tokens where the model's attention can be exchanged; else all of it is recomputed each time.
    Raises ConfigError for more tokens than the model has positions for.
    """
    assert prompt_bt.shape[1] > 0, "a prompt has at least one token; give the beginning-of-text token where there is no text"
    longest, most = prompt_bt.shape[1] + sampling.max_tokens, getattr(model, "most_positions", None)
    if most is not None and longest > most:
        raise ConfigError(f"{longest} tokens, the prompt's and those to come, are more than the model's {most} positions; ask for fewer")
    generator = torch.Generator(prompt_bt.device).manual_seed(sampling.seed)
    stops = torch.tensor(sorted(stop), dtype=torch.int64, device=prompt_bt.device)
    tokens_bt, new_bt = prompt_bt, prompt_bt
    ended_b = torch.zeros_like(prompt_bt[:, 0], dtype=torch.bool)
    remembering = _cacheable(model)
    with nullcontext() if remembering is None else cached(remembering, prompt_bt.shape[1] + sampling.max_tokens):
        for _ in range(sampling.max_tokens):
            if remembering is None:
                logits_bv = model.logits(tokens_bt)[:, -1]
            else:
                first = tokens_bt.shape[1] - new_bt.shape[1]
                positions_bt = torch.arange(first, tokens_bt.shape[1], device=tokens_bt.device).expand_as(new_bt)
                logits_bv = remembering.logits(new_bt, positions_bt)[:, -1]
            token_b = torch.where(ended_b, tokens_bt[:, -1], pick(logits_bv, sampling, generator))
            yield token_b
            ended_b = ended_b | torch.isin(token_b, stops)
            if stop and bool(ended_b.all()):
                return
            new_bt = token_b[:, None]
            tokens_bt = torch.cat([tokens_bt, new_bt], dim=1)


def _cacheable(model: object) -> Cacheable | None:
    return model if isinstance(model, Cacheable) else None
