"""Torpor's three choices: which request, which GPU, which victim."""

import numpy as np
import pytest

from contracts.units import GIB, MS, S
from simulator.arrivals import Arrivals
from simulator.baselines.torpor import Torpor
from simulator.engine import Engine
from simulator.pool import Model, Pool, Swapping

FAST = Swapping(bytes_per_s=GIB * 10)
LIGHT, HEAVY = Model("light", 100 * MS, GIB // 10, 0, S), Model("heavy", 10 * MS, GIB, 0, S)


def play(models: list[Model], calls: list[tuple[float, int]], devices: int = 1, capacity: int = 2 * GIB, swapping: Swapping = FAST) -> Pool:
    engine = Engine()
    pool = Pool(engine, models, devices, capacity, Torpor(), swapping)
    at_ns = np.array([int(at_ms * MS) for at_ms, _ in calls], np.int64)
    engine.run(Arrivals(tuple(model.key for model in models), at_ns, np.array([n for _, n in calls], np.int32), 100 * S), pool.arrive)
    assert sum(record.answered for record in pool.records) == len(calls)
    return pool


def test_a_swap_hides_behind_a_long_run_and_not_behind_a_short_one() -> None:
    light, heavy = play([LIGHT, HEAVY], [(0, 0), (1000, 1)]).records
    assert light.parts["swap"].most_ns == 0
    assert heavy.parts["swap"].most_ns == pytest.approx(100 * MS + 1 * MS - 10 * MS)


def test_copies_of_neighbours_wait_for_each_other_on_one_link() -> None:
    apart = play([HEAVY, HEAVY], [(0, 0), (0, 1)], devices=2).records
    together = play([HEAVY, HEAVY], [(0, 0), (0, 1)], devices=2, swapping=Swapping(GIB * 10, per_link=2)).records
    assert max(record.parts["swap"].most_ns for record in apart) == pytest.approx(91 * MS)
    assert max(record.parts["swap"].most_ns for record in together) == pytest.approx(191 * MS)


def test_a_gpu_is_chosen_whose_link_is_idle() -> None:
    """Devices 0 and 1 share a link on which 0 loads; the second function goes to 2."""
    pool = play([HEAVY, HEAVY], [(0, 0), (1, 1)], devices=4, swapping=Swapping(GIB * 10, per_link=2))
    assert [list(device.models) for device in pool.devices] == [[0], [], [1], []]


def test_what_another_gpu_holds_comes_from_there() -> None:
    """Both requests are for one model; the second finds its holder busy."""
    (record,) = play([HEAVY], [(0, 0), (100, 0)], devices=2, swapping=Swapping(GIB * 10, peer_bytes_per_s=100 * GIB)).records
    assert record.cold == 2
    assert record.parts["total"].percentile_ms(50) == pytest.approx(11, rel=0.01), "10 ms over the peer link, and the tail"


def test_a_light_model_has_to_go_before_a_heavy_one_that_was_used_longer_ago() -> None:
    third = Model("third", 10 * MS, GIB, 0, S)
    pool = play([HEAVY, LIGHT, third], [(0, 0), (500, 1), (1000, 2)], capacity=2 * GIB)
    assert set(pool.devices[0].models) == {0, 2}


def test_the_function_that_can_still_keep_its_objective_goes_first() -> None:
    """While the GPU is busy one request of each waits: `lost` has missed everything by far, `near` only two of three."""
    lost, near = Model("lost", 600 * MS, 1, 0, 500 * MS, 50.0), Model("near", 100 * MS, 1, 0, 150 * MS, 50.0)
    calls = [(0, 0), (700, 0), (1400, 0), (2100, 1), (2101, 1), (2102, 1), (3000, 0), (3001, 0), (3002, 1)]
    near_record = play([lost, near], calls).records[1]
    assert near_record.parts["queue"].most_ns == pytest.approx(598 * MS), "it came last and ran as soon as the GPU was free"
