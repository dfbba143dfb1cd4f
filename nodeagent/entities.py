"""What a node consists of, as its state sees it: functions, requests, lanes, devices. Plain records; NodeState alone changes them."""

from __future__ import annotations

import enum
from collections import deque
from collections.abc import Iterator
from typing import Any

from contracts.functions import FunctionClass, Share
from nodeagent.copies import CopyTask, Link
from nodeagent.estimates import NeedEstimate, RunEstimate
from nodeagent.events import FunctionSpec, RequestArrived
from nodeagent.memory import DeviceMemory, Extent
from nodeagent.settings import DeviceSpec
from nodeagent.tokens import NEVER_NS, Account

LaneKey = tuple[int, FunctionClass]


class FunctionState:
    """A declared function. `extents` says on which devices its weights are or come; `running` counts batches on lanes, paused ones included.

    `stuck`: its most urgent batch found no SMs, lane or memory when it was last tried; `overtaken` counts the starts that others made meanwhile.
    Until `holder_until_ns` it waits for a device that holds its weights rather than swap.
    """

    __slots__ = (
        "account",
        "answered",
        "estimate",
        "extents",
        "holder_until_ns",
        "lane_key",
        "need",
        "number",
        "on_time",
        "overtaken",
        "queue",
        "queued_ns",
        "ready_key",
        "removed",
        "retried",
        "running",
        "spec",
        "stuck",
        "swaps",
        "turn",
        "waiting",
        "wake_ns",
    )

    def __init__(self, spec: FunctionSpec, number: int, window_ns: int, now_ns: int) -> None:
        self.spec = spec
        self.number = number
        self.turn = 2 * number
        self.account = Account(spec.cls, spec.share, window_ns, now_ns)
        self.estimate = RunEstimate(spec.run_ns * 100 // spec.share.sm_percent)
        self.need = NeedEstimate(now_ns)
        self.lane_key: LaneKey = (spec.share.sm_percent, spec.cls)
        self.queue: deque[RequestState] = deque()
        self.queued_ns = 0
        self.extents: dict[str, Extent] = {}
        self.running = 0
        self.removed = False
        self.stuck = False
        self.holder_until_ns = 0
        self.overtaken = 0
        self.waiting = False
        self.ready_key: tuple[Any, ...] | None = None
        self.wake_ns = NEVER_NS
        self.answered = self.on_time = self.retried = self.swaps = 0

    def set_share(self, share: Share, now_ns: int) -> None:
        """A new share, for the account and for the lanes that the next batch may run in."""
        self.estimate.rescale(self.account.share.sm_percent, share.sm_percent)
        self.account.set_share(share, now_ns)
        self.lane_key = (share.sm_percent, self.spec.cls)

    def enqueue(self, request: RequestState, *, first: bool = False) -> None:
        """A request waits; `queued_ns` is what all that wait are expected to take."""
        request.estimate_ns = self.estimate.run_ns(request.rows)
        self.queued_ns += request.estimate_ns
        if first:
            self.queue.appendleft(request)
        else:
            self.queue.append(request)

    def dequeue(self, request: RequestState | None = None) -> RequestState:
        """A request waits no more: this one, or the first."""
        if request is None:
            request = self.queue.popleft()
        else:
            self.queue.remove(request)
        self.queued_ns -= request.estimate_ns
        return request

    @property
    def idle(self) -> bool:
        """Nothing queued, nothing running."""
        return not self.queue and not self.running


class RequestState:
    """An accepted request until it is answered. While it is paused it stands in the ready queue itself.

    `weights_ns`: how long it waited for its function's weights before it took a lane.
    """

    __slots__ = (
        "arrived_ns",
        "cancelled",
        "cold",
        "deadline_ns",
        "estimate_ns",
        "function",
        "gpu_ns",
        "lane",
        "number",
        "ready_key",
        "requests",
        "retried",
        "rows",
        "slo_deadline_ns",
        "started_ns",
        "turn",
        "waiting",
        "wake_ns",
        "weights_ns",
    )

    def __init__(self, event: RequestArrived, function: FunctionState, now_ns: int) -> None:
        self.number = event.request
        self.turn = 2 * event.request + 1
        self.function = function
        self.rows = event.rows
        self.requests = event.requests
        self.arrived_ns = now_ns
        self.started_ns = 0
        self.weights_ns = 0
        self.slo_deadline_ns = event.slo_deadline_ns
        self.deadline_ns = event.deadline_ns
        self.lane: Lane | None = None
        self.estimate_ns = 0
        self.gpu_ns = 0
        self.retried = self.cancelled = self.cold = False
        self.waiting = False
        self.ready_key: tuple[Any, ...] | None = None
        self.wake_ns = NEVER_NS

    @property
    def extent(self) -> Extent:
        """Its weights, while it is on a lane."""
        assert self.lane is not None
        return self.function.extents[self.lane.device.spec.id]


class LaneState(enum.Enum):
    """STARTING -> IDLE -> RUNNING -> (PAUSING -> PAUSED -> RUNNING)* -> IDLE -> STOPPING."""

    STARTING = "starting"
    IDLE = "idle"
    RUNNING = "running"
    PAUSING = "pausing"
    PAUSED = "paused"
    STOPPING = "stopping"


class Lane:
    """A lane of a device. `since_ns` is when it took up its present state. Sizes are percent of the device's SMs.

    `sm_percent` is its cap, `held_sm` what it holds of its device while it runs. `copies` counts those that it makes. `doomed`: it was told to end
    with a batch in hand, since it hangs, or its device or one that it reads is lost. `peers`: the devices whose memory it has proved to read right.
    """

    __slots__ = ("best_effort", "copies", "device", "doomed", "held_sm", "key", "number", "peers", "request", "since_ns", "sm_percent", "state")

    def __init__(self, number: int, device: Device, key: LaneKey, now_ns: int) -> None:
        self.number = number
        self.device = device
        self.key = key
        self.sm_percent, cls = key
        self.best_effort = cls is FunctionClass.BEST_EFFORT
        self.held_sm = 100 if device.spec.exclusive else self.sm_percent
        self.state = LaneState.STARTING
        self.request: RequestState | None = None
        self.since_ns = now_ns
        self.copies = 0
        self.peers: set[str] = set()
        self.doomed = False

    @property
    def active(self) -> bool:
        """It holds SMs now."""
        return self.state is LaneState.RUNNING or self.state is LaneState.PAUSING

    @property
    def preemptible(self) -> bool:
        """Its batch may be asked to pause."""
        return self.best_effort and self.state is LaneState.RUNNING and not self.doomed

    @property
    def serving(self) -> bool:
        """It has come up and was not told to stop."""
        return self.state not in (LaneState.STARTING, LaneState.STOPPING) and not self.doomed

    def remaining_ns(self, now_ns: int) -> int:
        """How much longer its batch is expected to run."""
        if self.request is None:
            return 0
        left = self.request.estimate_ns - self.request.gpu_ns
        if self.state is not LaneState.PAUSED:
            left -= now_ns - self.since_ns
        return left if left > 0 else 0


class Device:
    """A device: its memory, its lanes, its link to the host, and how many percent of its SMs run now.

    `peer_links` lead to it from other devices, `copies` are all under way to it. `held_for`: kept free for a function that was starved.

    `pausable` counts its running best-effort batches that were not yet asked to pause. `lost`: its memory has gone, and nothing may start there.
    """

    __slots__ = (
        "busy_ns",
        "copies",
        "failed_starts",
        "held_for",
        "lanes",
        "lanes_by_key",
        "link",
        "lost",
        "memory",
        "pausable",
        "peer_links",
        "peer_swaps",
        "running_sm",
        "spec",
        "start_after_ns",
        "swapped_bytes",
        "swaps",
    )

    def __init__(self, spec: DeviceSpec, link: Link) -> None:
        self.spec = spec
        self.memory = DeviceMemory(spec.capacity_bytes)
        self.link = link
        self.peer_links: dict[str, Link] = {}
        self.copies: dict[int, CopyTask] = {}
        self.lanes: dict[int, Lane] = {}
        self.lanes_by_key: dict[LaneKey, list[Lane]] = {}
        self.running_sm = 0
        self.pausable = 0
        self.held_for: FunctionState | None = None
        self.busy_ns = self.swapped_bytes = self.swaps = self.peer_swaps = 0
        self.failed_starts = 0
        self.start_after_ns = 0
        self.lost = False

    def idle_lane(self, key: LaneKey, number: int = 0) -> Lane | None:
        """An idle lane of this size and class; with a number, only that one. One that copies has a batch of its own to come: better another."""
        lanes = self.lanes_by_key.get(key, ())
        for lane in lanes:
            if lane.state is LaneState.IDLE and (lane.number == number if number else not lane.copies):
                return lane
        return next((lane for lane in lanes if lane.state is LaneState.IDLE and not number), None) if self.copies else None

    def lacks_lane(self, key: LaneKey) -> bool:
        """One more lane of this size and class could run beside those there are, and none is on its way."""
        if self.lost:
            return False
        peers = self.lanes_by_key.get(key, ())
        most = 1 if self.spec.exclusive else 100 // key[0]
        return len(peers) < most and not any(lane.state is LaneState.STARTING for lane in peers)

    def free_in_ns(self, now_ns: int) -> int:
        """When the first of its batches is expected to end."""
        return min((lane.remaining_ns(now_ns) for lane in self.lanes.values() if lane.request is not None), default=0)

    def preemptible(self) -> Iterator[Lane]:
        """Lanes whose running batch may be asked to pause."""
        return (lane for lane in self.lanes.values() if lane.preemptible)
