"""NodeState: a batch whose weights take longer to come than it runs takes its lane late, and others have the lane meanwhile."""

from __future__ import annotations

from contracts.functions import Share
from contracts.units import MIB, MS, S
from nodeagent import events as ev
from nodeagent.events import Reason
from nodeagent.settings import Settings
from tests.nodeagent.driver import Driver, of, runs

BE = "best-effort"
LINK = 1_000_000_000
WEIGHTS = 60 * MIB
"""It takes 63 ms to come, and the run 5: begun when 8 ms of the copy are left, and a chunk of 1 ms."""


def slow_node(*names: str, devices: int = 1, links: int = 9, capacity: int = 400 * MIB, run_ns: int = 5 * MS) -> Driver:
    """Devices on slow links. Functions whose name begins with "be" are best-effort; all have run before, and no weights are left on the devices."""
    driver = Driver(devices, capacity, Settings(chunk_bytes=MIB, chunk_ns=0, hang_ns=S), links=links, link_bytes_per_s=LINK)
    for name in names:
        driver.declare(name, weight_bytes=WEIGHTS, cls=BE if name.startswith("be") else "latency-sensitive")
    run_once(driver, *names, run_ns=run_ns)
    for device in driver.state.devices:
        driver.send(ev.DeviceLost(device))
        driver.bring_back(device)
    driver.lanes_up()
    driver.now_ns += 10 * S
    driver.history.clear()
    return driver


def run_once(driver: Driver, *names: str, run_ns: int = 5 * MS) -> None:
    """Each function runs, one after another; then its weights are on the first device where there is room."""
    driver.lanes_up()
    for name in names:
        driver.arrive(1000 + len(driver.accepted), name)
        copy_to_the_end(driver)
        driver.finish(next(iter(driver.running)), run_ns)


def copy_to_the_end(driver: Driver, missing: int = 0) -> None:
    """The copies go on at the pace of a link, until no more than so many bytes of one are missing."""
    while pending := [copy for copy, (_, until) in driver.copies.items() if driver.copied[copy] < until]:
        for copy in pending:
            if missing and driver.copied[copy] >= WEIGHTS - missing:
                return
            driver.now_ns += MIB * S // LINK
            driver.copy_on(copy, MIB)


def copies(driver: Driver) -> list[str]:
    """Whose copies were begun."""
    return [command.function for command in driver.history if isinstance(command, ev.Copy)]


def copy_of(driver: Driver, name: str) -> int:
    """The newest copy of a function."""
    return next(command.copy for command in reversed(driver.history) if isinstance(command, ev.Copy) and command.function == name)


def running(driver: Driver) -> list[str]:
    """What runs now."""
    return [run.function for run in driver.running.values()]


def test_the_lane_is_taken_when_what_is_left_of_the_copy_takes_no_longer_than_the_run() -> None:
    driver = slow_node("a")
    commands = driver.arrive(1, "a")
    assert of(commands, ev.Copy) and not runs(commands), "its copy begins at once"
    copy_to_the_end(driver, missing=16 * MIB)
    assert not driver.running
    copy_to_the_end(driver, missing=6 * MIB)
    (run,) = driver.running.values()
    assert run.function == "a" and run.copy == copy_of(driver, "a"), "it runs behind the rest of the copy"


def test_a_function_that_never_ran_begins_at_once() -> None:
    driver = slow_node()
    driver.declare("new", weight_bytes=WEIGHTS)
    driver.lanes_up()
    assert runs(driver.arrive(1, "new")) == ["new"]


def test_others_have_the_lane_while_weights_come() -> None:
    driver = slow_node("a", "hit")
    run_once(driver, "hit")
    driver.arrive(1, "a")
    for request in (2, 3, 4):
        assert runs(driver.arrive(request, "hit")) == ["hit"]
        driver.finish(next(iter(driver.running)))
    copy_to_the_end(driver)
    assert running(driver) == ["a"]


def test_who_waits_for_weights_is_told_so_apart_from_the_queue() -> None:
    driver = slow_node("a")
    began_ns = driver.now_ns
    driver.arrive(1, "a")
    copy_to_the_end(driver, missing=6 * MIB)
    run = driver.running.pop(next(iter(driver.running)))
    copy_to_the_end(driver)
    waited_ns = driver.now_ns - began_ns
    (answer,) = of(driver.send(ev.BatchFinished(run.lane, run.request, 5 * MS, 2 * MS)), ev.Answer)
    assert isinstance(answer, ev.Answer) and answer.cold and answer.queue_ns == 0
    assert waited_ns - 12 * MS <= answer.swap_ns <= waited_ns - 2 * MS, "until 8 ms and a chunk were left, and 2 ms on its lane"


def test_what_waits_for_a_lane_when_its_weights_are_there_is_the_queue() -> None:
    driver = slow_node("a", "hit")
    run_once(driver, "hit")
    driver.arrive(1, "a")
    driver.arrive(2, "hit")
    began_ns = driver.now_ns
    copy_to_the_end(driver)
    there_ns = driver.now_ns - began_ns
    driver.now_ns += 100 * MS
    driver.finish(next(iter(driver.running)))
    (answer,) = of(driver.finish(next(iter(driver.running))), ev.Answer)
    assert isinstance(answer, ev.Answer) and answer.cold and answer.queue_ns >= 100 * MS
    assert answer.queue_ns + answer.swap_ns == there_ns + 100 * MS


def test_a_link_carries_one_copy_at_a_time_and_then_that_of_the_most_urgent() -> None:
    driver = slow_node("a", "b", "c", devices=2, links=1)
    driver.arrive(1, "a")
    driver.arrive(2, "b", slo_ns=900 * MS)
    driver.arrive(3, "c", slo_ns=800 * MS)
    copy_to_the_end(driver, missing=MIB)
    assert copies(driver) == ["a"], "a second copy would make both late"
    copy_to_the_end(driver)
    assert copies(driver) == ["a", "c", "b"]


def test_a_latency_sensitive_copy_does_not_wait_for_a_best_effort_one() -> None:
    driver = slow_node("be", "ls", devices=2, links=1)
    driver.arrive(1, "be")
    driver.arrive(2, "ls")
    assert copies(driver) == ["be", "ls"]


def test_a_request_that_finds_its_weights_on_their_way_takes_its_lane_when_they_are_near() -> None:
    driver = slow_node("a")
    driver.arrive(1, "a")
    assert driver.send(ev.RequestCancelled(1)) == [ev.Reject(1, Reason.CANCELLED)]
    copy_to_the_end(driver, missing=30 * MIB)
    assert driver.arrive(2, "a") == [], "no second copy, and no lane yet"
    copy_to_the_end(driver, missing=6 * MIB)
    assert running(driver) == ["a"]


def test_a_batch_that_is_given_up_leaves_weights_that_may_be_evicted() -> None:
    driver = slow_node("a", "b", capacity=70 * MIB)
    driver.arrive(1, "a")
    driver.send(ev.RequestCancelled(1))
    assert copies(driver) == ["a"] and not of(driver.arrive(2, "b"), ev.Evict), "the copy comes to its end"
    copy_to_the_end(driver)
    assert [command.function for command in of(driver.history, ev.Evict)] == ["a"]
    assert running(driver) == ["b"]


def test_weights_that_came_for_a_waiting_batch_stay_until_it_ran_whoever_comes() -> None:
    driver = slow_node("a", "b", capacity=70 * MIB)
    driver.declare("hit", weight_bytes=MIB)
    run_once(driver, "hit")
    driver.arrive(1, "a", slo_ns=900 * MS)
    driver.arrive(2, "hit")
    copy_to_the_end(driver)
    assert running(driver) == ["hit"]
    driver.arrive(3, "b", slo_ns=80 * MS)
    assert runs(driver.finish(next(iter(driver.running)))) == ["a"], "b goes first, but could only evict what a has waited for"
    driver.drain()
    assert isinstance(driver.outcomes[3], ev.Answer) and copies(driver)[-2:] == ["a", "b"]


def test_a_changed_share_between_copy_and_run_moves_the_batch_to_a_lane_of_the_new_size() -> None:
    driver = slow_node("a")
    driver.arrive(1, "a")
    driver.send(ev.ShareChanged("a", Share.of(50, 10)))
    driver.lanes_up()
    copy_to_the_end(driver)
    (lane,) = driver.running
    assert driver.up[lane].sm_percent == 50 and copies(driver) == ["a"]


def test_a_batch_whose_copying_lane_is_busy_runs_on_another_as_soon_as_the_weights_are_there() -> None:
    driver = slow_node("a", "hit", "small")
    for name in ("a", "hit", "small"):
        driver.send(ev.ShareChanged(name, Share.of(50, 10)))
    driver.lanes_up()
    run_once(driver, "hit", "small")
    driver.arrive(1, "hit")
    driver.arrive(2, "small")
    driver.lanes_up()
    assert len(driver.running) == 2
    for lane in list(driver.running):
        driver.finish(lane)
    driver.arrive(3, "a")
    copier, _ = driver.copies[copy_of(driver, "a")]
    driver.arrive(4, "hit")
    assert copier not in driver.running, "a lane that copies is not the first choice"
    driver.arrive(5, "small")
    assert copier in driver.running
    (other,) = set(driver.running) - {copier}
    copy_to_the_end(driver)
    assert runs(driver.finish(other)) == ["a"]


def test_a_lane_that_stops_to_copy_is_ended_and_the_copy_made_elsewhere() -> None:
    driver = slow_node("a", devices=2)
    driver.arrive(1, "a", timeout_ns=50 * S)
    copy_to_the_end(driver, missing=30 * MIB)
    lane, _ = driver.copies[copy_of(driver, "a")]
    since_ns = driver.now_ns
    while lane in driver.up:
        assert (driver.state.next_tick_ns() or since_ns) <= since_ns + S, "nobody looks"
        driver.now_ns = max(driver.now_ns + 1, driver.state.next_tick_ns() or 0)
        driver.send(ev.Tick())
    assert driver.now_ns == since_ns + S and not driver.running
    (copy,) = of(driver.lose(lane), ev.Copy)
    assert isinstance(copy, ev.Copy) and driver.up[copy.lane].device == "cpu:1"
    driver.drain()
    assert isinstance(driver.outcomes[1], ev.Answer) and driver.state.functions["a"].retried == 0


def test_a_copy_that_goes_on_slowly_does_not_hang() -> None:
    driver = slow_node("a")
    driver.arrive(1, "a", timeout_ns=500 * S)
    for _ in range(20):
        driver.now_ns += 900 * MS
        driver.send(ev.Tick())
        driver.copy_on(copy_of(driver, "a"), MIB)
    assert not of(driver.history, ev.StopLane)


def test_best_effort_work_runs_on_while_the_weights_of_what_will_displace_it_come() -> None:
    driver = slow_node("ls", "be")
    run_once(driver, "be")
    driver.arrive(1, "be")
    (be_lane,) = driver.running
    assert not of(driver.arrive(2, "ls"), ev.Preempt) and copies(driver)[-1] == "ls"
    copy_to_the_end(driver, missing=16 * MIB)
    assert not driver.preempted
    copy_to_the_end(driver, missing=6 * MIB)
    assert driver.preempted == {be_lane}
    assert runs(driver.pause(be_lane)) == ["ls"]


def test_a_wait_for_a_device_counts_the_more_urgent_work_that_waits_for_it() -> None:
    driver = slow_node("first", "second", "third", devices=2, run_ns=40 * MS)
    run_once(driver, "first", "second", "third", run_ns=40 * MS)
    for request, name in enumerate(("first", "second"), 1):
        driver.arrive(request, name)
    assert running(driver) == ["first"] and len(copies(driver)) == 3, "to wait 40 ms is better than to swap for 63"
    driver.arrive(3, "third", slo_ns=200 * MS)
    assert copies(driver)[3:] == ["third"], "to wait 80 is not"
