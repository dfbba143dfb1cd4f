"""The bound on what a batch may allocate beside the weights: RLIMIT_DATA, so that too large an activation fails in torch and not on the node.

The slab, host weights and segments are shared mappings, which that limit does not count.
"""

from __future__ import annotations

import contextlib
import os
import resource
import threading
from collections.abc import Iterator

from contracts.units import MIB

_SLACK_BYTES = 64 * MIB
_DATA_FIELD = 5


class ActivationBound:
    """Allows the process `activation_bytes` above what it holds between batches (0: no bound)."""

    def __init__(self, activation_bytes: int) -> None:
        self._bytes = activation_bytes
        self._lock = threading.Lock()
        self._lifts = 0
        self._stale = activation_bytes > 0

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """No bound while modules are built, since what they hold is no activation."""
        if not self._bytes:
            yield
            return
        with self._lock:
            self._lifts += 1
            _limit(resource.RLIM_INFINITY)
        try:
            yield
        finally:
            with self._lock:
                self._lifts -= 1
                self._stale = True

    def settle(self) -> None:
        """Takes what the process holds now as the base, if that has changed; called between batches."""
        if not self._stale:
            return
        with self._lock:
            if not self._lifts:
                _limit(_data_bytes() + self._bytes + _SLACK_BYTES)
                self._stale = False


def _data_bytes() -> int:
    """The process's private writable memory, as RLIMIT_DATA counts it (proc(5), statm)."""
    with open("/proc/self/statm") as statm:
        return int(statm.read().split()[_DATA_FIELD]) * os.sysconf("SC_PAGESIZE")


def _limit(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (nbytes, resource.getrlimit(resource.RLIMIT_DATA)[1]))
