"""How many events a second `NodeState.handle` takes: 1,000 functions, 8 devices, Poisson arrivals, on a virtual clock.

The load keeps the devices about four fifths busy, with every tenth function resident: hits, misses, evictions, pauses and shares all occur. Only the
processor time inside `handle` counts.
"""

from __future__ import annotations

import heapq
import random
import time

from contracts.functions import FunctionClass, Share, Slo
from contracts.units import MIB, MS, S
from nodeagent import events as ev
from nodeagent.settings import DeviceSpec, Settings
from nodeagent.state import NodeState

_WEIGHTS = 100 * MIB
_LINK = 20_000_000_000


def events_per_second(functions: int, devices: int, requests: int, load: float, seed: int) -> tuple[float, int]:
    """(events/s inside `handle`, events) of one seeded run."""
    world = _World(functions, devices, seed)
    gap_ns = round(world.mean_run_ns / (devices * load))
    return world.play(requests, gap_ns)


class _World:
    def __init__(self, functions: int, devices: int, seed: int) -> None:
        self._chance = random.Random(seed)
        specs = [DeviceSpec(f"gpu:{n}", functions // 10 // devices * _WEIGHTS + _WEIGHTS, _LINK) for n in range(devices)]
        self._state = NodeState(specs, Settings())
        self._heap: list[tuple[int, int, ev.Event]] = []
        self._count = self._requests = 0
        self._spent_ns = 0
        self._now_ns = S
        self._run_ns: dict[str, int] = {}
        self._paused_ns: dict[int, int] = {}
        self._ends: dict[int, tuple[int, int]] = {}
        self._names = [f"f{n}" for n in range(functions)]
        self.mean_run_ns = 0
        for n, name in enumerate(self._names):
            self._declare(n, name, devices)

    def _declare(self, n: int, name: str, devices: int) -> None:
        cls = FunctionClass.BEST_EFFORT if n % 5 == 0 else FunctionClass.LATENCY_SENSITIVE
        share = Share(sm_percent=(100, 50)[n % 2], quota_bp=max(1, devices * 8000 // len(self._names)))
        self._run_ns[name] = self._chance.choice((3, 5, 8, 20)) * MS
        self.mean_run_ns += self._run_ns[name] * share.sm_percent // 100 // len(self._names)
        self._handle(ev.FunctionDeclared(ev.FunctionSpec(name, cls, share, Slo(80 * MS), _WEIGHTS, self._run_ns[name])))

    def play(self, requests: int, gap_ns: int) -> tuple[float, int]:
        self._drain(until=requests // 50, gap_ns=gap_ns)
        self._count = self._spent_ns = 0
        self._drain(until=requests, gap_ns=gap_ns)
        return self._count * S / self._spent_ns, self._count

    def _drain(self, until: int, gap_ns: int) -> None:
        arrived = 0
        next_ns = self._now_ns
        while arrived < until:
            tick_ns = self._state.next_tick_ns() or 1 << 62
            due_ns = min(next_ns, self._heap[0][0] if self._heap else 1 << 62)
            if tick_ns < due_ns:
                self._now_ns = max(self._now_ns, tick_ns)
                self._handle(ev.Tick())
            elif next_ns <= due_ns:
                self._now_ns = next_ns
                arrived += 1
                self._requests += 1
                # Popularity is heavy-tailed, as in the public traces.
                name = self._names[min(len(self._names) - 1, int(self._chance.paretovariate(1.0)) - 1 + self._chance.randrange(50))]
                self._handle(ev.RequestArrived(self._requests, name, 1, 1, self._now_ns + 80 * MS, self._now_ns + 30 * S))
                next_ns += round(self._chance.expovariate(1 / gap_ns))
            else:
                self._now_ns, _, event = heapq.heappop(self._heap)
                self._happen(event)

    def _happen(self, event: ev.Event) -> None:
        if isinstance(event, ev.BatchFinished):
            if self._ends.get(event.lane, (0, 0))[0] != self._now_ns:
                return
            del self._ends[event.lane]
        self._handle(event)

    def _handle(self, event: ev.Event) -> None:
        began = time.thread_time_ns()
        commands = self._state.handle(event, self._now_ns)
        self._spent_ns += time.thread_time_ns() - began
        self._count += 1
        for command in commands:
            self._carry_out(command)

    def _at(self, delay_ns: int, event: ev.Event) -> None:
        heapq.heappush(self._heap, (self._now_ns + delay_ns, len(self._heap) + self._count * 64, event))

    def _carry_out(self, command: ev.Command) -> None:
        match command:
            case ev.StartLane():
                self._at(0, ev.LaneUp(command.lane))
            case ev.StopLane():
                self._at(0, ev.LaneLost(command.lane))
            case ev.Run():
                self._run(command.lane, command.request, self._run_ns[command.function] * 100 // self._state.lanes[command.lane].sm_percent)
            case ev.Preempt():
                end_ns, _ = self._ends.pop(command.lane)
                self._paused_ns[command.request] = max(1, end_ns - self._now_ns)
                self._at(100_000, ev.BatchPaused(command.lane, command.request, 100_000))
            case ev.Resume():
                self._run(command.lane, command.request, self._paused_ns.pop(command.request))
            case ev.Copy() if command.until_bytes:
                self._at(command.until_bytes * S // _LINK, ev.CopyProgress(command.copy, command.until_bytes))
            case ev.CopyGrant():
                self._at(8 * MIB * S // _LINK, ev.CopyProgress(command.copy, command.until_bytes))

    def _run(self, lane: int, request: int, run_ns: int) -> None:
        self._ends[lane] = (self._now_ns + run_ns, request)
        self._at(run_ns, ev.BatchFinished(lane, request, run_ns, 0))
