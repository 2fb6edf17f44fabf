"""What CUDA's caching allocator reserves for what a step allocates, with expandable segments, as training asks for them.

After PyTorch's c10/cuda/CUDACachingAllocator.cpp: every stream has one segment for small and one for large allocations. A request takes
the smallest free block that holds it, where a block counts with the unmapped range behind it, and the lowest of those. What is left over
stays free, and free neighbours are merged. Where no block is large enough, pages are mapped where the lowest room for it is. Only when the
device has no more is memory given back: every whole page that nothing lies in, of all segments.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field
from math import inf

MIB = 1 << 20
SMALL = MIB  # requests up to this come from the segment for small ones
SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB
MIDDLE = 10 * MIB  # requests below this ask the device for a large page, larger ones for as many small pages as they fill


class FullError(Exception):
    """The device has no memory left."""


@dataclass
class Segment:
    """One range of addresses. Free blocks are (size, address), in that order; what is not mapped lies in holes, and behind `size`."""

    page: int
    size: int = 0
    mapped: int = 0
    _free: list[tuple[int, int]] = field(default_factory=list)
    _size_at: dict[int, int] = field(default_factory=dict)  # of free blocks, by where they start
    _start_of: dict[int, int] = field(default_factory=dict)  # and by where they end
    _holes: dict[int, int] = field(default_factory=dict)  # sizes, by where they start

    def find(self, size: int) -> int | None:
        """The address of a block of `size` bytes among what is mapped and free; None where there is none."""
        best = bisect_left(self._free, (size, 0))
        if best == len(self._free):
            return None
        while best + 1 < len(self._free) and self._room(best + 1) < self._room(best):
            best += 1
        return self._take(*self._free[best], size)

    def map(self, size: int) -> int:
        """The address of a block of `size` bytes, in the lowest room for it, for which pages are mapped."""
        address = self._lowest(size)
        while (have := self._size_at.get(address, 0)) < size:
            missing = -(-(size - have) // self.page) * self.page
            self._fill(address + have, min(missing, self._holes.get(address + have, missing)))
        return self._take(self._size_at[address], address, size)

    def give_back(self, address: int, size: int) -> None:
        """Frees a block, merging it with its free neighbours."""
        if (after := self._size_at.get(address + size)) is not None:
            self._remove(after, address + size)
            size += after
        if (start := self._start_of.get(address)) is not None:
            self._remove(address - start, start)
            address, size = start, size + address - start
        self._add(size, address)

    def release(self) -> None:
        """Unmaps every whole page that nothing lies in."""
        for size, address in list(self._free):
            begin, end = -(-address // self.page) * self.page, (address + size) // self.page * self.page
            if begin >= end:
                continue
            self._remove(size, address)
            if begin > address:
                self._add(begin - address, address)
            if address + size > end:
                self._add(address + size - end, end)
            self.mapped -= end - begin
            self._holes[begin] = end - begin
        holes: dict[int, int] = {}
        last = -1
        for start, size in sorted(self._holes.items()):
            if last >= 0 and last + holes[last] == start:
                holes[last] += size
            else:
                holes[start], last = size, start
        if last >= 0 and last + holes[last] == self.size:
            self.size = last
            del holes[last]
        self._holes = holes

    def _room(self, place: int) -> float:
        """What a free block has with the unmapped range behind it."""
        size, address = self._free[place]
        end = address + size
        return inf if end == self.size else size + self._holes.get(end, 0)

    def _lowest(self, size: int) -> int:
        """Where the first of unmapped and free ranges, one after another, that hold `size` bytes begin; a free one in front belongs to
        them."""
        for hole in sorted(self._holes):
            start = end = self._start_of.get(hole, hole)
            while end - start < size and end < self.size and (more := self._size_at.get(end) or self._holes.get(end)):
                end += more
            if end - start >= size or end == self.size:
                return start
        return self._start_of.get(self.size, self.size)

    def _fill(self, start: int, size: int) -> None:
        """Maps the first `size` bytes of the unmapped range at `start`."""
        if (hole := self._holes.pop(start, None)) is not None and hole > size:
            self._holes[start + size] = hole - size
        self.size = max(self.size, start + size)
        self.mapped += size
        self.give_back(start, size)

    def _take(self, found: int, address: int, size: int) -> int:
        self._remove(found, address)
        if found > size:
            self._add(found - size, address + size)
        return address

    def _add(self, size: int, address: int) -> None:
        insort(self._free, (size, address))
        self._size_at[address], self._start_of[address + size] = size, address

    def _remove(self, size: int, address: int) -> None:
        self._free.pop(bisect_left(self._free, (size, address)))
        del self._size_at[address], self._start_of[address + size]


class Allocator:
    """All segments of a device that has `limit` bytes."""

    def __init__(self, limit: float = inf) -> None:
        self._limit = limit
        self._segments: dict[tuple[int, int], Segment] = {}
        self._held: dict[int, tuple[Segment, int, int]] = {}

    @property
    def reserved(self) -> int:
        return sum(segment.mapped for segment in self._segments.values())

    def change(self, stream: int, number: int, change: int) -> None:
        """An allocation grows or shrinks by so many bytes. Raises FullError where the device has too few."""
        size = change
        if number in self._held:
            segment, address, was = self._held.pop(number)
            segment.give_back(address, was)
            size += was
        if size <= 0:
            return
        page = SMALL_PAGE if size <= SMALL else LARGE_PAGE
        segment = self._segments.setdefault((stream, page), Segment(page))
        if (address := segment.find(size)) is None:  # type: ignore[assignment]
            self._make_room(size)
            address = segment.map(size)
        self._held[number] = segment, address, size

    def _make_room(self, size: int) -> None:
        """What is asked of the device is the whole request, whatever part of it already lies free."""
        asked = -(-size // SMALL_PAGE) * SMALL_PAGE if size <= SMALL or size >= MIDDLE else LARGE_PAGE
        if self.reserved + asked <= self._limit:
            return
        for segment in self._segments.values():
            segment.release()
        if self.reserved + asked > self._limit:
            raise FullError


def reserved_bytes(before: Iterable[tuple[int, int, int]], events: Iterable[tuple[int, int, int]], limit: float = inf) -> int:
    """What is reserved in the end. Each event is (stream, allocation, change in bytes); `before` is what the step finds.

    The step is run twice: what the first one leaves free, in pieces, is what the second has to make do with. Raises FullError where
    `limit` bytes are not enough.
    """
    allocator = Allocator(limit)
    step = list(events)
    for event in (*before, *step, *step):
        allocator.change(*event)
    return allocator.reserved


def fits(before: Iterable[tuple[int, int, int]], events: Iterable[tuple[int, int, int]], limit: float) -> bool:
    """Whether a step can do with so many bytes, where memory that it does not need at the time is given back and asked for again."""
    try:
        reserved_bytes(before, events, limit)
    except FullError:
        return False
    return True
