"""The cluster without Sluice: pods come and go as the KPA says, and their GPUs are charged while they are held."""

import numpy as np
import pytest

from contracts.units import GIB, MS, S
from simulator.arrivals import Arrivals, of_many, of_one
from simulator.baselines.knative import Cluster, Knative
from simulator.baselines.kpa import Spec
from simulator.engine import Engine
from simulator.generators import poisson
from simulator.pool import Model

ONE = Spec(target=0.7, total=1.0)
"""Aims at pods that are busy 70 % of the time, one request in each."""


def play(arrivals: Arrivals, spec: Spec = ONE, cluster: Cluster | None = None, run_ns: int = 100 * MS) -> Knative:
    engine = Engine()
    models = [Model(name, run_ns, GIB, 0, S) for name in arrivals.names]
    knative = Knative(engine, models, spec, cluster or Cluster(gpus=50))
    knative.start()
    engine.at(arrivals.span_ns, knative.stop)
    engine.run(arrivals, knative.arrive)
    return knative


def test_a_steady_load_has_the_pods_that_its_concurrency_asks_for() -> None:
    """30 requests/s of 100 ms are 3 at a time, and those that wait: 5 pods and more at 70 %."""
    span = 600 * S
    knative = play(of_one("f", poisson(30, span, np.random.default_rng(1)), span), cluster=Cluster(gpus=50, min_scale=4, pod_start_ns=S))
    (revision,) = knative.revisions
    assert 5 <= knative.gpus.reserved_ns / span <= 8
    assert revision.record.parts["total"].percentile_ms(50) < 150
    assert revision.busy_ns == revision.record.answered * 100 * MS


def test_the_first_request_waits_for_a_pod_and_the_pod_goes_after_the_silence() -> None:
    knative = play(of_one("f", np.array([10 * S]), 600 * S), Spec(target=1.0, total=1.0))
    (revision,) = knative.revisions
    assert revision.record.parts["queue"].most_ns == pytest.approx(15 * S, abs=10 * MS)
    assert knative.gpus.reserved_ns / S == pytest.approx(15 + 60 + 30, abs=6)
    assert knative.gpus.free == 50


def test_a_minimum_of_one_pod_is_charged_all_the_time() -> None:
    knative = play(of_one("f", np.array([300 * S]), 600 * S), cluster=Cluster(gpus=2, min_scale=1))
    (revision,) = knative.revisions
    assert revision.record.parts["queue"].most_ns == 0
    assert knative.gpus.reserved_ns == 600 * S


def test_without_a_free_gpu_pods_are_pending_and_requests_wait() -> None:
    arrivals = of_many(("f", "g"), [np.array([S]), np.array([2 * S])], 600 * S)
    first, second = play(arrivals, cluster=Cluster(gpus=1)).revisions
    assert first.record.parts["queue"].most_ns < 16 * S
    assert second.record.parts["queue"].most_ns > 80 * S, "not before the other function's pod has gone"
    assert second.record.answered == 1


def test_one_request_at_a_time_is_a_panic_at_knatives_own_target() -> None:
    """1 / 0.7 needs two pods, which is twice the one there is: so the KPA decides, and so it is charged."""
    knative = play(of_one("f", np.array([10 * S]), 600 * S))
    assert knative.gpus.most_used == 2


def test_every_request_has_one_outcome() -> None:
    span = 300 * S
    chance = np.random.default_rng(3)
    arrivals = of_many([f"f{n}" for n in range(6)], [poisson(rate, span // 2, chance) for rate in (0.1, 0.5, 1, 5, 20, 40)], span)
    knative = play(arrivals, cluster=Cluster(gpus=12))
    assert [revision.record.requests for revision in knative.revisions] == np.bincount(arrivals.function).tolist()
    assert sum(revision.record.answered for revision in knative.revisions) > 0.6 * len(arrivals)
    assert knative.gpus.most_used <= 12
