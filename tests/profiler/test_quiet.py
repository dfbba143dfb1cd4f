"""Other load is seen: requests of other functions at the node, and on the CPU device what other processes use of the machine."""

from __future__ import annotations

import os
from types import SimpleNamespace
from typing import Any, NamedTuple

import psutil
import pytest

from contracts.errors import Refused
from contracts.functions import FunctionClass, Share
from contracts.status import FunctionStatus, LatencyStatus, NodeStatus
from profiler import quiet
from profiler.quiet import Watch
from profiler.session import NAMESPACE


class Node:
    """A node whose functions a test describes: (key, answered, queued)."""

    def __init__(self, *functions: tuple[str, int, int]) -> None:
        self.functions = functions

    def status(self) -> NodeStatus:
        lines = [
            FunctionStatus(key, FunctionClass.BEST_EFFORT, "ready", Share(), 1.0, 1, (), queued, 0.0, LatencyStatus(), answered, 0, 0, 0, 0, 0, 0)
            for key, answered, queued in self.functions
        ]
        return NodeStatus(os.getpid(), 0, 0, 0, (), tuple(lines))


class Times(NamedTuple):
    user: float
    idle: float
    iowait: float
    guest: float
    guest_nice: float


class Machine:
    """What psutil says of it: CPU seconds spent altogether, and by the sweep's own processes."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = self.busy = self.own = 0.0
        monkeypatch.setattr(psutil, "cpu_times", self._cpu_times)
        monkeypatch.setattr(psutil, "Process", lambda pid: SimpleNamespace(pid=pid, cpu_times=self._own, children=lambda recursive: []))
        monkeypatch.setattr(quiet, "time", SimpleNamespace(monotonic=lambda: self.now, sleep=self._sleep))

    def _cpu_times(self) -> Any:
        return Times(user=self.busy, idle=1e6 + self.now, iowait=50.0 * self.now, guest=0.0, guest_nice=0.0)

    def _own(self) -> Any:
        return SimpleNamespace(user=self.own, system=0.0)

    def _sleep(self, seconds: float) -> None:
        self.pass_(seconds, busy=0.0, own=0.0)

    def pass_(self, seconds: float, busy: float, own: float) -> None:
        self.now += seconds
        self.busy += busy
        self.own += own


NODES = {
    "nothing": ((), (), ""),
    "requests of the profiler's own": ((f"{NAMESPACE}/a", 1, 0), (f"{NAMESPACE}/a", 50, 1), ""),
    "another function that is idle": (("default/a", 5, 0), ("default/a", 5, 0), ""),
    "another function that was answered": (("default/a", 5, 0), ("default/a", 7, 0), "other functions (2)"),
    "another function that waits": (("default/a", 5, 0), ("default/a", 5, 3), "3 requests of other functions are queued"),
}


@pytest.mark.parametrize(("before", "after", "wanted"), NODES.values(), ids=NODES)
def test_requests_of_other_functions(before: Any, after: Any, wanted: str) -> None:
    node = Node(*([before] if before else []))
    watch = Watch(node, "cuda:0")  # type: ignore[arg-type]
    node.functions = (after,) if after else ()
    assert wanted in watch.end()
    assert bool(watch.end()) == bool(wanted)


LOADS = {
    "an idle machine": (0.0, 0.0, ""),
    "the sweep's own work": (1.9, 1.9, ""),
    "a little else": (2.1, 1.9, ""),
    "another process": (3.9, 1.9, "other processes use 1.0 cores"),
}


@pytest.mark.parametrize(("busy", "own", "wanted"), LOADS.values(), ids=LOADS)
def test_work_of_other_processes(monkeypatch: pytest.MonkeyPatch, busy: float, own: float, wanted: str) -> None:
    machine = Machine(monkeypatch)
    watch = Watch(Node(), "cpu:0")  # type: ignore[arg-type]
    machine.pass_(2.0, busy, own)
    assert watch.end() == wanted
    watch.begin()
    assert watch.end() == "", "what was before no longer counts"


def test_a_busy_machine_is_refused_with_the_way_out(monkeypatch: pytest.MonkeyPatch) -> None:
    machine = Machine(monkeypatch)
    watch = Watch(Node(), "cpu:0")  # type: ignore[arg-type]
    watch.require_quiet()
    monkeypatch.setattr(quiet.time, "sleep", lambda seconds: machine.pass_(seconds, busy=2 * seconds, own=0.0))
    with pytest.raises(Refused, match=r"other processes use 2\.0 cores: measure when nothing else runs, or with --beside-load"):
        watch.require_quiet()
