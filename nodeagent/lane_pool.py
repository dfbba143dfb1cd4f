"""The lanes of a node: starting, stopping and losing them, and the SMs that they hold. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from contracts.units import S
from nodeagent import events as ev
from nodeagent.entities import Device, FunctionState, Lane, LaneKey, LaneState
from nodeagent.node import Node
from nodeagent.swaps import Swaps
from nodeagent.tokens import NEVER_NS

_FIRST_BACKOFF_NS = S // 10
_HANG_FACTOR = 10
_TRUSTED_PERIODS = 20


class LanePool:
    """All lanes. It knows sizes and states; what runs where is decided elsewhere."""

    def __init__(self, node: Node, swaps: Swaps) -> None:
        self.node = node
        self._swaps = swaps

    def occupy(self, lane: Lane, now_ns: int) -> None:
        """A batch starts or goes on: the lane holds its SMs."""
        device = lane.device
        lane.state = LaneState.RUNNING
        lane.since_ns = now_ns
        device.running_sm += lane.held_sm
        if lane.preemptible:
            device.pausable += 1
        self.node.watch(now_ns + self.node.settings.hang_ns)

    def pause(self, lane: Lane) -> None:
        """Asks its batch to stand still at the next gate; it holds its SMs until then."""
        assert lane.request is not None and lane.preemptible
        lane.device.pausable -= 1
        lane.state = LaneState.PAUSING
        self.node.emit(ev.Preempt(lane.number, lane.request.number))

    def vacate(self, lane: Lane, state: LaneState, now_ns: int) -> None:
        """A lane no longer holds SMs; with its batch over (IDLE) its request leaves it."""
        device, request = lane.device, lane.request
        if lane.active:
            device.running_sm -= lane.held_sm
            if lane.preemptible:
                device.pausable -= 1
        lane.state = LaneState.STOPPING if lane.doomed and state is LaneState.IDLE else state
        lane.since_ns = now_ns
        self.node.free(device)
        if request is not None and state is not LaneState.PAUSED:
            lane.request = None
            if request.waiting:
                self.node.ready.discard(request)
            function = request.function
            function.account.end(request.estimate_ns)
            function.running -= 1
            extent = function.extents.get(device.spec.id)
            if extent is not None:
                extent.pins -= 1

    def want(self, device: Device, key: LaneKey, now_ns: int) -> None:
        """Starts a lane of this size and class if there may be one more, making room among idle lanes of other sizes."""
        if not device.lacks_lane(key) or now_ns < device.start_after_ns:
            return
        if len(device.lanes) >= self.node.settings.max_lanes_per_device:
            self._make_room(device, key, now_ns)
            return
        lane = Lane(self.node.next_number(), device, key, now_ns)
        self.node.lanes[lane.number] = device.lanes[lane.number] = lane
        device.lanes_by_key.setdefault(key, []).append(lane)
        self.node.emit(ev.StartLane(lane.number, device.spec.id, *key))

    def _make_room(self, device: Device, key: LaneKey, now_ns: int) -> None:
        """Stops the lane of another size that has been idle longest. One that has just run is given a window, or lanes would only come and go."""
        if any(lane.state is LaneState.STOPPING for lane in device.lanes.values()):
            return
        idle = [lane for lane in device.lanes.values() if lane.state is LaneState.IDLE and lane.key != key]
        if idle:
            longest = min(idle, key=lambda lane: lane.since_ns)
            rested_ns = longest.since_ns + self.node.settings.window_ns
            self.node.start_after(device, rested_ns if rested_ns > now_ns else 0)
            if rested_ns <= now_ns:
                self.stop(longest, now_ns)

    def stop(self, lane: Lane, now_ns: int) -> None:
        """Stops an idle lane. A copy that it makes is lost with it, so a copying lane stays."""
        if not lane.copies:
            self.vacate(lane, LaneState.STOPPING, now_ns)
            self.node.emit(ev.StopLane(lane.number))

    def end_hung(self, now_ns: int) -> None:
        """Ends lanes whose batch runs far beyond all that is expected, and those that have long stopped to copy. What they held is a lost lane's."""
        if now_ns < self.node.watch_ns:
            return
        self.node.watch_ns = NEVER_NS
        for lane, hangs_ns in self.watched():
            if not lane.serving:
                continue
            if hangs_ns <= now_ns:
                self._end(lane, now_ns)
            else:
                self.node.watch(min(hangs_ns, now_ns + self.node.settings.hang_ns))

    def watched(self) -> Iterator[tuple[Lane, int]]:
        """Lanes that have a batch or a copy to go on with, and when that counts as hung. A copy hangs when no part of it arrives for long."""
        for lane in self.node.lanes.values():
            if lane.active:
                yield lane, self._hangs_ns(lane)
        for link in self.node.links.values():
            for task in link.tasks.values():
                in_flight_bytes = task.granted_bytes - task.copied_bytes
                if in_flight_bytes:
                    patience_ns = max(self.node.settings.hang_ns, _HANG_FACTOR * link.alone_ns(in_flight_bytes))
                    yield self.node.lanes[task.lane], task.moved_ns + patience_ns

    def _end(self, lane: Lane, now_ns: int) -> None:
        """Tells a lane to end. One with a batch in hand keeps that and its SMs until it has gone; it is then a lost lane's."""
        if lane.request is None:
            self.vacate(lane, LaneState.STOPPING, now_ns)
        else:
            lane.device.pausable -= lane.preemptible
            lane.doomed = True
        self.node.emit(ev.StopLane(lane.number))

    def _hangs_ns(self, lane: Lane) -> int:
        """When its batch counts as hung: after its deadline (one far away is not trusted), and after ten times what run and copy should take."""
        request = lane.request
        assert request is not None
        hang_ns = self.node.settings.hang_ns
        copy = request.extent.copy
        copy_ns = lane.device.copies[copy].link.swap_ns(request.extent.nbytes) if copy else 0
        patience_ns = max(hang_ns, _HANG_FACTOR * (request.estimate_ns + copy_ns))
        return max(lane.since_ns + patience_ns, min(request.deadline_ns, lane.since_ns + _TRUSTED_PERIODS * hang_ns))

    def end_all(self, device: Device, now_ns: int) -> None:
        """Ends every lane of a lost device."""
        self.end_those(device.lanes.values(), now_ns)

    def end_those(self, lanes: Iterable[Lane], now_ns: int) -> None:
        """Ends lanes, whatever they do."""
        for lane in lanes:
            if lane.state is not LaneState.STOPPING and not lane.doomed:
                self._end(lane, now_ns)

    def drop(self, lane: Lane, now_ns: int) -> list[FunctionState]:
        """The lane has gone: its copies are lost; starts are slowed down when lanes keep failing before they serve. Returns whose copies are lost."""
        device = lane.device
        if lane.state is LaneState.STARTING:
            device.failed_starts += 1
            self.node.start_after(device, now_ns + min(30 * S, _FIRST_BACKOFF_NS << min(device.failed_starts, 10)))
        self.vacate(lane, LaneState.STOPPING, now_ns)
        losers = self._swaps.abandon(lane, now_ns)
        del self.node.lanes[lane.number], device.lanes[lane.number]
        device.lanes_by_key[lane.key].remove(lane)
        return losers
