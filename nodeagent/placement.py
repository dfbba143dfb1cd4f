"""Where a function's next batch should run: pure choices over the devices as they are now.

Locality first, as LALB (GPU-enabled FaaS, IPDPS'23): a device that holds the weights; else wait for one that does if that is sooner than a swap; else
swap to the device with the cheapest path, its host link not busy with another swap (Torpor, ATC'25).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import msgspec

from nodeagent.entities import Device, FunctionState, Lane
from nodeagent.memory import Extent, Place
from nodeagent.tokens import NEVER_NS


class RunOn(msgspec.Struct, frozen=True):
    """Run on this lane: the weights are there, or come by this very lane."""

    lane: Lane


class SwapTo(msgspec.Struct, frozen=True):
    """Copy the weights to this place by this lane, and run there."""

    lane: Lane
    place: Place


class WaitFor(msgspec.Struct, frozen=True):
    """Stay queued.

    `lane_wanted`: this device has the SMs and the memory, but no lane of the right size is free. `holder_ns`: a device that holds the weights is free
    in so many ns, sooner than a swap would take; 0: it does not wait by choice.
    """

    lane_wanted: Device | None = None
    holder_ns: int = 0


Choice = RunOn | SwapTo | WaitFor
_DUPLICATE_COST = 0.1
_QUEUED_PER_S = 100.0


def choose(
    function: FunctionState, candidates: Sequence[Device], devices: Mapping[str, Device], owners: Mapping[int, FunctionState], now_ns: int
) -> Choice:
    """Where the function's next batch should run, of the candidates; `devices` are all, `owners` the functions by number."""
    hit = lane_with_weights(function, candidates) if function.extents else None
    if hit is not None:
        return RunOn(hit)
    sm_percent, _ = key = function.lane_key
    open_lanes: list[tuple[int, bool, int, Lane]] = []
    wanted: Device | None = None
    for at, device in enumerate(candidates):
        if device.running_sm + sm_percent > 100 or (device.held_for is not None and device.held_for is not function):
            continue
        lane, held = device.idle_lane(key), device.spec.id in function.extents
        if lane is not None and not held:
            full = device.memory.used_bytes + function.spec.weight_bytes > device.memory.capacity_bytes
            open_lanes.append((device.link.swap_ns(function.spec.weight_bytes), full, at, lane))
        if lane is None and wanted is None and device.lacks_lane(key) and (held or find_place(function, device, owners, now_ns) is not None):
            wanted = device
    if open_lanes:
        wait_ns = holder_wait_ns(function, devices, now_ns)
        open_lanes.sort(key=lambda entry: entry[:3])
        if wait_ns <= open_lanes[0][0]:
            return WaitFor(holder_ns=max(1, wait_ns))
        best: SwapTo | None = None
        for at, (swap_ns, _, _, lane) in enumerate(open_lanes):
            if best is not None and (not best.place.cost or swap_ns > open_lanes[at - 1][0]):
                break
            place = find_place(function, lane.device, owners, now_ns)
            if place is not None and (best is None or place.cost < best.place.cost):
                best = SwapTo(lane, place)
        if best is not None:
            return best
    return WaitFor(lane_wanted=wanted)


def lane_with_weights(function: FunctionState, candidates: Sequence[Device]) -> Lane | None:
    """A lane where the function can run now without a new copy: idle on a device that holds the weights, or the one that copies them."""
    extents, key = function.extents, function.lane_key
    for device in candidates:
        extent = extents.get(device.spec.id)
        if extent is None or device.running_sm + key[0] > 100 or (device.held_for is not None and device.held_for is not function):
            continue
        lane = device.idle_lane(key, device.link.tasks[extent.copy].lane if extent.copy else 0)
        if lane is not None:
            return lane
    return None


def holder_wait_ns(function: FunctionState, devices: Mapping[str, Device], now_ns: int) -> int:
    """How soon some device that holds the function's weights can take its next batch."""
    return min((_wait_ns(function, devices[id_], extent, now_ns) for id_, extent in function.extents.items()), default=NEVER_NS)


def _wait_ns(function: FunctionState, device: Device, extent: Extent, now_ns: int) -> int:
    """How soon a busy holder can take the batch: when its copy ends, or the first of its batches. Never: it has no lane, or is kept for another."""
    if device.held_for not in (None, function) or not any(lane.serving for lane in device.lanes_by_key.get(function.lane_key, ())):
        return NEVER_NS
    if not extent.resident:
        return device.link.swap_ns(extent.nbytes - extent.copied_bytes)
    return min((lane.remaining_ns(now_ns) for lane in device.lanes.values() if lane.request is not None), default=0)


def find_place(
    function: FunctionState, device: Device, owners: Mapping[int, FunctionState], now_ns: int, *, spare_queued: bool = False
) -> Place | None:
    """Where on the device the function's weights could go, at the least cost of evictions; None when too much must stay."""
    return device.memory.find(
        function.number, function.spec.weight_bytes, lambda extents: eviction_costs(extents, device, owners, now_ns, spare_queued=spare_queued)
    )


def eviction_costs(
    extents: Sequence[Extent], device: Device, owners: Mapping[int, FunctionState], now_ns: int, *, spare_queued: bool
) -> list[float | None]:
    """What it costs to forget each of these weights: the time to load them again x how soon they are needed. None: they must stay.

    Duplicates cost little. With `spare_queued` the weights of functions that have work queued stay, too (for prefetching).
    """
    costs: list[float | None] = []
    bytes_per_s = device.link.bytes_per_s
    for extent in extents:
        owner = owners[extent.owner]
        if extent.pins or (spare_queued and owner.queue):
            costs.append(None)
            continue
        rate = owner.need.per_second(now_ns)
        if owner.queue and rate < _QUEUED_PER_S:
            rate = _QUEUED_PER_S
        cost = extent.nbytes / bytes_per_s * rate
        costs.append(cost if len(owner.extents) == 1 else cost * _DUPLICATE_COST)
    return costs
