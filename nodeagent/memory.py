"""The memory of one device: which function's weights lie where in the slab. Pure; it decides places and victims, it copies nothing.

Eviction only forgets. Weights come back to their former place when that is free, so that what was prepared for an address stays valid.
"""

from __future__ import annotations

import math
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence

import msgspec

from contracts.artifact import ALIGNMENT
from nodeagent.tokens import NEVER_NS


class Extent:
    """Weights on a device, or on their way to it (`copy` is then the copy's id). `pins` count the runs and copies that need them to stay.

    `unused` until the first batch takes a lane: until then `asked_ns` is when the copy began, and `near_ns` when so much of it was done that a batch
    could begin.
    """

    __slots__ = ("asked_ns", "copied_bytes", "copy", "end", "nbytes", "near_ns", "offset", "owner", "pins", "unused")

    def __init__(self, owner: int, offset: int, nbytes: int, copy: int, asked_ns: int = 0) -> None:
        self.owner = owner
        self.offset = offset
        self.nbytes = nbytes
        self.end = offset + aligned(nbytes)
        self.copy = copy
        self.copied_bytes = 0
        self.pins = 0
        self.unused = True
        self.asked_ns = asked_ns
        self.near_ns = NEVER_NS

    @property
    def resident(self) -> bool:
        """All weights have arrived."""
        return self.copy == 0

    @property
    def missing_bytes(self) -> int:
        """What has not arrived yet."""
        return self.nbytes - self.copied_bytes if self.copy else 0

    def waited_ns(self, since_ns: int, now_ns: int) -> int:
        """For how long since then a batch, the first that uses these weights, had to wait for them rather than for anything else."""
        return max(0, min(now_ns, self.near_ns) - max(since_ns, self.asked_ns))


class Place(msgspec.Struct, frozen=True):
    """Where weights can go, once these owners are evicted, which costs `cost`."""

    offset: int
    victims: tuple[int, ...]
    cost: float = 0.0


Costs = Callable[[Sequence[Extent]], Sequence[float | None]]
_LOOKED_AT = 128
"""Extents whose eviction is weighed at a time: of 500 models on a device, to weigh all took half a millisecond for each swap."""


def aligned(nbytes: int) -> int:
    """Bytes that an extent takes of the slab."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class DeviceMemory:
    """One slab. Owners are numbers (a declaration of a function)."""

    def __init__(self, capacity_bytes: int) -> None:
        self.capacity_bytes = capacity_bytes // ALIGNMENT * ALIGNMENT
        self.extents: dict[int, Extent] = {}
        self.used_bytes = 0
        self._ordered: list[Extent] = []
        self._former: dict[int, int] = {}
        self._hand = 0

    def find(self, owner: int, nbytes: int, costs: Costs) -> Place | None:
        """The best place for an owner's weights, or None when pinned extents leave no room.

        A free former place first, then the smallest hole that fits, then a cheap run of neighbours to evict, the cheapest where they are few: `costs`
        says what evicting each of some extents costs (None: it must stay).
        """
        need = aligned(nbytes)
        if self.used_bytes + need <= self.capacity_bytes:
            holes = [(end - start, start) for start, end in self._holes() if end - start >= need]
            former = self._former.get(owner)
            if former is not None and any(start <= former and former + need <= start + size for size, start in holes):
                return Place(former, ())
            if holes:
                return Place(min(holes)[1], ())
        return self._cheapest(need, costs)

    def take(self, owner: int, offset: int, nbytes: int, copy: int, now_ns: int = 0) -> Extent:
        """Reserves a place that is free, for a copy that begins now."""
        extent = Extent(owner, offset, nbytes, copy, now_ns)
        at = bisect(self._ordered, offset, key=lambda other: other.offset)
        before = self._ordered[at - 1].end if at else 0
        after = self._ordered[at].offset if at < len(self._ordered) else self.capacity_bytes
        assert before <= offset and extent.end <= after, f"[{offset}, {extent.end}) is not free"
        self._ordered.insert(at, extent)
        self.extents[owner] = extent
        self.used_bytes += extent.end - offset
        return extent

    def drop(self, owner: int) -> None:
        """Forgets an owner's weights; their place is remembered."""
        extent = self.extents.pop(owner)
        assert not extent.pins, f"the weights of {owner} are in use"
        self._ordered.remove(extent)
        self._former[owner] = extent.offset
        self.used_bytes -= extent.end - extent.offset

    def forget(self, owner: int) -> None:
        """The owner will not come back."""
        self._former.pop(owner, None)

    def _holes(self) -> Iterator[tuple[int, int]]:
        at = 0
        for extent in self._ordered:
            if extent.offset > at:
                yield at, extent.offset
            at = extent.end
        if at < self.capacity_bytes:
            yield at, self.capacity_bytes

    def _cheapest(self, need: int, costs: Costs) -> Place | None:
        """What is cheapest to evict: of all, or of the next few where there are many, for a sample is about as good (as in Redis's eviction)."""
        count = len(self._ordered)
        if count > _LOOKED_AT:
            first = min(self._hand, count - _LOOKED_AT)
            self._hand = (first + _LOOKED_AT) % count
            place = self._cheapest_run(need, first, first + _LOOKED_AT, costs)
            if place is not None:
                return place
        return self._cheapest_run(need, 0, count, costs)

    def _cheapest_run(self, need: int, begin: int, stop: int, costs: Costs) -> Place | None:
        """Two pointers over some extents in order of address: each window of evictable neighbours that, with the holes around it, is long enough."""
        extents = self._ordered[begin:stop]
        starts = [self._ordered[begin - 1].end if begin else 0] + [extent.end for extent in extents]
        ends = [extent.offset for extent in extents[1:]] + [self._ordered[stop].offset if stop < len(self._ordered) else self.capacity_bytes]
        prices = costs(extents)
        best: tuple[int, int] | None = None
        least = math.inf
        first, total = 0, 0.0
        for last, price in enumerate(prices):
            if price is None:
                first, total = last + 1, 0.0
                continue
            total += price
            end = ends[last]
            while first < last and end - starts[first + 1] >= need:
                total -= prices[first] or 0.0
                first += 1
            if total < least and end - starts[first] >= need:
                least, best = total, (first, last)
        if best is None:
            return None
        first, last = best
        return Place(starts[first], tuple(extent.owner for extent in extents[first : last + 1]), least)
