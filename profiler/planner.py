"""Where a sweep measures next: where the estimator expects to learn most. Pure; it measures nothing and keeps nothing but what it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from contracts.functions import Function
from profiler.dataset import samples_of
from profiler.device import DeviceFacts
from profiler.estimator import Estimator
from profiler.points import Config, Point


class EstimatorPlanner:
    """Asks an estimator, trained or not, that is conditioned on what was measured so far."""

    def __init__(self, estimator: Estimator, name: str, facts: DeviceFacts, features: npt.ArrayLike | None = None) -> None:
        self._estimator = estimator
        self._name = name
        self._facts = facts
        self._features = features

    def next(self, measured: Sequence[Point], candidates: Sequence[Config]) -> tuple[int, float]:
        """As `profiler.sweep.Planner`."""
        estimate = self._estimator.condition(samples_of(self._name, self._facts, measured, features=self._features))
        rows = np.array([(config.batch, config.sm_percent, config.quota_percent) for config in candidates], dtype=np.float64)
        return estimate.next_probe(rows[:, 0], rows[:, 1], rows[:, 2]), estimate.expected_error()


def planners(estimator: Estimator, features: Callable[[Function], npt.ArrayLike | None] = lambda _: None) -> Callable[..., EstimatorPlanner]:
    """What `profiler.sweep.sweep` takes: a planner for each function, `features` giving its graph's vector, or None where it has none."""

    def planner(function: Function, facts: DeviceFacts) -> EstimatorPlanner:
        return EstimatorPlanner(estimator, function.key, facts, features(function))

    return planner
