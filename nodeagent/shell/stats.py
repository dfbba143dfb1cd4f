"""What the agent counts of a function beside what the state knows: answers, failures, and the latencies of the last minute.

Owns counters only; decides nothing.
"""

from __future__ import annotations

from collections import deque

from contracts.errors import Refused, SluiceError
from contracts.status import LatencyStatus
from contracts.units import S, ms

_LATENCY_WINDOW_NS = 60 * S
_RATE_WINDOW_NS = 10 * S
_LATENCY_SAMPLES = 20_000


class FunctionStats:
    """Counters of one function, in client requests, since it was declared."""

    __slots__ = ("_samples", "answered", "failed", "refused", "slo_met")

    def __init__(self) -> None:
        self.answered = 0
        self.failed = 0
        self.refused = 0
        self.slo_met = 0
        self._samples: deque[tuple[int, int, int]] = deque(maxlen=_LATENCY_SAMPLES)

    def answer(self, now_ns: int, latency_ns: int, requests: int, in_time: bool) -> None:
        """One batch that answers `requests` client requests has been answered."""
        self.answered += requests
        if in_time:
            self.slo_met += requests
        self._samples.append((now_ns, latency_ns, requests))

    def fail(self, error: SluiceError, requests: int) -> None:
        """One batch of `requests` client requests got an error; a refusal is no failure."""
        if isinstance(error, Refused):
            self.refused += requests
        else:
            self.failed += requests

    def rate(self, now_ns: int) -> float:
        """Client requests answered per second over the last ten seconds."""
        total = 0
        for at_ns, _, requests in reversed(self._samples):
            if at_ns < now_ns - _RATE_WINDOW_NS:
                break
            total += requests
        return total * S / _RATE_WINDOW_NS

    def latency(self, now_ns: int) -> LatencyStatus:
        """Percentiles of the last minute; zeros when nothing was answered."""
        samples = self._samples
        while samples and samples[0][0] < now_ns - _LATENCY_WINDOW_NS:
            samples.popleft()
        if not samples:
            return LatencyStatus()
        ordered = sorted((latency_ns, requests) for _, latency_ns, requests in samples)
        total = sum(requests for _, requests in ordered)
        ranks = [(percent * total + 99) // 100 for percent in (50, 95, 99)]
        found: list[float] = []
        seen = 0
        for latency_ns, requests in ordered:
            seen += requests
            while len(found) < len(ranks) and seen >= ranks[len(found)]:
                found.append(ms(latency_ns))
        return LatencyStatus(*found)
