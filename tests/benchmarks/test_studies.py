"""How the studies search: the largest number that holds, on the functions of a scenario dealt out in equal parts."""

import pytest

from benchmarks.simulator_parts.studies import Kept, largest, with_functions
from simulator.scenario import Devices, Group, Load, Scenario, Times

TINY = Scenario(
    "tiny",
    40.0,
    [
        Group("fast", Load(per_minute=60), Times(fixed_ms=10), "1Gi", slo_ms=200),
        Group("slow", Load(per_minute=30), Times(fixed_ms=50), "1Gi", slo_ms=300),
    ],
    Devices(memory="8Gi"),
)


@pytest.mark.parametrize("limit", [1, 2, 3, 5, 24, 25, 100, 640, 799, 800])
def test_the_largest_number_is_found_to_within_its_precision(limit: int) -> None:
    asked: list[int] = []

    def holds(number: int) -> bool:
        asked.append(number)
        return number <= limit

    found = largest(holds, 1, 800)
    assert limit * 0.96 - 1 <= found <= limit
    assert len(asked) < 20
    assert max(asked) <= max(1, 2 * limit)


def test_none_holds_and_all_hold() -> None:
    assert largest(lambda _: False, 3, 100) == 0
    assert largest(lambda _: True, 3, 100) == 100


def test_functions_are_dealt_out_in_equal_parts() -> None:
    assert [group.count for group in with_functions(TINY, 7).functions] == [3, 4]


def test_what_fits_is_kept_and_what_does_not_is_seen_early() -> None:
    kept = Kept(TINY, "sluice", (0, 1))
    assert kept.holds(4, 1.0) == 1.0
    assert kept.holds(200, 1.0) == 0.0, "3.5 s of work each second"
    assert 4 <= kept.largest(1.0, 2, 40) < 40
