"""Live measurements shift the estimate of each function: a pure state machine that is told the time.

Owns one number for each function: how much slower or faster than estimated it runs, in logarithms, with its uncertainty. What was measured long ago
counts less (half after `half_life_ns`), so that a correction fades when measurements cease. Reports drift when the shift is larger than chance
explains. Knows no clock and no estimator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from contracts.errors import InvalidValue
from contracts.units import S
from profiler.estimator import Prediction

HALF_LIFE_NS = 600 * S
_PRIOR_SD = 0.1
_NOISE_SD = 0.1
_DEGREES = 4.0
_MOST_SHIFT = math.log(8)
_DRIFT = math.log(1.1)
_DRIFT_SDS = 3.0


@dataclass(frozen=True, slots=True)
class Drift:
    """A function that runs `factor` times as long as estimated, surely enough to say so, after `measurements` (those that still count)."""

    function: str
    factor: float
    measurements: float


@dataclass(slots=True)
class _Shift:
    """Sums of weights and of weighted log ratios as of a time."""

    at_ns: int
    weight: float = 0.0
    total: float = 0.0


class Correction:
    """The shifts of all functions. Times are monotonic nanoseconds; one that goes back counts as no time passed."""

    def __init__(self, half_life_ns: int = HALF_LIFE_NS) -> None:
        if half_life_ns <= 0:
            raise InvalidValue("must be above 0", key="half_life_ns", value=half_life_ns)
        self._half_life_ns = half_life_ns
        self._shifts: dict[str, _Shift] = {}

    def observe(self, function: str, predicted_ms: float, measured_ms: float, now_ns: int) -> None:
        """One live measurement beside what was predicted without correction; InvalidValue when one is not finite and above 0."""
        for key, value in (("predicted_ms", predicted_ms), ("measured_ms", measured_ms)):
            if not (math.isfinite(value) and value > 0):
                raise InvalidValue(f"function {function!r}: must be finite and above 0", key=key, value=value)
        shift = self._decayed(function, now_ns)
        ratio = max(-_MOST_SHIFT, min(_MOST_SHIFT, math.log(measured_ms / predicted_ms)))
        # A single outlier (a page fault, a neighbour) counts little, a lasting change fully after some measurements.
        apart = (ratio - self._mean(shift)) ** 2 / self._variance(shift)
        weight = (_DEGREES + 1) / (_DEGREES + apart)
        shift.weight += weight
        shift.total += weight * ratio
        self._shifts[function] = shift

    def forget(self, function: str) -> None:
        """After a new model or a new estimate; unknown functions are no error."""
        self._shifts.pop(function, None)

    def factor(self, function: str, now_ns: int) -> float:
        """By what its estimates are to be multiplied; 1 for a function without measurements."""
        return math.exp(self._mean(self._decayed(function, now_ns)))

    def apply(self, function: str, prediction: Prediction, now_ns: int) -> Prediction:
        """The corrected prediction; its interval moves with it and never grows narrower. Order along SM and quota stays."""
        factor = self.factor(function, now_ns)
        return Prediction(prediction.mean_ms * factor, prediction.low_ms * factor, prediction.high_ms * factor)

    def drift(self, now_ns: int) -> list[Drift]:
        """Functions whose shift is beyond 10 % and beyond three of its standard deviations, the largest first: measure these again."""
        found = []
        for function in self._shifts:
            shift = self._decayed(function, now_ns)
            mean = self._mean(shift)
            if abs(mean) > max(_DRIFT, _DRIFT_SDS * _NOISE_SD / math.sqrt(max(shift.weight, 1e-9))):
                found.append(Drift(function, math.exp(mean), shift.weight))
        return sorted(found, key=lambda drift: -abs(math.log(drift.factor)))

    def _decayed(self, function: str, now_ns: int) -> _Shift:
        shift = self._shifts.get(function, _Shift(now_ns))
        kept = 0.5 ** (max(now_ns - shift.at_ns, 0) / self._half_life_ns)
        return _Shift(max(now_ns, shift.at_ns), shift.weight * kept, shift.total * kept)

    @staticmethod
    def _mean(shift: _Shift) -> float:
        """Shrunk towards no shift by what one expects of estimates in general."""
        return shift.total / (shift.weight + (_NOISE_SD / _PRIOR_SD) ** 2)

    @staticmethod
    def _variance(shift: _Shift) -> float:
        return _NOISE_SD**2 + _NOISE_SD**2 / (shift.weight + (_NOISE_SD / _PRIOR_SD) ** 2)
