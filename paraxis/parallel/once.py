"""What a block computes once even where all else in it is computed again: attention that no compiler may look into.

A block that is compiled in pieces cannot be watched operator by operator, since torch compiles nothing while a dispatch mode watches. So
such attention hands over its outputs itself, and is given them back the second time.
"""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import Tensor

from paraxis.base.replaced import replaced

CALL = "attention in one"  # as a knapsack.Call names it: its outputs are kept by a block all of whose other calls are computed again

Outputs = tuple[Tensor, ...]
Keeper = Callable[[Callable[[], Outputs]], Outputs]


class _Now:
    keeper: Keeper | None = None


_now = _Now()


def once(compute: Callable[[], Outputs]) -> Outputs:
    """What `compute` makes, outside autograd; where a block that keeps it runs again, what it made the first time."""
    return compute() if _now.keeper is None else _now.keeper(compute)


@contextmanager
def keeping(keeper: Keeper) -> Iterator[None]:
    """While inside, `keeper` is asked for what is computed once."""
    with replaced(_now, "keeper", keeper):
        yield


def computed_once() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """For one forward of a checkpointed block, and for its recomputation, in which `once` computes nothing."""
    kept = deque[Outputs]()

    def first(compute: Callable[[], Outputs]) -> Outputs:
        made = compute()
        kept.append(tuple(x.detach() for x in made))  # autograd gives what is returned a history of its own, which must not be held
        return made

    def again(compute: Callable[[], Outputs]) -> Outputs:
        return kept.popleft()

    return keeping(first), keeping(again)
