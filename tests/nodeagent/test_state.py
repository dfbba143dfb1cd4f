"""NodeState, one rule of the design at a time: who runs, where, what is copied and evicted, and how each request ends."""

from __future__ import annotations

from contracts.functions import Share
from contracts.units import MIB, MS, S
from nodeagent import events as ev
from nodeagent.events import Reason
from nodeagent.settings import Settings
from tests.nodeagent.driver import Driver

BE = "best-effort"


def warm(driver: Driver, *names: str) -> None:
    """Each function runs once, so that its lane is up and its weights are resident."""
    for at, name in enumerate(names, 1):
        driver.lanes_up()
        driver.arrive(-at, name)
        driver.drain()


def of(commands: list[ev.Command], kind: type[ev.Command]) -> list[ev.Command]:
    return [command for command in commands if isinstance(command, kind)]


def runs(commands: list[ev.Command]) -> list[str]:
    return [command.function for command in commands if isinstance(command, ev.Run)]


# The way of a request.


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


# Refusals and ends.


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


# Shares.


def test_a_function_at_its_limit_waits_for_its_account() -> None:
    driver = Driver()
    driver.declare("a", share=(100, 10, 10))
    warm(driver, "a")
    driver.arrive(1, "a")
    driver.finish(next(iter(driver.running)), gpu_ns=100 * MS)
    assert not runs(driver.arrive(2, "a"))
    finished_ns = driver.now_ns
    while not driver.running:
        driver.now_ns = driver.state.next_tick_ns() or 0
        driver.send(ev.Tick())
    assert 850 * MS < driver.now_ns - finished_ns < 1050 * MS, "105 ms were used, at most 10 were saved: at a tenth that is about a second"


def test_spare_time_is_borrowed() -> None:
    driver = Driver()
    driver.declare("a", share=(100, 1))
    warm(driver, "a")
    driver.arrive(1, "a")
    driver.finish(next(iter(driver.running)), gpu_ns=300 * MS)
    assert runs(driver.arrive(2, "a")) == ["a"]


def test_guaranteed_time_goes_before_borrowed_time() -> None:
    driver = Driver()
    for name in ("blocker", "borrows", "guaranteed"):
        driver.declare(name, share=(100, 10))
    warm(driver, "borrows", "guaranteed", "blocker")
    driver.now_ns += S
    driver.arrive(1, "borrows")
    driver.finish(next(iter(driver.running)), gpu_ns=500 * MS)
    driver.arrive(2, "blocker")
    driver.arrive(3, "borrows", slo_ns=10 * MS)
    driver.arrive(4, "guaranteed")
    assert runs(driver.finish(next(iter(driver.running)))) == ["guaranteed"]


def test_least_slack_goes_first_within_a_tier() -> None:
    driver = Driver()
    for name in ("blocker", "a", "b"):
        driver.declare(name, share=(100, 10))
    warm(driver, "a", "b", "blocker")
    driver.now_ns += S
    driver.arrive(1, "blocker")
    driver.arrive(2, "a", slo_ns=90 * MS)
    driver.arrive(3, "b", slo_ns=50 * MS)
    assert runs(driver.finish(next(iter(driver.running)))) == ["b"]


def test_work_that_can_still_be_on_time_goes_before_work_that_cannot() -> None:
    driver = Driver()
    for name in ("blocker", "late", "timely"):
        driver.declare(name, share=(100, 10))
    warm(driver, "late", "timely", "blocker")
    driver.now_ns += S
    driver.arrive(1, "blocker")
    driver.arrive(2, "late", slo_ns=MS)
    driver.arrive(3, "timely", slo_ns=60 * MS)
    driver.now_ns += 5 * MS
    assert runs(driver.finish(next(iter(driver.running)))) == ["timely"]


def test_functions_run_side_by_side_up_to_all_sms() -> None:
    driver = Driver()
    for name, sm in (("a", 60), ("b", 40), ("c", 20)):
        driver.declare(name, share=(sm, 10))
    driver.lanes_up()
    for number, name in enumerate("abc", 1):
        driver.arrive(number, name)
    assert sorted(run.function for run in driver.running.values()) == ["a", "b"]


def test_a_share_change_moves_the_next_batch_to_a_lane_of_the_new_size() -> None:
    driver = Driver()
    driver.declare("a", share=(100, 10))
    warm(driver, "a")
    driver.send(ev.ShareChanged("a", Share.of(50, 10)))
    driver.arrive(1, "a")
    driver.lanes_up()
    (lane,) = driver.running
    assert driver.up[lane].sm_percent == 50
    assert not driver.running[lane].copy, "weights stay where they are"


def test_guarantees_that_do_not_fit_are_refused_with_the_figures() -> None:
    driver = Driver()
    driver.declare("a", share=(100, 80))
    reason = driver.state.refusal("b", Share.of(50, 50))
    assert reason is not None and "25 % of a GPU" in reason and "80 % of 100 %" in reason
    assert driver.state.refusal("b", Share.of(50, 40)) is None
    assert driver.state.refusal("a", Share.of(100, 100)) is None, "its own old share does not count against it"


# Best-effort work.


def test_latency_sensitive_work_pauses_best_effort_work_and_then_lets_it_go_on() -> None:
    driver = Driver()
    driver.declare("ls", share=(100, 20))
    driver.declare("be", share=(100, 20), cls=BE)
    warm(driver, "ls", "be")
    driver.arrive(1, "be")
    (be_lane,) = driver.running
    assert driver.arrive(2, "ls") == [ev.Preempt(be_lane, 1)]
    assert runs(driver.pause(be_lane)) == ["ls"]
    (ls_lane,) = driver.running
    assert ev.Resume(be_lane, 1) in driver.finish(ls_lane)
    (answer,) = of(driver.finish(be_lane, gpu_ns=7 * MS), ev.Answer)
    assert isinstance(answer, ev.Answer) and answer.run_ns == 8 * MS, "both segments are paid for"


def test_a_batch_that_ends_before_its_gate_is_no_trouble() -> None:
    driver = Driver()
    driver.declare("ls", share=(100, 20))
    driver.declare("be", share=(100, 20), cls=BE)
    warm(driver, "ls", "be")
    driver.arrive(1, "be")
    driver.arrive(2, "ls")
    commands = driver.finish(next(iter(driver.running)))
    assert of(commands, ev.Answer) and runs(commands) == ["ls"]


def test_work_is_not_paused_for_nothing() -> None:
    driver = Driver(capacity=15 * MIB)
    driver.declare("ls", share=(100, 20))
    driver.declare("be", share=(100, 20), cls=BE)
    driver.lanes_up()
    driver.arrive(1, "be")
    driver.copy_all()
    assert not of(driver.arrive(2, "ls"), ev.Preempt), "the memory that it needs is pinned by what would be paused"


def test_paid_best_effort_time_is_not_starved_by_borrowing() -> None:
    driver = Driver()
    driver.declare("ls", share=(100, 1))
    driver.declare("be", share=(100, 30), cls=BE)
    warm(driver, "ls", "be")
    driver.arrive(1000, "ls")
    driver.finish(next(iter(driver.running)), gpu_ns=500 * MS)
    driver.arrive(1, "ls")
    driver.arrive(2, "be")
    ran = []
    for number in range(3, 60):
        driver.arrive(number, "ls")
        driver.now_ns += 10 * MS
        ran += runs(driver.finish(next(iter(driver.running)), gpu_ns=10 * MS))
        if "be" in ran:
            break
    assert 9 <= len(ran) <= 13, "when a window has passed in which it should have run"


# Placement.


def test_a_hit_on_an_idle_device_is_preferred() -> None:
    driver = Driver(devices=2)
    driver.declare("a")
    driver.declare("b")
    warm(driver, "a", "b")
    where = next(d for d, device in driver.state.devices.items() if driver.state.functions["b"].number in device.memory.extents)
    (run,) = driver.arrive(1, "b")
    assert isinstance(run, ev.Run) and driver.up[run.lane].device == where


def test_a_short_wait_for_a_holder_is_better_than_a_swap() -> None:
    driver = Driver(devices=2)
    driver.declare("a", weight_bytes=80 * MIB, run_ns=2 * MS)
    warm(driver, "a")
    driver.arrive(1, "a")
    driver.arrive(2, "a")
    assert len(driver.running) == 1


def test_a_long_wait_is_worth_a_swap() -> None:
    driver = Driver(devices=2)
    driver.declare("a", weight_bytes=8 * MIB, run_ns=500 * MS)
    driver.lanes_up()
    driver.arrive(1, "a")
    driver.copy_all()
    driver.arrive(2, "a")
    assert len(driver.running) == 2


def test_a_swap_avoids_the_link_that_is_busy() -> None:
    driver = Driver(devices=2, settings=Settings(chunk_bytes=MIB))
    driver.declare("heavy", weight_bytes=80 * MIB, share=(50, 10))
    driver.declare("light", share=(50, 10))
    driver.lanes_up()
    driver.arrive(1, "heavy")
    (copy, *_) = driver.arrive(2, "light")
    assert isinstance(copy, ev.Copy)
    assert driver.up[copy.lane].device != driver.up[next(c.lane for c in driver.history if isinstance(c, ev.Copy))].device


def test_a_hit_may_overtake_a_swap_that_can_wait_but_not_for_ever() -> None:
    driver = Driver(capacity=100 * MIB)
    driver.declare("hit", share=(100, 30))
    driver.declare("miss", share=(100, 30), weight_bytes=60 * MIB)
    warm(driver, "hit")
    driver.now_ns += S
    driver.arrive(1, "hit")
    driver.arrive(2, "miss", slo_ns=30 * S)
    driver.arrive(3, "hit", slo_ns=40 * S)
    copying = {command.function for command in driver.history if isinstance(command, ev.Copy)}
    assert "miss" in copying, "its weights come while the other runs"
    for number in range(4, 200):
        driver.now_ns += 100 * MS
        driver.arrive(number, "hit", slo_ns=40 * S)
        ran = runs(driver.finish(next(iter(driver.running)), gpu_ns=MS))
        driver.copy_all()
        if "miss" in ran:
            return
    raise AssertionError("never ran")


def test_no_function_is_starved_of_a_whole_device_by_small_ones() -> None:
    driver = Driver()
    driver.declare("whole", share=(100, 10))
    for n in range(4):
        driver.declare(f"small{n}", share=(50, 10))
    warm(driver, "whole", "small0", "small1", "small2", "small3")
    number = 1
    for n in range(4):
        driver.arrive(number := number + 1, f"small{n}", slo_ns=S)
    driver.arrive(1, "whole", slo_ns=900 * MS)
    for step in range(400):
        driver.arrive(number := number + 1, f"small{step % 4}", slo_ns=S, timeout_ns=100 * S)
        driver.now_ns += MS
        if 1 in driver.outcomes:
            return
        driver.finish(min(driver.running, key=lambda lane: driver.running[lane].request), gpu_ns=MS)
    raise AssertionError("starved")


# Memory.


def test_the_least_needed_weights_are_evicted() -> None:
    driver = Driver(capacity=25 * MIB)
    for name in ("often", "rare", "new"):
        driver.declare(name)
    warm(driver, "rare")
    for n in range(20):
        driver.now_ns += 10 * MS
        driver.arrive(1000 + n, "often")
        driver.drain()
    driver.arrive(1, "new")
    assert [command.function for command in driver.history if isinstance(command, ev.Evict)] == ["rare"]


def test_a_duplicate_is_evicted_before_a_sole_copy() -> None:
    driver = Driver(devices=2, capacity=25 * MIB)
    driver.declare("twice", run_ns=500 * MS)
    driver.declare("sole")
    driver.lanes_up()
    driver.arrive(1, "twice")
    driver.arrive(2, "twice")
    driver.drain()
    warm(driver, "sole")
    driver.now_ns += 100 * S
    driver.declare("new", weight_bytes=16 * MIB)
    driver.lanes_up()
    driver.arrive(50, "new")
    assert [command.function for command in driver.history if isinstance(command, ev.Evict)] == ["twice"]


def test_weights_too_large_for_every_device_are_refused() -> None:
    assert "largest device" in (Driver().state.refusal("a", Share(), weight_bytes=200 * MIB) or "")


# Lanes that go.


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
    driver = Driver(settings=Settings(chunk_bytes=MIB))
    driver.declare("a")
    driver.lanes_up()
    driver.arrive(1, "a")
    driver.lose(next(iter(driver.running)))
    driver.lanes_up()
    assert len(driver.copies) == 1 and driver.running
    driver.drain()


def test_a_copy_goes_on_when_the_lane_of_another_is_lost() -> None:
    driver = Driver(settings=Settings(chunk_bytes=MIB))
    driver.declare("a", share=(50, 10))
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
