"""What a node says of itself: the answer to GetStatus, and what `sluice status --json` prints."""

from __future__ import annotations

import msgspec

from contracts.functions import FunctionClass, Share


class LatencyStatus(msgspec.Struct, frozen=True):
    """Latencies of the last minute at the agent (queue + swap + run), in ms."""

    p50_ms: float = 0.0
    p95_ms: float = 0.0
    p99_ms: float = 0.0


class FunctionStatus(msgspec.Struct, frozen=True):
    """A line of `sluice status`. Counters run since the agent started; `rate` is requests per second over the last ten seconds."""

    key: str
    cls: FunctionClass
    state: str
    share: Share
    slo_ms: float
    weight_bytes: int
    resident_on: tuple[str, ...]
    queued: int
    rate: float
    latency: LatencyStatus
    answered: int
    failed: int
    refused: int
    retried: int
    slo_met: int
    swaps: int
    gpu_ns: int
    reason: str = ""


class LaneStatus(msgspec.Struct, frozen=True):
    """One lane: its size, class, process, and whether it runs a batch now.

    `attached` functions are ready to be copied and run; the weights of `unpinned` of them could not be pinned, and are copied slowly.
    """

    lane: int
    sm_percent: int
    cls: FunctionClass
    pid: int
    state: str
    attached: int = 0
    unpinned: int = 0


class DeviceStatus(msgspec.Struct, frozen=True):
    """One device: memory in bytes, GPU time handed out in ns, bytes swapped in, and its lanes. `peer_swaps` of its swaps came from other devices.

    `state` is "up", or "lost" while its memory is being brought back; `backend` is what holds its lanes to their SMs (Spawn.backend), and `why` so.
    """

    device: str
    capacity_bytes: int
    used_bytes: int
    busy_ns: int
    swapped_bytes: int
    swaps: int
    running_sm: int
    lanes: tuple[LaneStatus, ...]
    state: str = "up"
    backend: str = "pace"
    why: str = ""
    peer_swaps: int = 0


class NodeStatus(msgspec.Struct, frozen=True):
    """What `sluice status` shows."""

    pid: int
    uptime_ns: int
    host_used_bytes: int
    host_budget_bytes: int
    devices: tuple[DeviceStatus, ...]
    functions: tuple[FunctionStatus, ...]
