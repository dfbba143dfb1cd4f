"""The slab: extents never overlap, former places are used again, and victims are the cheapest neighbours that make room."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodeagent.memory import Costs, DeviceMemory, Extent, Place


def each(cost: Callable[[Extent], float | None]) -> Costs:
    return lambda extents: [cost(extent) for extent in extents]


free = each(lambda _: 1.0)


def filled(capacity: int, *sizes: int) -> DeviceMemory:
    memory = DeviceMemory(capacity)
    for owner, size in enumerate(sizes, 1):
        place = memory.find(owner, size, free)
        assert place is not None and not place.victims
        memory.take(owner, place.offset, size, 0)
    return memory


def test_weights_come_back_to_their_former_place() -> None:
    memory = filled(4096, 1024, 1024, 1024)
    memory.drop(2)
    memory.drop(1)
    assert memory.find(2, 1024, free) == Place(1024, ())


def test_a_former_place_that_is_taken_is_not_used() -> None:
    memory = filled(4096, 1024, 1024)
    memory.drop(1)
    memory.take(3, 0, 512, 0)
    assert memory.find(1, 1024, free) == Place(2048, ())


def test_the_smallest_hole_that_fits_is_used() -> None:
    memory = filled(8192, 1024, 512, 1024, 768, 1024)
    memory.drop(2)
    memory.drop(4)
    assert memory.find(9, 700, free) == Place(2560, ())


def test_the_cheapest_neighbours_are_evicted() -> None:
    memory = filled(4096, 1024, 1024, 1024, 1024)
    costs = {1: 5.0, 2: 1.0, 3: 1.0, 4: 4.0}
    assert memory.find(9, 2048, each(lambda extent: costs[extent.owner])) == Place(1024, (2, 3), 2.0)


def test_holes_beside_a_victim_count() -> None:
    memory = filled(4096, 1024, 1024, 1024, 1024)
    memory.drop(2)
    costs = {1: 3.0, 3: 2.0, 4: 1.0}
    assert memory.find(9, 2048, each(lambda extent: costs[extent.owner])) == Place(1024, (3,), 2.0)


def test_no_more_is_evicted_than_is_needed() -> None:
    memory = filled(4096, 512, 2048, 1536)
    place = memory.find(9, 2048, free)
    assert place is not None and place.victims == (2,)


def test_what_must_stay_is_never_a_victim() -> None:
    memory = filled(3072, 1024, 1024, 1024)
    assert memory.find(9, 2048, each(lambda extent: None if extent.owner == 2 else 1.0)) is None


def test_more_than_the_slab_never_fits() -> None:
    assert DeviceMemory(1024).find(1, 2048, free) is None


def test_pinned_weights_cannot_be_dropped() -> None:
    memory = filled(1024, 512)
    memory.extents[1].pins += 1
    with pytest.raises(AssertionError):
        memory.drop(1)


@given(st.randoms(use_true_random=False), st.integers(1, 60))
def test_places_are_always_free_and_inside(chance: random.Random, steps: int) -> None:
    memory = DeviceMemory(64 * 256)
    pinned: set[int] = set()
    for owner in range(steps):
        if memory.extents and chance.random() < 0.3:
            memory.drop(chance.choice(sorted(set(memory.extents) - pinned) or [0])) if set(memory.extents) - pinned else None
        size = chance.randint(1, 20 * 256)
        place = memory.find(owner, size, each(lambda extent: None if extent.owner in pinned else chance.random()))
        if place is None:
            continue
        assert not set(place.victims) & pinned
        for victim in place.victims:
            memory.drop(victim)
        extent = memory.take(owner, place.offset, size, 0)
        assert extent.end <= memory.capacity_bytes
        if chance.random() < 0.2:
            pinned.add(owner)
    ordered = sorted(memory.extents.values(), key=lambda extent: extent.offset)
    assert all(a.end <= b.offset for a, b in pairwise(ordered))
    assert memory.used_bytes == sum(extent.end - extent.offset for extent in ordered)


def test_of_very_many_extents_some_are_weighed_at_a_time_and_all_in_turn() -> None:
    memory = filled(1000 * 256, *[256] * 1000)
    weighed: list[int] = []

    def costs(extents: Sequence[Extent]) -> list[float | None]:
        weighed.extend(extent.owner for extent in extents)
        return [float(extent.owner) for extent in extents]

    places = [memory.find(5000, 256, costs) for _ in range(20)]
    assert len(weighed) < 20 * 200, "a search looks at a bounded number"
    assert set(weighed) == set(range(1, 1001))
    assert {place.victims[0] for place in places if place is not None} >= {1}, "the cheapest of all has its turn"


def test_what_is_not_found_among_some_is_looked_for_among_all() -> None:
    memory = filled(1000 * 256, *[256] * 1000)
    for _ in range(10):
        place = memory.find(5000, 256, each(lambda extent: 1.0 if extent.owner == 777 else None))
        assert place is not None and place.victims == (777,)
    assert memory.find(5000, 300 * 256, each(lambda _: 1.0)) == Place(0, tuple(range(1, 301)), 300.0), "more than are weighed at a time"
