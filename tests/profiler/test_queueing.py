"""The replay of a queue, held against the predictor's own batcher and the node's own token account in an event loop, and against known formulas."""

from __future__ import annotations

import heapq
from collections import deque

import numpy as np
import pytest

from contracts.functions import FunctionClass, Share
from contracts.units import MS
from nodeagent.tokens import Account, Tier
from predictor.batching import Batcher, Waiting
from profiler.queueing import Load, Server, poisson, replay

WINDOW_NS = 100 * MS
NEVER_NS = 1 << 60


class Node:
    """One function: the real Batcher in front of the real Account, and a lane that runs one batch at a time."""

    def __init__(self, run_ns: list[int], quota_percent: float) -> None:
        self.run_ns = run_ns
        self.batcher = Batcher(len(run_ns), 1 << 30)
        self.account = Account(FunctionClass.LATENCY_SENSITIVE, Share.of(100, quota_percent, quota_percent), WINDOW_NS, 0)
        self.queue: deque[list[int]] = deque()
        self.running: list[int] | None = None
        self.done_ns: dict[int, int] = {}
        self.events: list[tuple[int, int, int]] = []

    def play(self, arrivals_ns: list[int]) -> dict[int, int]:
        self.events = [(at, 1, number) for number, at in enumerate(arrivals_ns)]
        while self.events:
            now, kind, number = heapq.heappop(self.events)
            if kind == 0:
                self.finish(now)
            elif kind == 1:
                self.batcher.add(Waiting(number, 1, (), NEVER_NS))
            self.submit(now)
            self.start(now)
        return self.done_ns

    def finish(self, now: int) -> None:
        batch = self.running
        assert batch is not None
        self.account.charge(self.run_ns[len(batch) - 1])
        self.done_ns |= dict.fromkeys(batch, now)
        self.running = None
        self.batcher.returned(len(batch))

    def submit(self, now: int) -> None:
        for batch in self.batcher.take(now):
            if not self.queue and self.running is None:
                self.account.wake(now)
            self.queue.append(batch)

    def start(self, now: int) -> None:
        if self.running is not None or not self.queue:
            return
        tier, until = self.account.tier(now)
        if tier is Tier.BLOCKED:
            heapq.heappush(self.events, (until, 2, 0))
            return
        self.running = self.queue.popleft()
        heapq.heappush(self.events, (now + self.run_ns[len(self.running) - 1], 0, 0))


CASES = {
    "one request at a time, all of the time": ([10.0], 100, 60),
    "one request at a time, a fifth of the time": ([10.0], 20, 14),
    "batches, all of the time": ([10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0], 100, 200),
    "batches, a third of the time": ([10.0, 12.0, 14.0, 16.0, 18.0, 20.0, 22.0, 24.0], 30, 60),
    "batches longer than the window": ([150.0, 200.0, 250.0, 300.0], 40, 3),
    "rare requests with a hundredth of the time": ([40.0], 1, 0.05),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_replay_waits_as_batcher_and_account_make_it_wait(case: tuple[list[float], float, float]) -> None:
    run_ms, quota, rate = case
    load = poisson(arrivals=5000, seed=3)
    server = Server(tuple(run_ms), tuple(ms * 100 / quota for ms in run_ms))
    found = replay(server, load, rate, 100.0)
    arrivals_ns = [round(at * 1000 / rate * MS) for at in load.arrivals]
    done = Node([round(ms * MS) for ms in run_ms], quota).play(arrivals_ns)
    expected = np.array([(done[number] - at) / MS for number, at in enumerate(arrivals_ns)])[-len(found.sojourn_ms) :]
    assert np.percentile(found.sojourn_ms, [50, 90, 99]) == pytest.approx(np.percentile(expected, [50, 90, 99]), rel=0.01)


def test_without_batches_and_quota_it_is_an_m_d_1_queue() -> None:
    """Pollaczek-Khinchine: the mean wait is rho s / (2 (1 - rho))."""
    found = replay(Server((10.0,), (10.0,)), poisson(arrivals=200_000, seed=1), 70.0, 100.0)
    assert found.sojourn_ms.mean() == pytest.approx(10 + 0.7 * 10 / (2 * 0.3), rel=0.03)
    assert found.utilisation == pytest.approx(0.7, rel=0.02)


def test_runs_that_vary_wait_longer() -> None:
    """Pollaczek-Khinchine again, with the variance of lognormal times."""
    load = poisson(tail=3.0, arrivals=200_000, seed=2)
    second = (load.noise**2).mean()
    found = replay(Server((10.0,), (10.0,)), load, 50.0, 100.0)
    assert load.noise.mean() == pytest.approx(1, rel=0.01)
    assert np.percentile(load.noise, 99) == pytest.approx(3.0, rel=0.15)
    assert found.sojourn_ms.mean() == pytest.approx(10 + 0.5 * 10 * second / (2 * 0.5), rel=0.05)


def test_a_share_that_is_too_small_for_the_rate_makes_wait_for_ever() -> None:
    server = Server((10.0, 15.0), (50.0, 75.0))
    assert server.capacity_per_s == pytest.approx(2000 / 75)
    over = replay(server, poisson(), 30.0, 100.0)
    assert np.isinf(over.sojourn_ms).all()
    assert over.utilisation > 1
    assert np.isfinite(replay(server, poisson(), 20.0, 100.0).sojourn_ms).all()


def test_the_same_seed_gives_the_same_answer() -> None:
    first, second = (replay(Server((5.0,), (9.0,)), poisson(1.3, 500, seed=7), 40.0, 100.0) for _ in range(2))
    assert np.array_equal(first.sojourn_ms, second.sojourn_ms)


def test_idle_time_saves_one_window_and_no_more() -> None:
    """At half of the time, 100 ms saved let ten runs of 10 ms, each costing 20, follow each other; the next ones wait for their tokens."""
    arrivals = np.concatenate([[0.0], np.full(15, 100.0)])
    found = replay(Server((10.0,), (20.0,)), Load(arrivals, np.ones(16)), 1.0, 100.0)
    assert np.diff(found.sojourn_ms[1:]) == pytest.approx([10] * 10 + [20] * 4, abs=1e-6)
