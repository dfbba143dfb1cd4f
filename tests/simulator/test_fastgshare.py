"""FaST-GShare's choices: efficient pods for what is missing by whole pods, the smallest that suffices for the rest."""

import numpy as np
import pytest

from contracts.units import GIB, MS, S
from simulator.arrivals import of_many
from simulator.baselines.fastgshare import QUOTA_PERCENT, SM_PERCENT, FastGShare
from simulator.engine import Engine
from simulator.generators import poisson
from simulator.latency import Law, RunTimes
from simulator.pool import Model
from simulator.shared_gpu import SharedGpus, Size

LAW = Law(fixed_ms=2, row_ms=8, needs_sm=50)
"""10 ms on half of the SMs and on more."""


def world(functions: int = 1, gpus: int = 2, objective_ms: float = 100, weights: int = GIB // 10) -> tuple[Engine, SharedGpus, FastGShare]:
    engine, scaler = Engine(), FastGShare(gpus)
    models = [Model(f"m{n}", 10 * MS, weights, 0, int(objective_ms * MS), timeout_ns=10 * S) for n in range(functions)]
    times = RunTimes({model.key: LAW for model in models})
    shared = SharedGpus(engine, models, times, [8 * GIB] * gpus, scaler, pod_start_ns=S, sharing=True)
    return engine, shared, scaler


def sizes(gpus: SharedGpus, function: int = 0) -> list[Size]:
    return sorted(pod.size for pod in gpus.pods[function])


def test_a_function_without_requests_has_the_pod_with_the_least_throughput_that_keeps_its_objective() -> None:
    _, gpus, _ = world()
    gpus.start()
    (size,) = sizes(gpus)
    possible = [Size(sm, quota) for sm in SM_PERCENT for quota in QUOTA_PERCENT if gpus.keeps(0, Size(sm, quota))]
    assert gpus.per_s(0, size) == min(gpus.per_s(0, other) for other in possible)
    assert Size(6, 20) not in possible, "69 ms of run at a fifth of the pace"


def test_an_objective_that_nothing_keeps_gets_the_fastest_size() -> None:
    _, gpus, _ = world(objective_ms=1)
    gpus.start()
    assert sizes(gpus) == [Size(50, 100)]


def test_whole_pods_that_are_missing_are_the_most_efficient_and_the_rest_is_small() -> None:
    """At 12 % and 100 % a pod gives 28.3/s for 0.12 GPUs, the most for its area of those that are fast enough: two, and for 7/s another small one."""
    _, gpus, scaler = world()
    scaler.scale(gpus, 0, 2 * 28.3 + 7)
    found = sizes(gpus)
    assert found[:2] == [Size(12, 100)] * 2
    assert len(found) == 3
    assert gpus.per_s(0, found[2]) >= 7


def test_pods_that_can_be_spared_end_and_one_stays() -> None:
    _, gpus, scaler = world()
    scaler.scale(gpus, 0, 200.0)
    assert len(gpus.pods[0]) > 5
    for _ in range(30):
        scaler.scale(gpus, 0, 0.0)
    assert len(gpus.pods[0]) == 1


def test_when_nothing_fits_it_is_tried_again_only_after_something_has_gone() -> None:
    _, gpus, scaler = world(functions=2, gpus=1)
    scaler.scale(gpus, 0, 1e6)
    full = len(gpus.pods[0])
    scaler.scale(gpus, 1, 5.0)
    assert len(gpus.pods[1]) == 0
    gpus.end(gpus.pods[0][0])
    scaler.scale(gpus, 1, 5.0)
    assert (len(gpus.pods[0]), len(gpus.pods[1])) == (full - 1, 1)


def test_weights_that_have_no_room_keep_a_pod_away() -> None:
    _, gpus, _ = world(functions=3, gpus=1, weights=3 * GIB)
    gpus.start()
    assert [len(pods) for pods in gpus.pods] == [1, 1, 0]


def test_a_steady_load_is_kept_within_its_objective() -> None:
    span, chance = 120 * S, np.random.default_rng(5)
    engine, gpus, _ = world(functions=3)
    gpus.start()
    engine.at(10 * S, gpus.forget)
    engine.at(span, gpus.stop)
    arrivals = of_many(["m0", "m1", "m2"], [poisson(rate, span, chance) for rate in (1, 5, 40)], span)
    engine.run(arrivals, gpus.arrive)
    assert all(record.answered for record in gpus.records)
    assert gpus.records[0].late == 0
    assert 0 < gpus.busy_ns <= gpus.area_ns < gpus.whole_ns
    assert gpus.whole_ns == pytest.approx(span, rel=0.02), "all of it on one GPU"
