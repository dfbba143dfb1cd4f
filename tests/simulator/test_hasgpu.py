"""HAS-GPU's choices: quotas before pods, used GPUs before new ones, a filter for each function, and never more of a GPU than there is."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.units import GIB, MS, S
from simulator.arrivals import of_many
from simulator.baselines.hasgpu import COOLDOWN_NS, HasGpu, Kalman
from simulator.engine import Engine
from simulator.generators import poisson
from simulator.latency import Law, RunTimes
from simulator.pool import Model
from simulator.shared_gpu import SharedGpus, Size

LAW = Law(fixed_ms=2, row_ms=8, needs_sm=50)


def world(functions: int = 1, gpus: int = 2, objective_ms: float = 100, max_batch: int = 1) -> tuple[Engine, SharedGpus, HasGpu]:
    engine, scaler = Engine(), HasGpu(gpus)
    models = [Model(f"m{n}", 10 * MS, GIB // 10, 0, int(objective_ms * MS), timeout_ns=10 * S, max_batch=max_batch) for n in range(functions)]
    shared = SharedGpus(engine, models, RunTimes({m.key: LAW for m in models}), [8 * GIB] * gpus, scaler, pod_start_ns=S, sharing=False)
    return engine, shared, scaler


def capacity(gpus: SharedGpus, function: int = 0) -> float:
    return sum(gpus.per_s(function, pod.size) for pod in gpus.pods[function])


def test_the_filter_is_the_papers() -> None:
    """Q = 1, R = 10 from P = 1: gains of 2/12, then (5/3 + 1) / (5/3 + 11)."""
    kalman = Kalman(alpha=1.0)
    assert kalman.predict(12.0) == pytest.approx(2.0 + (5 / 3) ** 0.5)
    gain = (8 / 3) / (8 / 3 + 10)
    assert kalman.predict(12.0) == pytest.approx(2.0 + 10 * gain + ((1 - gain) * 8 / 3) ** 0.5)


def test_the_filter_follows_and_does_not_feed_its_margin_to_itself() -> None:
    kalman = Kalman(alpha=1.0)
    for _ in range(100):
        last = kalman.predict(50.0)
    assert last == pytest.approx(50 + 2.7016**0.5, abs=0.01)


def test_a_quota_grows_before_there_is_another_pod() -> None:
    _, gpus, scaler = world(objective_ms=200)
    scaler.scale(gpus, 0, 0.0)
    (pod,) = gpus.pods[0]
    before = pod.size.quota_percent
    scaler.scale(gpus, 0, capacity(gpus) * 4)
    assert pod.size.quota_percent > before
    assert len(gpus.pods[0]) == 1


def test_where_quotas_do_not_suffice_pods_are_added_on_the_gpu_in_use_first() -> None:
    _, gpus, scaler = world()
    for _ in range(20):
        scaler.scale(gpus, 0, 60.0)
    assert len(gpus.pods[0]) > 1
    assert {pod.gpu for pod in gpus.pods[0]} == {0}
    assert capacity(gpus) * 0.9 >= 60
    for _ in range(20):
        scaler.scale(gpus, 0, 500.0)
    assert {pod.gpu for pod in gpus.pods[0]} == {0, 1}


def test_below_a_third_it_shrinks_once_in_ten_seconds_and_keeps_a_pod() -> None:
    engine, gpus, scaler = world()
    for _ in range(20):
        scaler.scale(gpus, 0, 100.0)
    capacities = [capacity(gpus)]
    for _ in range(40):
        engine.settle(engine.now_ns + COOLDOWN_NS // 2)
        scaler.scale(gpus, 0, 0.0)
        capacities.append(capacity(gpus))
    falls = [at for at, (one, other) in enumerate(pairwise(capacities)) if other < one]
    assert falls
    assert all(later - earlier >= 2 for earlier, later in pairwise(falls)), "a cooldown is two steps"
    assert len(gpus.pods[0]) == 1
    assert gpus.keeps(0, gpus.pods[0][0].size)


def test_the_largest_batch_that_is_fast_enough_is_chosen() -> None:
    _, gpus, scaler = world(objective_ms=400, max_batch=8)
    scaler.scale(gpus, 0, 500.0)
    for pod in gpus.pods[0]:
        larger = [Size(pod.size.sm_percent, pod.size.quota_percent, batch) for batch in (2, 4, 8) if batch > pod.size.batch]
        assert not any(gpus.keeps(0, size) for size in larger)
    assert max(pod.size.batch for pod in gpus.pods[0]) > 1


@given(st.lists(st.tuples(st.integers(0, 5), st.floats(0, 200)), max_size=40))
def test_no_gpu_is_given_away_twice(steps: list[tuple[int, float]]) -> None:
    engine, gpus, scaler = world(functions=6)
    for function, per_s in steps:
        engine.settle(engine.now_ns + 4 * S)
        scaler.scale(gpus, function, per_s)
        for gpu in range(2):
            pods = [pod for pods in gpus.pods for pod in pods if pod.gpu == gpu]
            rows = {id(pod.place): pod.place for pod in pods}.values()
            assert sum(row.sm_percent for row in rows) <= 100
            for row in rows:
                assert row.quota_percent == sum(pod.size.quota_percent for pod in pods if pod.place is row) <= 100
                assert all(pod.size.sm_percent == row.sm_percent for pod in pods if pod.place is row)


def test_a_steady_load_is_kept_at_a_part_of_a_gpu() -> None:
    span, chance = 120 * S, np.random.default_rng(5)
    engine, gpus, _ = world(functions=3)
    gpus.start()
    engine.at(30 * S, gpus.forget)
    engine.at(span, gpus.stop)
    engine.run(of_many(["m0", "m1", "m2"], [poisson(rate, span, chance) for rate in (1, 5, 20)], span), gpus.arrive)
    assert all(record.answered for record in gpus.records)
    assert sum(record.late for record in gpus.records) < 0.1 * sum(record.requests for record in gpus.records)
    assert 0 < gpus.busy_ns <= gpus.area_ns < 0.6 * gpus.whole_ns
