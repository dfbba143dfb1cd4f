"""The node as a pure state machine: events in, commands out. The asyncio shell and the simulator are its only two drivers.

It owns what is queued, running and resident, and every account; it never touches a clock, a socket, torch or a process. Every accepted request leaves
by exactly one Answer or Reject. Who goes first is `tokens`, where is `placement`, what is evicted is `memory`, how links are shared is `copies`;
`dispatch`, `lane_pool` and `swaps` put them to work.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence

from contracts.functions import Share
from contracts.units import MS, WHOLE_QUOTA_BP
from nodeagent import events as ev
from nodeagent.dispatch import Dispatcher
from nodeagent.entities import Device, FunctionState, Lane, LaneState, RequestState
from nodeagent.events import Reason
from nodeagent.invariants import check
from nodeagent.lane_pool import LanePool
from nodeagent.node import Node
from nodeagent.settings import DeviceSpec, Settings
from nodeagent.swaps import Swaps
from nodeagent.tokens import NEVER_NS


class NodeState:
    """All that the node agent decides. `handle` is the only way in."""

    def __init__(self, devices: Sequence[DeviceSpec], settings: Settings | None = None) -> None:
        self.settings = settings or Settings()
        self.functions: dict[str, FunctionState] = {}
        self.requests: dict[int, RequestState] = {}
        self.node = Node(devices, self.settings)
        self.devices = self.node.devices
        self.lanes = self.node.lanes
        self._swaps = Swaps(self.node)
        self._pool = LanePool(self.node, self._swaps)
        self._dispatcher = Dispatcher(self.node, self._pool, self._swaps)
        self.used_ns = 0
        self.retired_ns = 0
        self._deadlines: list[tuple[int, int]] = []
        self._reap_at_ns = NEVER_NS
        self.tick_ns = NEVER_NS
        """The same as `next_tick_ns`, a far future instead of None."""
        self._lost: list[Device] = []
        self._exclusive = any(device.exclusive for device in devices)
        self._handlers: dict[type[ev.Event], Callable[..., None]] = {
            ev.RequestArrived: self._request_arrived,
            ev.BatchFinished: self._batch_finished,
            ev.BatchPaused: self._batch_paused,
            ev.CopyProgress: self._copy_progress,
            ev.RequestCancelled: self._request_cancelled,
            ev.FunctionDeclared: self._function_declared,
            ev.FunctionRemoved: self._function_removed,
            ev.ShareChanged: self._share_changed,
            ev.LaneUp: self._lane_up,
            ev.LaneLost: self._lane_lost,
            ev.PeerUp: self._peer_up,
            ev.DeviceLost: self._device_lost,
            ev.DeviceUp: self._device_up,
            ev.Tick: self._tick,
        }

    def handle(self, event: ev.Event, now_ns: int) -> list[ev.Command]:
        """What to do about an event that happened now. `now_ns` never falls."""
        if now_ns >= self.tick_ns:
            self._expire(now_ns)
            self._dispatcher.requeue_due(now_ns)
        self._handlers[type(event)](event, now_ns)
        if self._lost:
            self._forget_lost_weights()
        self._dispatcher.dispatch(now_ns)
        self.tick_ns = self._next_tick_ns()
        return self.node.take_commands()

    def next_tick_ns(self) -> int | None:
        """When a Tick is needed if nothing else happens first; None when never."""
        return None if self.tick_ns >= NEVER_NS else self.tick_ns

    def _next_tick_ns(self) -> int:
        deadline_ns = self._next_deadline_ns() + 1 if self._deadlines else NEVER_NS
        return min(deadline_ns, self.node.ready.next_ns, self.node.restart_ns, self._reap_at_ns, self.node.watch_ns)

    def refusal(self, key: str, share: Share, weight_bytes: int = 0) -> str | None:
        """Why a function with this share cannot be served, None if it can: guarantees must add up to no more than the devices have."""
        own = self._area_ppm(share)
        others = sum(self._area_ppm(function.account.share) for name, function in self.functions.items() if name != key)
        whole = 100 * WHOLE_QUOTA_BP * len(self.devices)
        if others + own > whole:
            alone = " (its lanes run alone)" if own > share.area_ppm else ""
            return (
                f"the share {share.sm_percent} % of SMs x {share.quota_percent:g} % of time is {own / 10_000:g} % of a GPU{alone}; "
                f"{others / 10_000:g} % of {whole / 10_000:g} % are guaranteed to other functions"
            )
        room = max(device.memory.capacity_bytes for device in self.devices.values())
        if weight_bytes > room:
            return f"its weights are {weight_bytes} bytes, the largest device has room for {room}"
        return None

    def _area_ppm(self, share: Share) -> int:
        """What a share takes of a GPU; where lanes run alone, the whole of it for its time."""
        return 100 * share.quota_bp if self._exclusive else share.area_ppm

    def check(self) -> None:
        """Asserts what must hold after every event."""
        check(self, self._pool)

    # Functions.

    def _function_declared(self, event: ev.FunctionDeclared, now_ns: int) -> None:
        if event.spec.key in self.functions:
            self._function_removed(ev.FunctionRemoved(event.spec.key), now_ns)
        function = FunctionState(event.spec, self.node.next_number(), self.settings.window_ns, now_ns)
        self.functions[event.spec.key] = self.node.functions[function.number] = function
        self._prepare_lanes(function, now_ns)

    def _function_removed(self, event: ev.FunctionRemoved, now_ns: int) -> None:
        function = self.functions.pop(event.function, None)
        if function is None:
            return
        function.removed = True
        while function.queue:
            self._reject(function.dequeue(), Reason.REMOVED)
        self._dispatcher.requeue(function, now_ns)
        self._retire(function)
        self._reap_at_ns = now_ns + self.settings.lane_idle_ns

    def _share_changed(self, event: ev.ShareChanged, now_ns: int) -> None:
        function = self.functions.get(event.function)
        if function is None:
            return
        old_key = function.lane_key
        function.set_share(event.share, now_ns)
        if function.lane_key != old_key:
            self._prepare_lanes(function, now_ns)
            self._reap_at_ns = now_ns + self.settings.lane_idle_ns
        self._dispatcher.requeue(function, now_ns)

    def _prepare_lanes(self, function: FunctionState, now_ns: int) -> None:
        """A lane of its size should stand ready before the first request needs it."""
        for device in self.devices.values():
            if not device.lanes_by_key.get(function.lane_key):
                self._pool.want(device, function.lane_key, now_ns)

    def _retire(self, function: FunctionState) -> None:
        """A removed function goes for good once nothing of it runs or copies."""
        if function.running:
            return
        for device in self.devices.values():
            self._swaps.release(function, device)
        if not function.extents and function.number in self.node.functions:
            del self.node.functions[function.number]
            self.retired_ns += function.account.charged_ns
            for device in self.devices.values():
                device.memory.forget(function.number)

    # Requests.

    def _request_arrived(self, event: ev.RequestArrived, now_ns: int) -> None:
        function = self.functions.get(event.function)
        if function is None:
            self.node.emit(ev.Reject(event.request, Reason.NO_FUNCTION))
            return
        run_ns = function.estimate.run_ns(event.rows)
        finish_ns = self._earliest_finish_ns(function, run_ns, now_ns)
        if len(function.queue) >= function.spec.max_queue:
            self.node.emit(ev.Reject(event.request, Reason.QUEUE_FULL, _retry_ms(finish_ns - now_ns)))
            return
        if finish_ns > event.deadline_ns:
            self.node.emit(ev.Reject(event.request, Reason.HOPELESS, _retry_ms(finish_ns - event.deadline_ns)))
            return
        if function.idle:
            function.account.wake(now_ns)
        function.need.arrived(now_ns)
        request = RequestState(event, function, now_ns)
        self.requests[event.request] = request
        if not function.queue and function.extents and self._dispatcher.start_at_once(request, now_ns):
            return
        function.enqueue(request)
        heapq.heappush(self._deadlines, (event.deadline_ns, event.request))
        if len(function.queue) == 1:
            self._dispatcher.requeue(function, now_ns)

    def _earliest_finish_ns(self, function: FunctionState, run_ns: int, now_ns: int) -> int:
        """The soonest that one more batch could end if nobody else had any work: what is queued, spread over all devices, held to the limit."""
        if not function.queue:
            return max(now_ns, function.account.limit_due_ns) + run_ns
        share = function.account.share
        parallel = min(len(self.devices) * (100 // share.sm_percent), max(1, len(function.queue)))
        at_most_bp = share.limit_bp if share.limit_bp < WHOLE_QUOTA_BP else parallel * WHOLE_QUOTA_BP
        queue_ns = function.queued_ns * WHOLE_QUOTA_BP // min(parallel * WHOLE_QUOTA_BP, at_most_bp)
        return max(now_ns, function.account.limit_due_ns) + queue_ns + run_ns

    def _request_cancelled(self, event: ev.RequestCancelled, now_ns: int) -> None:
        request = self.requests.get(event.request)
        if request is None:
            return
        if request.lane is not None:
            request.cancelled = True
            return
        self._reject(request.function.dequeue(request), Reason.CANCELLED)
        self._dispatcher.requeue(request.function, now_ns)

    def _expire(self, now_ns: int) -> None:
        """Requests whose deadline passes while they wait; those on a lane are answered when it is done with them."""
        while self._deadlines and self._deadlines[0][0] < now_ns:
            _, number = heapq.heappop(self._deadlines)
            request = self.requests.get(number)
            if request is not None and request.lane is None:
                self._reject(request.function.dequeue(request), Reason.DEADLINE)
                self._dispatcher.requeue(request.function, now_ns)

    def _next_deadline_ns(self) -> int:
        """The first deadline of a request that waits. Others need no look: what is on a lane is answered when that is done with it."""
        while self._deadlines:
            deadline_ns, number = self._deadlines[0]
            request = self.requests.get(number)
            if request is not None and request.lane is None:
                return deadline_ns
            heapq.heappop(self._deadlines)
        return NEVER_NS

    def _reject(self, request: RequestState, reason: Reason, retry_after_ms: int = 0) -> None:
        del self.requests[request.number]
        self.node.emit(ev.Reject(request.number, reason, retry_after_ms))

    # Batches.

    def _batch_finished(self, event: ev.BatchFinished, now_ns: int) -> None:
        lane = self.lanes.get(event.lane)
        request = lane.request if lane is not None else None
        if lane is None or request is None or request.number != event.request:
            return
        if request.extent.copy and lane.device.copies[request.extent.copy].spoilt:
            return  # The lane was told to end, and its batch is tried again when it has.
        function = request.function
        self._charge(lane, request, event.gpu_ns)
        if event.ok:
            function.estimate.observe(request.rows, request.gpu_ns)
        self._pool.vacate(lane, LaneState.IDLE, now_ns)
        if request.cancelled:
            self._reject(request, Reason.CANCELLED)
        else:
            function.answered += request.requests
            if event.ok and now_ns <= request.slo_deadline_ns:
                function.on_time += request.requests
            del self.requests[request.number]
            queue_ns = request.started_ns - request.arrived_ns - request.weights_ns
            swap_ns = request.weights_ns + event.swap_ns
            self.node.emit(ev.Answer(request.number, queue_ns, swap_ns, request.gpu_ns, request.cold, lane.device.spec.id))
        self._settle(function, now_ns)

    def _batch_paused(self, event: ev.BatchPaused, now_ns: int) -> None:
        lane = self.lanes.get(event.lane)
        if lane is None or lane.request is None or lane.request.number != event.request:
            return
        self._charge(lane, lane.request, event.gpu_ns)
        self._pool.vacate(lane, LaneState.PAUSED, now_ns)
        self._dispatcher.requeue_paused(lane.request, now_ns)

    def _charge(self, lane: Lane, request: RequestState, gpu_ns: int) -> None:
        request.gpu_ns += gpu_ns
        request.function.account.charge(gpu_ns)
        lane.device.busy_ns += gpu_ns
        self.used_ns += gpu_ns

    def _settle(self, function: FunctionState, now_ns: int) -> None:
        """Its account or its running work has changed."""
        if function.removed:
            self._retire(function)
        elif function.queue:
            self._dispatcher.requeue(function, now_ns)

    def _copy_progress(self, event: ev.CopyProgress, now_ns: int) -> None:
        function = self._swaps.copied(event, now_ns)
        if function is not None:
            self._settle(function, now_ns)

    # Lanes and time.

    def _lane_up(self, event: ev.LaneUp, now_ns: int) -> None:
        lane = self.lanes.get(event.lane)
        if lane is not None and lane.state is LaneState.STARTING:
            lane.device.failed_starts = 0
            self._pool.vacate(lane, LaneState.IDLE, now_ns)

    def _lane_lost(self, event: ev.LaneLost, now_ns: int) -> None:
        lane = self.lanes.get(event.lane)
        if lane is None:
            return
        request = lane.request
        for function in self._pool.drop(lane, now_ns):
            self._settle(function, now_ns)
        if request is not None:
            self._try_again(request, now_ns)
        for function in [function for function in self.node.functions.values() if function.removed]:
            self._retire(function)
        self._reap_at_ns = min(self._reap_at_ns, now_ns + self.settings.lane_idle_ns)

    def _peer_up(self, event: ev.PeerUp, now_ns: int) -> None:
        lane, source = self.lanes.get(event.lane), self.devices[event.device]
        if lane is not None and lane.device is not source and not source.lost and event.bytes_per_s > 0:
            self.node.link_peer(source, lane.device, event.bytes_per_s)
            lane.peers.add(event.device)
            self.node.free(lane.device)

    def _device_lost(self, event: ev.DeviceLost, now_ns: int) -> None:
        device = self.devices[event.device]
        if device.lost:
            return
        device.lost = True
        device.held_for = None
        self._lost.append(device)
        self._pool.end_all(device, now_ns)
        self._pool.end_those(self._swaps.readers_of(device), now_ns)
        for lane in self.lanes.values():
            lane.peers.discard(event.device)
        self._look_again(now_ns)

    def _device_up(self, event: ev.DeviceUp, now_ns: int) -> None:
        device = self.devices[event.device]
        assert not device.lanes, f"{event.device} is up with lanes of its time before"
        if not device.lost:
            return
        device.lost = False
        device.failed_starts = 0
        self.node.start_after(device, 0)
        self._lost.remove(device)
        for function in self.functions.values():
            self._pool.want(device, function.lane_key, now_ns)
        self._look_again(now_ns)

    def _look_again(self, now_ns: int) -> None:
        """What waits was told to wait for devices that are no longer what they were."""
        for function in self.functions.values():
            function.holder_until_ns = 0
            self._dispatcher.requeue(function, now_ns)

    def _forget_lost_weights(self) -> None:
        """What lay on a lost device is forgotten as soon as no lane that still ends holds on to it."""
        for device in self._lost:
            for owner in list(device.memory.extents):
                function = self.node.functions[owner]
                self._swaps.release(function, device)
                if function.removed:
                    self._retire(function)

    def _try_again(self, request: RequestState, now_ns: int) -> None:
        """A lost lane's batch is tried once more, first in its function's queue, if its deadline allows."""
        function = request.function
        request.lane = None
        if request.cancelled:
            self._reject(request, Reason.CANCELLED)
        elif function.removed:
            self._reject(request, Reason.REMOVED)
        elif request.retried or now_ns + function.estimate.run_ns(request.rows) > request.deadline_ns:
            self._reject(request, Reason.LANE_LOST)
        else:
            request.retried = True
            request.gpu_ns = 0
            function.retried += 1
            function.enqueue(request, first=True)
            heapq.heappush(self._deadlines, (request.deadline_ns, request.number))
        self._settle(function, now_ns)

    def _tick(self, event: ev.Tick, now_ns: int) -> None:
        """Ends lanes that hang, and stops those of a size that no function has any more."""
        self._pool.end_hung(now_ns)
        if now_ns < self._reap_at_ns:
            return
        self._reap_at_ns = NEVER_NS
        wanted = {function.lane_key for function in self.functions.values()}
        for lane in [lane for lane in self.lanes.values() if lane.state is LaneState.IDLE and lane.key not in wanted]:
            self._pool.stop(lane, now_ns)


def _retry_ms(wait_ns: int) -> int:
    return max(1, wait_ns // MS)
