"""NodeState: where a batch runs, what is copied for it and what is evicted."""

from __future__ import annotations

import pytest

from contracts.functions import Share
from contracts.units import MIB, MS, S
from nodeagent import events as ev
from nodeagent.settings import Settings
from tests.nodeagent.driver import Driver, runs, warm


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
    driver = Driver(devices=2, settings=Settings(chunk_bytes=MIB, chunk_ns=0))
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


@pytest.mark.parametrize(("chunk_ns", "chunk_bytes"), [(400_000, 8 * MIB), (2 * MS, 16_000_000)])
def test_chunks_keep_a_fast_link_busy_until_more_is_granted(chunk_ns: int, chunk_bytes: int) -> None:
    driver = Driver(settings=Settings(chunk_ns=chunk_ns))
    driver.declare("heavy", weight_bytes=90 * MIB)
    driver.lanes_up()
    driver.arrive(1, "heavy")
    ((_, granted_bytes),) = driver.copies.values()
    assert granted_bytes == 2 * chunk_bytes, "of a link of 8 GB/s"
