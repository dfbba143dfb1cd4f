"""A function's profile: what was measured of it on one device, and what follows for every share.

Owns the choice of points and estimator for a function, and its estimate on a grid for people and machines. Measures nothing.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from contracts.errors import InvalidValue, NotFound
from profiler import points as tables
from profiler.dataset import samples_of
from profiler.device import DeviceFacts
from profiler.estimator import Estimator, ModelEstimate
from profiler.lattice import Array
from profiler.points import Points
from profiler.visits import Pooled, pooled, quietest

_ENOUGH_FOR_A_TAIL = 50


@dataclass(frozen=True, slots=True)
class Grid:
    """Estimates over batch x SM x quota, in ms: arrays of that shape, the levels ascending."""

    batches: tuple[int, ...]
    sm_percents: tuple[int, ...]
    quota_percents: tuple[float, ...]
    mean_ms: Array
    low_ms: Array
    high_ms: Array


@dataclass(frozen=True, slots=True)
class Profile:
    """What is known of one function on one device. `points` are of one model: the one that was measured last under this name."""

    function: str
    device: str
    facts: DeviceFacts
    points: tuple[Pooled, ...]
    estimate: ModelEstimate

    @property
    def tail(self) -> float:
        """The 99th percentile of a run's time over its mean, for `profiler.need`; points with few samples do not know it."""
        sampled = [point for point in self.points if point.samples >= _ENOUGH_FOR_A_TAIL] or self.points
        return max(1.0, statistics.median(point.service_p99_ms / point.service_mean_ms for point in sampled))

    def grid(self, batches: Sequence[int] = (), sm_percents: Sequence[int] = (), quota_percents: Sequence[float] = ()) -> Grid:
        """Estimates at these levels, or at those that were measured."""
        levels = (
            tuple(batches) or tuple(sorted({point.batch for point in self.points})),
            tuple(sm_percents) or tuple(sorted({point.sm_percent for point in self.points})),
            tuple(quota_percents) or tuple(sorted({point.quota_percent for point in self.points})),
        )
        axes = np.meshgrid(*levels, indexing="ij")
        found = self.estimate.predict(*(axis.ravel() for axis in axes))
        return Grid(*levels, *(values.reshape(axes[0].shape) for values in (found.mean_ms, found.low_ms, found.high_ms)))


def profile(table: Points, estimator: Estimator, function: str, device: str | None = None) -> Profile:
    """The profile of a function (name, or namespace/name) on a device, which may be left out when the table has only one of this function's.

    NotFound lists what there is. Points measured beside load count only for configurations that have no others.
    """
    known = table.functions
    keys = [key for key in known if function in (key, key.partition("/")[2])]
    if not keys:
        raise NotFound(
            f"no measurements of {function!r} (there are: {', '.join(known) or 'none'}): measure it with `sluice profile sweep {function}`"
        )
    if len(keys) > 1:
        raise InvalidValue(f"is not unique: write one of {', '.join(keys)}", key="function", value=function)
    points = [point for point in table.points if point.function == keys[0]]
    devices = sorted({point.device for point in points})
    if device is None and len(devices) > 1:
        raise InvalidValue(f"{keys[0]} was measured on several devices: name one of {', '.join(devices)} with --device")
    chosen = device or devices[0]
    if chosen not in devices:
        raise NotFound(f"no measurements of {keys[0]} on {chosen!r} (there are: {', '.join(devices)})")
    points = [point for point in points if point.device == chosen]
    newest = max(points, key=lambda point: point.started_at)
    points = [point for point in points if point.model_digest == newest.model_digest]
    visited = pooled(quietest(points))
    facts = table.header.devices[chosen]
    return Profile(keys[0], chosen, facts, visited, estimator.condition(samples_of(keys[0], facts, visited)))


def load(table: Path, estimator: Path | None, function: str, device: str | None = None) -> Profile:
    """`profile` from files; without an estimator, physics and the probes alone speak."""
    return profile(tables.read(table), Estimator() if estimator is None else Estimator.load(estimator), function, device)
