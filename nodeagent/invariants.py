"""What must hold of a node after every event. For tests and for those who hunt a bug: it walks everything and is not meant for the hot path."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from nodeagent.copies import Link
from nodeagent.entities import Device, LaneState
from nodeagent.lane_pool import LanePool
from nodeagent.memory import aligned
from nodeagent.tokens import NEVER_NS

if TYPE_CHECKING:
    from nodeagent.state import NodeState


def check(state: NodeState, pool: LanePool) -> None:
    """AssertionError that says what does not hold."""
    for device in state.devices.values():
        _check_sm(device)
        _check_memory(state, device)
        if device.lost:
            _check_lost(device)
    for name, link in state.node.links.items():
        _check_link(state, name, link)
    for device in state.devices.values():
        _check_peers(state, device)
    _check_watch(state, pool)
    _check_requests(state)
    _check_accounts(state)


def _check_sm(device: Device) -> None:
    running = sum(lane.held_sm for lane in device.lanes.values() if lane.active)
    assert running == device.running_sm <= 100, f"{device.spec.id}: lanes of {running} % run, {device.running_sm} % are counted"
    pausable = sum(1 for _ in device.preemptible())
    assert pausable == device.pausable, f"{device.spec.id}: {pausable} batches can be paused, {device.pausable} are counted"
    for lane in device.lanes.values():
        busy = lane.state in (LaneState.RUNNING, LaneState.PAUSING, LaneState.PAUSED)
        assert busy == (lane.request is not None), f"lane {lane.number} is {lane.state.value} with request {lane.request}"


def _check_lost(device: Device) -> None:
    assert device.held_for is None, f"{device.spec.id} is lost and kept for {device.held_for}"
    for lane in device.lanes.values():
        assert lane.doomed or lane.state is LaneState.STOPPING, f"lane {lane.number} is {lane.state.value} on {device.spec.id}, which is lost"
    for extent in device.memory.extents.values():
        assert extent.pins, f"{device.spec.id} is lost and still holds weights of {extent.owner}"


def _check_memory(state: NodeState, device: Device) -> None:
    extents = sorted(device.memory.extents.values(), key=lambda extent: extent.offset)
    end = 0
    for extent in extents:
        assert extent.offset >= end, f"{device.spec.id}: extents overlap at {extent.offset}"
        end = extent.end
        owner = state.node.functions.get(extent.owner)
        assert owner is not None and owner.extents.get(device.spec.id) is extent, f"{device.spec.id}: an extent of {extent.owner} is nobody's"
        users = sum(1 for lane in device.lanes.values() if lane.request is not None and lane.request.function is owner)
        copying = extent.copy in device.copies
        readers = sum(1 for other in state.devices.values() for task in other.copies.values() if task.source is extent)
        assert not readers or extent.resident, f"{device.spec.id}: weights of {extent.owner} are read before they are there"
        assert copying == (extent.copy != 0), f"{device.spec.id}: copy {extent.copy} is not under way"
        assert extent.pins == users + copying + readers, f"{device.spec.id}: {extent.pins} pins, {users} users, {readers} readers, copy {extent.copy}"
        assert not (users and extent.unused), f"{device.spec.id}: weights of {extent.owner} are in use and count as unused"
    used = sum(aligned(extent.nbytes) for extent in extents)
    assert used == device.memory.used_bytes <= device.memory.capacity_bytes, (
        f"{device.spec.id}: {used} bytes used, {device.memory.used_bytes} counted"
    )
    assert end <= device.memory.capacity_bytes


def _check_link(state: NodeState, name: str, link: Link) -> None:
    tasks = link.tasks.values()
    classes = [state.node.functions[task.owner].spec.cls for task in tasks]
    assert len(classes) == len(set(classes)), f"{name}: copies of one class share it: {classes}"
    left, in_flight = sum(task.nbytes - task.copied_bytes for task in tasks), sum(task.granted_bytes - task.copied_bytes for task in tasks)
    assert left == link.waiting_bytes, f"{name}: {left} bytes are left, {link.waiting_bytes} counted"
    assert in_flight == link.in_flight_bytes, f"{name}: {in_flight} bytes in flight, {link.in_flight_bytes} counted"
    assert bool(in_flight) == bool(tasks), f"{name} has work and stands still"
    for task in tasks:
        lane = state.lanes.get(task.lane)
        assert lane is not None and lane.device.spec.id == task.device, f"{name}: copy {task.copy} has no lane"
        assert lane.device.copies.get(task.copy) is task and task.link is link, f"{name}: copy {task.copy} is not known as one of its device"


def _check_peers(state: NodeState, device: Device) -> None:
    for lane in device.lanes.values():
        assert not any(state.devices[peer].lost for peer in lane.peers), f"lane {lane.number} counts on a lost device: {lane.peers}"
    for source, link in device.peer_links.items():
        for task in link.tasks.values():
            holder = state.devices[source].memory.extents.get(task.owner)
            trusted = task.source is not None and task.source is holder
            assert trusted or (task.spoilt and not state.lanes[task.lane].serving), f"copy {task.copy} reads from {source} what is not there"


def _check_watch(state: NodeState, pool: LanePool) -> None:
    """Whatever is under way has somebody who notices that it does not go on."""
    copies = Counter(task.lane for link in state.node.links.values() for task in link.tasks.values())
    for lane in state.lanes.values():
        assert copies[lane.number] == lane.copies, f"lane {lane.number} makes {copies[lane.number]} copies, {lane.copies} counted"
    watched = any(lane.serving for lane, _ in pool.watched())
    assert not watched or state.tick_ns <= state.node.watch_ns < NEVER_NS, f"looked at {state.node.watch_ns}, the next tick is {state.tick_ns}"


def _check_requests(state: NodeState) -> None:
    queued = {request.number for function in state.functions.values() for request in function.queue}
    on_lanes = [lane.request.number for lane in state.lanes.values() if lane.request is not None]
    assert len(on_lanes) == len(set(on_lanes)), "a request runs twice"
    assert not queued & set(on_lanes), "a request is queued and runs"
    assert queued | set(on_lanes) == set(state.requests), "a request is neither queued nor on a lane, or was answered and is still there"
    running = Counter(lane.request.function.number for lane in state.lanes.values() if lane.request is not None)
    for function in state.node.functions.values():
        assert running[function.number] == function.running, f"{function.spec.key}: {running[function.number]} run, {function.running} counted"
        assert function.queued_ns == sum(request.estimate_ns for request in function.queue), f"{function.spec.key}: {function.queued_ns} ns queued"
        assert not (function.queue and function.removed), f"{function.spec.key} was removed and has work queued"


def _check_accounts(state: NodeState) -> None:
    charged = state.retired_ns + sum(function.account.charged_ns for function in state.node.functions.values())
    assert charged == state.used_ns == sum(device.busy_ns for device in state.devices.values()), f"{charged} ns charged, {state.used_ns} ns used"
    pending: Counter[int] = Counter()
    for lane in state.lanes.values():
        if lane.request is not None:
            pending[lane.request.function.number] += lane.request.estimate_ns
    for function in state.node.functions.values():
        counted = function.account.pending_ns
        assert pending[function.number] == counted, f"{function.spec.key}: {pending[function.number]} ns pending, {counted} counted"
