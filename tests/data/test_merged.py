"""Streams merged by weight: the order of the tags, any stretch of it by itself, and no source far from its share."""

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from itertools import accumulate, islice

import numpy as np
import pytest

from paraxis.data.merged import Branch, Laid, Leaf, Pair, merged

Tree = int | tuple["Tree", "Tree"]


def lengths_of(seed: int, longest: int, count: int = 97) -> list[int]:
    """Lengths of some documents, the longest among them."""
    return [longest, *np.random.default_rng(seed).integers(1, longest + 1, count - 1).tolist()]


def cycle(lengths: Sequence[int]) -> Callable[[int, int], Laid]:
    """Documents of these lengths for ever."""
    ends = np.cumsum(lengths)

    def laid(start: int, stop: int) -> Laid:
        whole, found = int(ends[-1]), []
        for number in range(start // whole, -(-stop // whole)):
            first, last = np.searchsorted(ends, [start - number * whole + 1, min(whole, stop - number * whole)])
            places = np.arange(max(0, first), last + 1)
            found.append(Laid(0 * places, places, number * whole + ends[places] - np.array(lengths)[places], np.array(lengths)[places]))
        return Laid(*map(np.concatenate, zip(*found, strict=True)))

    return laid


def source(number: int, weight: int, lengths: Sequence[int], offset: int = 0) -> Leaf:
    return Leaf(number, weight, max(lengths), cycle(lengths), offset)


def one_by_one(tree: Tree, weights: Sequence[int], lengths: Sequence[Sequence[int]]) -> Iterator[tuple[int, int, int]]:
    """The source, the document and its length, for ever: two streams merged by comparing their next documents' tags."""
    if isinstance(tree, int):
        while True:
            yield from ((tree, document, length) for document, length in enumerate(lengths[tree]))
    total = [sum(weights[leaf] for leaf in leaves(branch)) for branch in tree]
    streams = [one_by_one(branch, weights, lengths) for branch in tree]
    heads, begins = [next(stream) for stream in streams], [0, 0]
    while True:
        tags = [(begin + Fraction(head[2], 2)) / weight for begin, head, weight in zip(begins, heads, total, strict=True)]
        side = 1 if tags[1] < tags[0] else 0
        yield heads[side]
        begins[side] += heads[side][2]
        heads[side] = next(streams[side])


def leaves(tree: Tree) -> list[int]:
    return [tree] if isinstance(tree, int) else [leaf for branch in tree for leaf in leaves(branch)]


def built(tree: Tree, sources: Sequence[Branch]) -> Branch:
    return sources[tree] if isinstance(tree, int) else Pair(*(built(branch, sources) for branch in tree))


WEIGHTS = (7, 2, 1, 5)


@pytest.mark.parametrize("tree", [0, (0, 1), (1, 0), ((0, 1), 2), (3, ((0, 1), 2)), ((0, 1), (2, 3))], ids=str)
@pytest.mark.parametrize("longest", [(9, 9, 9, 9), (1, 1, 1, 1), (2, 40, 7, 1)], ids=str)
def test_any_stretch_is_that_of_the_documents_put_in_order_one_by_one(tree, longest):
    lengths = [lengths_of(number, most) for number, most in enumerate(longest)]
    expected = list(islice(one_by_one(tree, WEIGHTS, lengths), 1200))
    ends = list(accumulate(length for _, _, length in expected))
    branch = built(tree, [source(number, weight, lengths[number]) for number, weight in enumerate(WEIGHTS)])
    rng = np.random.default_rng(1)
    for start in [0, 1, *rng.integers(0, ends[-1] // 2, 40).tolist()]:
        stop = start + int(rng.integers(1, 90))
        laid = branch.laid(start, stop)
        first, last = (int(np.searchsorted(ends, token, side="right")) for token in (start, stop - 1))
        found = zip(laid.sources.tolist(), laid.documents.tolist(), laid.lengths.tolist(), strict=True)
        assert list(found) == expected[first : last + 1]
        assert laid.starts.tolist() == [0, *ends][first : last + 1]
        before = {leaf: sum(length for name, _, length in expected[:first] if name == leaf) for leaf in leaves(tree)}
        before[expected[first][0]] += start - [0, *ends][first]
        assert branch.counts(start) == before


def test_nothing_overflows_trillions_of_tokens_on():
    lengths = [lengths_of(number, 4000) for number in range(3)]
    sources = [source(number, weight, lengths[number]) for number, weight in enumerate((49_999, 33_334, 16_667))]
    branch, far = merged(sources), 10**14 + 12345
    counts = branch.counts(far)
    assert sum(counts.values()) == far
    assert all(abs(counts[n] - Fraction(s.weight, 100_000) * far) <= branch.furthest(Fraction(0)) for n, s in enumerate(sources))
    laid = branch.laid(far, far + 500_000)
    assert (laid.starts[1:] == laid.starts[:-1] + laid.lengths[:-1]).all()
    for number in range(3):
        own = laid.documents[laid.sources == number]
        assert ((own[1:] - own[:-1]) % 97 == 1).all()


def off(branch: Branch, weights: Sequence[int], tokens: int) -> np.ndarray:
    """How many tokens [token, source] each source is ahead of its share where a document begins. Between it only goes straight on."""
    laid = branch.laid(0, tokens)
    read = np.cumsum((laid.sources[:, None] == np.arange(len(weights))) * laid.lengths[:, None], axis=0)
    return read - (laid.starts + laid.lengths)[:, None] * np.array(weights) / sum(weights)


MIXTURES = [(1, 1), (7, 2, 1), (900, 50, 30, 10, 5, 5), (1,) * 11, (5000, *[50] * 100), (600, 111, 88, 77, 66, 55, 3), (64, 32, 16, 8, 1)]


@pytest.mark.parametrize("weights", MIXTURES, ids=str)
@pytest.mark.parametrize("draw", ["all as long", "of any length", "each source its own"])
def test_no_prefix_is_one_and_no_window_two_of_what_is_promised_from_the_weights(weights, draw):
    longest = [50 if draw != "each source its own" else 3 + 13 * number % 60 for number in range(len(weights))]
    lengths = [[most] if draw == "all as long" else lengths_of(number, most) for number, most in enumerate(longest)]
    branch = merged([source(number, weight, lengths[number]) for number, weight in enumerate(weights)])
    promised, found = float(branch.furthest(Fraction(0))), off(branch, weights, 40_000)
    assert np.abs(found).max() <= promised + 1e-6
    assert (found.max(axis=0) - found.min(axis=0)).max() <= 2 * promised + 1e-6  # a window is the difference of two prefixes
    assert np.abs(found).max() <= max(longest)


def test_what_is_promised_is_one_longest_document_or_in_a_few_mixtures_little_more():
    rng = np.random.default_rng(3)
    promised = []
    for number in range(300):
        count = 2 + number % 14
        drawn = rng.random(count) if number % 2 else 10 ** rng.uniform(-3, 0, count)
        weights = np.maximum(1, drawn / drawn.sum() * 10_000).astype(int).tolist()
        branch = merged([source(leaf, weight, [100]) for leaf, weight in enumerate(weights)])
        promised.append(branch.furthest(Fraction(0)) / 100)
        assert count > 3 or promised[-1] <= 1
        assert count > 2 or promised[-1] == Fraction(1, 2)
    assert max(promised) <= 1.1
    assert np.mean([one <= 1 for one in promised]) > 0.5


def test_equal_weights_and_equal_documents_take_turns():
    branch = merged([source(number, 1, [10]) for number in range(8)])
    laid = branch.laid(0, 8 * 10 * 20)
    assert all(sorted(turn.tolist()) == list(range(8)) for turn in laid.sources.reshape(-1, 8))


def test_a_source_may_begin_at_any_of_its_documents():
    lengths = lengths_of(1, 20)
    whole, later = source(0, 1, lengths), source(0, 1, lengths, offset=sum(lengths[:13]))
    assert later.laid(0, 1).documents.tolist() == [13]
    assert later.laid(5, 300).documents.tolist() == whole.laid(sum(lengths[:13]) + 5, sum(lengths[:13]) + 300).documents.tolist()
    assert later.laid(0, 300).starts[0] == 0
