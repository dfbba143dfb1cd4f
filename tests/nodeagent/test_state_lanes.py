"""NodeState: lanes that are lost, hang, never come up or are needed no more."""

from __future__ import annotations

import pytest

from contracts.functions import Share
from contracts.units import MIB, MS, S
from nodeagent import events as ev
from nodeagent.events import Reason
from nodeagent.settings import Settings
from tests.nodeagent.driver import Driver, of, warm

BE = "best-effort"


def test_a_lost_lane_s_batch_is_tried_once_more() -> None:
    driver = Driver()
    driver.declare("a")
    warm(driver, "a")
    driver.arrive(1, "a")
    driver.lose(next(iter(driver.running)))
    driver.lanes_up()
    assert [run.request for run in driver.running.values()] == [1]
    assert driver.lose(next(iter(driver.running)))[0] == ev.Reject(1, Reason.LANE_LOST)


def test_a_lost_lane_s_batch_is_not_tried_again_past_its_deadline() -> None:
    driver = Driver()
    driver.declare("a")
    warm(driver, "a")
    driver.arrive(1, "a", timeout_ns=20 * MS)
    driver.now_ns += 18 * MS
    assert ev.Reject(1, Reason.LANE_LOST) in driver.lose(next(iter(driver.running)))


def test_a_copy_dies_with_its_lane_and_is_made_again() -> None:
    driver = Driver(settings=Settings(chunk_bytes=MIB, chunk_ns=0))
    driver.declare("a")
    driver.lanes_up()
    driver.arrive(1, "a")
    driver.lose(next(iter(driver.running)))
    driver.lanes_up()
    assert len(driver.copies) == 1 and driver.running
    driver.drain()


def test_a_copy_goes_on_when_the_lane_of_another_is_lost() -> None:
    driver = Driver(settings=Settings(chunk_bytes=MIB, chunk_ns=0))
    driver.declare("a", share=(50, 10), cls=BE)
    driver.declare("b", share=(30, 10))
    driver.lanes_up()
    driver.arrive(1, "a")
    driver.arrive(2, "b")
    first = next(run.lane for run in driver.running.values() if run.function == "a")
    copy = next(copy for copy, (lane, _) in driver.copies.items() if lane != first)
    while driver.copied[copy] < driver.copies[copy][1]:
        driver.copy_on(copy)
    assert any(isinstance(command, ev.CopyGrant) and command.copy == copy for command in driver.lose(first))


def test_a_paused_batch_goes_on_although_its_function_is_at_its_limit() -> None:
    driver = Driver()
    driver.declare("ls", share=(100, 20))
    driver.declare("be", share=(100, 10, 10), cls=BE)
    warm(driver, "ls", "be")
    driver.now_ns += S
    driver.arrive(1, "be")
    (be_lane,) = driver.running
    driver.arrive(2, "ls")
    driver.pause(be_lane, gpu_ns=90 * MS)
    (ls_lane,) = driver.running
    assert ev.Resume(be_lane, 1) in driver.finish(ls_lane)


def test_a_lane_that_never_comes_up_is_not_started_in_a_frenzy() -> None:
    driver = Driver()
    driver.declare("a")
    driver.arrive(1, "a", timeout_ns=50 * S)
    starts = 0
    until = driver.now_ns + 10 * S
    while driver.now_ns < until:
        starts += len(driver.starting)
        for lane in list(driver.starting):
            driver.lose(lane)
        driver.now_ns = max(driver.now_ns + MS, min(driver.state.next_tick_ns() or until, driver.now_ns + S))
        driver.send(ev.Tick())
    assert 3 <= starts <= 12


def test_lanes_of_a_size_that_nobody_has_are_stopped() -> None:
    driver = Driver()
    driver.declare("a", share=(100, 10))
    driver.lanes_up()
    driver.send(ev.ShareChanged("a", Share.of(50, 10)))
    driver.lanes_up()
    driver.now_ns = driver.state.next_tick_ns() or 0
    (stop,) = driver.send(ev.Tick())
    assert isinstance(stop, ev.StopLane) and driver.state.lanes[stop.lane].sm_percent == 100


HANGS: dict[str, tuple[int, int, int]] = {
    "a short batch after the least time": (5 * MS, S, 30 * S),
    "a long one after ten times its estimate": (20 * S, 25 * S, 200 * S),
    "one that is still waited for after its deadline": (5 * MS, 100 * S, 100 * S),
    "one that is waited for for ever after a time": (5 * MS, 1 << 62, 600 * S),
}


@pytest.mark.parametrize(("run_ns", "timeout_ns", "hangs_ns"), HANGS.values(), ids=HANGS)
def test_a_batch_that_hangs_loses_its_lane(run_ns: int, timeout_ns: int, hangs_ns: int) -> None:
    driver = Driver()
    driver.declare("a", run_ns=run_ns)
    driver.lanes_up()
    driver.arrive(1, "a", timeout_ns=timeout_ns)
    driver.copy_all()
    (lane,) = driver.running
    since_ns, stopped = driver.now_ns, []
    while not stopped:
        assert driver.now_ns < since_ns + hangs_ns, "it is let run for too long"
        tick_ns = driver.state.next_tick_ns()
        assert tick_ns is not None and tick_ns > driver.now_ns, "the clock goes on"
        driver.now_ns = tick_ns
        stopped = driver.send(ev.Tick())
    assert stopped == [ev.StopLane(lane)] and driver.now_ns == since_ns + hangs_ns
    driver.now_ns += S
    assert not driver.send(ev.Tick()), "it is told once"
    driver.lanes_up()
    assert lane not in driver.state.lanes
    driver.drain()


def test_a_lane_that_hangs_holds_its_sms_until_it_has_gone_and_is_replaced() -> None:
    driver = Driver()
    driver.declare("a")
    warm(driver, "a")
    driver.arrive(1, "a", timeout_ns=S)
    driver.now_ns += 31 * S
    assert of(driver.send(ev.Tick()), ev.StopLane)
    driver.arrive(2, "a")
    assert driver.state.devices["cpu:0"].running_sm == 100 and not driver.running
    driver.drain()
    assert driver.outcomes[1] == ev.Reject(1, Reason.LANE_LOST)
    assert isinstance(driver.outcomes[2], ev.Answer)


def test_a_paused_batch_does_not_hang() -> None:
    driver = Driver()
    driver.declare("ls", share=(100, 20))
    driver.declare("be", share=(100, 10), cls=BE)
    warm(driver, "ls", "be")
    driver.arrive(1, "be", timeout_ns=S)
    (be_lane,) = driver.running
    driver.arrive(2, "ls", timeout_ns=S)
    driver.pause(be_lane)
    driver.now_ns += 31 * S
    assert [command.lane for command in of(driver.send(ev.Tick()), ev.StopLane)] == list(driver.state.lanes.keys() - {be_lane})
