"""Whether anything else uses the node or the machine while a point is measured.

Owns the counters between `begin` and `end`. On the CPU device the machine's own load matters: every process that is not the node's or this one's.
"""

from __future__ import annotations

import contextlib
import os
import time

import psutil

from contracts.errors import Refused
from contracts.status import NodeStatus
from profiler.session import NAMESPACE, Session

QUIET_CORES = 0.25
_LOOK_S = 1.0


class Machine:
    """The CPU time that others spend from now on: who is neither one of these processes nor was started by one."""

    def __init__(self, *pids: int) -> None:
        self._pids = pids
        self._busy_s, self._own_s = self._spent()
        self._begun = time.monotonic()

    def cores(self) -> float:
        """How many cores others have used on average."""
        busy_s, own_s = self._spent()
        own = sum(max(0.0, spent - self._own_s.get(pid, 0.0)) for pid, spent in own_s.items())
        return (busy_s - self._busy_s - own) / max(1e-3, time.monotonic() - self._begun)

    def _spent(self) -> tuple[float, dict[int, float]]:
        """(CPU seconds of the whole machine, CPU seconds of each own process), since their starts."""
        times = psutil.cpu_times()
        busy_s = sum(times) - times.idle - times.iowait - times.guest - times.guest_nice
        own: dict[int, float] = {}
        for pid in self._pids:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(pid)
                for process in (root, *root.children(recursive=True)):
                    with contextlib.suppress(psutil.Error):
                        spent = process.cpu_times()
                        own[process.pid] = spent.user + spent.system
        return busy_s, own


class Watch:
    """Counts what others do. `begin`, then `end`: in words what else ran meanwhile, empty when nothing did."""

    def __init__(self, session: Session, device: str) -> None:
        self._session = session
        self._cpu = device.startswith("cpu:")
        self.begin()

    def begin(self) -> None:
        """From now on."""
        status = self._session.status()
        self._requests = _foreign_requests(status)
        self._machine = Machine(os.getpid(), status.pid) if self._cpu else None

    def end(self) -> str:
        """What else ran since `begin`."""
        status = self._session.status()
        foreign = _foreign_requests(status) - self._requests
        if foreign > 0:
            return f"the node answers requests of other functions ({foreign})"
        queued = sum(line.queued for line in status.functions if not line.key.startswith(f"{NAMESPACE}/"))
        if queued:
            return f"{queued} requests of other functions are queued"
        cores = self._machine.cores() if self._machine is not None else 0.0
        return f"other processes use {cores:.1f} cores" if cores > QUIET_CORES else ""

    def require_quiet(self) -> None:
        """Looks for a moment; Refused when something else runs."""
        self.begin()
        time.sleep(_LOOK_S)
        found = self.end()
        if found:
            raise Refused(f"{found}: measure when nothing else runs, or with --beside-load, which marks what was measured beside load")


def _foreign_requests(status: NodeStatus) -> int:
    """Requests of functions that are not the profiler's, since the agent started."""
    return sum(line.answered + line.failed + line.refused for line in status.functions if not line.key.startswith(f"{NAMESPACE}/"))
