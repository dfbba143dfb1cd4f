"""Where a function's next batch should run: pure choices over the devices as they are now.

Locality first, as LALB (GPU-enabled FaaS, IPDPS'23): a device that holds the weights; else wait for one that does if that is sooner than a swap; else
swap to the device with the cheapest path, its host link not busy with another swap (Torpor, ATC'25).
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import msgspec

from nodeagent.entities import Device, FunctionState, Lane
from nodeagent.memory import Extent, Place


class RunOn(msgspec.Struct, frozen=True):
    """Run on this lane: the weights are there, or come by this very lane."""

    lane: Lane


class SwapTo(msgspec.Struct, frozen=True):
    """Copy the weights to this place by this lane, and run there."""

    lane: Lane
    place: Place


class WaitFor(msgspec.Struct, frozen=True):
    """Stay queued. `device`: where it would run next; `lane_wanted`: it has the SMs there, but no lane of the right size is free."""

    device: Device | None
    lane_wanted: bool = False


Choice = RunOn | SwapTo | WaitFor
_DUPLICATE_COST = 0.1
_QUEUED_PER_S = 100.0


def choose(function: FunctionState, devices: Sequence[Device], held: Collection[str], owners: Mapping[int, FunctionState], now_ns: int) -> Choice:
    """The choice for one function. `held` devices are kept for others; `owners` are the functions by number."""
    sm_percent, _ = key = function.lane_key
    holder: Device | None = None
    holder_wait_ns = 0
    open_lanes: list[tuple[int, int, Lane]] = []
    wanted: Device | None = None
    for at, device in enumerate(devices):
        extent = function.extents.get(device.spec.id)
        has_room = device.running_sm + sm_percent <= 100 and device.spec.id not in held
        lane = device.idle_lane(key, device.link.tasks[extent.copy].lane if extent and extent.copy else 0) if has_room else None
        if extent is not None:
            if lane is not None and (extent.resident or device.link.tasks[extent.copy].lane == lane.number):
                return RunOn(lane)
            wait_ns = _wait_ns(device, extent, now_ns)
            if holder is None or wait_ns < holder_wait_ns:
                holder, holder_wait_ns = device, wait_ns
                if has_room and lane is None:
                    wanted = device
        elif lane is not None:
            open_lanes.append((device.link.swap_ns(function.spec.weight_bytes), at, lane))
        elif has_room and wanted is None and holder is None and find_place(function, device, owners, now_ns) is not None:
            wanted = device
    open_lanes.sort(key=lambda entry: entry[:2])
    for swap_ns, _, lane in open_lanes:
        if holder is not None and holder_wait_ns <= swap_ns:
            break
        place = find_place(function, lane.device, owners, now_ns)
        if place is not None:
            return SwapTo(lane, place)
    if wanted is not None:
        return WaitFor(wanted, lane_wanted=True)
    return WaitFor(holder)


def _wait_ns(device: Device, extent: Extent, now_ns: int) -> int:
    """How soon a busy holder can take the batch: the copy that is under way, or the first of its batches to end."""
    if not extent.resident:
        return device.link.swap_ns(extent.nbytes - extent.copied_bytes)
    return min((lane.remaining_ns(now_ns) for lane in device.lanes.values() if lane.active), default=0)


def find_place(
    function: FunctionState, device: Device, owners: Mapping[int, FunctionState], now_ns: int, *, spare_queued: bool = False
) -> Place | None:
    """Where on the device the function's weights could go, at the least cost of evictions; None when too much must stay."""
    return device.memory.find(
        function.number,
        function.spec.weight_bytes,
        lambda extent: eviction_cost(owners[extent.owner], extent, device, now_ns, spare_queued=spare_queued),
    )


def eviction_cost(function: FunctionState, extent: Extent, device: Device, now_ns: int, *, spare_queued: bool) -> float | None:
    """What it costs to forget these weights: the time to load them again x how soon they are needed. None: they must stay.

    Duplicates cost little. With `spare_queued` the weights of functions that have work queued stay, too (for prefetching).
    """
    if extent.pins:
        return None
    rate = function.need.per_second(now_ns)
    if function.queue:
        if spare_queued:
            return None
        rate = max(rate, _QUEUED_PER_S)
    reload_s = extent.nbytes / device.link.bytes_per_s
    return reload_s * rate * (_DUPLICATE_COST if len(function.extents) > 1 else 1.0)
