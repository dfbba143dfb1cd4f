"""Admission refuses what cannot be answered in time, and nothing else."""

import pytest

from contracts.units import MS
from predictor.admission import Estimates


def measured(*batch_ms: int) -> Estimates:
    """Estimates after batches of so many ms, one after the other, each submitted when the last was answered."""
    estimates, now_ns = Estimates(), 1000 * MS
    for took in batch_ms:
        estimates.observe(now_ns, now_ns + took * MS, took * MS)
        now_ns += took * MS
    return estimates


CASES = {
    "nothing is known: admitted": (Estimates(), 50, 100, 0),
    "there is time for all that is ahead: admitted": (measured(10, 10), 50, 70, 0),
    "one batch too many is ahead: refused until it is gone": (measured(10, 10), 50, 69, 1),
    "far too late: refused for as long as it is too late": (measured(10, 10), 500, 69, 561),
    "nothing is ahead: admitted, however slow it was": (measured(10_000), 0, 5, 0),
}


@pytest.mark.parametrize(("estimates", "rows_ahead", "left_ms", "expected_ms"), CASES.values(), ids=CASES)
def test_who_is_admitted(estimates: Estimates, rows_ahead: int, left_ms: int, expected_ms: int) -> None:
    now_ns = 10**12
    assert estimates.retry_after_ms(now_ns, now_ns + left_ms * MS, 3, rows_ahead, 8) == expected_ms


def test_batches_that_ran_side_by_side_count_by_how_often_an_answer_came() -> None:
    estimates = Estimates()
    estimates.observe(0, 100 * MS, 100 * MS)
    estimates.observe(0, 110 * MS, 100 * MS)
    assert estimates.run_ns == 100 * MS
    assert estimates.service_ns < 100 * MS


def test_an_estimate_follows_what_it_measures() -> None:
    estimates = measured(*[100] * 5, *[10] * 40)
    assert 10 * MS <= estimates.run_ns < 11 * MS


HURRY = {
    "until the SLO less the run": (100, 1000, 90),
    "until the deadline less the run, when the run alone breaks the SLO": (5, 1000, 990),
    "not at all when even the deadline is lost": (5, 8, 0),
}


@pytest.mark.parametrize(("slo_ms", "deadline_ms", "expected_ms"), HURRY.values(), ids=HURRY)
def test_how_long_a_request_may_wait_for_company(slo_ms: int, deadline_ms: int, expected_ms: int) -> None:
    assert measured(10).hurry_ns(0, slo_ms * MS, deadline_ms * MS) == expected_ms * MS
