"""How many functions a GPU keeps: the pieces by themselves, and all of it with small models on the CPU device, where the figures mean nothing."""

from __future__ import annotations

import asyncio
import math

import numpy as np
import pytest

from benchmarks import gpu_functions
from benchmarks.gpu_parts import functions
from benchmarks.gpu_parts.answers import NEAR, NEAR_PART, SAME, WRONG, compare, separation
from benchmarks.gpu_parts.fleet import Keeper, Kind, Request, Search, Served, arrivals, fleet, mix, weight_bytes
from contracts.functions import Slo
from contracts.units import MS

LIGHT = Kind("light", "mlp?width=64&seed={}", Slo(100 * MS, 98.0), 10)
HEAVY = Kind("heavy", "mlp?width=128&seed={}", Slo(200 * MS, 90.0), 30)

MIXES = {
    "all alike where memory allows it": (500, 10_000, (250, 250)),
    "as many heavy ones as fit": (500, 5_000 + 100 * 20, (400, 100)),
    "light ones alone": (500, 5_000, (500, 0)),
    "fewer than asked for": (500, 4_000, (400, 0)),
}


@pytest.mark.parametrize(("functions", "budget", "counts"), MIXES.values(), ids=MIXES)
def test_the_mix_fits_the_memory(functions, budget, counts):
    assert mix([LIGHT.nbytes, HEAVY.nbytes], functions, budget) == counts


def test_every_beginning_of_a_fleet_has_the_mix_of_the_whole():
    whole = fleet([LIGHT, HEAVY], (75, 25))
    assert (whole.count(LIGHT), whole.count(HEAVY), whole.nbytes) == (75, 25, 1500)
    assert len({function.model.source for function in whole.functions}) == 100
    for end in range(20, 101, 20):
        heavy = sum(whole.kinds[function.name] == HEAVY for function in whole.functions[:end])
        assert abs(heavy - end / 4) <= 1


def test_arrivals_are_random_at_the_rate_and_the_same_for_all():
    found = arrivals(200, 10, 60, seed=3)
    assert found == arrivals(200, 10, 60, seed=3) != arrivals(200, 10, 60, seed=4)
    assert abs(len(found) - 2000) < 5 * math.sqrt(2000)
    gaps = np.diff([request.due_s for request in found])
    assert abs(gaps.std() / gaps.mean() - 1) < 0.1
    assert np.bincount([request.function for request in found]).var() == pytest.approx(10, rel=0.5)


def test_a_function_is_out_with_the_first_late_request_beyond_its_percentile():
    whole = fleet([HEAVY], (50,))
    requests = [Request(0, 0, 0)] * 20 + [Request(0, 1, 0)] * 9
    keeper = Keeper(whole, 50, requests)
    late, in_time = 200.1, 200.0
    for _ in range(2):
        keeper.add(Served(requests[0], late, SAME, cold=False))
    assert keeper.out == 0  # 2 of 20 may be late at P90
    keeper.add(Served(requests[-1], in_time, SAME, cold=False))
    assert keeper.out == 0
    keeper.add(Served(requests[0], math.inf, "refused", cold=False))
    keeper.add(Served(requests[0], late, SAME, cold=False))
    assert (keeper.out, keeper.holds) == (1, True)  # 2 % of 50
    keeper.add(Served(requests[-1], late, SAME, cold=False))
    assert (keeper.out, keeper.holds) == (2, False)


@pytest.mark.parametrize("guess", [50, 250, 500])
@pytest.mark.parametrize("truth", range(0, 501, 50))
def test_the_search_finds_the_greatest_number(truth, guess):
    search = Search(50, 500, guess)
    tries = []
    while (number := search.next) is not None:
        tries.append(number)
        search.told(number, number <= truth)
    assert search.least == search.most == truth
    assert tries[0] == guess
    assert len(tries) <= 5


def test_an_answer_is_right_when_it_is_near_its_own_reference_alone():
    one = {"scores": np.array([[1.0, -2.0]], np.float32)}
    near = {"scores": one["scores"] * np.float32(1 + NEAR_PART / 2)}
    other = {"scores": one["scores"] + np.float32(0.1)}
    broken = {"scores": np.array([[1.0, np.nan]], np.float32)}
    assert [compare(each, one) for each in (one, near, other, broken, {"other": one["scores"]})] == [SAME, NEAR, WRONG, WRONG, WRONG]
    assert separation([one, other, {"scores": -one["scores"]}]) == pytest.approx(0.05)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_all_systems_answer_rightly():
    kinds = tuple(
        Kind(name, source, Slo(slo_ms * MS, 98.0), weight_bytes(source.format(1)), tokens)
        for name, source, slo_ms, tokens in (
            ("mlp", "mlp?width=256&seed={}", 2000, 0),
            ("cnn", "cnn?seed={}", 2000, 0),
            ("text", "bert-base?num_hidden_layers=2&hidden_size=128&num_attention_heads=2&intermediate_size=512&vocab_size=20000&seed={}", 5000, 32),
        )
    )
    size = functions.Size("cpu:0", kinds, functions=60, rates=(20.0, 60.0), limit_s=100, sm_percent=50, span_requests=2)
    found = gpu_functions.metrics(size, asyncio.run(functions.measure(size)))
    assert found["functions_of_mlp"].value == 20
    for system in ("sluice", "keep_alive", "on_demand"):
        assert found[f"{system}_answers"].value > 0
        assert found[f"{system}_wrong"].value == 0
        assert found[f"{system}_failed"].value == 0
    assert found["sluice_20_per_minute_kept"].value > 0
    assert found["sluice_20_per_minute_swapped_percent"].value > 30
