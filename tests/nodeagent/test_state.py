"""NodeState: the way of a request through a node, and how it ends."""

from __future__ import annotations

from contracts.units import MIB, MS
from nodeagent import events as ev
from nodeagent.events import Reason
from tests.nodeagent.driver import Driver, of, runs, warm


def test_a_cold_request_copies_and_runs_at_once_on_the_same_lane() -> None:
    driver = Driver()
    driver.declare("a")
    driver.lanes_up()
    copy, run = driver.arrive(1, "a")[:2]
    assert isinstance(copy, ev.Copy) and isinstance(run, ev.Run)
    assert run.copy == copy.copy and run.lane == copy.lane and run.offset == copy.offset
    driver.copy_all()
    (answer,) = driver.finish(run.lane)
    assert isinstance(answer, ev.Answer) and answer.cold and answer.run_ns == 5 * MS


def test_a_warm_request_only_runs() -> None:
    driver = Driver()
    driver.declare("a")
    warm(driver, "a")
    (run,) = driver.arrive(1, "a")
    assert isinstance(run, ev.Run) and run.copy == 0


def test_a_lane_is_started_before_the_first_request_needs_it() -> None:
    driver = Driver(devices=2)
    driver.declare("a", share=(40, 10))
    assert {(lane.device, lane.sm_percent) for lane in driver.starting.values()} == {("cpu:0", 40), ("cpu:1", 40)}


def test_a_request_waits_for_its_lane() -> None:
    driver = Driver()
    driver.declare("a")
    assert not runs(driver.arrive(1, "a"))
    driver.lanes_up()
    assert driver.running


def test_an_unknown_function_is_refused() -> None:
    driver = Driver()
    (reject,) = driver.arrive(1, "nobody")
    assert reject == ev.Reject(1, Reason.NO_FUNCTION)


def test_a_full_queue_refuses_and_says_when_to_come_again() -> None:
    driver = Driver()
    driver.declare("a", max_queue=2)
    driver.arrive(1, "a")
    driver.arrive(2, "a")
    (reject,) = driver.arrive(3, "a")
    assert isinstance(reject, ev.Reject) and reject.reason is Reason.QUEUE_FULL and reject.retry_after_ms > 0


def test_a_request_that_can_meet_no_deadline_is_refused_at_once() -> None:
    driver = Driver()
    driver.declare("a", run_ns=50 * MS)
    (reject,) = driver.arrive(1, "a", timeout_ns=20 * MS)
    assert isinstance(reject, ev.Reject) and reject.reason is Reason.HOPELESS


def test_a_deadline_that_passes_in_the_queue_ends_the_request() -> None:
    driver = Driver()
    driver.declare("a")
    driver.arrive(1, "a", timeout_ns=50 * MS)
    tick = driver.state.next_tick_ns()
    assert tick is not None and tick <= driver.now_ns + 50 * MS + 1
    driver.now_ns += 50 * MS + 1
    assert driver.send(ev.Tick()) == [ev.Reject(1, Reason.DEADLINE)]


def test_a_cancelled_request_does_not_run() -> None:
    driver = Driver()
    driver.declare("a")
    driver.arrive(1, "a")
    assert driver.send(ev.RequestCancelled(1)) == [ev.Reject(1, Reason.CANCELLED)]
    driver.lanes_up()
    assert not driver.running


def test_a_request_cancelled_while_it_runs_is_rejected_when_it_is_done_and_paid_for() -> None:
    driver = Driver()
    driver.declare("a")
    driver.lanes_up()
    driver.arrive(1, "a")
    driver.copy_all()
    assert driver.send(ev.RequestCancelled(1)) == []
    assert ev.Reject(1, Reason.CANCELLED) in driver.finish(next(iter(driver.running)))
    assert driver.state.functions["a"].account.charged_ns == 5 * MS


def test_a_removed_function_rejects_what_waits_and_answers_what_runs() -> None:
    driver = Driver()
    driver.declare("a")
    driver.lanes_up()
    driver.arrive(1, "a")
    driver.arrive(2, "a")
    assert ev.Reject(2, Reason.REMOVED) in driver.send(ev.FunctionRemoved("a"))
    driver.copy_all()
    commands = driver.finish(next(iter(driver.running)))
    assert of(commands, ev.Answer) and of(commands, ev.Evict)
    assert driver.state.devices["cpu:0"].memory.used_bytes == 0


def test_a_name_declared_again_does_not_inherit_the_old_weights() -> None:
    driver = Driver()
    driver.declare("a")
    warm(driver, "a")
    driver.declare("a", weight_bytes=20 * MIB)
    driver.lanes_up()
    assert of(driver.arrive(1, "a"), ev.Copy)
