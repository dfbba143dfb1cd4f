"""NodeState: who runs first, for how long, beside whom, and who gives way."""

from __future__ import annotations

from contracts.functions import Share
from contracts.units import MIB, MS, S
from nodeagent import events as ev
from tests.nodeagent.driver import Driver, of, runs, warm

BE = "best-effort"


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
    warm(driver, *"abc")
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
