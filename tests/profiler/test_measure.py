"""How a point is measured, without noise: the same calls as a sweep's, answered by the node agent's own state in virtual time."""

from __future__ import annotations

from itertools import product

import pytest

from contracts.functions import FunctionClass, Share, Slo
from contracts.units import MIB, MS, S
from nodeagent import events as ev
from nodeagent.settings import DeviceSpec
from profiler.measure import Measured, Sampling, measure
from profiler.points import Config
from simulator.engine import Engine
from simulator.node import Hardware, SimulatedNode

KEY = "profile/f"
SAMPLING = Sampling(spread=0.01, fewest=4, enough=40, seconds=0.5, most_seconds=2.5)


class Node:
    """One function on a simulated node, as session and as caller. A run takes `run_ms` at all SMs, and `around_ms` passes outside of it."""

    def __init__(self, run_ms: float, around_ms: float) -> None:
        self.run_ms, self.around_ns = run_ms, round(around_ms * MS)
        self.engine = Engine()
        self.node = SimulatedNode(self.engine, [DeviceSpec("cpu:0", 64 * MIB)], self, Hardware())
        self.node.listener = self
        self.answer: ev.Answer | None = None
        self.asked = 0
        spec = ev.FunctionSpec(KEY, FunctionClass.LATENCY_SENSITIVE, Share.of(100, 100), Slo(), MIB, MS)
        self.node.handle(ev.FunctionDeclared(spec))
        self.rest(10)

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        return round(self.run_ms * MS * 100 / sm_percent)

    def answered(self, answer: ev.Answer) -> None:
        self.answer = answer

    def rejected(self, reject: ev.Reject) -> None:
        raise AssertionError(reject)

    def set_share(self, key: str, share: Share) -> None:
        self.node.handle(ev.ShareChanged(key, share))

    def call(self) -> tuple[ev.Answer, int]:
        begun_ns, self.answer = self.engine.now_ns, None
        self.asked += 1
        far_ns = begun_ns + 10_000 * S
        self.rest(self.around_ns / 2 / S)
        self.node.handle(ev.RequestArrived(self.asked, KEY, 1, 1, far_ns, far_ns))
        while self.answer is None:
            self.rest(self.run_ms / S * MS / 400)
        self.rest(self.around_ns / 2 / S)
        return self.answer, self.engine.now_ns - begun_ns

    def rest(self, seconds: float) -> None:
        self.engine.settle(self.engine.now_ns + round(seconds * S))

    def measure(self, sm: int, quota: float) -> Measured:
        return measure(self, self, KEY, Config(1, sm, quota), SAMPLING, self.rest)  # type: ignore[arg-type]


MODELS = {"a short run, as long around it as in it": (2.0, 2.0), "a medium one": (20.0, 0.7), "one that is longer than the window": (130.0, 1.0)}


@pytest.mark.parametrize(("run_ms", "around_ms"), MODELS.values(), ids=MODELS)
def test_one_batch_after_another_takes_its_gpu_time_over_the_quota_or_its_own_time(run_ms: float, around_ms: float) -> None:
    """The law that estimates are made with, over the whole grid, whatever was measured before and however few samples there are."""
    node = Node(run_ms, around_ms)
    for sm, quota in product((20, 85, 100), (20, 5, 100, 50, 85, 100, 10)):
        found = node.measure(sm, quota)
        gpu_ms = run_ms * 100 / sm
        law_ms = max(gpu_ms + around_ms, gpu_ms * 100 / quota)
        assert found.latency.mean_ms == pytest.approx(law_ms, rel=0.01), (sm, quota, found.samples)
        assert found.latency.p99_ms == pytest.approx(found.latency.p50_ms, rel=0.01), (sm, quota, found.samples)
        assert found.service.mean_ms == pytest.approx(gpu_ms + around_ms, rel=0.01)
        assert found.gpu_ms == pytest.approx(gpu_ms, rel=1e-6)


def test_the_next_point_is_not_begun_before_what_this_one_owes_is_paid() -> None:
    """A hundredth of the time: were a debt of 20 ms left to it, the next point's first batch would wait two seconds for it."""
    node = Node(20.0, 0.5)
    node.measure(100, 50)
    begun_ns = node.engine.now_ns
    found = node.measure(100, 1)
    measuring_ms = found.samples * found.latency.mean_ms
    assert (node.engine.now_ns - begun_ns) / MS - measuring_ms < 10 * 20.0
