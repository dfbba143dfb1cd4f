"""Cutting, scaling and joining arrivals keeps what it should keep; generators give the rates that they are asked for."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from contracts.errors import InvalidValue
from contracts.units import S
from simulator.arrivals import Arrivals, joined, of_many, of_one
from simulator.generators import bursty, diurnal, poisson, popularity

SPAN = 1000 * S


def load(seed: int = 0) -> Arrivals:
    chance = np.random.default_rng(seed)
    return of_many(("a", "b", "c"), [poisson(rate, SPAN, chance) for rate in (1, 10, 3)], SPAN)


def test_a_part_of_it_begins_at_zero() -> None:
    whole = load()
    part = whole.between(100 * S, 300 * S)
    assert part.span_ns == 200 * S
    assert part.at_ns[0] >= 0
    assert part.at_ns[-1] < part.span_ns
    assert len(part) == ((whole.at_ns >= 100 * S) & (whole.at_ns < 300 * S)).sum()


@pytest.mark.parametrize(("start", "end"), [(0, 1001), (-1, 5), (5, 5), (7, 6)])
def test_what_is_no_part_of_it_is_refused(start: int, end: int) -> None:
    with pytest.raises(InvalidValue, match="from, until"):
        load().between(start * S, end * S)


@given(st.floats(0.05, 5))
def test_more_or_fewer_requests_in_the_same_time(factor: float) -> None:
    whole = load()
    scaled = whole.at_rate(factor, np.random.default_rng(1))
    assert len(scaled) == pytest.approx(factor * len(whole), abs=5 * np.sqrt(len(whole)))
    assert scaled.span_ns == whole.span_ns
    assert (np.diff(scaled.at_ns) >= 0).all()
    assert scaled.at_ns[0] >= 0
    assert scaled.at_ns[-1] < scaled.span_ns


def test_whole_factors_keep_every_request() -> None:
    whole = load()
    assert np.isin(whole.at_ns, whole.at_rate(3.0, np.random.default_rng(1)).at_ns).all()
    assert whole.at_rate(1.0, np.random.default_rng(1)).at_ns.tolist() == whole.at_ns.tolist()


def test_faster_is_the_same_in_less_time() -> None:
    fast = load().faster(10)
    assert len(fast) == len(load())
    assert fast.span_ns == SPAN // 10
    assert fast.at_ns[-1] < fast.span_ns


@pytest.mark.parametrize("factor", [0, -1, float("nan"), float("inf")])
def test_a_factor_that_is_none(factor: float) -> None:
    with pytest.raises(InvalidValue, match="rate"):
        load().at_rate(factor, np.random.default_rng(1))
    with pytest.raises(InvalidValue, match="speed"):
        load().faster(factor)


def test_the_busiest_come_first() -> None:
    two = load().busiest(2)
    assert two.names == ("b", "c")
    assert np.bincount(two.function).tolist() == np.bincount(load().function)[[1, 2]].tolist()
    assert load().busiest(1, ["only"]).names == ("only",)
    with pytest.raises(InvalidValue, match="functions"):
        load().busiest(4)


def test_joined_functions_of_one_name_are_one() -> None:
    both = joined([load(0), of_one("b", np.array([5, 3]), SPAN), of_one("d", np.array([1]), 2 * SPAN)])
    assert both.names == ("a", "b", "c", "d")
    assert len(both) == len(load(0)) + 3
    assert both.span_ns == 2 * SPAN
    assert (both.function == 1).sum() == (load(0).function == 1).sum() + 2


@pytest.mark.parametrize("generator", [poisson, bursty, diurnal])
def test_the_mean_rate(generator) -> None:  # type: ignore[no-untyped-def]
    span = 20 * 86_400 * S
    at_ns = generator(1.0, span, np.random.default_rng(3))
    assert len(at_ns) * S / span == pytest.approx(1.0, rel=0.05)
    assert (np.diff(at_ns) >= 0).all()
    assert at_ns[-1] < span
    assert generator(1.0, span, np.random.default_rng(3)).tolist() == at_ns.tolist()


def test_bursts_are_burstier_than_chance() -> None:
    def dispersion(at_ns: np.ndarray) -> float:
        counts = np.bincount(at_ns // (10 * S), minlength=1000)
        return counts.var() / counts.mean()

    chance = np.random.default_rng(4)
    assert dispersion(poisson(10, 10_000 * S, chance)) == pytest.approx(1, abs=0.2)
    assert dispersion(bursty(10, 10_000 * S, chance)) > 10


def test_the_day_has_its_peak() -> None:
    at_ns = diurnal(1.0, 10 * 86_400 * S, np.random.default_rng(5), swing=0.8, peak=0.5)
    hours = np.bincount(at_ns // S % 86_400 // 3600)
    assert hours.argmax() in (11, 12)
    assert hours.max() / hours.min() == pytest.approx(1.8 / 0.2, rel=0.3)


def test_popularity_has_a_heavy_tail() -> None:
    parts = np.sort(popularity(1000, 1.0, np.random.default_rng(6)))[::-1]
    assert parts.sum() == pytest.approx(1)
    assert parts[:100].sum() > 0.6
    assert popularity(10, 0, np.random.default_rng(6)).tolist() == pytest.approx([0.1] * 10)
