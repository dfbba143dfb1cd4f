"""The lattice of configurations (batch x SM x quota): where estimates are kept, and how they are read between its points.

It owns interpolation (linear in the logarithms), what is said outside the measured range, and the projection on what is possible: more SMs or
more quota never make a model slower. It knows nothing of latencies' origin.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import numpy.typing as npt
from scipy.optimize import isotonic_regression

from contracts.errors import InvalidValue

Array = npt.NDArray[np.float64]
Indices = npt.NDArray[np.intp]
_MAX_LEVELS = (10, 24, 16)
_DOMAIN = (np.array([1.0, 2, 4, 8, 16, 32]), np.array([2.0, 5, 10, 15, 20, 30, 40, 50, 60, 80, 100]), np.array([1.0, 5, 10, 20, 30, 40, 60, 80, 100]))
_PROJECTIONS = 25
_NAMES = ("batch", "sm_percent", "quota_percent")
_LIMITS = (1e6, 100.0, 100.0)


def points(batch: npt.ArrayLike, sm_percent: npt.ArrayLike, quota_percent: npt.ArrayLike) -> Array:
    """Configurations as rows (n, 3): batch, SM and quota in percent; scalars are repeated. InvalidValue names what is no share and no batch."""
    try:
        columns = np.broadcast_arrays(*(np.atleast_1d(np.asarray(value, dtype=np.float64)) for value in (batch, sm_percent, quota_percent)))
    except (TypeError, ValueError) as error:
        raise InvalidValue(f"batch, sm_percent and quota_percent must be numbers of one length: {error}") from None
    for name, column, limit in zip(_NAMES, columns, _LIMITS, strict=True):
        least = 1.0 if name == "batch" else 0.0
        wrong = ~np.isfinite(column) | (column > limit) | ((column < least) if least else (column <= 0))
        if wrong.any():
            raise InvalidValue(f"must be finite, {'at least 1' if least else 'above 0 and at most 100'}", key=name, value=float(column[wrong][0]))
    return np.stack(columns, axis=-1)


@dataclass(frozen=True, slots=True)
class Lattice:
    """Levels of batch, SM and quota, each ascending; the points are their product, the quota running fastest."""

    batch: Array
    sm_percent: Array
    quota_percent: Array

    @classmethod
    def over(cls, measured: Sequence[Array]) -> Lattice:
        """The levels that were measured (each (n, 3), see `points`), thinned where there are many; a coarse view of the whole domain when none were.

        The whole device and all of the time (100 %) always belong to it.
        """
        if not measured:
            return cls(*_DOMAIN)
        rows = np.concatenate(list(measured))
        found = [_thinned(np.unique(rows[:, axis]), limit) for axis, limit in enumerate(_MAX_LEVELS)]
        return cls(np.union1d(found[0], [1.0]), np.union1d(found[1], [100.0]), np.union1d(found[2], [100.0]))

    @property
    def axes(self) -> tuple[Array, Array, Array]:
        """The three levels."""
        return self.batch, self.sm_percent, self.quota_percent

    @property
    def shape(self) -> tuple[int, int, int]:
        """Numbers of levels."""
        return len(self.batch), len(self.sm_percent), len(self.quota_percent)

    def rows(self) -> Array:
        """All points (n, 3) in the lattice's order."""
        return np.stack([axis.ravel() for axis in np.meshgrid(*self.axes, indexing="ij")], axis=-1)

    def corners(self, rows: Array, axis: int) -> tuple[Indices, Indices, Array]:
        """The levels around the rows along one axis, and how far (0 to 1) each row lies from the lower to the upper; clamped at the ends."""
        levels, at = np.log(self.axes[axis]), np.log(rows[:, axis])
        upper = np.clip(np.searchsorted(levels, at), min(1, len(levels) - 1), len(levels) - 1)
        lower = np.maximum(upper - 1, 0)
        part = (at - levels[lower]) / np.where(upper > lower, levels[upper] - levels[lower], 1.0)
        return lower, upper, np.clip(part, 0.0, 1.0)

    def weights(self, rows: Array, axis: int) -> Array:
        """Interpolation weights (n, levels) of the rows along one axis; clamped at its ends."""
        lower, upper, part = self.corners(rows, axis)
        found = np.zeros((len(rows), len(self.axes[axis])))
        index = np.arange(len(rows))
        found[index, lower] = 1 - part
        found[index, upper] += part
        return found

    def beyond(self, rows: Array) -> Array:
        """What lies outside the lattice (n,), as an addition to the logarithm of the latency: time grows as 1 / share and as the batch."""
        batch, sm, quota = (np.log(rows[:, axis]) for axis in range(3))
        outside = np.maximum(np.log(self.sm_percent[0]) - sm, 0.0) + np.maximum(np.log(self.quota_percent[0]) - quota, 0.0)
        return np.asarray(outside + np.maximum(batch - np.log(self.batch[-1]), 0.0), dtype=np.float64)

    def read(self, values: Array, rows: Array) -> Array:
        """Values (k, *shape) at the rows: (k, n). Linear along each axis, so it keeps the order that the lattice has."""
        found = np.zeros((len(values), len(rows)))
        sides = []
        for axis in range(3):
            lower, upper, part = self.corners(rows, axis)
            sides.append(((lower, 1 - part), (upper, part)))
        for (batch, near), (sm, nearer), (quota, nearest) in product(*sides):
            found += values[:, batch, sm, quota] * (near * nearer * nearest)
        return found


def monotone(values: Array) -> Array:
    """The nearest values (batch, SM, quota), in least squares, that are non-increasing along SM and quota.

    Dykstra's alternating projections on the two orders (each an isotonic regression); what the last round leaves is evened out exactly, half way
    between the least majorant and the greatest minorant.
    """
    found = np.stack([_nearest(plane) for plane in values])
    above = np.maximum.accumulate(np.maximum.accumulate(found[:, ::-1, ::-1], axis=1), axis=2)[:, ::-1, ::-1]
    below = np.minimum.accumulate(np.minimum.accumulate(found, axis=1), axis=2)
    return np.asarray((above + below) / 2, dtype=np.float64)


def _nearest(plane: Array) -> Array:
    found, by_sm, by_quota = plane, np.zeros_like(plane), np.zeros_like(plane)
    for _ in range(_PROJECTIONS):
        if (np.diff(found, axis=0) <= 0).all() and (np.diff(found, axis=1) <= 0).all():
            break
        first = np.stack([_falling(line) for line in (found + by_sm).T], axis=1)
        by_sm = found + by_sm - first
        found = np.stack([_falling(line) for line in first + by_quota])
        by_quota = first + by_quota - found
    return found


def _falling(line: Array) -> Array:
    return np.asarray(isotonic_regression(line, increasing=False).x, dtype=np.float64)


def _thinned(levels: Array, limit: int) -> Array:
    if len(levels) <= limit:
        return levels
    return np.asarray(levels[np.linspace(0, len(levels) - 1, limit).round().astype(int)], dtype=np.float64)


def log_distance(levels: Array) -> Array:
    """Pairwise differences of the logarithms (n, n)."""
    log = np.log(levels)
    return np.asarray(log[:, None] - log[None, :], dtype=np.float64)
