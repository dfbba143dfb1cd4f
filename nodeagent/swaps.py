"""Weights on their way: which copies begin, go on, end and are abandoned, and what is evicted for them. Pure.

Places and victims come from `memory`, the order of chunks from `copies`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from contracts.functions import FunctionClass
from nodeagent import events as ev
from nodeagent.copies import CopyTask, Link
from nodeagent.entities import Device, FunctionState, Lane, LaneKey, RequestState
from nodeagent.memory import Place
from nodeagent.node import Node
from nodeagent.placement import find_place


class Swaps:
    """All copies of the node."""

    def __init__(self, node: Node) -> None:
        self.node = node

    def _grant(self, link: Link, now_ns: int) -> None:
        """Lets the link's copies go on as far as their turn allows."""
        for task in link.grant(now_ns):
            self.node.emit(ev.CopyGrant(task.copy, task.lane, task.granted_bytes))

    def copied(self, event: ev.CopyProgress, now_ns: int) -> FunctionState | None:
        """Bytes have arrived; returns the function when its weights are complete."""
        for link in self.node.links.values():
            task = link.progress(event.copy, event.copied_bytes)
            if task is not None:
                break
        else:
            return None
        function = self.node.functions[task.owner]
        function.extents[task.device].copied_bytes = task.copied_bytes
        self._grant(link, now_ns)
        if task.copied_bytes < task.nbytes:
            return None
        if not link.tasks:
            link.observe(task.nbytes, now_ns - task.started_ns)
        self._copy_over(task)
        device = self.node.devices[task.device]
        self.node.free(device)
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
            self.node.free(device)
            self.node.emit(ev.Evict(device.spec.id, function.spec.key))

    def abandon(self, lane: Lane, now_ns: int) -> None:
        """The lane has gone, and its copies with it; what they held of the link goes to others."""
        device = lane.device
        for task in [task for task in device.link.tasks.values() if task.lane == lane.number]:
            device.link.abandon(task.copy)
            self._copy_over(task)
            self.release(self.node.functions[task.owner], device)
        self._grant(device.link, now_ns)

    def _copy_over(self, task: CopyTask) -> None:
        extent = self.node.functions[task.owner].extents[task.device]
        extent.pins -= 1
        extent.copy = 0

    def begin(self, function: FunctionState, lane: Lane, place: Place, now_ns: int) -> None:
        """Reserves the place, evicting its victims, and begins the copy with its first chunks."""
        device = lane.device
        for victim in place.victims:
            self.release(self.node.functions[victim], device)
        number = self.node.next_number()
        extent = device.memory.take(function.number, place.offset, function.spec.weight_bytes, number)
        extent.pins += 1
        function.extents[device.spec.id] = extent
        weight = self.node.settings.latency_sensitive_weight if function.spec.cls is FunctionClass.LATENCY_SENSITIVE else 1
        head = function.queue[0]
        due_ns = head.slo_deadline_ns - function.estimate.run_ns(head.rows)
        task = CopyTask(number, device.spec.id, lane.number, function.number, function.spec.weight_bytes, weight, now_ns, due_ns)
        device.link.begin(task)
        others = [other for other in device.link.grant(now_ns) if other is not task]
        self.node.emit(ev.Copy(number, lane.number, function.spec.key, extent.offset, task.granted_bytes))
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
            for device in self.node.device_list:
                lane = self._copying_lane(device, item.lane_key) if device.link in idle else None
                place = find_place(item, device, self.node.functions, now_ns, spare_queued=True) if lane is not None else None
                if lane is not None and place is not None:
                    self.begin(item, lane, place, now_ns)
                    idle.remove(device.link)
                    break

    def _copying_lane(self, device: Device, key: LaneKey) -> Lane | None:
        """The lane that a prefetched function would run in, else any that serves."""
        for lane in device.lanes_by_key.get(key, ()):
            if lane.serving:
                return lane
        return next((lane for lane in device.lanes.values() if lane.serving), None)
