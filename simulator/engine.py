"""A clock and what is due: the event loop of a simulation. It knows neither nodes nor requests, and two runs of the same calls are the same run."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any

from simulator.arrivals import Arrivals

_CHUNK = 1 << 16


class Engine:
    """Virtual time, in ns. What is due at the same time happens in the order in which it was asked for."""

    def __init__(self) -> None:
        self.now_ns = 0
        self._due: list[tuple[int, int, Callable[..., None], tuple[Any, ...]]] = []
        self._asked = 0

    def at(self, when_ns: int, act: Callable[..., None], *arguments: Any) -> None:
        """Calls `act` at that time, at once after what is due now if the time has passed."""
        self._asked += 1
        heappush(self._due, (when_ns if when_ns > self.now_ns else self.now_ns, self._asked, act, arguments))

    def run(self, arrivals: Arrivals, arrive: Callable[[int], None], progress: Callable[[int], None] = lambda _: None, *, start_ns: int = 0) -> None:
        """Plays all arrivals, calling `arrive` with the function's index, and then what they have caused, until nothing is due.

        They begin at `start_ns`. `progress` hears from time to time how many have arrived. Arrivals are not put on the heap: a day of them costs no
        memory.
        """
        due = self._due
        for start in range(0, len(arrivals), _CHUNK):
            part = slice(start, start + _CHUNK)
            times, functions = (arrivals.at_ns[part] + start_ns).tolist(), arrivals.function[part].tolist()
            for at_ns, function in zip(times, functions, strict=True):
                while due and due[0][0] <= at_ns:
                    self.now_ns, _, act, arguments = heappop(due)
                    act(*arguments)
                self.now_ns = at_ns
                arrive(function)
            progress(start + len(times))
        self.settle()

    def settle(self, until_ns: int | None = None) -> None:
        """Goes on until nothing is due, or until this time."""
        while self._due and (until_ns is None or self._due[0][0] <= until_ns):
            self.now_ns, _, act, arguments = heappop(self._due)
            act(*arguments)
        if until_ns is not None:
            self.now_ns = max(self.now_ns, until_ns)
