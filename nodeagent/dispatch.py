"""The scheduler's act: match waiting work with lanes, weights with memory, copies with links. Pure: it turns decisions into commands in `out`.

`NodeState` tells it what happened; the order comes from `tokens`, the device from `placement`, the victims from `memory`, the chunks from `copies`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from contracts.functions import FunctionClass
from contracts.units import S
from nodeagent import events as ev
from nodeagent.copies import CopyTask, Link
from nodeagent.entities import Device, FunctionState, Lane, LaneKey, LaneState, RequestState
from nodeagent.memory import Place
from nodeagent.placement import RunOn, SwapTo, choose, find_place
from nodeagent.ready import ReadyQueue
from nodeagent.settings import DeviceSpec, Settings
from nodeagent.tokens import Tier, lateness_rank

_SCAN = 64
_PREFETCH_SCAN = 16
_FIRST_BACKOFF_NS = S // 10


class Dispatcher:
    """Devices, lanes, links and the ready queue, and what to do with them."""

    def __init__(self, specs: Sequence[DeviceSpec], settings: Settings) -> None:
        self.settings = settings
        self.links: dict[str, Link] = {}
        self.devices: dict[str, Device] = {}
        for spec in specs:
            link = self.links.setdefault(spec.link or spec.id, Link(settings.chunk_bytes, settings.chunks_in_flight, spec.link_bytes_per_s))
            self.devices[spec.id] = Device(spec, link)
        self.lanes: dict[int, Lane] = {}
        self.ready = ReadyQueue()
        self.functions: dict[int, FunctionState] = {}
        self.out: list[ev.Command] = []
        self._device_list = tuple(self.devices.values())
        self._open_devices: dict[str, Device] = {}
        self._new_items: dict[int, FunctionState] = {}
        self._last_number = 0

    # The order of work.

    def requeue(self, function: FunctionState, now_ns: int) -> None:
        """Puts a function where its urgency is now, or nowhere when nothing is queued."""
        if not function.queue:
            self.ready.discard(function)
            self._release_hold(function)
            return
        self._place(function, function, function.queue[0], function.estimate.run_ns(function.queue[0].rows), now_ns)

    def requeue_paused(self, request: RequestState, now_ns: int) -> None:
        """Puts a paused batch where its urgency is now."""
        assert request.lane is not None
        self._place(request, request.function, request, max(0, request.estimate_ns - request.gpu_ns), now_ns)
        self._open_devices[request.lane.device.spec.id] = request.lane.device

    def requeue_due(self, now_ns: int) -> None:
        """Looks again at all whose urgency has changed with time, and at devices where a lane may be started again after a failure."""
        for device in self._device_list:
            if 0 < device.start_after_ns <= now_ns:
                device.start_after_ns = 0
                self._open_devices[device.spec.id] = device
        for item in self.ready.due(now_ns):
            if isinstance(item, FunctionState):
                self.requeue(item, now_ns)
            elif item.lane is not None and item.lane.request is item and item.lane.state is LaneState.PAUSED:
                self.requeue_paused(item, now_ns)

    @property
    def next_ns(self) -> int:
        """When `requeue_due` next has something to do."""
        return min([self.ready.next_ns, *(device.start_after_ns for device in self._device_list if device.start_after_ns)])

    def _place(self, item: FunctionState | RequestState, function: FunctionState, head: RequestState, estimate_ns: int, now_ns: int) -> None:
        tier, change_ns = function.account.tier(now_ns)
        if function.overtaken >= self.settings.skip_limit and tier is not Tier.BLOCKED:
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
        self.ready.place(item, tier, order, change_ns)
        if isinstance(item, FunctionState):
            if tier is Tier.BLOCKED:
                self._release_hold(item)
            else:
                self._new_items[item.number] = item

    # Starting work.

    def dispatch(self, now_ns: int) -> None:
        """Starts all that can start now, then prefetches and grants copies.

        What waited could not start when it was last tried, so only two things are looked at: work that is new or has become more urgent, and devices
        on which something has become free.
        """
        idle_links: dict[int, Link] = {}
        while self._new_items or self._open_devices:
            if self._open_devices:
                device = self._open_devices.pop(next(iter(self._open_devices)))
                idle_links[id(device.link)] = device.link
                self._fill(device, now_ns)
            else:
                function = self._new_items.pop(next(iter(self._new_items)))
                if function.ready_key is not None and not self._try(function, self._device_list, now_ns):
                    self._prefetch((function,), self.links.values(), now_ns)
        if idle_links and len(self.ready):
            self._prefetch(self.ready.head(_PREFETCH_SCAN), idle_links.values(), now_ns)

    def _fill(self, device: Device, now_ns: int) -> None:
        """Gives a device that has become freer to waiting work, most urgent first."""
        may_preempt = any(True for _ in device.preemptible())
        for item in self.ready.head(_SCAN):
            if device.running_sm >= 100 and not may_preempt:
                return
            if item.ready_key is None:
                continue
            if isinstance(item, RequestState):
                self._resume(item, device, now_ns)
            elif item.holder_until_ns > now_ns and device.spec.id not in item.extents:
                continue
            elif may_preempt or item.lane_key[0] + device.running_sm <= 100 or item.overtaken >= self.settings.skip_limit:
                # Only the most urgent work that cannot start is worth a pause: the rest could not start in its place.
                started = self._try(item, (device,), now_ns, may_preempt=may_preempt)
                may_preempt = may_preempt and started
            else:
                item.stuck = True

    def _try(self, function: FunctionState, candidates: Sequence[Device], now_ns: int, *, may_preempt: bool = True) -> bool:
        """Starts a function's next batch on one of these devices, or a hit in its place, if its choice permits."""
        choice = choose(function, candidates, self.devices, self.functions, now_ns)
        if isinstance(choice, RunOn):
            self._run(function, choice.lane, now_ns)
            return True
        if isinstance(choice, SwapTo):
            # While the hit runs the copy goes on: being overtaken costs little.
            hit = self._hit_behind(function, choice, now_ns)
            self._swap(function, choice.lane, choice.place, now_ns)
            self._run(*(hit or (function, choice.lane)), now_ns)
            return True
        function.stuck = not choice.holder_ns
        function.holder_until_ns = now_ns + choice.holder_ns
        if choice.lane_wanted is not None:
            self.want_lane(choice.lane_wanted, function.lane_key, now_ns)
        elif function.stuck:
            device = self._preempt(function, candidates, now_ns) if may_preempt else None
            if function.overtaken >= self.settings.skip_limit:
                self._hold(function, device)
        return False

    def _hold(self, function: FunctionState, device: Device | None) -> None:
        """Keeps a device free for a starved function: the one that makes room, or holds it, or is least busy, of those that are large enough."""
        if any(other.held_for is function for other in self._device_list):
            return
        free = [d for d in self._device_list if d.held_for is None and d.memory.capacity_bytes >= function.spec.weight_bytes]
        if free:
            best = min(free, key=lambda d: (d is not device, d.spec.id not in function.extents, d.running_sm))
            best.held_for = function

    def _release_hold(self, function: FunctionState) -> None:
        if function.overtaken >= self.settings.skip_limit:
            for device in self._device_list:
                if device.held_for is function:
                    device.held_for = None
                    self._open_devices[device.spec.id] = device

    def _hit_behind(self, function: FunctionState, choice: SwapTo, now_ns: int) -> tuple[FunctionState, Lane] | None:
        """Another function of the same tier that this device already holds, if the one that must swap can afford to let it go first (O3 of LALB)."""
        if function.overtaken >= self.settings.skip_limit or function.ready_key is None:
            return None
        device = choice.lane.device
        urgent_ns = function.queue[0].slo_deadline_ns - function.estimate.run_ns(function.queue[0].rows)
        for other in self.ready.head(_SCAN):
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
        for item in self.ready.head(_SCAN):
            if not isinstance(item, FunctionState) or item is started or not item.stuck or item.ready_key is None or key is None:
                continue
            if item.ready_key < key or item.ready_key[0] is Tier.BE_OVERDUE:
                item.overtaken += 1
                if item.overtaken == self.settings.skip_limit:
                    self.requeue(item, now_ns)

    # Running, pausing, resuming.

    def _run(self, function: FunctionState, lane: Lane, now_ns: int) -> None:
        self._count_overtaken(function, now_ns)
        self._release_hold(function)
        request = function.queue.popleft()
        extent = function.extents[lane.device.spec.id]
        extent.pins += 1
        request.lane = lane
        request.started_ns = request.started_ns or now_ns
        request.cold = request.cold or not extent.resident
        request.estimate_ns = function.estimate.run_ns(request.rows)
        function.account.begin(request.estimate_ns)
        function.running += 1
        function.overtaken = 0
        function.stuck = False
        lane.request = request
        self._occupy(lane, now_ns)
        preemptible = function.spec.cls is FunctionClass.BEST_EFFORT
        self.out.append(ev.Run(lane.number, request.number, function.spec.key, extent.offset, extent.copy, preemptible))
        self.requeue(function, now_ns)

    def _resume(self, request: RequestState, device: Device, now_ns: int) -> None:
        """A paused batch goes on when its SMs are free; on a device kept for another only when nothing runs: it may hold the memory needed."""
        lane = request.lane
        assert lane is not None
        held = device.held_for not in (None, request.function) and device.running_sm > 0
        if lane.device is device and device.running_sm + lane.sm_percent <= 100 and not held:
            self.ready.discard(request)
            self._occupy(lane, now_ns)
            self.out.append(ev.Resume(lane.number, request.number))

    def _preempt(self, function: FunctionState, candidates: Sequence[Device], now_ns: int) -> Device | None:
        """Asks less urgent best-effort batches to pause where that makes room; returns the device that will have it."""
        if function.ready_key is None:
            return None
        tier: Tier = function.ready_key[0]
        if tier >= Tier.BE_BORROWED:
            return None
        for device in sorted(candidates, key=lambda d: d.spec.id not in function.extents) if len(candidates) > 1 else candidates:
            if not any(True for _ in device.preemptible()) or device.held_for not in (None, function):
                continue
            room = 100 - device.running_sm + sum(lane.sm_percent for lane in device.lanes.values() if lane.state is LaneState.PAUSING)
            victims: list[Lane] = []
            for lane in device.preemptible():
                if room >= function.lane_key[0]:
                    break
                if lane.request is not None and lane.request.function.account.tier(now_ns)[0] > tier:
                    victims.append(lane)
                    room += lane.sm_percent
            # Pausing is for nothing unless the weights and a lane are there, or can be, when the room is.
            holds = device.spec.id in function.extents or find_place(function, device, self.functions, now_ns) is not None
            if room < function.lane_key[0] or not holds:
                continue
            if device.idle_lane(function.lane_key) is None:
                self.want_lane(device, function.lane_key, now_ns)
            else:
                for lane in victims:
                    lane.state = LaneState.PAUSING
                    assert lane.request is not None
                    self.out.append(ev.Preempt(lane.number, lane.request.number))
                return device
        return None

    def _occupy(self, lane: Lane, now_ns: int) -> None:
        lane.state = LaneState.RUNNING
        lane.since_ns = now_ns
        lane.device.running_sm += lane.sm_percent

    def vacate(self, lane: Lane, state: LaneState, now_ns: int) -> None:
        """A lane no longer holds SMs; with its batch over (IDLE) its request leaves it."""
        if lane.active:
            lane.device.running_sm -= lane.sm_percent
        lane.state = state
        lane.since_ns = now_ns
        self._open_devices[lane.device.spec.id] = lane.device
        if state is not LaneState.PAUSED and lane.request is not None:
            request, lane.request = lane.request, None
            self.ready.discard(request)
            request.function.account.end(request.estimate_ns)
            request.function.running -= 1
            extent = request.function.extents.get(lane.device.spec.id)
            if extent is not None:
                extent.pins -= 1

    # Lanes.

    def want_lane(self, device: Device, key: LaneKey, now_ns: int) -> None:
        """Starts a lane of this size and class if there may be one more, making room among idle lanes of other sizes."""
        peers = device.lanes_by_key.get(key, ())
        if len(peers) >= 100 // key[0] or any(lane.state is LaneState.STARTING for lane in peers) or now_ns < device.start_after_ns:
            return
        if len(device.lanes) >= self.settings.max_lanes_per_device:
            settled_ns = now_ns - self.settings.window_ns  # a lane that has just come up or run is given a window, or lanes would only come and go
            idle = [lane for lane in device.lanes.values() if lane.state is LaneState.IDLE and lane.key != key and lane.since_ns <= settled_ns]
            if idle and not any(lane.state is LaneState.STOPPING for lane in device.lanes.values()):
                self.stop_lane(min(idle, key=lambda lane: lane.since_ns), now_ns)
            return
        lane = Lane(self._next_number(), device, key, now_ns)
        self.lanes[lane.number] = device.lanes[lane.number] = lane
        device.lanes_by_key.setdefault(key, []).append(lane)
        self.out.append(ev.StartLane(lane.number, device.spec.id, *key))

    def stop_lane(self, lane: Lane, now_ns: int) -> None:
        """Stops an idle lane. A copy that it makes is lost with it, so a copying lane stays."""
        if not any(task.lane == lane.number for task in lane.device.link.tasks.values()):
            self.vacate(lane, LaneState.STOPPING, now_ns)
            self.out.append(ev.StopLane(lane.number))

    def drop_lane(self, lane: Lane, now_ns: int) -> None:
        """The lane has gone: its copies are lost; starts are slowed down when lanes keep failing before they serve."""
        device = lane.device
        if lane.state is LaneState.STARTING:
            device.failed_starts += 1
            device.start_after_ns = now_ns + min(30 * S, _FIRST_BACKOFF_NS << min(device.failed_starts, 10))
        self.vacate(lane, LaneState.STOPPING, now_ns)
        for task in [task for task in device.link.tasks.values() if task.lane == lane.number]:
            device.link.abandon(task.copy)
            self._copy_over(task)
            self.release(self.functions[task.owner], device)
        del self.lanes[lane.number], device.lanes[lane.number]
        device.lanes_by_key[lane.key].remove(lane)

    # Weights.

    def grant(self, link: Link, now_ns: int) -> None:
        """Lets the link's copies go on as far as their turn allows."""
        for task in link.grant(now_ns):
            self.out.append(ev.CopyGrant(task.copy, task.lane, task.granted_bytes))

    def copied(self, event: ev.CopyProgress, now_ns: int) -> FunctionState | None:
        """Bytes have arrived; returns the function when its weights are complete."""
        for link in self.links.values():
            task = link.progress(event.copy, event.copied_bytes)
            if task is not None:
                break
        else:
            return None
        function = self.functions[task.owner]
        function.extents[task.device].copied_bytes = task.copied_bytes
        self.grant(link, now_ns)
        if task.copied_bytes < task.nbytes:
            return None
        if not link.tasks:
            link.observe(task.nbytes, now_ns - task.started_ns)
        self._copy_over(task)
        device = self.devices[task.device]
        self._open_devices[task.device] = device
        device.swaps += 1
        device.swapped_bytes += task.nbytes
        function.swaps += 1
        return function

    def release(self, function: FunctionState, device: Device) -> None:
        """Forgets a function's weights on a device, if nothing needs them."""
        extent = function.extents.get(device.spec.id)
        if extent is not None and not extent.pins:
            device.memory.drop(function.number)
            del function.extents[device.spec.id]
            self._open_devices[device.spec.id] = device
            self.out.append(ev.Evict(device.spec.id, function.spec.key))

    def _copy_over(self, task: CopyTask) -> None:
        extent = self.functions[task.owner].extents[task.device]
        extent.pins -= 1
        extent.copy = 0

    def _swap(self, function: FunctionState, lane: Lane, place: Place, now_ns: int) -> None:
        """Reserves the place, evicting its victims, and begins the copy; `dispatch` grants its chunks."""
        device = lane.device
        for victim in place.victims:
            self.release(self.functions[victim], device)
        number = self._next_number()
        extent = device.memory.take(function.number, place.offset, function.spec.weight_bytes, number)
        extent.pins += 1
        function.extents[device.spec.id] = extent
        weight = self.settings.latency_sensitive_weight if function.spec.cls is FunctionClass.LATENCY_SENSITIVE else 1
        head = function.queue[0]
        due_ns = head.slo_deadline_ns - function.estimate.run_ns(head.rows)
        task = CopyTask(number, device.spec.id, lane.number, function.number, function.spec.weight_bytes, weight, now_ns, due_ns)
        device.link.begin(task)
        others = [other for other in device.link.grant(now_ns) if other is not task]
        self.out.append(ev.Copy(number, lane.number, function.spec.key, extent.offset, task.granted_bytes))
        self.out.extend(ev.CopyGrant(other.copy, other.lane, other.granted_bytes) for other in others)

    def _prefetch(self, items: Iterable[FunctionState | RequestState], links: Collection[Link], now_ns: int) -> None:
        """Uses idle links for queued work whose weights are nowhere yet, without evicting what queued work needs; one copy for each link."""
        idle = [link for link in links if not link.tasks]
        for item in items:
            if not idle:
                return
            if not isinstance(item, FunctionState) or item.extents or item.ready_key is None:
                continue
            for device in self._device_list:
                lane = self._copying_lane(device, item.lane_key) if device.link in idle else None
                place = find_place(item, device, self.functions, now_ns, spare_queued=True) if lane is not None else None
                if lane is not None and place is not None:
                    self._swap(item, lane, place, now_ns)
                    idle.remove(device.link)
                    break

    def _copying_lane(self, device: Device, key: LaneKey) -> Lane | None:
        """The lane that a prefetched function would run in, else any that serves."""
        serving = (LaneState.STARTING, LaneState.STOPPING)
        for lane in device.lanes_by_key.get(key, ()):
            if lane.state not in serving:
                return lane
        return next((lane for lane in device.lanes.values() if lane.state not in serving), None)

    def _next_number(self) -> int:
        self._last_number += 1
        return self._last_number
