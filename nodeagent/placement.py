"""Where a function's next batch should run: pure choices over the devices as they are now.

Locality first, as LALB (GPU-enabled FaaS, IPDPS'23): a device that holds the weights; else wait for one that does if that is sooner than a swap; else
swap to the device with the cheapest path (a link from a device that holds them, or from the host) that is not busy with a swap (Torpor, ATC'25). A
batch whose weights take longer to come than it runs waits in the queue meanwhile: it takes its lane when what is left of the copy is hidden behind
its layers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from operator import itemgetter

import msgspec

from contracts.functions import FunctionClass
from contracts.units import MS
from nodeagent.copies import Link
from nodeagent.entities import Device, FunctionState, Lane
from nodeagent.memory import Extent, Place
from nodeagent.ready import ReadyQueue
from nodeagent.tokens import NEVER_NS


class RunOn(msgspec.Struct, frozen=True):
    """Run on this lane: the weights are there, or come by this very lane."""

    lane: Lane


class Way(msgspec.Struct, frozen=True):
    """How weights come to a device: from another that holds them, or, where `source` is empty, from the host."""

    link: Link
    source: str = ""


class SwapTo(msgspec.Struct, frozen=True):
    """Copy the weights to this place by this lane, and run there, when `stall_ns` of the copy have gone by; at once if it is 0."""

    lane: Lane
    place: Place
    way: Way
    stall_ns: int


class WaitFor(msgspec.Struct, frozen=True):
    """Stay queued.

    `lane_wanted`: this device has the SMs and the memory, but no lane of the right size is free. `holder_ns`: a device that holds the weights, or
    to which they are on their way, can take the batch in so many ns, sooner than after a swap; 0: it does not wait for one. `for_link`: another
    copy must end first.
    """

    lane_wanted: Device | None = None
    holder_ns: int = 0
    for_link: bool = False


Choice = RunOn | SwapTo | WaitFor
_AHEAD = 32
_EARLY_NS = 2 * MS
"""A lane is taken so much earlier than the copy and the run need, and by a quarter of the run: a run is slower while weights are copied."""
Opening = tuple[int, bool, int, Lane, Way]
"""A lane to which weights could be copied now: (swap time, is its device full, order, lane, way)."""
_BY_TIME = itemgetter(0, 1, 2)
_DUPLICATE_COST = 0.1
_QUEUED_PER_S = 100.0


def choose(
    function: FunctionState,
    candidates: Sequence[Device],
    devices: Mapping[str, Device],
    owners: Mapping[int, FunctionState],
    ready: ReadyQueue,
    now_ns: int,
) -> Choice:
    """Where the function's next batch should run, of the candidates.

    `devices` are all, `owners` the functions by number, `ready` is all that waits.
    """
    rows = function.queue[0].rows
    hit = lane_with_weights(function, rows, candidates) if function.extents else None
    if hit is not None:
        return RunOn(hit)
    openings, wanted, for_link = _openings(function, candidates, owners, now_ns)
    if openings:
        wait_ns = holder_wait_ns(function, devices, ready, now_ns)
        if wait_ns <= openings[0][0]:
            return WaitFor(holder_ns=max(1, wait_ns))
        best: SwapTo | None = None
        for at, (swap_ns, _, _, lane, way) in enumerate(openings):
            if best is not None and (not best.place.cost or swap_ns > openings[at - 1][0]):
                break
            place = find_place(function, lane.device, owners, now_ns)
            if place is not None and (best is None or place.cost < best.place.cost):
                best = SwapTo(lane, place, way, stall_ns(function, rows, way.link, function.spec.weight_bytes))
        if best is not None:
            return best
    return WaitFor(wanted, _coming_ns(function, rows, devices) if function.extents else 0, for_link)


def _openings(
    function: FunctionState, candidates: Sequence[Device], owners: Mapping[int, FunctionState], now_ns: int
) -> tuple[list[Opening], Device | None, bool]:
    """Idle lanes to which the weights could be copied now, best first. Besides, the device that lacks only a lane, and whether links are too busy."""
    sm_percent, _ = key = function.lane_key
    openings: list[Opening] = []
    wanted: Device | None = None
    for_link = False
    for at, device in enumerate(candidates):
        if device.running_sm + sm_percent > 100 or (device.held_for is not None and device.held_for is not function):
            continue
        lane, held = device.idle_lane(key), device.spec.id in function.extents
        if lane is not None and not held:
            way = best_way(function, lane, owners)
            if way is None:
                for_link = True
                continue
            full = device.memory.used_bytes + function.spec.weight_bytes > device.memory.capacity_bytes
            openings.append((way.link.swap_ns(function.spec.weight_bytes), full, at, lane, way))
        if lane is None and wanted is None and device.lacks_lane(key) and (held or find_place(function, device, owners, now_ns) is not None):
            wanted = device
    if len(openings) > 1:
        openings.sort(key=_BY_TIME)
    return openings, wanted, for_link


def best_way(function: FunctionState, lane: Lane, owners: Mapping[int, FunctionState]) -> Way | None:
    """How the weights come to a lane's device soonest; None when that is a link which has to end another copy first."""
    device, nbytes, cls = lane.device, function.spec.weight_bytes, function.spec.cls
    ways = [Way(device.link)]
    if lane.peers and function.extents:
        held = (id_ for id_, extent in function.extents.items() if extent.resident and id_ in lane.peers)
        ways += [Way(device.peer_links[id_], id_) for id_ in held]
    best, least_ns = None, NEVER_NS
    for way in ways:
        link, busy = way.link, link_busy(way.link, cls, owners)
        ns = link.alone_ns(link.waiting_bytes + nbytes) if busy else link.swap_ns(nbytes)
        if ns < least_ns:
            best, least_ns = None if busy else way, ns
    return best


def link_busy(link: Link, cls: FunctionClass, owners: Mapping[int, FunctionState]) -> bool:
    """Two copies that share a link are both late, so the next waits for the link; but latency-sensitive work waits for no best-effort copy."""
    if not link.tasks:
        return False
    return cls is FunctionClass.BEST_EFFORT or any(owners[task.owner].spec.cls is cls for task in link.tasks.values())


def stall_ns(function: FunctionState, rows: int, link: Link, missing_bytes: int) -> int:
    """How long a batch would only stand on its lane if it began now, since weights take longer to come than it runs. Others can use that time.

    A lane is rather taken too early: by a chunk, for its arrival is the next occasion, and by what the run may take longer than expected. Nothing is
    known of a function that never ran: its first batch begins at once.
    """
    if not missing_bytes or not function.estimate.measured:
        return 0
    run_ns = function.estimate.run_ns(rows)
    return max(0, link.alone_ns(missing_bytes - link.chunk_bytes) - run_ns - run_ns // 4 - _EARLY_NS)


def lane_with_weights(function: FunctionState, rows: int, candidates: Sequence[Device]) -> Lane | None:
    """A lane where a batch can run now without a new copy: idle on a device that holds the weights, or the one that is about to have copied them."""
    extents, key = function.extents, function.lane_key
    for device in candidates:
        extent = extents.get(device.spec.id)
        if extent is None or device.running_sm + key[0] > 100 or (device.held_for is not None and device.held_for is not function):
            continue
        copier = 0
        if extent.copy:
            task = device.copies[extent.copy]
            if stall_ns(function, rows, task.link, extent.missing_bytes):
                continue
            copier = task.lane
        lane = device.idle_lane(key, copier)
        if lane is not None:
            return lane
    return None


def _coming_ns(function: FunctionState, rows: int, devices: Mapping[str, Device]) -> int:
    """How long the first of the copies under way will be too far from its end for a batch to begin; 0: none is, or there is none."""
    coming = (
        stall_ns(function, rows, devices[id_].copies[extent.copy].link, extent.missing_bytes)
        for id_, extent in function.extents.items()
        if extent.copy and _copier(devices[id_], extent).serving
    )
    return min(coming, default=0)


def _copier(device: Device, extent: Extent) -> Lane:
    return device.lanes[device.copies[extent.copy].lane]


def holder_wait_ns(function: FunctionState, devices: Mapping[str, Device], ready: ReadyQueue, now_ns: int) -> int:
    """How soon some device that holds the function's weights can take its next batch, after those that wait for that device and go first."""
    if not function.extents:
        return NEVER_NS
    first = takewhile(lambda item: item is not function, ready.head(_AHEAD))
    ahead = [item for item in first if isinstance(item, FunctionState) and item.extents]
    return min(_wait_ns(function, devices[id_], extent, now_ns) + _queued_ns(id_, ahead) for id_, extent in function.extents.items())


def _wait_ns(function: FunctionState, device: Device, extent: Extent, now_ns: int) -> int:
    """How soon a holder can take the batch: when its copy and the first of its batches end. Never: it has no lane, or is kept for another."""
    if device.held_for not in (None, function) or not any(lane.serving for lane in device.lanes_by_key.get(function.lane_key, ())):
        return NEVER_NS
    if extent.copy and not _copier(device, extent).serving:
        return NEVER_NS
    busy_ns = device.free_in_ns(now_ns)
    return max(busy_ns, device.copies[extent.copy].link.swap_ns(extent.missing_bytes)) if extent.copy else busy_ns


def _queued_ns(device: str, ahead: Sequence[FunctionState]) -> int:
    """What more urgent functions will take of a device; of several that hold their weights each has its part."""
    return sum(
        other.estimate.run_ns(other.queue[0].rows) * other.lane_key[0] // (100 * len(other.extents))
        for other in ahead
        if other.queue and device in other.extents
    )


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

    Duplicates cost little. Weights stay that were copied for a batch which may go and has not gone yet, or two functions could evict each other for
    ever; not, though, on a device that is kept for another. With `spare_queued` the weights of all functions with work queued stay (for prefetching).
    """
    costs: list[float | None] = []
    bytes_per_s = device.link.bytes_per_s
    for extent in extents:
        owner = owners[extent.owner]
        if extent.pins or (spare_queued and owner.queue) or (extent.unused and device.held_for is None and _awaited(owner, device)):
            costs.append(None)
            continue
        rate = owner.need.per_second(now_ns)
        if owner.queue and rate < _QUEUED_PER_S:
            rate = _QUEUED_PER_S
        cost = extent.nbytes / bytes_per_s * rate
        costs.append(cost if len(owner.extents) == 1 else cost * _DUPLICATE_COST)
    return costs


def _awaited(owner: FunctionState, device: Device) -> bool:
    """It has a batch that may go, and a lane there."""
    return owner.ready_key is not None and any(lane.serving for lane in device.lanes_by_key.get(owner.lane_key, ()))
