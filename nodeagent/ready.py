"""The order in which waiting work is looked at: functions with queued requests and paused batches, most urgent first. Pure.

Urgency changes with time (an account comes into its guarantee, a deadline can no longer hold), so every item also has a time at which it is looked at
again. Items are few thousand at most: a sorted list beats a tree.
"""

from __future__ import annotations

import heapq
from bisect import bisect_left, insort
from collections.abc import Iterator
from operator import itemgetter
from typing import Any, Protocol

from nodeagent.tokens import NEVER_NS, Tier


class Waiting(Protocol):
    """What can stand in the queue, which owns the first three fields. `turn` breaks ties; no two items have the same."""

    waiting: bool
    ready_key: tuple[Any, ...] | None
    wake_ns: int
    turn: int


_ITEM = itemgetter(2)


class ReadyQueue:
    """Items in order of urgency; those that are blocked wait outside the order for their time."""

    def __init__(self) -> None:
        self.order: list[tuple[tuple[Any, ...], int, Any]] = []
        """What may start, most urgent first: (key, turn, item)."""
        self._wakes: list[tuple[int, int, Any]] = []

    def head(self, count: int) -> Iterator[Any]:
        """The most urgent items, in order, as they stand now, whatever is placed or discarded meanwhile."""
        return map(_ITEM, self.order[:count])

    def place(self, item: Waiting, tier: Tier, order: tuple[Any, ...], change_ns: int) -> None:
        """Puts an item where its urgency says, until `change_ns`."""
        if item.ready_key is not None:
            self._take_out(item)
        item.waiting = True
        if tier is not Tier.BLOCKED:
            item.ready_key = (tier, *order)
            insort(self.order, (item.ready_key, item.turn, item))
        if change_ns < item.wake_ns:
            item.wake_ns = change_ns
            heapq.heappush(self._wakes, (change_ns, item.turn, item))

    def discard(self, item: Waiting) -> None:
        """The item waits no more."""
        if item.ready_key is not None:
            self._take_out(item)
        item.waiting = False

    def due(self, now_ns: int) -> list[Any]:
        """Items whose time has come; each must be placed again if it still waits."""
        found = []
        while self._wakes and self._wakes[0][0] <= now_ns:
            wake_ns, _, item = heapq.heappop(self._wakes)
            if item.wake_ns == wake_ns:
                item.wake_ns = NEVER_NS
                found.append(item)
        return found

    @property
    def next_ns(self) -> int:
        """When `due` next has something that waits."""
        while self._wakes:
            wake_ns, _, item = self._wakes[0]
            if item.waiting and item.wake_ns == wake_ns:
                return wake_ns
            heapq.heappop(self._wakes)
            if item.wake_ns == wake_ns:
                item.wake_ns = NEVER_NS
        return NEVER_NS

    def _take_out(self, item: Waiting) -> None:
        del self.order[bisect_left(self.order, (item.ready_key, item.turn))]
        item.ready_key = None
