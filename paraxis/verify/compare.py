"""Holding what a layout computed against one process: how far apart they are, and which parameter or quantity tells."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from paraxis.verify.measure import Measured, differences, joined, relative

# Loss, gradient norm and gradients; weights after steps. The error of a tensor is max|a-b| / max|b|.
TOLERANCES = {"fp64": (1e-10, 1e-9), "fp32": (1e-5, 1e-5)}
SAME_FACTOR = 1e-6  # gradients that are all this close to a multiple of the right ones are off by a factor
NOTHING = 1e-12


@dataclass(frozen=True)
class Row:
    """A layout's verdict. Differences are None where it did not run to its end.

    `reason` says in a line what is wrong; `account` holds the traceback or stacks of a rank that failed.
    """

    layout: str
    ranks: int
    loss_diff: float | None = None
    grad_norm_diff: float | None = None
    grad_diff: float | None = None
    grad_name: str | None = None
    weight_diff: float | None = None
    ok: bool = False
    reason: str = ""
    account: str = ""


@dataclass(frozen=True)
class Whole:
    """What all ranks saw together: losses and norms by step, whole tensors by kind and name, and how far apart copies of them were."""

    losses: list[float]
    norms: list[float]
    tensors: Mapping[str, Mapping[str, Tensor]]
    apart: Mapping[str, Mapping[str, float]]


@dataclass(frozen=True)
class Finding:
    """The largest difference of one kind of thing, where it is, and whether that is too much."""

    worst: float
    name: str
    missed: bool


def put_together(ranks: Sequence[Measured]) -> Whole:
    """Raises ValueError where ranks disagree on the loss or the norm, or an element of a tensor is missing or not a number."""
    first = ranks[0]
    for number, rank in enumerate(ranks):
        for what, own, theirs in (("losses", rank.losses, first.losses), ("gradient norms", rank.norms, first.norms)):
            if repr(own) != repr(theirs):  # two that are no numbers agree
                raise ValueError(f"ranks 0 and {number} report different {what}: {theirs} and {own}")
    tensors: dict[str, Mapping[str, Tensor]] = {}
    apart: dict[str, Mapping[str, float]] = {}
    for kind in first.parts:
        tensors[kind], apart[kind] = joined([rank.parts[kind] for rank in ranks])
    return Whole(first.losses, first.norms, tensors, apart)


def compare(layout: str, ranks: int, found: Mapping[str, Whole], expected: Mapping[str, Whole], precision: str) -> Row:
    """The verdict on a layout from what it and one process computed under each optimizer (name to Whole)."""
    tolerance, after_steps = TOLERANCES[precision]
    loss = _worst_of([_numbers("loss", found[o].losses, expected[o].losses, tolerance) for o in expected])
    norm = _worst_of([_numbers("gradient norm", found[o].norms, expected[o].norms, tolerance) for o in expected])
    gradient = _worst_of([_tensors(kind, found[o], expected[o], tolerance) for kind in ("gradient", "clipped") for o in expected])
    tokens = _worst_of([_tensors("tokens", found[o], expected[o], 0.0) for o in expected])
    weights = {o: _tensors("weight", found[o], expected[o], after_steps) for o in expected}
    misses = [finding.name for finding in (gradient, tokens, norm, loss) if finding.missed]
    if not gradient.missed:  # else they are bound to be off
        misses += [f"{finding.name} after steps of {o}" for o, finding in weights.items() if finding.missed]
    return Row(
        layout,
        ranks,
        loss.worst,
        norm.worst,
        gradient.worst,
        gradient.name,
        max(finding.worst for finding in weights.values()),
        ok=not misses,
        reason="; ".join(misses),
    )


def _worst_of(findings: Sequence[Finding]) -> Finding:
    """The first that misses, else the largest: what comes later in a step follows from what came before."""
    return next((finding for finding in findings if finding.missed), max(findings, key=lambda finding: finding.worst))


def _numbers(what: str, found: Sequence[float], expected: Sequence[float], tolerance: float) -> Finding:
    """The same number at every step."""
    errors = [relative(abs(a - b), abs(b)) for a, b in zip(found, expected, strict=True)]
    worst = max(errors)
    factor = found[0] / expected[0] if expected[0] else 1.0
    name = f"{what}, by a factor of {factor:.4g}" if errors[0] > SAME_FACTOR else what
    if not math.isfinite(sum(found)):
        name = f"{what}, which is not a number"
    return Finding(worst, name, worst > tolerance)


# How the kinds of tensors are called, one and all, where they miss.
_CALLED = {
    "gradient": ("gradient of {}", "gradients"),
    "clipped": ("clipped gradient of {}", "clipped gradients"),
    "tokens": ("tokens by expert of {}", "counts of tokens by expert"),
    "weight": ("weight {}", "weights"),
}


def _tensors(kind: str, found: Whole, expected: Whole, tolerance: float) -> Finding:
    """Tensors of one kind by name: the worst of them, or what they have in common where all are off."""
    ours, theirs = found.tensors.get(kind, {}), expected.tensors.get(kind, {})
    one, all_of_them = _CALLED[kind]
    if odd := sorted(ours.keys() ^ theirs.keys()):
        return Finding(float("inf"), f"{one.format(odd[0])}, which {'no rank' if odd[0] in theirs else 'one process never'} has", True)
    if not theirs:
        return Finding(0.0, "", False)
    errors = differences(ours, theirs, found.apart.get(kind))
    worst, name = max((error, name) for name, error in errors.items())
    if worst <= tolerance:
        return Finding(worst, name, False)
    off = [name for name, error in errors.items() if error > tolerance]
    telling = [name for name, tensor in theirs.items() if tensor.numel() and float(tensor.abs().max()) >= NOTHING]
    if len(telling) > 1 and set(telling) <= set(off):
        if (factor := _factor(ours, theirs, telling)) is not None:
            return Finding(worst, f"all {all_of_them}, by a factor of {factor:.4g}", True)
        return Finding(worst, f"all {all_of_them}, {name} most of all", True)
    more = f" and {len(off) - 1} more" if len(off) > 1 else ""
    return Finding(worst, one.format(name) + more, True)


def _factor(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], names: Sequence[str]) -> float | None:
    """The one number that all of `found` are `expected` times, if there is one."""
    products = torch.stack([torch.stack([(found[n] * expected[n]).sum(), expected[n].square().sum()]).double() for n in names]).sum(0)
    factor = float(products[0] / products[1])
    if not abs(factor) > NOTHING:
        return None
    scaled = differences({n: found[n] / factor for n in names}, {n: expected[n] for n in names})
    return factor if max(scaled.values()) <= SAME_FACTOR else None
