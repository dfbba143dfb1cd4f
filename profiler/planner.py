"""Where a sweep measures next: where the estimator expects to learn most. Pure; it measures nothing and keeps nothing but what it was given."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from contracts.functions import Function
from profiler.dataset import samples_of
from profiler.device import DeviceFacts
from profiler.estimator import Estimator
from profiler.points import Config
from profiler.visits import Pooled

_INTERVAL = 2 * 1.6449
"""Standard deviations that a 90 % interval is wide."""
_MEAN_OF_NORMAL = (2 / np.pi) ** 0.5
"""Mean absolute value of a normal variable with deviation 1."""


class EstimatorPlanner:
    """Asks an estimator, trained or not, that is conditioned on what was measured so far."""

    def __init__(self, estimator: Estimator, name: str, facts: DeviceFacts, features: npt.ArrayLike | None = None) -> None:
        self._estimator = estimator
        self._name = name
        self._facts = facts
        self._features = features

    def next(self, measured: Sequence[Pooled], candidates: Sequence[Config]) -> tuple[int, float]:
        """As `profiler.sweep.Planner`. The error is that of the candidates alone: nobody asked for the rest of what the estimator covers."""
        estimate = self._estimator.condition(samples_of(self._name, self._facts, measured, features=self._features))
        columns = np.array([(config.batch, config.sm_percent, config.quota_percent) for config in candidates], dtype=np.float64).T
        found = estimate.predict(*columns)
        deviation = float(np.mean(np.log(found.high_ms / found.low_ms))) / _INTERVAL
        return estimate.next_probe(*columns), _MEAN_OF_NORMAL * deviation


def planners(estimator: Estimator, features: Callable[[Function], npt.ArrayLike | None] = lambda _: None) -> Callable[..., EstimatorPlanner]:
    """What `profiler.sweep.sweep` takes: a planner for each function, `features` giving its graph's vector, or None where it has none."""

    def planner(function: Function, facts: DeviceFacts) -> EstimatorPlanner:
        return EstimatorPlanner(estimator, function.key, facts, features(function))

    return planner
