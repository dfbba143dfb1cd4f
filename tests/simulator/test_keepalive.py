"""Whole models that stay: one copy, its requests wait for it, and room is made by what was used longest ago."""

import numpy as np

from contracts.units import GIB, MS, S
from simulator.arrivals import Arrivals
from simulator.baselines.keepalive import KeepAlive
from simulator.engine import Engine
from simulator.pool import Model, Pool


def play(calls: list[tuple[float, int]], models: int, devices: int) -> Pool:
    engine = Engine()
    pool = Pool(engine, [Model(f"m{n}", 100 * MS, GIB, 2 * S, S) for n in range(models)], devices, 2 * GIB, KeepAlive())
    at_ns = np.array([int(at_s * S) for at_s, _ in calls], np.int64)
    engine.run(Arrivals(tuple(f"m{n}" for n in range(models)), at_ns, np.array([n for _, n in calls], np.int32), 1000 * S), pool.arrive)
    assert sum(record.answered for record in pool.records) == len(calls)
    return pool


def test_requests_wait_for_the_device_that_holds_their_model_though_another_is_idle() -> None:
    pool = play([(0, 0), (0, 0), (0, 0)], models=1, devices=2)
    assert [device.loads for device in pool.devices] == [1, 0]
    assert pool.records[0].parts["queue"].most_ns == 2 * S + 200 * MS


def test_models_are_dealt_out_to_the_least_busy_devices() -> None:
    pool = play([(0, 0), (0, 1), (0, 2), (0, 3)], models=4, devices=2)
    assert sorted(sorted(device.models) for device in pool.devices) == [[0, 2], [1, 3]]


def test_what_was_used_longest_ago_has_to_go() -> None:
    pool = play([(0, 0), (5, 1), (10, 0), (15, 2), (20, 0)], models=3, devices=1)
    assert set(pool.devices[0].models) == {0, 2}
    assert pool.devices[0].loads == 3
