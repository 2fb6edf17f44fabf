"""First values: the same however a parameter is cut, normal, and independent between names, seeds and places."""

import hashlib
import itertools
import statistics

import pytest
import torch

from paraxis.base.axes import AXES, Degrees
from paraxis.base.layout import Box, place, whole_box
from paraxis.models import init
from paraxis.models.init import Normal, Ones, Zeros, default_rule, fill_, initialise

STANDARD = Normal(1.0)


def values(shape, box=None, *, seed=0, name="w", dtype=torch.float32, rule=STANDARD):
    box = box or whole_box(shape)
    local = torch.full(box.sizes, torch.nan, dtype=dtype)
    fill_(local, rule, seed=seed, name=name, shape=shape, box=box)
    return local


@pytest.mark.parametrize("shape", [(37, 53), (211,), (5, 7, 11), ()])
def test_any_box_holds_bitwise_what_the_whole_holds_there(shape):
    whole = values(shape)
    pieces = [[(a, n) for a in range(0, size, max(1, size // 4)) for n in (1, 3, size - a) if a + n <= size] for size in shape]
    for cut in itertools.islice(itertools.product(*pieces), 400):
        box = Box(tuple(a for a, _ in cut), tuple(n for _, n in cut))
        assert torch.equal(values(shape, box), whole[box.slices_within(whole_box(shape))])


def test_chunks_do_not_show(monkeypatch):
    whole = values((40, 50))
    monkeypatch.setattr(init, "CHUNK", 37)
    assert torch.equal(values((40, 50)), whole)
    assert torch.equal(values((40, 50), Box((3, 5), (30, 21))), whole[3:33, 5:26])


def test_lower_precision_is_the_same_values_rounded():
    assert torch.equal(values((33, 9), dtype=torch.bfloat16), values((33, 9)).bfloat16())
    assert torch.equal(values((33, 9), dtype=torch.float64), values((33, 9)).double())


def test_a_part_that_is_not_contiguous_is_filled_alike():
    storage = torch.zeros(20, 30)
    fill_(storage[:, :7], Normal(1.0), seed=0, name="w", shape=(20, 7), box=whole_box((20, 7)))
    assert torch.equal(storage[:, :7], values((20, 7)))
    assert not storage[:, 7:].any()


def test_moments_are_those_of_the_normal_distribution():
    n = 1_000_000
    x = values((1000, 1000), rule=Normal(0.5)).double().flatten() / 0.5
    # Five standard errors each.
    assert abs(x.mean()) < 5 / n**0.5
    assert abs(x.var() - 1) < 5 * (2 / n) ** 0.5
    assert abs((x**3).mean()) < 5 * (15 / n) ** 0.5
    assert abs((x**4).mean() - 3) < 5 * (96 / n) ** 0.5
    for bound in (0.5, 1.0, 2.0, 3.0):
        share = torch.special.ndtr(torch.tensor(bound, dtype=torch.float64)).item()
        assert abs((x < bound).double().mean() - share) < 5 * (share * (1 - share) / n) ** 0.5
    assert x.abs().max() > 4.2


def test_neighbours_names_and_seeds_are_independent():
    a = values((500, 1000)).double()
    others = {
        "next column": (a[:, :-1], a[:, 1:]),
        "next row": (a[:-1], a[1:]),
        "half a row on": (a[:, :500], a[:, 500:]),
        "name": (a, values((500, 1000), name="v").double()),
        "seed": (a, values((500, 1000), seed=1).double()),
    }
    for between, (x, y) in others.items():
        for power in (1, 2):
            correlation = torch.corrcoef(torch.stack([x.flatten() ** power, y.flatten() ** power]))[0, 1]
            assert abs(correlation) < 5 / x.numel() ** 0.5, (between, power)


def test_values_are_splitmix64_through_the_inverse_normal_distribution():
    def expected(index, seed, name):
        bits = index * 0x9E3779B97F4A7C15 + int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "big")
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB), (31, 1)):
            bits &= 2**64 - 1
            bits = (bits ^ bits >> shift) * factor
        below_half = ((bits >> 32) + 0.5) / 2**33
        return statistics.NormalDist().inv_cdf(below_half) * (1 if bits & 1 else -1)

    ours = values((300,), seed=5, name="layers.3.mlp.up_proj.weight").tolist()
    assert ours == pytest.approx([expected(i, 5, "layers.3.mlp.up_proj.weight") for i in range(300)], rel=1e-5, abs=1e-6)


def test_rules_without_chance_and_the_default_rules():
    assert torch.equal(values((3,), rule=Ones()), torch.ones(3))
    assert torch.equal(values((3,), rule=Zeros()), torch.zeros(3))
    assert default_rule("layers.0.norm.weight", (8,)) == Ones()
    assert default_rule("layers.0.fc.bias", (8,)) == Zeros()
    assert default_rule("bias", (8,)) == Zeros()
    assert default_rule("layers.0.fc.weight", (8, 8)) == Normal(0.02)


def test_initialise_follows_the_models_table_then_the_default():
    model = torch.nn.Module()
    model.init = {"a.*": Zeros()}
    at = {**dict.fromkeys(AXES, 0), "fsdp": 1}
    for name, zero in (("a.weight", True), ("b.weight", False)):
        placed = place(name, (7, 4), {}, Degrees(fsdp=2), at)
        local = torch.full(placed.stored.sizes, torch.nan)
        initialise(model, local, placed, 0)
        assert bool((local == 0).all()) == zero
        if not zero:
            assert torch.equal(local, values((7, 4), name=name, rule=Normal(0.02))[4:])
