"""What all policies have in common that give whole devices to requests: who is given up, and what is charged until the last answer."""

import numpy as np
import pytest

from contracts.units import GIB, MS, S
from simulator import report
from simulator.arrivals import Arrivals
from simulator.baselines.keepalive import KeepAlive
from simulator.baselines.lalb import SKIP_LIMIT, Lalb, LoadBalancing
from simulator.baselines.torpor import Torpor
from simulator.engine import Engine
from simulator.pool import TIMED_OUT, Model, Pool, Queue, Request, Scheduler, Swapping
from simulator.run import POLICIES, simulate
from simulator.scenario import Devices, Group, Load, Scenario, Times, build

SCHEDULERS = {"keep-alive": KeepAlive, "load balancing": LoadBalancing, "LALB": Lalb, "LALB and O3": lambda: Lalb(SKIP_LIMIT), "Torpor": Torpor}


def play(scheduler: Scheduler, calls: list[tuple[float, int]], timeouts_s: tuple[float, ...], devices: int = 1) -> Pool:
    engine = Engine()
    models = [Model(f"m{n}", 100 * MS, GIB, 0, S, timeout_ns=int(timeout_s * S)) for n, timeout_s in enumerate(timeouts_s)]
    pool = Pool(engine, models, devices, 8 * GIB, scheduler, Swapping(100 * GIB))
    pool.preload()
    at_ns = np.array([int(at_ms * MS) for at_ms, _ in calls], np.int64)
    engine.run(Arrivals(tuple(model.key for model in models), at_ns, np.array([n for _, n in calls], np.int32), 100 * S), pool.arrive)
    return pool


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_what_has_waited_too_long_is_given_up(scheduler: type[Scheduler]) -> None:
    """40 requests at once for a device that runs 10 a second, each waiting a second at most."""
    (record,) = play(scheduler(), [(0, 0)] * 40, (1.0,)).records
    assert record.parts["queue"].most_ns <= S
    assert (record.answered, record.rejected[TIMED_OUT]) == (11, 29)
    assert record.late == 29 + 1


@pytest.mark.parametrize("scheduler", SCHEDULERS.values(), ids=SCHEDULERS)
def test_each_function_has_its_own_patience(scheduler: type[Scheduler]) -> None:
    patient, hasty = play(scheduler(), [(n / 10, n % 2) for n in range(40)], (60.0, 0.5)).records
    assert patient.answered == 20
    assert hasty.answered + hasty.rejected[TIMED_OUT] == 20
    assert hasty.rejected[TIMED_OUT] > 0
    assert hasty.parts["queue"].most_ns <= 0.5 * S


def test_a_queue_keeps_the_order_of_arrival_of_all_and_of_each_model() -> None:
    queue = Queue()
    requests = [Request(model, at) for at, model in enumerate([0, 1, 0, 2, 1])]
    for request in requests:
        queue.add(request)
    assert queue.head is requests[0]
    assert queue.take(requests[1]) is requests[1]
    assert list(queue) == [requests[0], *requests[2:]]
    assert queue.models[1][0] is requests[4]
    queue.take(requests[3])
    assert 2 not in queue.models
    assert len(queue) == 3


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "knative-tuned"])
def test_under_overload_nobody_is_busier_than_what_is_charged(policy: str) -> None:
    """Three times what a device can do, for 20 s: the queue is served long after the load has ended, and that is charged, too."""
    group = Group("f", Load(per_minute=600), Times(fixed_ms=100), "1Gi", count=3, slo_ms=500, timeout_ms=10_000, load_ms=200, max_batch=1)
    scenario = Scenario("overload", 20.0, [group], Devices(memory="2Gi"), pod_start_s=1.0)
    world = build(scenario, 0)
    found = report.figures(world, simulate(policy, world))
    assert found["requests"] == len(world.arrivals)
    assert found["answered"] < found["requests"], "some were given up"
    assert 0 < found["utilisation_percent"] <= 100
    assert found["gpu_seconds_whole"] <= 20 + 10 + 2 + 1


@pytest.mark.parametrize("policy", [policy for policy in POLICIES if policy != "knative-tuned"])
def test_what_passes_outside_of_the_gpus_counts_for_all(policy: str) -> None:
    group = Group("f", Load(per_minute=30), Times(fixed_ms=100), "1Gi", slo_ms=1000, around_ms=70)
    world = build(Scenario("around", 30.0, [group], Devices(memory="2Gi"), pod_start_s=0.1), 0)
    found = report.figures(world, simulate(policy, world))
    assert found["queue_p50_ms"] == pytest.approx(70, rel=0.01)
    assert found["total_p50_ms"] >= 165
