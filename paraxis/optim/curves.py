"""The learning rate as a pure function of the step: nothing to save, nothing to restore.

With s the step (the first is 0), S the steps in all, w the warm-up steps, p the peak and f the final fraction of it:

    warm-up    s < w      p (s + 1) / w
    constant   s >= w     p
    linear     s >= w     p (1 - (1 - f) t)                     t = (s - w) / (S - w)
    cosine     s >= w     p (f + (1 - f) (1 + cos(pi t)) / 2)   t = (s - w) / (S - w)     (Loshchilov and Hutter, arXiv 1608.03983)
    wsd        s >= w     p (1 - (1 - f) t)                     t = (s - d) / (S - d)     (Hu et al., arXiv 2404.06395)

where d = max(w, S - decay S) is the step at which wsd stops being stable, and t is held between 0 and 1. The last step
that is taken, S - 1, is still a little above p f: a step at exactly zero would be wasted. A run shorter than its warm-up
(S <= w) only ever warms up.
"""

import math

from paraxis.optim.config import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The learning rate of `step`, counted from 0, in a run of `total_steps`."""
    if step < config.warmup:
        return config.lr * (step + 1) / config.warmup
    match config.schedule:
        case "constant":
            remaining = 1.0
        case "linear":
            remaining = 1.0 - _progress(step, config.warmup, total_steps)
        case "cosine":
            remaining = 0.5 * (1.0 + math.cos(math.pi * _progress(step, config.warmup, total_steps)))
        case "wsd":
            start = max(config.warmup, total_steps - round(config.decay * total_steps))
            remaining = 1.0 - _progress(step, start, total_steps)
    return config.lr * (config.final + (1.0 - config.final) * remaining)


def _progress(step: int, start: int, end: int) -> float:
    """How much of the way from `start` to `end` is done, from 0 to 1; an empty way is done once `end` is reached."""
    return min(1.0, max(0.0, (step - start) / (end - start))) if end > start else float(step >= end)
