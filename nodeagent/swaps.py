"""Weights on their way: which copies begin, go on, end and are abandoned, and what is evicted for them. Pure.

Places and victims come from `memory`, the order of chunks from `copies`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from contracts.functions import FunctionClass
from nodeagent import events as ev
from nodeagent.copies import CopyTask, Link
from nodeagent.entities import Device, FunctionState, Lane, LaneKey, RequestState
from nodeagent.memory import Extent, Place
from nodeagent.node import Node
from nodeagent.placement import Way, find_place, stall_ns
from nodeagent.tokens import NEVER_NS


class Swaps:
    """All copies of the node."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def _grant(self, link: Link, now_ns: int) -> None:
        """Lets the link's copies go on as far as their turn allows."""
        self.node.watch(now_ns + self.node.settings.hang_ns)
        for task in link.grant(now_ns):
            self.node.emit(ev.CopyGrant(task.copy, task.lane, task.granted_bytes))

    def copied(self, event: ev.CopyProgress, now_ns: int) -> FunctionState | None:
        """Bytes have arrived; returns the function when its weights are complete, or so near that its batch may take its lane."""
        task = next((device.copies[event.copy] for device in self.node.device_list if event.copy in device.copies), None)
        if task is None or task.spoilt:
            return None
        link = task.link
        link.progress(event.copy, event.copied_bytes, now_ns)
        function = self.node.functions[task.owner]
        extent = function.extents[task.device]
        extent.copied_bytes = task.copied_bytes
        self._grant(link, now_ns)
        if task.copied_bytes < task.nbytes:
            return function if self._comes_near(function, extent, link, now_ns) else None
        if not link.tasks:
            link.observe(task.nbytes, now_ns - task.started_ns)
        device = self.node.devices[task.device]
        device.peer_swaps += task.source is not None
        self._copy_over(task)
        extent.near_ns = min(extent.near_ns, now_ns)
        device.swaps += 1
        device.swapped_bytes += task.nbytes
        function.swaps += 1
        return function

    def _comes_near(self, function: FunctionState, extent: Extent, link: Link, now_ns: int) -> bool:
        """The function's next batch may take its lane from now on, and could not before."""
        if not function.queue or stall_ns(function, function.queue[0].rows, link, extent.missing_bytes):
            extent.near_ns = NEVER_NS
            return False
        before_ns, extent.near_ns = extent.near_ns, min(extent.near_ns, now_ns)
        return before_ns == NEVER_NS

    def release(self, function: FunctionState, device: Device) -> None:
        """Forgets a function's weights on a device, if nothing needs them."""
        extent = function.extents.get(device.spec.id)
        if extent is not None and not extent.pins:
            device.memory.drop(function.number)
            del function.extents[device.spec.id]
            function.holder_until_ns = 0
            self.node.free(device)
            self.node.emit(ev.Evict(device.spec.id, function.spec.key))

    def abandon(self, lane: Lane, now_ns: int) -> list[FunctionState]:
        """The lane has gone, and its copies with it; what they held of the link goes to others. Returns the functions that have lost one."""
        tasks, losers = [task for task in lane.device.copies.values() if task.lane == lane.number], []
        for task in tasks:
            task.link.abandon(task.copy)
            self._copy_over(task)
            losers.append(self.node.functions[task.owner])
            self.release(losers[-1], lane.device)
        for link in {task.link: None for task in tasks}:
            self._grant(link, now_ns)
        return losers

    def readers_of(self, lost: Device) -> list[Lane]:
        """The lanes of other devices that copy from a lost one. What they bring is not to be trusted, and nothing there is kept for them."""
        lanes = []
        for device in self.node.device_list:
            for task in device.copies.values():
                if task.link is device.peer_links.get(lost.spec.id):
                    self._let_go(task)
                    task.spoilt = True
                    lanes.append(self.node.lanes[task.lane])
        return lanes

    def _let_go(self, task: CopyTask) -> None:
        if task.source is not None:
            task.source.pins -= 1
            task.source = None

    def _copy_over(self, task: CopyTask) -> None:
        """The copy has ended: its link can take another, to any of its devices, and what it read may be evicted."""
        extent = self.node.functions[task.owner].extents[task.device]
        extent.pins -= 1
        extent.copy = 0
        self.node.lanes[task.lane].copies -= 1
        del self.node.devices[task.device].copies[task.copy]
        for device in self.node.device_list:
            reads = task.source is not None and task.source is device.memory.extents.get(task.owner)
            if reads or device.link is task.link or device.spec.id == task.device:
                self.node.free(device)
        self._let_go(task)

    def begin(self, function: FunctionState, lane: Lane, place: Place, way: Way, now_ns: int) -> None:
        """Reserves the place, evicting its victims, and begins the copy with its first chunks. What it reads on another device stays there."""
        device = lane.device
        for victim in place.victims:
            self.release(self.node.functions[victim], device)
        number = self.node.next_number()
        extent = device.memory.take(function.number, place.offset, function.spec.weight_bytes, number, now_ns)
        extent.pins += 1
        lane.copies += 1
        function.extents[device.spec.id] = extent
        weight = self.node.settings.latency_sensitive_weight if function.spec.cls is FunctionClass.LATENCY_SENSITIVE else 1
        head = function.queue[0]
        due_ns = head.slo_deadline_ns - function.estimate.run_ns(head.rows)
        source = function.extents[way.source] if way.source else None
        if source is not None:
            source.pins += 1
        task = CopyTask(number, device.spec.id, lane.number, function.number, function.spec.weight_bytes, weight, now_ns, due_ns, source)
        device.copies[number] = task
        way.link.begin(task)
        self.node.watch(now_ns + self.node.settings.hang_ns)
        others = [other for other in way.link.grant(now_ns) if other is not task]
        source_offset = source.offset if source is not None else 0
        self.node.emit(ev.Copy(number, lane.number, function.spec.key, extent.offset, task.granted_bytes, way.source, source_offset))
        for other in others:
            self.node.emit(ev.CopyGrant(other.copy, other.lane, other.granted_bytes))

    def prefetch(self, items: Iterable[FunctionState | RequestState], links: Collection[Link], now_ns: int) -> None:
        """Uses idle links for queued work whose weights are nowhere yet, without evicting what queued work needs; one copy for each link."""
        idle = [link for link in links if not link.tasks]
        for item in items:
            if not idle:
                return
            if not isinstance(item, FunctionState) or item.extents or item.ready_key is None:
                continue
            for device in sorted(self.node.device_list, key=lambda device: device.free_in_ns(now_ns)):
                lane = self._copying_lane(device, item.lane_key) if device.link in idle else None
                place = find_place(item, device, self.node.functions, now_ns, spare_queued=True) if lane is not None else None
                if lane is not None and place is not None:
                    self.begin(item, lane, place, Way(device.link), now_ns)
                    idle.remove(device.link)
                    break

    def _copying_lane(self, device: Device, key: LaneKey) -> Lane | None:
        """The lane that a prefetched function would run in, else any that serves."""
        for lane in device.lanes_by_key.get(key, ()):
            if lane.serving:
                return lane
        return next((lane for lane in device.lanes.values() if lane.serving), None)
