"""Locality on whole GPUs: the effect that GPU-enabled FaaS reports, and where it comes from."""

import numpy as np
import pytest

from contracts.units import GIB, MIB, MS, S
from simulator.arrivals import Arrivals, of_many
from simulator.baselines.lalb import SKIP_LIMIT, Lalb, LoadBalancing
from simulator.engine import Engine
from simulator.generators import poisson, popularity
from simulator.pool import Model, Pool, Scheduler
from simulator.record import together


def play(scheduler: Scheduler, models: list[Model], arrivals: Arrivals, devices: int, capacity: int = 8 * GIB) -> Pool:
    engine = Engine()
    pool = Pool(engine, models, devices, capacity, scheduler)
    engine.run(arrivals, pool.arrive)
    assert sum(record.answered for record in pool.records) == len(arrivals)
    assert not pool.queue
    assert all(device.free_bytes >= 0 for device in pool.devices)
    return pool


def named(count: int, load_ns: int, run_ns: int = 100 * MS) -> list[Model]:
    return [Model(f"m{n}", run_ns, 2 * GIB - MIB, load_ns, S) for n in range(count)]


def mean_ms(pool: Pool) -> float:
    return together(pool.records)["total"].mean_ms


def load(models: int, per_s: float, span_s: int, seed: int) -> Arrivals:
    chance = np.random.default_rng(seed)
    parts = popularity(models, 1.0, chance)
    return of_many([f"m{n}" for n in range(models)], [poisson(per_s * part, span_s * S, chance) for part in parts], span_s * S)


def test_with_slow_loads_locality_is_worth_tens_of_times_and_with_fast_swaps_little() -> None:
    """12 devices that hold 4 models each, 22 models, as in the paper; loads of 3 s. The rate is what locality still sustains."""
    slow, fast = named(22, 3 * S), named(22, 15 * MS)
    arrivals = load(22, per_s=30, span_s=600, seed=1)
    balanced, local, reordered = (mean_ms(play(scheduler, slow, arrivals, 12)) for scheduler in (LoadBalancing(), Lalb(), Lalb(SKIP_LIMIT)))
    assert balanced > 10 * reordered
    assert reordered < local < balanced
    assert mean_ms(play(LoadBalancing(), fast, arrivals, 12)) < 1.3 * mean_ms(play(Lalb(SKIP_LIMIT), fast, arrivals, 12))


def test_a_request_waits_for_the_device_that_holds_its_model_when_that_is_sooner_than_a_load() -> None:
    arrivals = Arrivals(("m0",), np.array([0, 4 * S, 4 * S + MS]), np.zeros(3, np.int32), 10 * S)
    assert sum(device.loads for device in play(Lalb(), named(1, 3 * S), arrivals, 2).devices) == 1
    assert sum(device.loads for device in play(LoadBalancing(), named(1, 3 * S), arrivals, 2).devices) == 2
    assert sum(device.loads for device in play(Lalb(), named(1, 50 * MS), arrivals, 2).devices) == 2


@pytest.mark.parametrize("limit", [0, 3, SKIP_LIMIT])
def test_a_request_is_passed_over_no_more_often_than_is_allowed(limit: int) -> None:
    """m1 waits for the only device while requests for the model that it holds keep coming."""
    requests = [0, 1, *[0] * 60]
    arrivals = Arrivals(("m0", "m1"), np.arange(len(requests)) * MS, np.array(requests, np.int32), S)
    pool = play(Lalb(limit), named(2, 10 * S), arrivals, devices=1, capacity=2 * GIB)
    (waited,) = [pool.records[1].parts["queue"].most_ns]
    assert waited == pytest.approx(10 * S + (1 + limit) * 100 * MS, abs=110 * MS)
