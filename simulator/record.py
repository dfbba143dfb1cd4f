"""What a simulation observed, in bounded memory: for each function how long its requests took and in which part, and what became of them.

Latencies go into buckets that are 1 % wide (as HdrHistogram does), so a percentile is within 0.5 % of the exact one however long the run.
"""

from __future__ import annotations

import math
import sys
from collections import Counter
from collections.abc import Iterable, Mapping

import numpy as np
import numpy.typing as npt

from contracts.units import MS

_WIDTH = math.log(1.01)
_RECENT = 1024
PARTS = ("total", "queue", "swap", "run")
_ANY = sys.maxsize


class Lost(Exception):
    """A run that was worth going on with only while a function misses its objective no more often than it may; it does."""


class Histogram:
    """Times in ns."""

    __slots__ = ("_buckets", "_zeros", "most_ns", "sum_ns")

    def __init__(self) -> None:
        self._buckets: dict[int, int] = {}
        self._zeros = self.sum_ns = self.most_ns = 0

    def add(self, times_ns: npt.NDArray[np.int64]) -> None:
        """Counts times, 0 included."""
        some_ns = times_ns[times_ns > 0]
        self._zeros += len(times_ns) - len(some_ns)
        if len(some_ns):
            found, counts = np.unique((np.log(some_ns) / _WIDTH).astype(np.int64), return_counts=True)
            for bucket, count in zip(found.tolist(), counts.tolist(), strict=True):
                self._buckets[bucket] = self._buckets.get(bucket, 0) + count
            self.sum_ns += int(some_ns.sum())
            self.most_ns = max(self.most_ns, int(some_ns.max()))

    @property
    def count(self) -> int:
        """How many times were counted."""
        return self._zeros + sum(self._buckets.values())

    def merge(self, other: Histogram) -> None:
        """Takes over all that another has counted."""
        for bucket, times in other._buckets.items():
            self._buckets[bucket] = self._buckets.get(bucket, 0) + times
        self._zeros += other._zeros
        self.sum_ns += other.sum_ns
        self.most_ns = max(self.most_ns, other.most_ns)

    def percentile_ms(self, percent: float) -> float:
        """The time within which so many percent lie (nearest rank); nan when nothing was counted."""
        rank, seen = math.ceil(self.count * percent / 100), self._zeros
        if seen >= rank > 0:
            return 0.0
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            if seen >= rank:
                return min(self.most_ns, math.exp((bucket + 0.5) * _WIDTH)) / MS
        return math.nan

    def curve(self) -> list[tuple[float, float]]:
        """(ms, percent of the times that are not longer), ascending: the cumulative distribution."""
        seen, count = self._zeros, self.count
        points = [(0.0, 100 * seen / count)] if seen else []
        for bucket in sorted(self._buckets):
            seen += self._buckets[bucket]
            points.append((min(self.most_ns, math.exp((bucket + 1) * _WIDTH)) / MS, 100 * seen / count))
        return points

    @property
    def mean_ms(self) -> float:
        """Exact; nan when nothing was counted."""
        count = self.count
        return self.sum_ns / count / MS if count else math.nan


class Record:
    """One function. `late` requests were answered after the objective; a request that got no answer is late too.

    `allow` makes it raise Lost when more than so many are late, or remain without an answer. The newest times are kept as they are, and counted some
    hundred at a time.
    """

    __slots__ = ("_histograms", "_most_late", "_most_rejected", "_recent", "answered", "cold", "late", "objective_ns", "rejected")

    def __init__(self, objective_ns: int) -> None:
        self.objective_ns = objective_ns
        self.allow(_ANY, _ANY)
        self.clear()

    def allow(self, late: int, rejected: int) -> None:
        """From now on, with what is counted already."""
        self._most_late, self._most_rejected = late, rejected

    def clear(self) -> None:
        """Begins anew."""
        self._histograms = {part: Histogram() for part in PARTS}
        self._recent: list[int] = []
        self.answered = self.cold = self.late = 0
        self.rejected: Counter[str] = Counter()

    def answer(self, total_ns: int, queue_ns: int, swap_ns: int, run_ns: int, *, cold: bool) -> None:
        """One request was answered."""
        self.answered += 1
        if cold:
            self.cold += 1
        if total_ns > self.objective_ns:
            self.late += 1
            if self.late > self._most_late:
                raise Lost
        recent = self._recent
        recent += (total_ns, queue_ns, swap_ns, run_ns)
        if len(recent) >= _RECENT:
            self._count()

    def reject(self, reason: str, requests: int = 1) -> None:
        """So many requests got no answer."""
        if requests:
            self.rejected[reason] += requests
            self.late += requests
            if self.late > self._most_late or self.rejected.total() > self._most_rejected:
                raise Lost

    @property
    def parts(self) -> Mapping[str, Histogram]:
        """The times of each of PARTS."""
        self._count()
        return self._histograms

    @property
    def requests(self) -> int:
        """All that came."""
        return self.answered + self.rejected.total()

    def within_slo(self, percentile: float) -> bool:
        """Whether so many percent of the requests were answered in time; a function without requests misses nothing."""
        return self.late <= self.requests * (100 - percentile) / 100

    def _count(self) -> None:
        columns = np.array(self._recent, np.int64).reshape(-1, len(PARTS)).T
        for histogram, times_ns in zip(self._histograms.values(), columns, strict=True):
            histogram.add(times_ns)
        self._recent.clear()


def together(records: Iterable[Record]) -> dict[str, Histogram]:
    """All functions' times as one histogram for each part."""
    merged = {part: Histogram() for part in PARTS}
    for record in records:
        for part, histogram in record.parts.items():
            merged[part].merge(histogram)
    return merged
