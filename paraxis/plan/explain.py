"""Why one option is slower than another, in words."""

from collections.abc import Sequence

from paraxis.plan.candidates import Candidate
from paraxis.plan.search import Option

GIB = 2**30
SEEN = 0.002  # of a step: differences below it are not worth a word


def gib(bytes: float) -> str:
    """Bytes in GiB: a digit behind the point, more where there would be nothing before it."""
    return f"{bytes / GIB:.1f}" if abs(bytes) >= GIB or not bytes else f"{bytes / GIB:.3g}"


def why_slower(option: Option, best: Option) -> str:
    """What `option` spends its time on beyond `best`, such as "4.1 % slower: bubble 3.0 % more"; empty for `best` itself."""
    if option is best:
        return ""
    slower = best.tokens_per_s / option.tokens_per_s - 1
    if slower < -SEEN:
        return f"{-slower:.1%} faster by prediction, which is less than predictions tell apart, on more axes"
    if abs(slower) < SEEN:
        return f"as fast; {'' if option.reserved < best.reserved else '+'}{gib(option.reserved - best.reserved)} GiB"
    reasons = [f"in {option.config.precision}"] if option.config.precision != best.config.precision else []
    if (bubble := option.bubble - best.bubble) > SEEN:
        reasons.append(f"bubble {bubble:.1%} more")
    if (waits := option.exposed_s / option.step_s - best.exposed_s / best.step_s) > SEEN:
        reasons.append(f"{waits:.1%} more of the step waiting for messages")
    reasons += _of_work(option, best)
    return f"{slower:.1%} slower: {', '.join(reasons) or 'a little of each'}"


def _of_work(option: Option, best: Option) -> list[str]:
    """What makes its computing itself longer."""
    busy, least = (one.step_s / (1 + one.bubble) - one.exposed_s for one in (option, best))
    if busy * best.tokens_per_s <= least * option.tokens_per_s * (1 + SEEN) or busy <= least * (1 + SEEN):
        return []
    order = ("none", "selective", "full")
    own, other = option.candidate, best.candidate
    more = f"{busy / least - 1:.1%} more computing"
    if _place(order, own.remat) > _place(order, other.remat):
        return [f"{more}, as it computes activations again ({own.remat})"]
    if own.splits_backward and not other.splits_backward:
        return [f"{more}, as a split backward is not compiled"]
    return [f"{more} in smaller products" if _finer(own, other) else more]


def _place(order: Sequence[str], mode: str) -> int:
    return order.index(mode) if mode in order else 0


def _finer(own: Candidate, other: Candidate) -> bool:
    return own.degrees.tp > other.degrees.tp or own.micro_batch < other.micro_batch


def why_refused(option: Option) -> str:
    """How much an option lacks."""
    said = f"memory {gib(option.reserved - option.usable)} GiB too much: {gib(option.reserved)} of {gib(option.usable)}"
    if option.prediction is not None and option.prediction.runs:
        in_use = gib(option.prediction.allocated)
        return f"{said}; it would run, slowly: {in_use} GiB are in use at a time, the rest is given back and asked for again"
    return said


def placed(option: Option) -> str:
    """Which devices its ranks are on, in words."""
    order = list(option.order)
    if order == list(range(len(order))):
        return "ranks on devices in order, tp innermost"
    runs: list[tuple[int, int, int]] = []
    for rank, device in enumerate(order):
        if runs and runs[-1][1] + runs[-1][2] == device:
            first, start, length = runs[-1]
            runs[-1] = first, start, length + 1
        else:
            runs.append((rank, device, 1))
    return "; ".join(f"ranks {rank}-{rank + length - 1} on devices {start}-{start + length - 1}" for rank, start, length in runs)


def run_lengths(cuts: Sequence[int]) -> str:
    """Layers of stages, equal neighbours joined: `3 x 11, 9`."""
    said: list[list[int]] = []
    for layers in cuts:
        if said and said[-1][1] == layers:
            said[-1][0] += 1
        else:
            said.append([1, layers])
    return ", ".join(f"{times} x {layers}" if times > 1 else str(layers) for times, layers in said)
