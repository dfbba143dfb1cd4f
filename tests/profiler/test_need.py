"""The smallest share for an objective: found on estimates whose truth is known, and never a larger one than another that would do."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from contracts.errors import InvalidValue
from profiler.need import FRONT_MS, PROOF_ARRIVALS, QUOTA_LEVELS, SM_LEVELS, Objective, need
from profiler.queueing import Server, keeps, poisson

LOADS = (poisson(), poisson(arrivals=PROOF_ARRIVALS, seed=1))


class Known:
    """A model whose law is known: `fixed_ms` and `row_ms` a row on the whole device, slower as 1 / SM share; `width` is the interval's."""

    def __init__(self, fixed_ms: float, row_ms: float, width: float = 1.0) -> None:
        self.fixed_ms = fixed_ms
        self.row_ms = row_ms
        self.width = width

    def run_ms(self, rows: float, sm: float) -> float:
        return (self.fixed_ms + self.row_ms * rows) * 100 / sm

    def predict(self, batch: Any, sm: Any, quota: Any) -> Any:
        mean = (self.fixed_ms + self.row_ms * np.asarray(batch)) * 100 / np.asarray(sm) * 100 / np.asarray(quota)
        return SimpleNamespace(mean_ms=mean, low_ms=mean / self.width, high_ms=mean * self.width)


def kept(model: Known, objective: Objective, sm: int, quota: float, batch: int) -> bool:
    service = tuple(model.run_ms(rows + 1, sm) * model.width for rows in range(batch))
    server = Server(service, tuple(ms * 100 / quota for ms in service))
    within_ms = objective.latency_ms - FRONT_MS
    return all(keeps(server, load, objective.rate_per_s, 100.0, within_ms, objective.percentile) for load in LOADS)


@pytest.mark.parametrize(("slo_ms", "rate"), [(60, 5), (200, 20), (500, 1), (40, 40)], ids=lambda value: f"{value:g}")
def test_no_smaller_share_would_do(slo_ms: float, rate: float) -> None:
    model, objective = Known(4, 1, width=1.1), Objective(slo_ms, rate)
    found = need(model, objective, max_batch=4)  # type: ignore[arg-type]
    option = found.option
    assert found.verdict == "share"
    assert option.low_ms <= option.latency_ms <= option.high_ms <= slo_ms
    assert 0 < option.utilisation < 1
    assert kept(model, objective, option.sm_percent, option.quota_percent, option.max_batch)
    smaller = [(sm, quota) for sm in SM_LEVELS for quota in QUOTA_LEVELS if sm * quota / 100 < option.area_percent - 1e-6]
    assert not [(sm, quota, batch) for sm, quota in smaller for batch in (1, 2, 4) if kept(model, objective, sm, quota, batch)]


def test_a_function_that_is_rarely_called_gets_all_sms_for_a_moment() -> None:
    """40 ms of work once in 20 s within 50 ms: nearly all SMs are needed, of their time only so much that a second request rarely meets a debt."""
    found = need(Known(39, 1), Objective(50, 0.05), max_batch=1)  # type: ignore[arg-type]
    assert found.verdict == "share"
    assert found.option.sm_percent >= 80
    assert found.option.quota_percent <= 20
    assert f"{found.option.sm_percent} % of the SMs for {found.option.quota_percent:g} % of the time" in found.reason


def test_only_the_whole_device_will_do() -> None:
    found = need(Known(9, 1), Objective(200, 88), max_batch=1)  # type: ignore[arg-type]
    assert found.verdict == "whole-device"
    assert (found.option.sm_percent, found.option.quota_percent) == (100, 100.0)
    assert found.reason.startswith("only the whole device will do")


def test_longer_batches_carry_a_rate_that_single_requests_cannot() -> None:
    alone = need(Known(9, 1), Objective(100, 200), max_batch=1)  # type: ignore[arg-type]
    together = need(Known(9, 1), Objective(100, 200), max_batch=8)  # type: ignore[arg-type]
    assert (alone.verdict, together.verdict) == ("nothing", "share")
    assert together.option.max_batch > 1
    assert together.option.mean_batch > 1


def test_a_smaller_batch_is_said_to_be_needed() -> None:
    """Four rows together take 42 ms: a burst of them, behind a batch that runs, breaks 40 ms even on the whole device."""
    found = need(Known(2, 10), Objective(40, 26), max_batch=8)  # type: ignore[arg-type]
    assert found.verdict != "nothing"
    assert found.smaller_batch
    assert found.option.max_batch < 8
    assert f"batches of at most {found.option.max_batch}, since with 8 not even the whole device would do" in found.reason


def test_a_rate_that_is_too_high_is_told_with_the_one_that_is_not() -> None:
    found = need(Known(9, 1), Objective(30, 500), max_batch=1)  # type: ignore[arg-type]
    assert found.verdict == "nothing"
    assert found.reachable_rate_per_s is not None
    assert 20 < found.reachable_rate_per_s < 100
    assert kept(Known(9, 1), Objective(30, found.reachable_rate_per_s * 0.9), 100, 100, 1)
    assert "nothing will do at 500 requests/s: the whole device keeps 30 ms up to" in found.reason


def test_an_objective_below_one_run_can_never_be_kept() -> None:
    found = need(Known(9, 1), Objective(5, 1))  # type: ignore[arg-type]
    assert (found.verdict, found.reachable_rate_per_s) == ("nothing", 0)
    assert "alone on the whole device a request takes up to 10.0 ms, the objective is 5 ms" in found.reason


def test_the_less_is_known_the_larger_the_share() -> None:
    objective = Objective(100, 20)
    areas = [need(Known(4, 1, width), objective).option.area_percent for width in (1.0, 1.3, 2.0)]  # type: ignore[arg-type]
    assert areas == sorted(areas)
    assert areas[0] < areas[-1]


def test_runs_that_vary_need_a_larger_share() -> None:
    objective = Objective(100, 20)
    steady, varying = (need(Known(4, 1), objective, tail=tail).option.area_percent for tail in (1.0, 4.0))  # type: ignore[arg-type]
    assert steady < varying


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((0, 1), "slo-ms: must be greater than 0, got 0"),
        ((10, -1), "rate: must be greater than 0, got -1"),
        ((10, 1, 100), "percentile: must lie between 0 and 100, got 100"),
    ],
    ids=["an objective of nothing", "a negative rate", "a percentile of 100"],
)
def test_an_objective_that_makes_no_sense_is_refused(arguments: tuple[float, ...], said: str) -> None:
    with pytest.raises(InvalidValue, match=said):
        Objective(*arguments)
