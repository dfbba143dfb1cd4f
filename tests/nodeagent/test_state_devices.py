"""NodeState: devices whose memory is lost and comes back, and devices whose lanes cannot run beside each other."""

from __future__ import annotations

from contracts.functions import Share
from contracts.units import MS, S
from nodeagent import events as ev
from nodeagent.events import Reason
from tests.nodeagent.driver import Driver, of, runs, warm

BE = "best-effort"


def test_a_lost_device_s_lanes_end_and_its_weights_are_forgotten_and_come_again() -> None:
    driver = Driver()
    driver.declare("a")
    driver.declare("b", share=(50, 10))
    warm(driver, "a", "b")
    commands = driver.send(ev.DeviceLost("cpu:0"))
    assert len(of(commands, ev.StopLane)) == 2
    assert {command.function for command in of(commands, ev.Evict)} == {"a", "b"}
    driver.arrive(1, "a")
    assert not driver.running
    driver.history.clear()
    driver.bring_back("cpu:0")
    driver.drain()
    assert "a" in [copy.function for copy in driver.history if isinstance(copy, ev.Copy)], "its weights are swapped in again"
    assert isinstance(driver.outcomes[1], ev.Answer)


def test_what_runs_on_a_lost_device_is_tried_again_when_its_lane_has_gone_and_not_before() -> None:
    driver = Driver(devices=2)
    driver.declare("a")
    warm(driver, "a")
    driver.arrive(1, "a")
    (lane,) = driver.running
    device = driver.state.lanes[lane].device.spec.id
    assert of(driver.send(ev.DeviceLost(device)), ev.StopLane) and not driver.running, "the lane may still write its answer"
    driver.lose(lane)
    driver.lanes_up()
    (again,) = driver.running
    assert driver.state.lanes[again].device.spec.id != device
    driver.drain()
    assert isinstance(driver.outcomes[1], ev.Answer)


def test_a_batch_that_loses_two_devices_is_refused_and_one_past_its_deadline_too() -> None:
    driver = Driver()
    driver.declare("a")
    warm(driver, "a")
    driver.arrive(1, "a")
    driver.arrive(2, "a", timeout_ns=20 * MS)
    for _ in range(2):
        driver.send(ev.DeviceLost("cpu:0"))
        driver.bring_back("cpu:0")
        driver.now_ns += 30 * MS
        driver.send(ev.Tick())
        driver.lanes_up()
    assert driver.outcomes[1] == ev.Reject(1, Reason.LANE_LOST)
    assert driver.outcomes[2] == ev.Reject(2, Reason.DEADLINE)


def test_a_function_that_waits_for_a_device_that_holds_its_weights_stops_waiting_when_that_is_lost() -> None:
    driver = Driver(devices=2)
    driver.declare("a", run_ns=S, weight_bytes=50 << 20)
    driver.declare("b", run_ns=MS)
    warm(driver, "a", "b")
    driver.arrive(1, "a")
    driver.arrive(2, "a")
    (lane,) = list(driver.running)[:1]
    driver.send(ev.DeviceLost(driver.state.lanes[lane].device.spec.id))
    assert runs(driver.history[-8:]) or driver.starting, "the other device takes what waits"
    driver.drain()
    assert all(isinstance(driver.outcomes[request], ev.Answer) for request in (1, 2))


def test_a_paused_batch_on_a_lost_device_does_not_go_on_there() -> None:
    driver = Driver()
    driver.declare("ls", share=(100, 20))
    driver.declare("be", share=(100, 10), cls=BE)
    warm(driver, "ls", "be")
    driver.arrive(1, "be")
    (be_lane,) = driver.running
    driver.arrive(2, "ls")
    driver.pause(be_lane)
    driver.send(ev.DeviceLost("cpu:0"))
    (ls_lane,) = set(driver.state.lanes) - {be_lane}
    assert not of(driver.lose(ls_lane), ev.Resume)
    driver.drain()
    assert all(isinstance(outcome, ev.Answer) for outcome in driver.outcomes.values())


def test_a_device_is_lost_once_and_one_that_is_up_stays_as_it_is() -> None:
    driver = Driver()
    driver.declare("a")
    driver.lanes_up()
    driver.send(ev.DeviceLost("cpu:0"))
    assert not driver.send(ev.DeviceLost("cpu:0"))
    driver.bring_back("cpu:0")
    driver.lanes_up()
    for lane in list(driver.state.lanes):
        driver.lose(lane)
    assert not of(driver.send(ev.DeviceUp("cpu:0")), ev.Evict)


def test_a_removed_function_whose_batch_is_lost_with_its_device_leaves_nothing() -> None:
    driver = Driver()
    driver.declare("a")
    warm(driver, "a")
    driver.arrive(1, "a")
    driver.send(ev.FunctionRemoved("a"))
    driver.send(ev.DeviceLost("cpu:0"))
    driver.bring_back("cpu:0")
    assert driver.outcomes[1] == ev.Reject(1, Reason.REMOVED)
    assert not driver.state.node.functions


def test_lanes_of_an_exclusive_device_run_one_after_another() -> None:
    driver = Driver(exclusive=True)
    driver.declare("a", share=(50, 10))
    driver.declare("b", share=(30, 10))
    warm(driver, "a", "b")
    driver.arrive(1, "a")
    driver.arrive(2, "b")
    driver.arrive(3, "a")
    assert len(driver.running) == 1 and driver.state.devices["cpu:0"].running_sm == 100
    assert [lane.sm_percent for lane in driver.state.lanes.values()] == [50, 30], "one lane of a size is enough"
    driver.drain()
    assert len(driver.outcomes) == 5


def test_time_is_all_that_an_exclusive_device_can_guarantee() -> None:
    driver, shared = Driver(exclusive=True), Driver()
    for each in (driver, shared):
        each.declare("a", share=(50, 60))
    assert shared.state.refusal("b", Share.of(50, 60)) is None
    assert driver.state.refusal("b", Share.of(50, 40)) is None
    reason = driver.state.refusal("b", Share.of(50, 60))
    assert reason is not None and "is 60 % of a GPU (its lanes run alone); 60 % of 100 % are guaranteed" in reason
