"""What must hold of a node after every event. For tests and for those who hunt a bug: it walks everything and is not meant for the hot path."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

from nodeagent.entities import Device, LaneState
from nodeagent.memory import aligned

if TYPE_CHECKING:
    from nodeagent.state import NodeState


def check(state: NodeState) -> None:
    """AssertionError that says what does not hold."""
    for device in state.devices.values():
        _check_sm(device)
        _check_memory(state, device)
        if device.lost:
            _check_lost(device)
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
        copying = extent.copy in device.link.tasks
        assert copying == (extent.copy != 0), f"{device.spec.id}: copy {extent.copy} is not under way"
        assert extent.pins == users + copying, f"{device.spec.id}: {extent.pins} pins, {users} users, copy {extent.copy}"
    used = sum(aligned(extent.nbytes) for extent in extents)
    assert used == device.memory.used_bytes <= device.memory.capacity_bytes, (
        f"{device.spec.id}: {used} bytes used, {device.memory.used_bytes} counted"
    )
    assert end <= device.memory.capacity_bytes


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
