"""The agent's log: what keeps one who fails a thousand times a second from filling it.

Owns how many lines each place in the code may write. Never looks at what they say.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

_FORMAT = "%(asctime)s nodeagent %(levelname)s %(message)s"


class FloodFilter(logging.Filter):
    """Lets `most` lines of each place in the code through in `period_s`; the first after that says how many were kept back."""

    def __init__(self, most: int = 20, period_s: float = 10.0, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._most = most
        self._period_s = period_s
        self._clock = clock
        self._counts: dict[tuple[str, int], tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the line is written."""
        now, place = self._clock(), (record.pathname, record.lineno)
        since, count = self._counts.get(place, (now, 0))
        if now - since >= self._period_s:
            if count > self._most:
                record.msg, record.args = f"{record.getMessage()} ({count - self._most} more like it were kept back)", ()
            since, count = now, 0
        self._counts[place] = since, count + 1
        return count < self._most


def start() -> None:
    """Logs to standard error from now on."""
    handler = logging.StreamHandler()
    handler.addFilter(FloodFilter())
    logging.basicConfig(level=logging.INFO, format=_FORMAT, handlers=[handler])
