"""Latencies that were measured: what `sluice profile` knows of a function, as run times of the simulated world.

Owns which column of a profile is the time on the SMs, and how batches differ from each other. Measures nothing.

A row's `gpu_ms` is what a batch was charged, whatever the quota made it wait for; `service_*` adds the way to the lane and back, the same for every
batch of a row. So the mean is `gpu_ms`, and the spread is that of `service_*` around its own mean.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, TypeVar

import numpy as np

from contracts.errors import InvalidArtifact, InvalidValue, SluiceError
from profiler import points as tables
from profiler import profiles
from profiler.dataset import device_key
from profiler.estimator import Estimator, ModelEstimate, ModelSamples
from profiler.points import Point, Points
from profiler.profiles import Profile
from simulator.latency import Latency, Table, Varying

T = TypeVar("T")
Level = Literal["mean", "low", "high"]

_ENOUGH_FOR_A_SPREAD = 20
_DRAWS = 1000
_WHOLE_QUOTA = 100.0


class Estimated:
    """What an estimator says of a model at a full quota: its middle, or an end of the 90 % interval."""

    def __init__(self, estimate: ModelEstimate, level: Level = "mean") -> None:
        self._estimate = estimate
        self._level = level

    def run_ms(self, rows: int, sm_percent: int) -> float:
        """`Latency`."""
        found = self._estimate.predict([rows], [sm_percent], [_WHOLE_QUOTA])
        return float({"mean": found.mean_ms, "low": found.low_ms, "high": found.high_ms}[self._level][0])


class Scaled:
    """A latency in another place: `times` as long."""

    def __init__(self, latency: Latency, times: float) -> None:
        self._latency = latency
        self._times = times

    def run_ms(self, rows: int, sm_percent: int) -> float:
        """`Latency`."""
        return self._times * self._latency.run_ms(rows, sm_percent)

    def factors(self, rows: int, sm_percent: int) -> Sequence[float]:
        """`Varying`."""
        return self._latency.factors(rows, sm_percent) if isinstance(self._latency, Varying) else ()


class Measured:
    """Means from one latency, and the spread of the measured point that is nearest."""

    def __init__(self, mean: Latency, points: Sequence[Point]) -> None:
        self._mean = mean
        self._spreads = {(point.batch, point.sm_percent): factors_of(point) for point in points if point.samples >= _ENOUGH_FOR_A_SPREAD}

    def run_ms(self, rows: int, sm_percent: int) -> float:
        """`Latency`."""
        return self._mean.run_ms(rows, sm_percent)

    def factors(self, rows: int, sm_percent: int) -> Sequence[float]:
        """`Varying`."""
        if not self._spreads:
            return ()
        return self._spreads[min(self._spreads, key=lambda at: abs(math.log(at[0] / rows)) + abs(math.log(at[1] / sm_percent)))]


def factors_of(point: Point) -> tuple[float, ...]:
    """What a point's batches took over their mean, as equally likely values with the mean 1.

    Time grows in a straight line between the percentiles. The least is not measured: it is the one that makes the mean right, or half the median.
    """
    p50, p95, p99 = (
        max(point.gpu_ms / 2, point.gpu_ms + at - point.service_mean_ms) for at in (point.service_p50_ms, point.service_p95_ms, point.service_p99_ms)
    )
    above = 0.45 * (p50 + p95) / 2 + 0.04 * (p95 + p99) / 2 + 0.01 * p99
    least = min(p50, max(p50 / 2, 4 * (point.gpu_ms - above) - p50))
    drawn = np.interp((np.arange(_DRAWS) + 0.5) / _DRAWS, (0, 0.5, 0.95, 0.99, 1), (least, p50, p95, p99, p99))
    return tuple((drawn / drawn.mean()).tolist())


class Profiles:
    """A table of measurements (`sluice profile sweep`), and, if it is named, what was learnt from many (`sluice profile fit`)."""

    def __init__(self, table: Path, estimator: Path | None = None) -> None:
        """Reads both; InvalidArtifact names the file that is missing, torn or foreign."""
        self._path = table
        self._table: Points = _read("profile", table, tables.read)
        self._estimator = None if estimator is None else _read("estimator", estimator, Estimator.load)

    @property
    def functions(self) -> tuple[str, ...]:
        """The functions that were measured."""
        return self._table.functions

    def latency(self, function: str, device: str | None = None, level: Level = "mean") -> Measured:
        """A function's (name, or namespace/name) on a device, which must be named only when it was measured on several.

        Without an estimator what was measured stands as it is, and what the sweep left out between is filled in by physics. InvalidValue or NotFound
        lists what there is.
        """
        found = profiles.profile(self._table, Estimator(), function, device)
        chosen = _at_most_quota(found.points)
        estimated = Estimated(self._estimate(found, chosen), level)
        return Measured(estimated if self._estimator is not None or level != "mean" else _filled(chosen, estimated), list(chosen.values()))

    def _estimate(self, profile: Profile, chosen: Mapping[tuple[int, int], Point]) -> ModelEstimate:
        """Conditioned on GPU times, which cost no quota."""
        device = device_key(profile.facts)
        if self._estimator is not None and device not in self._estimator.beliefs:
            known = ", ".join(self._estimator.beliefs) or "none"
            raise InvalidValue(f"the estimator has learnt nothing of the device that {self._path} was measured on (it knows: {known})", value=device)
        batch, sm_percent = zip(*chosen, strict=True)
        times = [point.gpu_ms for point in chosen.values()]
        samples = ModelSamples(profile.function, device, batch, sm_percent, [_WHOLE_QUOTA] * len(chosen), times)
        return (self._estimator or Estimator()).condition(samples)


def _at_most_quota(points: Sequence[Point]) -> dict[tuple[int, int], Point]:
    """For each (batch, SM percent) the point that waited least for its quota."""
    return {(point.batch, point.sm_percent): point for point in sorted(points, key=lambda point: point.quota_percent)}


def _filled(points: Mapping[tuple[int, int], Point], estimated: Latency) -> Table:
    """A full grid."""
    rows, percents = {rows for rows, _ in points}, {sm for _, sm in points}
    return Table({(r, sm): points[r, sm].gpu_ms if (r, sm) in points else estimated.run_ms(r, sm) for r in rows for sm in percents})


def _read(key: str, path: Path, reader: Callable[[Path], T]) -> T:
    try:
        return reader(path)
    except (OSError, SluiceError) as error:
        raise InvalidArtifact(f"cannot be used ({error})", key=key, value=str(path)) from None
