"""What CUDA's caching allocator reserves for what a step allocates, with expandable segments, as training asks for them.

After PyTorch's c10/cuda/CUDACachingAllocator.cpp: every stream has one segment for small and one for large allocations. A request takes
the smallest free block that holds it, and the lowest of those; the block at the end, which can grow, counts as larger than all others.
What is left over stays free, and free neighbours are merged. Where no block is large enough the segment grows by whole pages, and never
shrinks: memory that was reserved once is given back only when the device has no more.
"""

from bisect import bisect_left, insort
from collections.abc import Iterable
from dataclasses import dataclass, field

MIB = 1 << 20
SMALL = MIB  # requests up to this come from the segment for small ones
SMALL_PAGE, LARGE_PAGE = 2 * MIB, 20 * MIB


@dataclass
class Segment:
    """One growing range of addresses. Free blocks are (size, address), in that order."""

    page: int
    size: int = 0
    _free: list[tuple[int, int]] = field(default_factory=list)
    _size_at: dict[int, int] = field(default_factory=dict)  # of free blocks, by where they start
    _start_of: dict[int, int] = field(default_factory=dict)  # and by where they end

    def take(self, size: int) -> int:
        """The address of a block of `size` bytes."""
        best = bisect_left(self._free, (size, 0))
        if best == len(self._free):
            self._grow(size)
            best = bisect_left(self._free, (size, 0))
        elif sum(self._free[best]) == self.size and best + 1 < len(self._free):
            best += 1
        found, address = self._free[best]
        self._remove(found, address)
        if found > size:
            self._add(found - size, address + size)
        return address

    def give_back(self, address: int, size: int) -> None:
        """Frees a block, merging it with its free neighbours."""
        if (after := self._size_at.get(address + size)) is not None:
            self._remove(after, address + size)
            size += after
        if (start := self._start_of.get(address)) is not None:
            self._remove(address - start, start)
            address, size = start, size + address - start
        self._add(size, address)

    def _grow(self, size: int) -> None:
        """Adds pages at the end until `size` bytes lie free there."""
        start = self._start_of.get(self.size, self.size)
        pages = -(-(size - (self.size - start)) // self.page)
        end, self.size = self.size, self.size + pages * self.page
        self.give_back(end, self.size - end)

    def _add(self, size: int, address: int) -> None:
        insort(self._free, (size, address))
        self._size_at[address], self._start_of[address + size] = size, address

    def _remove(self, size: int, address: int) -> None:
        self._free.pop(bisect_left(self._free, (size, address)))
        del self._size_at[address], self._start_of[address + size]


def reserved_bytes(before: Iterable[tuple[int, int, int]], events: Iterable[tuple[int, int, int]]) -> int:
    """What is reserved in the end. Each event is (stream, allocation, change in bytes); `before` is what the step finds.

    The step is run twice: what the first one leaves free, in pieces, is what the second has to make do with.
    """
    segments: dict[tuple[int, int], Segment] = {}
    held: dict[int, tuple[Segment, int, int]] = {}
    step = list(events)
    for stream, number, change in (*before, *step, *step):
        size = change
        if number in held:
            segment, address, was = held.pop(number)
            segment.give_back(address, was)
            size += was
        if size > 0:
            page = SMALL_PAGE if size <= SMALL else LARGE_PAGE
            segment = segments.setdefault((stream, page), Segment(page))
            held[number] = segment, segment.take(size), size
    return sum(segment.size for segment in segments.values())
