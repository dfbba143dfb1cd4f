"""Visits to a configuration become a point: what drift and noise leave in it, what is owed, and sweeps of a machine whose speed moves."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from contracts.wire import Answer
from profiler.dataset import samples_of
from profiler.estimator import Estimator
from profiler.measure import Sampling
from profiler.points import Config, Point, read
from profiler.sweep import Plan, sweep
from profiler.visits import next_owed, owed, pooled, quietest
from tests.profiler.test_points import point
from tests.profiler.test_sweep import FACTS, ONE, FakeCaller, FakeNode, FakePlanner


def visit(factor: float = 1.0, **changes: object) -> Point:
    """`factor`: how much slower the machine is just then, as its reference shows."""
    plain = point(**changes)
    names = [name for name in msgspec.structs.asdict(plain) if name.startswith(("latency_", "service_")) or name == "gpu_ms"]
    return msgspec.structs.replace(plain, reference_ms=5 * factor, **{name: getattr(plain, name) * factor for name in names})


def test_the_machines_speed_is_taken_out_of_every_time() -> None:
    (found,) = pooled([visit(1.0), visit(1.3), visit(0.8)])
    for name in ("latency_mean_ms", "latency_p50_ms", "latency_p95_ms", "latency_p99_ms", "service_mean_ms", "gpu_ms"):
        assert getattr(found, name) == pytest.approx(getattr(point(), name))
    assert (found.samples, found.duration_s, found.swap_ms, found.spread) == (300, 24, 3, pytest.approx(0, abs=1e-9))


def test_one_visit_in_three_that_was_disturbed_changes_little() -> None:
    (found,) = pooled([visit(), visit(latency_mean_ms=160.0), visit(latency_mean_ms=81.0)])
    assert found.latency_mean_ms == 81
    assert found.spread > 0.1, "but it is less sure"


def test_the_tail_of_short_visits_is_that_of_all_their_batches() -> None:
    tails = (95.0, 120.0, 99.0)
    short, long = ([visit(samples=samples, latency_p99_ms=tail) for tail in tails] for samples in (33, 100))
    assert [pooled(each)[0].latency_p99_ms for each in (short, long)] == [120, 99]


def test_rows_of_older_tables_stay_what_they_were() -> None:
    rows = [point(), point(batch=2), point(function="default/b")]
    assert [msgspec.structs.asdict(found) for found in pooled(rows)] == [msgspec.structs.asdict(row) | {"spread": 0.0} for row in rows]


def test_models_devices_and_loads_are_pooled_apart_in_the_order_of_their_first_visits() -> None:
    kinds = [{}, {"model_digest": "e" * 64}, {"device": "cpu:1"}, {"beside_load": True}, {"batch": 2}, {"function": "default/b"}]
    rows = [visit(latency_mean_ms=100.0 + number, **kind) for _ in range(2) for number, kind in enumerate(kinds)]
    found = pooled(rows)
    assert [one.latency_mean_ms for one in found] == [100, 101, 102, 103, 104, 105]
    assert {one.samples for one in found} == {200}


def test_a_visit_beside_load_counts_where_its_configuration_has_no_others() -> None:
    quiet, loud, only_loud = visit(), visit(beside_load=True), visit(batch=2, beside_load=True)
    assert quietest([loud, quiet, only_loud]) == [quiet, only_loud]


@pytest.mark.parametrize("visits", [1, 2, 3, 5])
def test_the_spread_is_the_error_of_the_point(visits: int) -> None:
    """Of many configurations whose visits differ by a twentieth: the points are as far off as their spreads say."""
    chance = np.random.default_rng(visits)
    rows = [visit(latency_mean_ms=80 * math.exp(off), batch=batch) for batch in range(1, 201) for off in chance.normal(0, 0.05, visits)]
    found = pooled(rows)
    errors = [math.log(one.latency_mean_ms / 80) for one in found]
    if visits == 1:
        assert {one.spread for one in found} == {0}, "nobody knows"
    else:
        assert math.sqrt(np.mean([one.spread**2 for one in found])) == pytest.approx(np.std(errors), rel=0.2)


def test_a_configuration_that_was_visited_once_is_as_unsure_as_any_visit() -> None:
    rows = [visit(latency_mean_ms=mean, batch=batch) for batch in range(1, 30) for mean in (78.0, 82.0)]
    *_, single = pooled([*rows, visit(batch=99)])
    assert single.spread == pytest.approx(math.log(82 / 78) / math.sqrt(2), rel=0.01)


def test_owed_visits_take_as_long_as_those_before() -> None:
    rows = [visit(duration_s=2.0), visit(duration_s=4.0), visit(batch=2, duration_s=1.0), *[visit(batch=3)] * 3]
    assert owed(rows, 3) == {rows[0].config: 3.0, rows[2].config: 2.0}
    assert next_owed(rows, 3, seed=1) == rows[2].config, "it was visited least"


def test_rounds_have_orders_of_their_own_that_the_seed_decides() -> None:
    def rounds(seed: int) -> list[list[Config]]:
        rows = [visit(batch=batch) for batch in range(1, 9)]
        for _ in range(16):
            rows.append(visit(batch=next_owed(rows, 3, seed).batch))
        return [[row.config for row in rows[start : start + 8]] for start in (0, 8, 16)]

    one, other = rounds(1), rounds(2)
    assert {tuple(sorted(each)) for each in one} == {tuple(one[0])}, "in each round everyone once"
    assert len({tuple(each) for each in one}) == 3
    assert one == rounds(1) != other


PLAN = Plan((1, 4), (20, 50, 100), (20, 50, 100), None, None, beside_load=True, sampling=Sampling(spread=1.0, fewest=2, enough=4), visits=3)
HELD_OUT = replace(PLAN, sm_percents=(35, 75), quota_percents=(35, 75))


class Drifting(FakeNode):
    """Its clock goes on by what its batches take, and its speed moves by a fifth as time passes; beside that, every batch differs a little."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.now_ns = 0.0
        self.chance = np.random.default_rng(seed)
        self.phases = self.chance.uniform(0, 2 * math.pi, 2)

    def slower(self) -> float:
        slow, quick = np.sin(2 * math.pi * self.now_ns / np.array([6e7, 1.7e7]) + self.phases)
        return math.exp(0.14 * slow + 0.06 * quick + self.chance.normal(0, 0.04))

    def caller(self, key: str, signature: Any, inputs: Any) -> Any:
        self.callers += 1
        return DriftingCaller(self, key, len(next(iter(inputs.values()))))


class DriftingCaller(FakeCaller):
    def call(self) -> tuple[Answer, int]:
        node = self._node
        assert isinstance(node, Drifting)
        answer, took_ns = super().call()
        slower = node.slower()
        node.now_ns += took_ns * slower
        scaled = msgspec.structs.replace(answer, run_ns=round(answer.run_ns * slower), queue_ns=round(answer.queue_ns * slower))
        return scaled, round(took_ns * slower)


def swept(path: Path, node: FakeNode, plans: Sequence[Plan]) -> tuple[Point, ...]:
    for plan in plans:
        sweep([ONE], path, lambda *_: FakePlanner(), plan, node)
    return read(path).points


def judged(rows: Sequence[Point]) -> tuple[list[float], list[bool]]:
    """Relative errors of the shares that were not probed, and whether they lie in the 90 % interval."""
    points = pooled(rows)
    probes, unseen = ([one for one in points if (one.config in PLAN.grid(True)) is known] for known in (True, False))
    assert (len(probes), len(unseen)) == (18, 8)
    estimate = Estimator().condition(samples_of("one", FACTS, probes))
    found = estimate.predict(*zip(*((one.batch, one.sm_percent, one.quota_percent) for one in unseen), strict=True))
    measured = np.array([one.latency_mean_ms for one in unseen])
    return np.abs(found.mean_ms / measured - 1).tolist(), ((found.low_ms <= measured) & (measured <= found.high_ms)).tolist()


def test_several_visits_beside_a_reference_take_the_machines_drift_out_of_the_estimate(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the same virtual time; drift is the same function of time for both, and everything is decided by seeds."""
    monkeypatch.setattr("profiler.device.measure", lambda *_: FACTS)
    once_off, often_off, inside, took = list[float](), list[float](), list[bool](), Counter[str]()
    for seed in range(5):
        once, often = Drifting(seed), Drifting(seed)
        single = [replace(plan, sampling=Sampling(spread=1.0, enough=38), visits=1) for plan in (PLAN, HELD_OUT)]
        rows = swept(tmp_path / f"once-{seed}.parquet", once, single)
        once_off += judged([msgspec.structs.replace(row, reference_ms=0.0) for row in rows])[0]
        rounds = [replace(plan, visits=visits) for visits in (1, 2, 3) for plan in (PLAN, HELD_OUT)]
        errors, found = judged(swept(tmp_path / f"often-{seed}.parquet", often, rounds))
        often_off, inside = often_off + errors, inside + found
        took += Counter(once=round(once.now_ns), often=round(often.now_ns))
    print(np.mean(once_off), np.mean(often_off), np.mean(inside), took)
    assert np.mean(often_off) < 0.5 * np.mean(once_off)
    assert np.mean(inside) >= 0.85
