import math

import numpy as np
import pytest

from contracts.errors import InvalidValue
from contracts.units import S
from profiler.correction import Correction
from profiler.estimator import Prediction


def run(correction: Correction, ratios, start_ns: int = 0, step_ns: int = S, function: str = "f") -> int:
    now = start_ns
    for ratio in ratios:
        now += step_ns
        correction.observe(function, 10.0, 10.0 * ratio, now)
    return now


def test_a_function_without_measurements_is_left_alone():
    assert Correction().factor("f", 0) == 1.0
    assert Correction().drift(0) == []


def test_a_lasting_change_is_followed():
    correction = Correction()
    now = run(correction, [1.5] * 40)
    assert correction.factor("f", now) == pytest.approx(1.5, rel=0.03)


def test_what_is_learnt_fades_when_measurements_cease():
    correction = Correction(half_life_ns=60 * S)
    now = run(correction, [1.5] * 40)
    factors = [correction.factor("f", now + later * 60 * S) for later in (0, 2, 5, 10, 30)]
    assert factors == sorted(factors, reverse=True)
    assert factors[-1] == pytest.approx(1.0, abs=1e-6)


def test_a_newer_change_wins_over_an_older_one():
    correction = Correction(half_life_ns=30 * S)
    now = run(correction, [1.5] * 100)
    now = run(correction, [0.8] * 300, start_ns=now)
    assert correction.factor("f", now) == pytest.approx(0.8, rel=0.03)


def test_one_outlier_hardly_counts():
    correction = Correction()
    now = run(correction, [1.0] * 20 + [30.0])
    assert correction.factor("f", now) == pytest.approx(1.0, abs=0.03)


def test_functions_are_apart_and_can_be_forgotten():
    correction = Correction()
    now = run(correction, [2.0] * 40, function="a")
    assert correction.factor("b", now) == 1.0
    correction.forget("a")
    correction.forget("never seen")
    assert correction.factor("a", now) == 1.0


def test_drift_is_reported_largest_first_and_not_for_noise():
    correction = Correction()
    random = np.random.default_rng(3)
    run(correction, np.exp(random.normal(0, 0.05, 200)), function="steady")
    run(correction, [1.3] * 60, function="slower")
    now = run(correction, [0.5] * 60, function="faster")
    found = correction.drift(now)
    assert [drift.function for drift in found] == ["faster", "slower"]
    assert found[0].factor == pytest.approx(0.5, rel=0.05)


def test_few_measurements_are_no_drift():
    correction = Correction()
    now = run(correction, [1.2] * 2)
    assert correction.drift(now) == []


def test_a_clock_that_goes_back_changes_nothing_but_the_sum():
    correction = Correction()
    run(correction, [1.5] * 10, start_ns=100 * S)
    correction.observe("f", 10.0, 15.0, 5 * S)
    assert 1.3 < correction.factor("f", 110 * S) < 1.5


def test_predictions_and_intervals_move_together_and_stay_ordered():
    correction = Correction()
    now = run(correction, [1.5] * 200)
    found = correction.apply("f", Prediction(np.array([10.0, 5.0]), np.array([8.0, 4.0]), np.array([12.0, 6.0])), now)
    factor = correction.factor("f", now)
    np.testing.assert_allclose(found.mean_ms, [10 * factor, 5 * factor])
    assert (found.low_ms < found.mean_ms).all()
    assert (found.mean_ms < found.high_ms).all()


@pytest.mark.parametrize("wrong", [0.0, -1.0, math.nan, math.inf])
def test_impossible_latencies_are_refused(wrong):
    correction = Correction()
    with pytest.raises(InvalidValue, match=r"'f'.*finite"):
        correction.observe("f", 10.0, wrong, 0)
    with pytest.raises(InvalidValue, match=r"'f'.*finite"):
        correction.observe("f", wrong, 10.0, 0)
    with pytest.raises(InvalidValue, match="half_life_ns"):
        Correction(half_life_ns=0)
