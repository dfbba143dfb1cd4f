"""NodeState: weights that come from another device's memory: when, how they are kept there meanwhile, and what happens when either end goes."""

from __future__ import annotations

import random

import pytest

from contracts.units import MIB, MS, S
from nodeagent import events as ev
from nodeagent.settings import Settings
from tests.nodeagent.driver import Driver, of, warm
from tests.nodeagent.test_state_properties import History

SMALL_CHUNKS = Settings(chunk_bytes=MIB, chunk_ns=0)
FAST, SLOW = 50 * S, S // 10


def peered(bytes_per_s: int = FAST, devices: int = 2, capacity: int = 100 << 20) -> Driver:
    """Devices of one lane each whose lanes find each other's memory."""
    driver = Driver(devices, capacity, SMALL_CHUNKS)
    driver.peer_bytes_per_s = bytes_per_s
    return driver


def copies(driver: Driver, function: str) -> list[ev.Copy]:
    return [command for command in driver.history if isinstance(command, ev.Copy) and command.function == function]


def spread(driver: Driver, **options: object) -> ev.Copy:
    """A function that ran on one device is called twice at once: the copy for the second call."""
    driver.declare("a", **{"run_ns": 500 * MS, **options})
    warm(driver, "a")
    driver.state.functions["a"].estimate.observe(1, 500 * MS)
    driver.arrive(1, "a", slo_ns=S)
    driver.arrive(2, "a", slo_ns=S)
    assert len(copies(driver, "a")) == 2
    return copies(driver, "a")[-1]


def holder(driver: Driver, copy: ev.Copy) -> str:
    """The other device."""
    return next(device for device in driver.state.devices if device != driver.state.lanes[copy.lane].device.spec.id)


def test_weights_come_from_the_device_that_holds_them_when_that_is_the_faster_way() -> None:
    driver = peered()
    copy = spread(driver)
    first = copies(driver, "a")[0]
    assert (first.source, copy.source) == ("", holder(driver, copy))
    assert copy.source_offset == first.offset
    driver.drain()
    devices = driver.state.devices.values()
    assert [device.peer_swaps for device in devices if device.spec.id != copy.source] == [1]
    assert sum(device.swaps for device in devices) == 2


@pytest.mark.parametrize(("bytes_per_s", "why"), [(SLOW, "slower than the host"), (0, "no lane has proved that it can")])
def test_else_they_come_from_the_host(bytes_per_s: int, why: str) -> None:
    assert spread(peered(bytes_per_s)).source == "", why


def test_a_way_that_one_lane_has_proved_is_not_another_s() -> None:
    driver = peered(0)
    driver.declare("a", run_ns=500 * MS)
    warm(driver, "a")
    (held,) = driver.state.functions["a"].extents
    lane = next(lane for lane, command in driver.up.items() if command.device == held)
    other = next(device for device in driver.state.devices if device != held)
    driver.send(ev.PeerUp(lane, other, FAST))
    driver.arrive(1, "a")
    driver.arrive(2, "a")
    assert copies(driver, "a")[-1].source == ""


def test_a_copy_from_a_peer_leaves_the_host_link_to_others() -> None:
    driver = peered()
    driver.declare("b")
    assert spread(driver, weight_bytes=40 * MIB).source
    for device in driver.state.devices.values():
        assert not device.link.tasks
    (found,) = of(driver.arrive(3, "b"), ev.Copy)
    assert isinstance(found, ev.Copy) and found.source == ""


def test_what_is_read_is_not_evicted_before_it_was_read() -> None:
    driver = peered(capacity=50 << 20)
    driver.declare("b", weight_bytes=45 * MIB)
    copy = spread(driver, weight_bytes=20 * MIB)
    source, number = driver.state.devices[copy.source], driver.state.functions["a"].number
    reading = next(iter(driver.running))
    driver.finish(next(lane for lane in driver.running if driver.up[lane].device == copy.source))
    driver.arrive(3, "b", slo_ns=20 * MS)
    assert number in source.memory.extents and source.memory.extents[number].pins == 1, reading
    driver.copy_all()
    driver.drain()
    assert copies(driver, "b"), "room was made in the end"


def test_when_the_memory_that_is_read_is_lost_the_lane_ends_and_the_weights_come_from_the_host() -> None:
    driver = peered(devices=3)
    copy = spread(driver, weight_bytes=40 * MIB)
    driver.copy_on(copy.copy, MIB)
    stopped = {command.lane for command in of(driver.lose_device(copy.source), ev.StopLane) if isinstance(command, ev.StopLane)}
    assert copy.lane in stopped
    lane = driver.state.lanes[copy.lane]
    assert lane.request is not None
    driver.send(ev.CopyProgress(copy.copy, 40 * MIB))
    driver.send(ev.BatchFinished(copy.lane, lane.request.number, MS, 0))
    assert not driver.outcomes.keys() & {1, 2}, "what was read from lost memory makes no answer"
    driver.drain()
    assert all(isinstance(driver.outcomes[number], ev.Answer) for number in (1, 2))
    assert copies(driver, "a")[2].source == ""


def test_a_lost_device_that_is_back_is_read_only_after_that_was_proved_anew() -> None:
    driver = peered()
    copy = spread(driver)
    driver.drain()
    driver.lose_device(copy.source)
    assert not any(copy.source in lane.peers for lane in driver.state.lanes.values())
    driver.peer_bytes_per_s = 0
    driver.bring_back(copy.source)
    driver.lanes_up()
    driver.arrive(3, "a")
    driver.arrive(4, "a")
    assert copies(driver, "a")[-1].source == ""


def test_when_the_copying_lane_is_lost_what_it_read_may_go_and_the_copy_is_made_again() -> None:
    driver = peered()
    copy = spread(driver, weight_bytes=40 * MIB)
    driver.copy_on(copy.copy, MIB)
    driver.lose(copy.lane)
    source = driver.state.devices[copy.source].memory.extents[driver.state.functions["a"].number]
    assert source.pins == 1, "only the batch that runs there"
    driver.drain()
    assert all(isinstance(driver.outcomes[number], ev.Answer) for number in (1, 2))


def test_a_function_that_is_removed_while_it_is_copied_leaves_nothing() -> None:
    driver = peered()
    copy = spread(driver, weight_bytes=40 * MIB)
    driver.copy_on(copy.copy, MIB)
    driver.send(ev.FunctionRemoved("a"))
    driver.drain()
    driver.copy_all()
    assert all(not device.memory.extents and not device.copies for device in driver.state.devices.values())


@pytest.mark.parametrize("seed", range(4))
def test_whatever_happens_nothing_is_written_over_while_it_is_read(seed: int) -> None:
    """`Driver` follows what every copy reads and writes."""
    history = History(random.Random(seed), 3)
    history.driver.peer_bytes_per_s = FAST
    for _ in range(3000):
        history.step()
        if history.chance.random() < 0.02 and history.names:
            name = history.chance.choice(history.names)
            history.driver.state.functions[name].estimate.observe(1, 400 * MS)
            for _ in range(3):
                history.requests += 1
                history.driver.arrive(history.requests, name, S)
    history.driver.drain()
    found = [command for command in history.driver.history if isinstance(command, ev.Copy)]
    assert sum(bool(copy.source) for copy in found) > 5, f"of {len(found)} copies"
