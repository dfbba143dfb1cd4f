"""The law of a model's latency under a share, and what measurements say about its unknowns.

    log latency = smooth maximum of (device(batch, SM) + stretch(quota)) and host(quota)

Either the device is the bottleneck, and its time depends on batch and SM (and on the quota as far as the token policy counts device time), or
the host that launches kernels is, and its time depends on the quota alone (as far as launches are gated). The unknowns are the values of the
three curves on a lattice; they have a Gaussian prior, and conditioning is a few Gauss-Newton steps (Laplace's approximation) with Student-t
weights against outliers. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from profiler.lattice import Array, Lattice, log_distance

_SHARPNESS = 0.05
_DEGREES = 4.0
_STEPS = 14
_LONGEST_STEP = 1.5
_JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class Belief:
    """A Gaussian over the unknowns of the law on a lattice, and the spread of one measurement, in logarithms.

    `mean` (u,) and `covariance` (u, u): device values (batch x SM, SM fastest), then stretch and host (quota levels each).
    """

    lattice: Lattice
    mean: Array
    covariance: Array
    device_noise: float
    host_noise: float


def untrained(lattice: Lattice) -> Belief:
    """What physics alone says: device time = work x batch / SM above a floor, host time = 1 / quota, their levels nearly unknown."""
    batch, sm, quota = lattice.axes
    nb, ns, nq = lattice.shape
    nd = nb * ns
    log_batch, log_sm, log_quota = np.log(batch), np.log(sm / 100), np.log(quota / 100)
    mean = np.concatenate([np.maximum(0.7 * (log_batch[:, None] - log_sm[None, :]), 0.0).ravel(), -0.5 * log_quota, -1.0 - log_quota])
    covariance = np.zeros((len(mean), len(mean)))
    smooth = np.kron(_rbf(batch, 1.0), _rbf(sm, 0.7))
    by_batch = np.kron(np.outer(log_batch, log_batch), np.ones((ns, ns)))
    by_sm = np.kron(np.ones((nb, nb)), np.outer(log_sm, log_sm))
    covariance[:nd, :nd] = 9.0 + 0.1 * by_batch + 0.1 * by_sm + 0.1 * smooth
    stretch, host = slice(nd, nd + nq), slice(nd + nq, nd + 2 * nq)
    covariance[stretch, stretch] = np.outer(log_quota, log_quota) * (0.25 + 0.02 * _rbf(quota, 0.5))
    covariance[host, host] = 1.0 + 0.3 * np.outer(log_quota, log_quota) + 0.05 * _rbf(quota, 0.5)
    # The host's level is believed to follow the device's: both levels move together until a measurement tells them apart.
    covariance[:nd, host] += 9.0
    covariance[host, :nd] += 9.0
    covariance[host, host] += 9.0
    return Belief(lattice, mean, covariance + _JITTER * np.eye(len(mean)), 0.03, 0.05)


def design(lattice: Lattice, rows: Array) -> tuple[Array, Array]:
    """Linear maps (n, u) from the unknowns to the logarithms of device time and of host time at the rows."""
    batch, sm, quota = (lattice.weights(rows, axis) for axis in range(3))
    device = (batch[:, :, None] * sm[:, None, :]).reshape(len(rows), -1)
    none = np.zeros_like(quota)
    return np.hstack([device, quota, none]), np.hstack([np.zeros_like(device), none, quota])


def evaluate(unknowns: Array, maps: tuple[Array, Array]) -> tuple[Array, Array, Array]:
    """(log latency, the part of it that the device decides, the derivative by the unknowns (n, u)) at the rows of `design`."""
    device, host = maps[0] @ unknowns, maps[1] @ unknowns
    value = _SHARPNESS * np.logaddexp(device / _SHARPNESS, host / _SHARPNESS)
    part = np.exp((device - value) / _SHARPNESS)
    return value, part, part[:, None] * maps[0] + (1 - part)[:, None] * maps[1]


def condition(prior: Belief, rows: Array, log_latency: Array) -> Belief:
    """The belief after measurements at the rows (n, 3); with none, the prior."""
    if not len(rows):
        return prior
    maps = design(prior.lattice, rows)
    unknowns, covariance = prior.mean, prior.covariance
    target = log_latency - prior.lattice.beyond(rows)
    for step in range(_STEPS):
        value, part, slope = evaluate(unknowns, maps)
        noise = part * prior.device_noise**2 + (1 - part) * prior.host_noise**2
        if step > 2:
            noise *= (_DEGREES + (target - value) ** 2 / noise) / (_DEGREES + 1)
        spread = prior.covariance @ slope.T
        gain = np.linalg.solve(slope @ spread + np.diag(noise), spread.T).T
        change = prior.mean + gain @ (target - value + slope @ (unknowns - prior.mean)) - unknowns
        longest = float(np.abs(change).max())
        unknowns = unknowns + change * min(1.0, _LONGEST_STEP / max(longest, 1e-12))
        covariance = prior.covariance - gain @ spread.T
        if longest < 1e-4 and step > 4:
            break
    return Belief(prior.lattice, unknowns, (covariance + covariance.T) / 2, prior.device_noise, prior.host_noise)


def _rbf(levels: Array, length: float) -> Array:
    return np.asarray(np.exp(-0.5 * (log_distance(levels) / length) ** 2), dtype=np.float64)
