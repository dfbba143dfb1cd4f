"""The factor by which a neighbour slows a function down: found again from what it made, and never the wrong way round."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidArtifact, InvalidValue
from profiler.device import DeviceFacts
from profiler.interference import Demand, Pair, fit, load

FACTS = DeviceFacts("cpu", "a processor", 1, 2500.0, 1e11, 2e10, 1e10, 1 << 30)
fractions = st.floats(0, 2)
demands = st.builds(Demand, fractions, fractions)


def truth(one: Demand, other: Demand) -> float:
    return 1 + 0.5 * one.memory * other.memory + 0.1 * other.compute


def pairs(count: int, noise: float, seed: int = 1) -> list[Pair]:
    random = np.random.default_rng(seed)
    found = []
    for at in range(count):
        one, other = (Demand(*random.uniform(0, 1, 2).tolist()) for _ in range(2))
        found.append(Pair(f"a{at}", f"b{at}", 50, 50, one, other, float(truth(one, other) * random.normal(1, noise))))
    return found


def test_a_known_law_is_found_again() -> None:
    model = fit("d", pairs(40, noise=0.01))
    for pair in pairs(20, noise=0, seed=2):
        assert model.slowdown(pair.demand, pair.neighbour_demand) == pytest.approx(pair.slowdown, abs=0.03)
    assert model.error < 0.03


def test_the_error_is_of_pairs_that_the_fit_has_not_seen() -> None:
    lonely = pairs(1, noise=0)
    assert fit("d", lonely).error == pytest.approx(lonely[0].slowdown - 1), "without another pair nothing is known but that nothing slows down"


@given(st.lists(st.builds(Pair, st.just("a"), st.just("b"), st.just(50), st.just(50), demands, demands, st.floats(0.5, 5)), min_size=1, max_size=6))
def test_more_demand_of_the_neighbour_never_makes_it_faster(found: list[Pair]) -> None:
    model = fit("d", found)
    one = Demand(0.5, 0.5)
    grid = [Demand(memory, compute) for memory in (0, 0.5, 1) for compute in (0, 0.5, 1)]
    for less in grid:
        for more in grid:
            if less.memory <= more.memory and less.compute <= more.compute:
                assert 1 <= model.slowdown(one, less) <= model.slowdown(one, more) + 1e-12


def test_beside_none_nothing_is_slower_and_two_neighbours_count_together() -> None:
    model = fit("d", pairs(40, noise=0))
    one, other = Demand(0.5, 0.2), Demand(0.4, 0.4)
    assert model.slowdown(one) == 1
    assert model.slowdown(one, other, other) == pytest.approx(model.slowdown(one, Demand(0.8, 0.8)))


def test_demand_is_the_fraction_of_what_the_device_was_measured_to_do() -> None:
    assert Demand.of(nbytes=1e8, flops=5e8, gpu_ms=10, facts=FACTS) == Demand(memory=0.5, compute=0.5)


@pytest.mark.parametrize("wrong", [(1, 1, 0), (-1, 1, 1), (1, -1, 1)])
def test_an_impossible_run_has_no_demand(wrong: tuple[float, float, float]) -> None:
    with pytest.raises(InvalidValue, match="a run takes time"):
        Demand.of(*wrong, FACTS)


def test_nothing_and_impossible_factors_are_refused() -> None:
    with pytest.raises(InvalidValue, match="no pair"):
        fit("d", [])
    with pytest.raises(InvalidValue, match="slowdown of a beside b: must be greater than 0, got nan"):
        fit("d", [Pair("a", "b", 50, 50, Demand(0, 0), Demand(1, 1), float("nan"))])


def test_a_model_comes_back_from_its_file(tmp_path: Path) -> None:
    model = fit("d", pairs(4, noise=0.1))
    model.save(tmp_path / "i.json")
    assert load(tmp_path / "i.json") == model


FILES = {
    "an empty file": b"",
    "another document": b'{"a": 1}',
    "a torn file": b'{"device":"d","coefficients":[1.0',
    "another version": b'{"device":"d","coefficients":[0,0,0,0],"error":0,"pairs":[],"version":9}',
    "coefficients that speed up": b'{"device":"d","coefficients":[0,0,0,-1],"error":0,"pairs":[],"version":1}',
}


@pytest.mark.parametrize("content", FILES.values(), ids=FILES)
def test_a_wrong_file_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "i.json").write_bytes(content)
    with pytest.raises(InvalidArtifact, match=r"i\.json"):
        load(tmp_path / "i.json")
