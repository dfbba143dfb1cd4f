"""What `sluice status` and the metrics show, put together from the state and the shell's own counters. Reads only."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping

from contracts.status import DeviceStatus, FunctionStatus, LaneStatus, NodeStatus
from nodeagent.entities import Device, Lane
from nodeagent.shell.functions import Entry, Functions
from nodeagent.shell.hoststore import HostStore
from nodeagent.shell.lanes import Lanes
from nodeagent.shell.slabs import Slab
from nodeagent.state import NodeState


def node_status(state: NodeState, functions: Functions, lanes: Lanes, slabs: Mapping[str, Slab], store: HostStore, uptime_ns: int) -> NodeStatus:
    """The whole node now."""
    now_ns = time.monotonic_ns()
    return NodeStatus(
        pid=os.getpid(),
        uptime_ns=uptime_ns,
        host_used_bytes=store.used_bytes,
        host_budget_bytes=store.budget_bytes,
        devices=tuple(_device(device, lanes, slabs[name]) for name, device in state.devices.items()),
        functions=tuple(_function(entry, state, now_ns) for entry in functions),
    )


def _device(device: Device, lanes: Lanes, slab: Slab) -> DeviceStatus:
    return DeviceStatus(
        device=device.spec.id,
        capacity_bytes=device.memory.capacity_bytes,
        used_bytes=device.memory.used_bytes,
        busy_ns=device.busy_ns,
        swapped_bytes=device.swapped_bytes,
        swaps=device.swaps,
        running_sm=device.running_sm,
        lanes=tuple(_lane(lane, lanes) for lane in device.lanes.values()),
        state="lost" if device.lost else "up",
        backend=slab.backend,
        why=slab.why,
        peer_swaps=device.peer_swaps,
    )


def _lane(lane: Lane, lanes: Lanes) -> LaneStatus:
    process = lanes[lane.number]
    return LaneStatus(lane.number, lane.sm_percent, lane.key[1], process.pid, lane.state.value, process.attached, process.unpinned)


def _function(entry: Entry, state: NodeState, now_ns: int) -> FunctionStatus:
    function, stats = entry.function, entry.stats
    known = state.functions.get(function.key) if entry.state == "ready" else None
    return FunctionStatus(
        key=function.key,
        cls=function.cls,
        state=entry.state,
        share=function.share,
        slo_ms=function.slo.latency_ns / 1e6,
        weight_bytes=known.spec.weight_bytes if known else 0,
        resident_on=tuple(device for device, extent in known.extents.items() if extent.resident) if known else (),
        queued=len(known.queue) if known else 0,
        rate=stats.rate(now_ns),
        latency=stats.latency(now_ns),
        answered=stats.answered,
        failed=stats.failed,
        refused=stats.refused,
        retried=known.retried if known else 0,
        slo_met=stats.slo_met,
        swaps=known.swaps if known else 0,
        gpu_ns=known.account.charged_ns if known else 0,
        reason=entry.reason,
    )
