"""What a node holds: its processes, their descriptors and mappings by kind, its files in shared memory. Counted before and after a fault.

Processes are found by a mark in their environment, which every descendant inherits, so that nothing hides behind a new session or a new parent.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil

MARK = "SLUICE_TEST_MARK"
ROLES = {"nodeagent": "agent", "models.loader": "loader", "predictor": "predictor", "predictor.worker": "worker", "sluice": "supervisor"}


WEIGHTS, SEGMENT = ".weights", "memfd:sluice-segment"


def family(mark: str) -> list[psutil.Process]:
    """All live processes that carry the mark."""
    return [process for process in psutil.process_iter() if _carries(process, mark)]


def alive(process: psutil.Process) -> bool:
    """Whether it still runs. A question to a process may always come too late."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    return False


def command(process: psutil.Process) -> list[str]:
    """Its command line; empty once it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return process.cmdline()
    return []


def kill(processes: Iterable[psutil.Process]) -> None:
    """SIGKILL for each that still runs: the end of one may be the end of another."""
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()


def _carries(process: psutil.Process, mark: str) -> bool:
    with contextlib.suppress(psutil.Error, OSError):
        return process.environ().get(MARK) == mark and process.status() != psutil.STATUS_ZOMBIE
    return False


def role(process: psutil.Process) -> str:
    """agent, loader, predictor, supervisor, fork server or lane; "" for one that is ending."""
    with contextlib.suppress(psutil.Error, OSError, ValueError, IndexError):
        command = process.cmdline()
        name = ROLES.get(command[command.index("-m") + 1], "")
        if name != "worker":
            return name
        parent = process.parent()
        return "lane" if parent is None or role(parent) != "agent" else "fork server"
    return ""


def of_role(mark: str, name: str) -> list[psutil.Process]:
    """The live processes of one role."""
    return [process for process in family(mark) if role(process) == name]


def descriptors(pid: int) -> Counter[str]:
    """Open descriptors by kind: socket, pidfd, memfd:NAME, file name."""
    return Counter(filter(None, map(_kind, _links(pid))))


def _links(pid: int) -> Iterator[str]:
    with contextlib.suppress(OSError):
        for name in os.listdir(f"/proc/{pid}/fd"):
            with contextlib.suppress(OSError):
                yield os.readlink(f"/proc/{pid}/fd/{name}")


def _kind(link: str) -> str:
    """One word for what a descriptor is. Weight files have one each, so they count under one name."""
    if link.startswith("/memfd:"):
        return link.split(" ")[0][1:]
    if link.startswith("/"):
        return Path(link.split(" ")[0]).suffix or link
    return re.sub(r":?\[?\d*\]?$", "", link)


@dataclass(frozen=True)
class Census:
    """`open_`: descriptors by role and kind. `stored`: names in the host store. `lane_most`: the most weight files and segments of one lane.

    What a lane has attached depends on what it happened to run or to copy, so it is held to a bound: one weight file for each function of the node
    (those that share a model map it each), one mapping of each segment.
    """

    processes: Counter[str]
    open_: dict[str, Counter[str]]
    lane_most: Counter[str]
    stored: frozenset[str]

    def leaked_since(self, before: Census, functions: int) -> str:
        """What is more than before, and which processes are not back, in words; "" when nothing is. `functions`: how many are declared now."""
        names = sorted(self.processes.keys() | before.processes.keys())
        lines = [f"{name}: {before.processes[name]} -> {self.processes[name]}" for name in names if self.processes[name] != before.processes[name]]
        for name, now in self.open_.items():
            old = before.open_.get(name, Counter())
            lines += [f"{name} holds {kind}: {old[kind]} -> {now[kind]}" for kind in sorted(now) if now[kind] > old[kind]]
        if self.lane_most[WEIGHTS] > functions:
            lines.append(f"a lane holds {self.lane_most[WEIGHTS]} weight files for {functions} functions")
        if self.lane_most[SEGMENT] > max(1, before.lane_most[SEGMENT]):
            lines.append(f"a lane maps {self.lane_most[SEGMENT]} segments, before {before.lane_most[SEGMENT]}")
        lines += [f"stored {name}" for name in sorted(self.stored - before.stored)]
        lines += [f"no longer stored {name}" for name in sorted(before.stored - self.stored)]
        return "\n".join(lines)


def end_loader(mark: str) -> None:
    """Ends an idle loader, which would end itself in ten seconds. Returns when the agent has reaped it: it starts another when it needs one."""
    loaders = of_role(mark, "loader")
    kill(loaders)
    _, left = psutil.wait_procs(loaders, timeout=120)
    assert not left, f"nobody reaps {left}"


def take(mark: str, store: Path) -> Census:
    """Counts now. A loader comes and goes by itself: take a census after it has gone."""
    processes: Counter[str] = Counter()
    open_: dict[str, Counter[str]] = {}
    lane_most: Counter[str] = Counter()
    for process in family(mark):
        name, held = role(process), descriptors(process.pid)
        processes[name] += 1
        if name == "lane":
            lane_most |= Counter({WEIGHTS: held.pop(WEIGHTS, 0), SEGMENT: held.pop(SEGMENT, 0)})
        open_.setdefault(name, Counter()).update(held)
    stored = frozenset(path.name for path in store.iterdir()) if store.exists() else frozenset()
    return Census(processes, open_, lane_most, stored)
