"""The sweep's decisions, on a node that answers by a law: what is measured in which order, when it ends, what is kept, and what it refuses."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from contracts.artifact import Gate, Program, Signature, WeightIndex
from contracts.errors import InvalidFunction, InvalidValue, Refused, Unavailable
from contracts.functions import Function, FunctionClass, ModelFormat, ModelRef, Share
from contracts.status import DeviceStatus, FunctionStatus, LatencyStatus, NodeStatus
from contracts.wire import Answer
from models.describe import describe
from profiler.dataset import samples_of
from profiler.device import DeviceFacts
from profiler.estimator import Estimator
from profiler.measure import Sampling
from profiler.planner import planners
from profiler.points import Config, Point, read
from profiler.session import Session
from profiler.sweep import Plan, Progress, corners, sweep
from profiler.visits import pooled

FACTS = DeviceFacts("cuda", "a fake", 80, 1500.0, 1e13, 1e12, 1e10, 1 << 30)
ONE = Function("one", ModelRef(ModelFormat.CATALOG, "mlp?width=8"))
TWO = Function("two", ModelRef(ModelFormat.CATALOG, "mlp?width=16"))
GRID = Plan(batches=(1, 4), sm_percents=(25, 50, 100), quota_percents=(20, 100), sampling=Sampling(enough=8, fewest=4), visits=1)
RUN_NS = 20_000
OVERHEAD_NS = 1_000


class FakeCaller:
    """Answers at once and says how long it would have taken: overhead + rows x time / SM share, and under a quota the wait that it makes."""

    def __init__(self, node: FakeNode, key: str, rows: int) -> None:
        self._node, self._key, self._rows = node, key, rows

    def call(self) -> tuple[Answer, int]:
        self._node.calls += 1
        if self._node.calls == self._node.fails_at:
            raise Unavailable("the node agent ended")
        share = self._node.shares[self._key]
        run_ns = RUN_NS * self._rows * 100 // share.sm_percent
        queue_ns = run_ns * (10_000 - share.limit_bp) // share.limit_bp
        cold = self._key in self._node.cold
        self._node.cold.discard(self._key)
        took_ns = OVERHEAD_NS + queue_ns + run_ns + (5_000_000 if cold else 0)
        return Answer(1, queue_ns, 0, run_ns, cold, "cuda:0"), took_ns

    def close(self) -> None:
        self._node.callers -= 1


class FakeNode(Session):
    """A node with one device and, if a test says so, other functions that answer requests: `foreign` gives their count at each look."""

    def __init__(self, foreign: Callable[[], int] = lambda: 0) -> None:
        self.foreign = foreign
        self.shares: dict[str, Share] = {}
        self.cold: set[str] = set()
        self.calls = self.fails_at = self.callers = 0
        self.digest = "a" * 64
        self.threads = 1

    @contextlib.contextmanager
    def serving(self, function: Function, share: Share) -> Iterator[str]:
        self.shares[function.key] = share
        try:
            yield function.key
        finally:
            del self.shares[function.key]

    @contextlib.contextmanager
    def chilling(self, function: Function) -> Iterator[Callable[[], None]]:
        yield lambda: self.cold.add(function.key)

    def index(self, function: Function) -> WeightIndex:
        program = Program("catalog", function.model.source)
        return WeightIndex(self.digest, 1 << 20, (), (Gate("", 0),), program, describe(function.model).signature, 1)

    def set_share(self, key: str, share: Share) -> None:
        self.shares[key] = share

    def status(self) -> NodeStatus:
        other = FunctionStatus(
            "default/other", FunctionClass.BEST_EFFORT, "ready", Share(), 1.0, 1, (), 0, 0.0, LatencyStatus(), self.foreign(), 0, 0, 0, 0, 0, 0
        )
        device = DeviceStatus("cuda:0", 1 << 30, 0, 0, 0, 0, 0, ())
        return NodeStatus(os.getpid(), 0, 0, 0, (device,), (other,))

    def caller(self, key: str, signature: Signature, inputs: Any) -> Any:
        self.callers += 1
        return FakeCaller(self, key, len(next(iter(inputs.values()))))


class FakePlanner:
    """Takes the last candidate; expects as large an error as the test says, and remembers what it was shown."""

    def __init__(self, errors: Sequence[float] = ()) -> None:
        self.errors = list(errors)
        self.shown: list[list[Config]] = []

    def next(self, measured: Sequence[Point], candidates: Sequence[Config]) -> tuple[int, float]:
        self.shown.append([point.config for point in measured])
        return len(candidates) - 1, self.errors.pop(0) if self.errors else 1.0


@pytest.fixture(autouse=True)
def _facts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("profiler.device.measure", lambda *_: FACTS)


def run(path: Path, plan: Plan, node: FakeNode | None = None, planner: FakePlanner | None = None, functions: Sequence[Function] = (ONE,)):  # type: ignore[no-untyped-def]
    seen: list[Progress] = []
    made = planner or FakePlanner()
    outcomes = sweep(functions, path, lambda *_: made, plan, node or FakeNode(), seen.append)
    return outcomes, seen


def test_a_whole_grid_is_measured_once_each_and_says_what_the_law_says(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    (outcome,), seen = run(path, GRID)
    found = read(path).points
    assert (outcome.function, outcome.reason, outcome.measured) == ("default/one", "grid", 12)
    assert sorted(point.config for point in found) == GRID.grid(True)
    for point in found:
        gpu_ms = RUN_NS / 1e6 * point.batch * 100 / point.sm_percent
        assert point.gpu_ms == pytest.approx(gpu_ms, rel=1e-3)
        assert point.latency_mean_ms == pytest.approx(gpu_ms * 100 / point.quota_percent + OVERHEAD_NS / 1e6, rel=1e-3)
        assert point.service_mean_ms == pytest.approx(gpu_ms + OVERHEAD_NS / 1e6, rel=1e-3)
        assert point.swap_ms == pytest.approx(5, rel=1e-3)
        assert (point.device, point.model_digest, point.device_bytes, point.beside_load) == ("cuda:0", "a" * 64, 1 << 20, False)
    assert [progress.measured for progress in seen] == list(range(13))
    assert seen[-1].grid == 12


def test_the_corners_come_first_then_what_the_planner_says(tmp_path: Path) -> None:
    planner = FakePlanner()
    _, seen = run(tmp_path / "t.parquet", GRID, planner=planner)
    order = [progress.point.config for progress in seen if progress.point]
    first = corners(GRID.grid(True))
    assert order[: len(first)] == first == [Config(1, 100, 100), Config(4, 100, 100), Config(1, 25, 100), Config(1, 100, 20)]
    left = [config for config in GRID.grid(True) if config not in first]
    assert order[len(first) :] == left[::-1]
    assert planner.shown == [order[:count] for count in range(len(first), 12)]


def test_each_configuration_is_visited_again_in_rounds_after_all_were_visited_once(tmp_path: Path) -> None:
    (outcome,), seen = run(tmp_path / "t.parquet", replace(GRID, visits=3))
    order = [progress.point.config for progress in seen if progress.point]
    rounds = [order[start : start + 12] for start in (0, 12, 24)]
    assert (outcome.reason, outcome.measured, len(order)) == ("grid", 12, 36)
    assert [sorted(each) for each in rounds] == [GRID.grid(True)] * 3
    assert rounds[1] != rounds[2]
    assert [progress.to_come for progress in seen] == [0, *range(2, 25, 2), *range(23, -1, -1)]
    assert all(point.reference_ms == RUN_NS / 1e6 for point in read(tmp_path / "t.parquet").points)


def test_more_visits_are_added_to_those_of_an_earlier_sweep(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    run(path, GRID)
    (outcome,), seen = run(path, replace(GRID, visits=2))
    assert (outcome.measured, len(seen) - 1, len(read(path).points)) == (12, 12, 24)


def test_the_target_counts_when_all_visits_are_made(tmp_path: Path) -> None:
    """It seems reached after five configurations; when these have been visited twice it is not, so a sixth is measured."""
    (outcome,), seen = run(tmp_path / "t.parquet", replace(GRID, visits=2), planner=FakePlanner([0.4, *[0.05] * 5, 0.2, *[0.05] * 9]))
    begun = [progress.measured for progress in seen]
    assert (outcome.reason, outcome.measured, len(begun) - 1) == ("target", 6, 12)
    assert begun == [0, 1, 2, 3, 4, *[5] * 6, 6, 6]


def test_nothing_new_is_begun_when_the_budget_is_owed_to_visits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("profiler.sweep.time", SimpleNamespace(monotonic=lambda: now[0]))

    class Slow(FakeNode):
        """A visit takes a second: it brings the share of its configuration, as `_settle` does, with next to no quota before."""

        def set_share(self, key: str, share: Share) -> None:
            super().set_share(key, share)
            now[0] += share.quota_bp == 1

    (outcome,), _ = run(tmp_path / "t.parquet", replace(GRID, visits=3, budget_s=20.0), Slow())
    assert (outcome.reason, outcome.measured) == ("budget", 6)
    assert sorted(Counter(point.config for point in read(tmp_path / "t.parquet").points).values()) == [3] * 6


def test_it_ends_as_soon_as_the_target_is_expected(tmp_path: Path) -> None:
    (outcome,), _ = run(tmp_path / "t.parquet", GRID, planner=FakePlanner([0.4, 0.05]))
    assert (outcome.reason, outcome.measured, outcome.error) == ("target", 5, 0.05)


def test_it_ends_with_the_budget(tmp_path: Path) -> None:
    plan = replace(GRID, budget_s=0.0)
    (outcome,), _ = run(tmp_path / "t.parquet", plan)
    assert (outcome.reason, outcome.measured) == ("budget", 0)


def test_a_sweep_that_was_broken_off_goes_on_where_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    node = FakeNode()
    node.fails_at = 120
    with pytest.raises(Unavailable, match="the node agent ended"):
        run(path, GRID, node)
    before = read(path).points
    assert 0 < len(before) < 12
    assert (node.callers, node.shares) == (0, {}), "connections are closed and functions removed, whatever happens"
    (outcome,), seen = run(path, GRID)
    assert seen[0].measured == len(before)
    assert outcome.measured == 12
    assert read(path).points[: len(before)] == before, "nothing is measured twice"


def test_what_was_measured_of_another_model_under_the_same_name_does_not_count(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    run(path, GRID)
    node = FakeNode()
    node.digest = "b" * 64
    (outcome,), seen = run(path, GRID, node)
    assert (seen[0].measured, outcome.measured) == (0, 12)
    assert len(read(path).points) == 24


def test_several_functions_share_a_table(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    outcomes, _ = run(path, GRID, functions=(ONE, TWO))
    assert [(outcome.function, outcome.measured) for outcome in outcomes] == [("default/one", 12), ("default/two", 12)]
    assert read(path).functions == ("default/one", "default/two")


def test_beside_other_requests_nothing_is_begun(tmp_path: Path) -> None:
    requests = iter(range(1, 100))
    with pytest.raises(Refused, match=r"requests of other functions \(1\).*--beside-load"):
        run(tmp_path / "t.parquet", GRID, FakeNode(lambda: next(requests)))
    assert os.listdir(tmp_path) == []


def test_a_point_that_was_disturbed_is_measured_again(tmp_path: Path) -> None:
    looks = iter([0, 0, 0, 0, 0, 7])  # at start, to see that it is quiet (2), and in the third point
    last = [0]

    def foreign() -> int:
        last[0] = next(looks, last[0])
        return last[0]

    (outcome,), _ = run(tmp_path / "t.parquet", GRID, FakeNode(foreign))
    found = read(tmp_path / "t.parquet").points
    assert (outcome.measured, len(found)) == (12, 12)
    assert not any(point.beside_load for point in found)


def test_load_that_does_not_end_ends_the_sweep_and_keeps_what_there_is(tmp_path: Path) -> None:
    looks = [0]

    def foreign() -> int:
        looks[0] += 1
        return max(0, looks[0] - 8)

    with pytest.raises(Refused, match="also at try 3: what was measured before is kept"):
        run(tmp_path / "t.parquet", GRID, FakeNode(foreign))
    found = read(tmp_path / "t.parquet").points
    assert found
    assert not any(point.beside_load for point in found)


def test_beside_load_is_measured_if_wanted_and_marked_and_not_taken_up_without(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    requests = iter(range(10_000))
    plan = replace(GRID, beside_load=True)
    run(path, plan, FakeNode(lambda: next(requests)))
    assert all(point.beside_load for point in read(path).points)
    (outcome,), seen = run(path, GRID)
    assert (seen[0].measured, outcome.measured) == (0, 12)
    assert sum(not point.beside_load for point in read(path).points) == 12


def test_with_the_estimator_a_sweep_ends_before_the_grid_and_predicts_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    plan = Plan((1, 2, 4, 8), (10, 25, 50, 75, 100), (10, 20, 40, 60, 80, 100), target_error=0.05, sampling=GRID.sampling, visits=1)
    (outcome,) = sweep([ONE], path, planners(Estimator()), plan, FakeNode())
    table = read(path)
    assert outcome.reason == "target"
    assert outcome.error is not None
    assert outcome.error <= 0.05
    assert outcome.measured < 60
    estimate = Estimator().condition(samples_of("default/one", FACTS, pooled(table.points)))
    grid = np.array([(config.batch, config.sm_percent, config.quota_percent) for config in plan.grid(True)])
    predicted = estimate.predict(grid[:, 0], grid[:, 1], grid[:, 2]).mean_ms
    law = RUN_NS / 1e6 * grid[:, 0] * 1e4 / (grid[:, 1] * grid[:, 2]) + OVERHEAD_NS / 1e6
    assert np.mean(np.abs(predicted / law - 1)) < 0.1


PLANS = {
    "no batch size": ({"batches": ()}, InvalidValue, "at least one batch size"),
    "a batch of nothing": ({"batches": (0,)}, InvalidValue, "batch: must be from 1 to 1024, got 0"),
    "more SMs than there are": ({"sm_percents": (101,)}, InvalidFunction, "sm-percent: .* got 101"),
    "no time at all": ({"quota_percents": (0,)}, InvalidFunction, "quota-percent: .* got 0"),
}


@pytest.mark.parametrize(("fields", "kind", "message"), PLANS.values(), ids=PLANS)
def test_an_impossible_plan_is_named(fields: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        Plan(**fields)


@pytest.mark.parametrize("functions", [(), (ONE, ONE)], ids=["no function", "one function twice"])
def test_each_function_is_named_once(tmp_path: Path, functions: tuple[Function, ...]) -> None:
    with pytest.raises(InvalidValue, match="name each function to measure once"):
        run(tmp_path / "t.parquet", GRID, functions=functions)


def test_whoever_sweeps_stays_without_torch() -> None:
    code = "import sys, profiler.sweep, profiler.planner, profiler.pairs, profiler.points; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
