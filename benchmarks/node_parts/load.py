"""Load on a node and what came of it: closed loops that keep a function busy, and the record of its batches.

Owns the batches under way and waits for all of them at the end, so that none is lost unseen. Knows no function in particular.
"""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import time
from collections.abc import AsyncIterator, Mapping

import numpy as np

from benchmarks.node_parts.node import Node
from contracts.errors import SluiceError
from predictor.segment import Array

_STEPS = 2
_MOST_ROWS = 1024


class Record:
    """The batches of one function as they were answered: when (monotonic ns), and how much GPU time each took."""

    def __init__(self, key: str) -> None:
        self.key = key
        self.submitted = 0
        self.done_ns: list[int] = []
        self._used_ns = [0]

    @property
    def answered(self) -> int:
        """Batches answered."""
        return len(self.done_ns)

    @property
    def lost(self) -> int:
        """Batches that failed, or were not answered yet."""
        return self.submitted - self.answered

    @property
    def used_ns(self) -> int:
        """GPU time of all answered batches."""
        return self._used_ns[-1]

    def add(self, done_ns: int, run_ns: int) -> None:
        """A batch was answered."""
        self.done_ns.append(done_ns)
        self._used_ns.append(self._used_ns[-1] + run_ns)

    def used_between(self, first: int, last: int) -> tuple[int, int]:
        """(GPU time, wall time) from the end of batch `first` to the end of batch `last`."""
        return self._used_ns[last + 1] - self._used_ns[first + 1], self.done_ns[last] - self.done_ns[first]

    def share(self, from_ns: int, to_ns: int) -> float:
        """Percent of the time that it used, from the end of the first batch in the interval to the end of the last: whole turns, so exact."""
        used_ns, wall_ns = self.used_between(bisect.bisect_left(self.done_ns, from_ns), bisect.bisect_right(self.done_ns, to_ns) - 1)
        return 100 * used_ns / wall_ns


@contextlib.asynccontextmanager
async def saturated(node: Node, key: str, part: Mapping[str, Array], depth: int = 4) -> AsyncIterator[Record]:
    """Keeps `depth` batches of a function in flight; at the end it waits for those that are."""
    record = Record(key)
    stop = False

    async def loop() -> None:
        while not stop:
            record.submitted += 1
            with contextlib.suppress(SluiceError):
                reply = await node.caller.call(key, part)
                record.add(reply.done_ns, reply.answer.run_ns)

    tasks = [asyncio.create_task(loop()) for _ in range(depth)]
    try:
        yield record
    finally:
        stop = True
        await asyncio.gather(*tasks)


async def elapse(seconds: float) -> tuple[int, int]:
    """Lets time pass; (beginning, end) in monotonic ns."""
    begun_ns = time.monotonic_ns()
    await asyncio.sleep(seconds)
    return begun_ns, time.monotonic_ns()


async def rows_for(node: Node, key: str, part: Mapping[str, Array], run_ns: int) -> Mapping[str, Array]:
    """As many of the part's rows, repeated, as take about `run_ns` of GPU time; approached in steps, for a row costs less in a larger batch."""
    for _ in range(_STEPS):
        took_ns = [(await node.caller.call(key, part)).answer.run_ns for _ in range(3)]
        factor = run_ns / float(np.median(took_ns))
        part = {name: np.resize(array, (max(1, min(_MOST_ROWS, round(len(array) * factor))), *array.shape[1:])) for name, array in part.items()}
    return part
