"""The scheduler's act: waiting work onto lanes. Pure: it turns decisions into commands.

`NodeState` tells it what happened; the order comes from `tokens`, the device from `placement`, lanes from `lane_pool`, weights from `swaps`.
"""

from __future__ import annotations

from collections.abc import Sequence

from nodeagent import events as ev
from nodeagent.copies import Link
from nodeagent.entities import Device, FunctionState, Lane, LaneState, RequestState
from nodeagent.lane_pool import LanePool
from nodeagent.node import Node
from nodeagent.placement import RunOn, SwapTo, best_way, choose, find_place, holder_wait_ns, lane_with_weights, stall_ns
from nodeagent.swaps import Swaps
from nodeagent.tokens import Tier, lateness_rank

_SCAN = 32
_PREFETCH_SCAN = 16


class Dispatcher:
    """Who runs next, where, and who gives way."""

    def __init__(self, node: Node, pool: LanePool, swaps: Swaps) -> None:
        self.node = node
        self._pool = pool
        self._swaps = swaps
        self._new_items: dict[int, FunctionState] = {}

    # The order of work.

    def requeue(self, function: FunctionState, now_ns: int) -> None:
        """Puts a function where its urgency is now, or nowhere when nothing is queued."""
        if not function.queue:
            self.node.ready.discard(function)
            self._release_hold(function)
            function.overtaken = 0
            return
        head = function.queue[0]
        self._place(function, function, head, function.estimate.run_ns(head.rows), now_ns)

    def requeue_paused(self, request: RequestState, now_ns: int) -> None:
        """Puts a paused batch where its urgency is now."""
        assert request.lane is not None
        self._place(request, request.function, request, max(0, request.estimate_ns - request.gpu_ns), now_ns)
        self.node.free(request.lane.device)

    def requeue_due(self, now_ns: int) -> None:
        """Looks again at all whose urgency has changed with time, and at devices where a lane may be started again after a failure."""
        if self.node.restart_ns <= now_ns:
            for device in self.node.device_list:
                if 0 < device.start_after_ns <= now_ns:
                    self.node.start_after(device, 0)
                    self.node.free(device)
        for item in self.node.ready.due(now_ns):
            if isinstance(item, FunctionState):
                self.requeue(item, now_ns)
            elif item.lane is not None and item.lane.request is item and item.lane.state is LaneState.PAUSED:
                self.requeue_paused(item, now_ns)

    def _place(self, item: FunctionState | RequestState, function: FunctionState, head: RequestState, estimate_ns: int, now_ns: int) -> None:
        tier, change_ns = function.account.tier(now_ns)
        if tier is Tier.BLOCKED and item is not function:
            tier = Tier.BE_BORROWED  # a batch that has begun may end; it leaves a debt
        if function.overtaken >= self.node.settings.skip_limit and tier is not Tier.BLOCKED:
            tier = Tier.STARVED
        latest_start_ns = head.slo_deadline_ns - estimate_ns
        if tier in (Tier.STARVED, Tier.LS_OVERDUE, Tier.BE_OVERDUE):
            order: tuple[object, ...] = (False, function.account.due_ns)
        elif tier is Tier.BLOCKED:
            order = ()
        elif latest_start_ns >= now_ns:
            order = (False, latest_start_ns)
            change_ns = min(change_ns, latest_start_ns + 1)
        else:
            order = (True, lateness_rank(function.spec.slo.percentile, function.answered, function.on_time))
        self.node.ready.place(item, tier, order, change_ns)
        if isinstance(item, FunctionState):
            if tier is Tier.BLOCKED:
                self._release_hold(item)
            else:
                self._new_items[item.number] = item

    # Starting work.

    def start_at_once(self, request: RequestState, now_ns: int) -> bool:
        """Runs a request that finds nobody waiting, and its weights on a device with a free lane: there is no order to find, and nothing to move."""
        function = request.function
        if self.node.ready.order or self.node.freed or function.account.limit_due_ns > now_ns:
            return False
        lane = lane_with_weights(function, request.rows, self.node.device_list)
        if lane is None:
            return False
        self._start(request, lane, now_ns)
        return True

    def dispatch(self, now_ns: int) -> None:
        """Starts all that can start now, then prefetches.

        What waited could not start when it was last tried, so only two things are looked at: work that is new or has become more urgent, and devices
        on which something has become free.
        """
        node = self.node
        if not self._new_items and not node.ready.order:
            node.freed.clear()
            return
        idle_links: dict[Link, None] = {}
        while node.freed or self._new_items:
            if node.freed:
                device = next(iter(node.freed))
                del node.freed[device]
                idle_links[device.link] = None
                self._fill(device, now_ns)
            else:
                function = self._new_items.pop(next(iter(self._new_items)))
                if function.ready_key is not None and not self._try(function, node.device_list, now_ns):
                    self._swaps.prefetch((function,), node.host_links, now_ns)
        if idle_links and node.ready.order:
            self._swaps.prefetch(node.ready.head(_PREFETCH_SCAN), idle_links, now_ns)

    def _fill(self, device: Device, now_ns: int) -> None:
        """Gives a device that has become freer to waiting work, most urgent first."""
        may_preempt = device.pausable > 0
        for item in self.node.ready.head(_SCAN):
            if device.running_sm >= 100 and not may_preempt:
                return
            if item.ready_key is None:
                continue
            if isinstance(item, RequestState):
                self._resume(item, device, now_ns)
            elif item.holder_until_ns > now_ns and device.spec.id not in item.extents:
                continue
            elif may_preempt or item.lane_key[0] + device.running_sm <= 100 or item.overtaken >= self.node.settings.skip_limit:
                # Only the most urgent work that cannot start is worth a pause: the rest could not start in its place.
                started = self._try(item, (device,), now_ns, may_preempt=may_preempt)
                may_preempt = may_preempt and started
            else:
                item.stuck = True

    def _try(self, function: FunctionState, candidates: Sequence[Device], now_ns: int, *, may_preempt: bool = True) -> bool:
        """Starts a function's next batch on one of these devices, or a hit in its place, if its choice permits."""
        node = self.node
        choice = choose(function, candidates, node.devices, node.functions, node.ready, now_ns)
        if isinstance(choice, RunOn):
            self._run(function, choice.lane, now_ns)
            return True
        if isinstance(choice, SwapTo):
            self._swap(function, choice, now_ns)
            return True
        function.stuck = not (choice.holder_ns or choice.for_link)
        function.holder_until_ns = now_ns + choice.holder_ns
        if choice.lane_wanted is not None:
            self._pool.want(choice.lane_wanted, function.lane_key, now_ns)
        elif function.stuck:
            device = self._preempt(function, candidates, now_ns) if may_preempt else None
            if function.overtaken >= node.settings.skip_limit:
                self._hold(function, device)
        return False

    def _swap(self, function: FunctionState, choice: SwapTo, now_ns: int) -> None:
        """The copy begins at once; the batch takes its lane now if it hides the whole of it, else when it hides what is left."""
        if choice.stall_ns:
            self._swaps.begin(function, choice.lane, choice.place, choice.way, now_ns)
            function.stuck = False
            function.holder_until_ns = now_ns + choice.stall_ns
            self._release_hold(function)
            return
        # While the hit runs the copy goes on: being overtaken costs little.
        hit = self._hit_behind(function, choice, now_ns)
        self._swaps.begin(function, choice.lane, choice.place, choice.way, now_ns)
        self._run(*(hit or (function, choice.lane)), now_ns)

    def _hold(self, function: FunctionState, device: Device | None) -> None:
        """Keeps a device free for a starved function: the one that makes room, or holds it, or is least busy, of those that are large enough."""
        if any(other.held_for is function for other in self.node.device_list):
            return
        free = [d for d in self.node.device_list if d.held_for is None and not d.lost and d.memory.capacity_bytes >= function.spec.weight_bytes]
        if free:
            best = min(free, key=lambda d: (d is not device, d.spec.id not in function.extents, d.running_sm))
            best.held_for = function

    def _release_hold(self, function: FunctionState) -> None:
        if function.overtaken >= self.node.settings.skip_limit:
            for device in self.node.device_list:
                if device.held_for is function:
                    device.held_for = None
                    self.node.free(device)

    def _hit_behind(self, function: FunctionState, choice: SwapTo, now_ns: int) -> tuple[FunctionState, Lane] | None:
        """Another function of the same tier that this device already holds, if the one that must swap can afford to let it go first (O3 of LALB)."""
        if function.overtaken >= self.node.settings.skip_limit or function.ready_key is None:
            return None
        device = choice.lane.device
        urgent_ns = function.queue[0].slo_deadline_ns - function.estimate.run_ns(function.queue[0].rows)
        for other in self.node.ready.head(_SCAN):
            if other is function or not isinstance(other, FunctionState) or other.ready_key is None or other.ready_key[0] != function.ready_key[0]:
                continue
            extent = other.extents.get(device.spec.id)
            if extent is None or not extent.resident or other.number in choice.place.victims or device.running_sm + other.lane_key[0] > 100:
                continue
            lane = device.idle_lane(other.lane_key)
            if lane is not None:
                affordable = urgent_ns < now_ns or now_ns + other.estimate.run_ns(other.queue[0].rows) <= urgent_ns
                return (other, lane) if affordable else None
        return None

    def _count_overtaken(self, started: FunctionState, now_ns: int) -> None:
        """A start overtakes all stuck work that is more urgent, and overdue best-effort work in any case."""
        key = started.ready_key
        for item in self.node.ready.head(_SCAN):
            if item.ready_key is None or key is None:
                continue
            if item.ready_key >= key and item.ready_key[0] is not Tier.BE_OVERDUE:
                if item.ready_key[0] > Tier.BE_OVERDUE:
                    return
            elif isinstance(item, FunctionState) and item is not started and item.stuck:
                item.overtaken += 1
                if item.overtaken == self.node.settings.skip_limit:
                    self.requeue(item, now_ns)

    # Running, pausing, resuming.

    def _run(self, function: FunctionState, lane: Lane, now_ns: int) -> None:
        if len(self.node.ready.order) > 1:
            self._count_overtaken(function, now_ns)
        self._release_hold(function)
        self._start(function.dequeue(), lane, now_ns)
        self.requeue(function, now_ns)

    def _start(self, request: RequestState, lane: Lane, now_ns: int) -> None:
        """A request that waits no more goes to a lane."""
        function = request.function
        extent = function.extents[lane.device.spec.id]
        extent.pins += 1
        request.lane = lane
        if extent.unused:
            extent.unused = False
            if not request.started_ns:
                request.weights_ns = extent.waited_ns(request.arrived_ns, now_ns)
            request.cold = request.cold or extent.copy != 0 or request.weights_ns > 0
        request.started_ns = request.started_ns or now_ns
        request.estimate_ns = function.estimate.run_ns(request.rows)
        function.account.begin(request.estimate_ns)
        function.running += 1
        function.overtaken = 0
        function.stuck = False
        lane.request = request
        self._pool.occupy(lane, now_ns)
        self.node.emit(ev.Run(lane.number, request.number, function.spec.key, extent.offset, extent.copy, lane.best_effort))

    def _resume(self, request: RequestState, device: Device, now_ns: int) -> None:
        """A paused batch goes on when its SMs are free; on a device kept for another only when nothing runs: it may hold the memory needed."""
        lane = request.lane
        assert lane is not None
        held = device.held_for not in (None, request.function) and device.running_sm > 0
        if lane.device is device and device.running_sm + lane.sm_percent <= 100 and not held and not lane.doomed:
            self.node.ready.discard(request)
            self._pool.occupy(lane, now_ns)
            self.node.emit(ev.Resume(lane.number, request.number))

    def _swap_to(self, function: FunctionState, lane: Lane, now_ns: int) -> SwapTo | None:
        """How its weights would come to a lane: sooner than another device that holds them is free, and over a link that is free."""
        way = best_way(function, lane, self.node.functions)
        if way is None:
            return None
        if holder_wait_ns(function, self.node.devices, self.node.ready, now_ns) <= way.link.swap_ns(function.spec.weight_bytes):
            return None
        place = find_place(function, lane.device, self.node.functions, now_ns)
        if place is None:
            return None
        return SwapTo(lane, place, way, stall_ns(function, function.queue[0].rows, way.link, function.spec.weight_bytes))

    def _preempt(self, function: FunctionState, candidates: Sequence[Device], now_ns: int) -> Device | None:
        """Asks less urgent best-effort batches to pause where that makes room; returns the device that will have it."""
        if function.ready_key is None:
            return None
        tier: Tier = function.ready_key[0]
        if tier >= Tier.BE_BORROWED:
            return None
        for device in sorted(candidates, key=lambda d: d.spec.id not in function.extents) if len(candidates) > 1 else candidates:
            if not device.pausable or device.held_for not in (None, function):
                continue
            victims = _victims(device, function.lane_key[0], tier, now_ns)
            if victims is not None and self._take_over(function, device, victims, now_ns):
                return device
        return None

    def _take_over(self, function: FunctionState, device: Device, victims: list[Lane], now_ns: int) -> bool:
        """Pauses the victims if the function can use their room now; if weights have to come first, sends for them: they run on meanwhile."""
        lane = device.idle_lane(function.lane_key)
        if lane is None:
            self._pool.want(device, function.lane_key, now_ns)
            return False
        if device.spec.id not in function.extents:
            choice = self._swap_to(function, lane, now_ns)
            if choice is None:
                return False
            if choice.stall_ns:
                self._swap(function, choice, now_ns)
                return True
        for victim in victims:
            self._pool.pause(victim)
        return True


def _victims(device: Device, sm_percent: int, tier: Tier, now_ns: int) -> list[Lane] | None:
    """The running batches, less urgent than this tier, whose pause makes room for so many SMs; None if that takes more."""
    room = 100 - device.running_sm + sum(lane.held_sm for lane in device.lanes.values() if lane.state is LaneState.PAUSING)
    victims: list[Lane] = []
    for lane in device.preemptible():
        if room >= sm_percent:
            break
        if lane.request is not None and lane.request.function.account.tier(now_ns)[0] > tier:
            victims.append(lane)
            room += lane.held_sm
    return victims if room >= sm_percent else None
