"""Which operators of a compiled block become one kernel.

The rule, which is Inductor's in outline: elementwise operators and reductions that touch a common tensor, with no product, attention or
exchange on the way from one to the other, are one kernel. It reads each tensor from outside once, writes what is used outside once, and
starts once; what is used inside alone is never in memory. What is reduced to one number, such as the scale of a float8 tensor, is known
only when all has been read: what uses it is another kernel, and reads all again. Inductor makes two kernels of some more of these, where
the dimensions that are reduced differ or a kernel would grow too large.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from paraxis.plan.operators import Operator

MERGED = "merged"
NUMBER_BYTES = 8  # one number has no more
COMPILED = ("forward", "backward", "between")  # phases whose elementwise work a compiler merges: blocks, and the loss


@dataclass
class Kernel:
    """Operators that a compiler makes one of: what they touch, and how many bytes of each."""

    level: int
    reads: dict[int, int] = field(default_factory=dict)
    writes: dict[int, int] = field(default_factory=dict)

    def add(self, operator: Operator) -> None:
        for place, bytes in operator.reads:
            if place not in self.writes:
                self.reads[place] = max(bytes, self.reads.get(place, 0))
        for place, bytes in operator.writes:
            self.writes[place] = max(bytes, self.writes.get(place, 0))

    def join(self, other: "Kernel") -> None:
        """Takes in a kernel that could run before or beside this one."""
        for place, bytes in other.reads.items():
            if place not in self.writes:
                self.reads[place] = max(bytes, self.reads.get(place, 0))
        self.writes |= other.writes
        for place in self.writes.keys() & self.reads.keys():
            del self.reads[place]


def last_uses(operators: Sequence[Operator]) -> dict[int, int]:
    """By allocation, the number of the last operator that touches it."""
    return {place: number for number, operator in enumerate(operators) for place, _ in (*operator.reads, *operator.writes)}


def merged(operators: Sequence[Operator], end: int, last_use: Mapping[int, int]) -> tuple[list[Operator], set[int]]:
    """The operators of one phase, those that are one kernel as one; and the allocations that are never made, inside kernels.

    Operator `end` is the first after the phase: what it or a later one uses has to be written.

    An operator's level counts the products, attentions, exchanges and reductions to one number on the longest way to it; operators of one
    level that touch a common tensor can always be one kernel, since nothing that one of them needs comes after another.
    """
    level: dict[int, int] = {}
    kernels: dict[int, Kernel] = {}  # by the allocation that they touched, of the running level
    order: list[Operator | Kernel] = []
    users: dict[int, set[int]] = {}
    for operator in operators:
        touched = [place for place, _ in (*operator.reads, *operator.writes)]
        depth = max((level.get(place, 0) for place in touched), default=0)
        if not operator.fusible or operator.lane != "compute":
            for place in (*(place for place, _ in operator.writes), operator.result):
                level[place] = depth + 1
            order.append(operator)
            for place in touched:
                users.setdefault(place, set()).add(id(operator))
            continue
        kernel = Kernel(depth)
        kernel.add(operator)
        near = {id(k): k for place in touched if (k := kernels.get(place)) is not None and k.level == depth}
        if near:
            first, *others = near.values()
            first.add(operator)
            for other in others:
                _absorb(first, other, kernels, order)
            kernel = first
        else:
            order.append(kernel)
        for place in touched:
            kernels[place] = kernel
            level[place] = max(depth, level.get(place, 0))
        if _to_one_number(operator):
            for place, _ in operator.writes:
                level[place] = depth + 1
    for one in order:
        for place in one.reads if isinstance(one, Kernel) else ():
            users.setdefault(place, set()).add(id(one))
    found: list[Operator] = []
    inside: set[int] = set()
    for one in order:
        if isinstance(one, Kernel):
            used = {place for place in one.writes if last_use[place] >= end or users.get(place, set()) - {id(one)}}
            inside |= one.writes.keys() - used
            writes = tuple((place, bytes) for place, bytes in one.writes.items() if place in used)
            found.append(Operator(name=MERGED, sort="traffic", reads=tuple(one.reads.items()), writes=writes))
        else:
            found.append(one)
    return found, inside


def inlined(operators: Sequence[Operator], end: int, last_use: Mapping[int, int]) -> list[Operator]:
    """What `merged` found, as it is priced: where that moves fewer bytes, a kernel's results are computed again in each kernel that reads
    them and never written, as Inductor does with chains of elementwise operators."""
    found: list[Operator] = list(operators)
    gone: set[int] = set()
    users: dict[int, list[int]] = {}
    for number, one in enumerate(found):
        for place in dict.fromkeys(place for place, _ in (*one.reads, *one.writes)):
            users.setdefault(place, []).append(number)
    for number, one in enumerate(found):
        if one.name != MERGED:
            continue
        own = dict(one.writes)
        inner = {v for v in own if last_use[v] < end and all(n == number or _takes(found[n], v) for n in users[v])}
        if _to_one_number(replace(one, writes=tuple((v, own[v]) for v in inner))):
            continue
        readers = {n for v in inner for n in users[v] if n != number}
        again = {n: [read for read in one.reads if read[0] not in dict(found[n].reads)] for n in readers}
        spared = sum(own[v] * len(users[v]) for v in inner) + sum(bytes for _, bytes in one.reads) * (len(inner) == len(own))
        if not readers or spared <= sum(bytes for reads in again.values() for _, bytes in reads):
            continue
        for n in readers:
            kept = tuple(read for read in found[n].reads if read[0] not in inner)
            found[n] = replace(found[n], reads=(*kept, *again[n]))
            for place, _ in again[n]:
                users[place].append(n)
        if len(inner) == len(own):
            gone.add(number)
        found[number] = replace(one, writes=tuple(write for write in one.writes if write[0] not in inner))
    return [one for number, one in enumerate(found) if number not in gone]


def _to_one_number(one: Operator) -> bool:
    """Whether it reads much and leaves a number."""
    return 0 < sum(bytes for _, bytes in one.writes) <= NUMBER_BYTES < max((bytes for _, bytes in one.reads), default=0)


def _takes(one: Operator, place: int) -> bool:
    """Whether it is a merged kernel that reads an allocation and leaves it as it is."""
    return one.name == MERGED and place not in dict(one.writes)


def _absorb(first: Kernel, other: Kernel, kernels: dict[int, Kernel], order: list[Operator | Kernel]) -> None:
    first.join(other)
    order[:] = [one for one in order if one is not other]
    for place, kernel in kernels.items():
        if kernel is other:
            kernels[place] = first
