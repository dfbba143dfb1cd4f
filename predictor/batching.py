"""Which waiting requests of one function run together, and when: a pure state machine.

Owns the function's queue in the predictor and the count of what is in flight. Reads no clock, sends nothing and knows no tensors: the caller says
what time it is and dispatches what `take` returns.

A batch leaves when nothing of the function is in flight (an idle system adds no wait), when a batch in flight has returned, when it is full, or when
one of its requests would otherwise wait past its slack. Requests join only if all dimensions but the rows agree, or are padded and about as long, and
keep their order. Dynamic batching under a latency bound: Clipper (Crankshaw et al., NSDI 2017), Nexus (Shen et al., SOSP 2019).
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Container, Hashable, Mapping
from dataclasses import dataclass

QUEUED_BATCHES = 64
"""How many full batches a function may have outstanding in one predictor."""


@dataclass(frozen=True, slots=True)
class Waiting:
    """A request in the queue. `dims` is equal for requests that may share a batch; `hurry_ns` is when its slack has run out."""

    id: int
    rows: int
    dims: Hashable
    hurry_ns: int


_LEAST_STEP = 64


def joint(sizes: Mapping[str, int], padded: Container[str]) -> Hashable:
    """What requests must have in common to share a batch, from the sizes of their named dimensions: `Waiting.dims`.

    Joining saves a run's fixed cost and wastes what is padded. On one core MiniLM's fixed cost is that of about 50 tokens, and on a GPU it is more.
    So lengths join that are rounded up to the same multiple of 64 or, beyond 256, of a quarter of the power of two above: a request grows by less
    than 64 positions or by less than half, and 5 tokens never wait for 500.
    """
    return tuple(_rounded(size) if dim in padded else size for dim, size in sizes.items() if dim != "batch")


def _rounded(length: int) -> int:
    step = max(_LEAST_STEP, 1 << max(0, (length - 1).bit_length() - 2))
    return -(-length // step) * step


class Batcher:
    """The queue of one function. Of each group of equal `dims`, less than one full batch stays behind after a `take`."""

    def __init__(self, max_batch: int, max_rows: int) -> None:
        self.max_batch = max_batch
        self.max_rows = max_rows
        self.queued_rows = 0
        self.rows_in_flight = 0
        self._groups: dict[Hashable, deque[Waiting]] = {}
        self._group_rows: dict[Hashable, int] = {}
        self._waiting: dict[int, Waiting] = {}
        self._hurry: list[tuple[int, int]] = []
        self._in_flight = 0
        self._returned = False

    @property
    def rows(self) -> int:
        """Rows that this function has outstanding, waiting or in flight."""
        return self.queued_rows + self.rows_in_flight

    def add(self, waiting: Waiting) -> bool:
        """Queues a request; False, and nothing queued, when the queue is full. Ids are given in order of arrival."""
        if self.rows + waiting.rows > self.max_rows:
            return False
        self._groups.setdefault(waiting.dims, deque()).append(waiting)
        self._group_rows[waiting.dims] = self._group_rows.get(waiting.dims, 0) + waiting.rows
        self._waiting[waiting.id] = waiting
        if len(self._hurry) > 2 * len(self._waiting) + 64:
            self._hurry = [entry for entry in self._hurry if entry[1] in self._waiting]
            heapq.heapify(self._hurry)
        heapq.heappush(self._hurry, (waiting.hurry_ns, waiting.id))
        self.queued_rows += waiting.rows
        return True

    def remove(self, id_: int) -> bool:
        """Takes a request out of the queue; False when it is not there (it has left, or never came)."""
        waiting = self._waiting.get(id_)
        if waiting is None:
            return False
        self._groups[waiting.dims].remove(waiting)
        self._left(waiting)
        return True

    def take(self, now_ns: int) -> list[list[int]]:
        """The batches (request ids, in order) that leave now; each counts as in flight until `returned`."""
        batches = []
        while (group := self._due(now_ns)) is not None:
            batches.append(self._cut(group))
            self._in_flight += 1
            self._returned = False
        self._returned = False
        return batches

    def returned(self, rows: int) -> None:
        """A batch of so many rows has come back, with whatever outcome."""
        self._in_flight -= 1
        self.rows_in_flight -= rows
        self._returned = True

    def launched(self, rows: int) -> None:
        """A batch goes out beside the queue (a request that runs again by itself)."""
        self._in_flight += 1
        self.rows_in_flight += rows

    def wake_ns(self) -> int | None:
        """When `take` must be called again even if nothing happens; None when nothing waits."""
        while self._hurry and self._hurry[0][1] not in self._waiting:
            heapq.heappop(self._hurry)
        return self._hurry[0][0] if self._hurry else None

    def drain(self) -> list[int]:
        """Empties the queue: the ids that were in it, in order of arrival."""
        ids = sorted(self._waiting)
        for id_ in ids:
            self.remove(id_)
        return ids

    def _due(self, now_ns: int) -> Hashable | None:
        """The group whose batch should leave now. A key of a group is never None."""
        if not self._waiting:
            return None
        if self._in_flight == 0 or self._returned:
            return min(self._groups.values(), key=lambda group: group[0].id)[0].dims
        for dims, rows in self._group_rows.items():
            if rows >= self.max_batch:
                return dims
        wake_ns = self.wake_ns()
        if wake_ns is not None and wake_ns <= now_ns:
            return self._waiting[self._hurry[0][1]].dims
        return None

    def _cut(self, dims: Hashable) -> list[int]:
        group = self._groups[dims]
        ids: list[int] = []
        rows = 0
        while group and (not ids or rows + group[0].rows <= self.max_batch):
            waiting = group.popleft()
            ids.append(waiting.id)
            rows += waiting.rows
            self._left(waiting)
        self.rows_in_flight += rows
        return ids

    def _left(self, waiting: Waiting) -> None:
        """Bookkeeping for a request that is out of its group's queue."""
        del self._waiting[waiting.id]
        self.queued_rows -= waiting.rows
        self._group_rows[waiting.dims] -= waiting.rows
        if not self._groups[waiting.dims]:
            del self._groups[waiting.dims], self._group_rows[waiting.dims]
