"""The law of a model's latency under a share, and what measurements say about its unknowns.

    log latency = smooth maximum of device(batch, SM) + stretch(quota) and host(batch, quota) + session(batch, SM, quota)

Either the device is the bottleneck, and its time depends on batch and SM (and on the quota as far as the token policy counts device time), or
the host that launches kernels is, and its time depends on the quota (as far as launches are gated) and on the process that was measured:
`session` is what differs from one such process to the next. The unknowns are the values of these curves on a lattice. They have a Gaussian
prior; conditioning is Gauss-Newton (Laplace's approximation) with Student-t weights against outliers. No I/O.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from profiler.lattice import Array, Lattice, log_distance

_SHARPNESS = (0.4, 0.2, 0.1, 0.05)
"""Of the maximum, step by step, in logarithms: begun blunt, so that a wrong guess of the bottleneck can still be left."""
_DEGREES = 4.0
_STEPS = 25
_LONGEST_STEP = 1.5
_JITTER = 1e-6
_LEVEL_SD = 3.0
_AROUND, _AROUND_SD = 0.05, 0.15
"""Of a node that charges device time: what the host adds to the device's time, in logarithms."""
_GAPS_SD = 0.1
"""How much slower a device is that idles between batches."""
_BENT_SD = 0.17
"""How far the device's time bends away from powers of batch and share."""
_NOISES = (0.01, 0.02, 0.03, 0.045, 0.065, 0.1, 0.15, 0.22, 0.33)
_NOISE, _NOISE_WIDTH = 0.05, 1.0
"""Spreads of one measurement that are weighed, and how they are spread themselves, lognormal: its middle and its width."""
_OF_NORMAL = 1.25
"""Standard deviation of a normal distribution over the scale of the Student's t that fits it, roughly, at these degrees of freedom."""


@dataclass(frozen=True, slots=True)
class Session:
    """Covariance of the session term: a standard deviation and correlations along batch, SM and quota, whose product it is."""

    sd: float
    batch: Array
    sm: Array
    quota: Array

    def covariance(self, left: Points, right: Points) -> Array:
        """Between two sets of points (n, m)."""
        found = left.batch @ self.batch @ right.batch.T
        found *= left.sm @ self.sm @ right.sm.T
        found *= left.quota @ self.quota @ right.quota.T
        return np.asarray(self.sd**2 * found, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Belief:
    """A Gaussian over the law's unknowns on a lattice, and the spread of one measurement (standard deviations of logarithms).

    `mean` (u,) and `covariance` (u, u): device values (batch x SM, SM fastest), stretch (quota), host (batch x quota, quota fastest).
    `caution` multiplies the unknowns' standard deviation in intervals, so that these hold what they promise. `charged`: the host's values are not
    its time but what it adds to the device's, in logarithms (see `charging`).
    """

    lattice: Lattice
    mean: Array
    covariance: Array
    session: Session
    device_noise: float
    host_noise: float
    caution: float = 1.0
    charged: bool = False


@dataclass(frozen=True, slots=True)
class Points:
    """Configurations as interpolation weights on the lattice's levels, (n, levels) each, and what lies beyond the lattice (n,)."""

    batch: Array
    sm: Array
    quota: Array
    beyond: Array

    @classmethod
    def at(cls, lattice: Lattice, rows: Array) -> Points:
        """The rows (n, 3) of `lattice.points`."""
        batch, sm, quota = (lattice.weights(rows, axis) for axis in range(3))
        return cls(batch, sm, quota, lattice.beyond(rows))

    def device(self) -> Array:
        """Map (n, u) from the unknowns to the logarithm of the device's time."""
        time = (self.batch[:, :, None] * self.sm[:, None, :]).reshape(len(self.beyond), -1)
        return np.hstack([time, self.quota, np.zeros((len(time), self.batch.shape[1] * self.quota.shape[1]))])

    def host(self, charged: bool = False) -> Array:
        """Map (n, u) from the unknowns to the logarithm of the host's time, without the session's part."""
        time = (self.batch[:, :, None] * self.quota[:, None, :]).reshape(len(self.beyond), -1)
        device = (self.batch[:, :, None] * self.sm[:, None, :]).reshape(len(self.beyond), -1)
        return np.hstack([device if charged else np.zeros_like(device), np.zeros_like(self.quota), time])

    def maps(self, prior: Belief) -> tuple[Array, Array]:
        """Both maps, as this belief has them."""
        return self.device(), self.host(prior.charged)

    def lattice(self) -> Array:
        """Map (n, points of the lattice) from values on the lattice to values here."""
        return np.asarray(np.einsum("nb,ns,nq->nbsq", self.batch, self.sm, self.quota).reshape(len(self.beyond), -1), dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Blend:
    """The law at some points: log latency, the part that the device decides, and the derivative by the unknowns (n, u)."""

    value: Array
    part: Array
    slope: Array

    @classmethod
    def of(cls, device: Array, host: Array, maps: tuple[Array, Array], sharpness: float = _SHARPNESS[-1]) -> Blend:
        """From the logarithms of device and host time (n,) and the two maps."""
        value = sharpness * np.logaddexp(device / sharpness, host / sharpness)
        part = np.exp((device - value) / sharpness)
        return cls(value, part, part[:, None] * maps[0] + (1 - part)[:, None] * maps[1])

    def noise(self, belief: Belief) -> Array:
        """Variances (n,) of single measurements."""
        return np.asarray(self.part * belief.device_noise**2 + (1 - self.part) * belief.host_noise**2, dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Posterior:
    """What measurements say at all points of the lattice: log latency (n,), its covariance (n, n), a measurement's variance (n,)."""

    value: Array
    covariance: Array
    noise: Array


def untrained(lattice: Lattice) -> Belief:
    """What physics alone says: device time = work x batch / SM above a floor, host time = 1 / quota, their common level nearly unknown."""
    batch, sm, quota = lattice.axes
    nb, _, _ = lattice.shape
    log_batch, log_sm, log_quota = np.log(batch), np.log(sm / 100), np.log(quota / 100)
    device, stretch, host = parts(lattice)
    mean = np.concatenate([np.maximum(0.7 * (log_batch[:, None] - log_sm), 0.0).ravel(), -0.5 * log_quota, np.tile(-1.0 - log_quota, nb)])
    covariance = np.zeros((len(mean), len(mean)))
    covariance[device, device] = _slopes(lattice) + 0.1 * np.kron(_rbf(batch, 1.0), _rbf(sm, 0.7)) + 0.002 * np.kron(_rbf(batch, 0.5), _rbf(sm, 0.2))
    covariance[stretch, stretch] = np.outer(log_quota, log_quota) * (0.25 + 0.02 * _rbf(quota, 0.5))
    common = 1.0 + 0.3 * np.outer(log_quota, log_quota) + 0.05 * _rbf(quota, 0.5)
    covariance[host, host] = np.kron(np.ones((nb, nb)), common) + np.kron(np.eye(nb), 0.02 + 0.01 * _rbf(quota, 0.5))
    level = np.ones(len(mean))
    level[stretch] = 0.0
    covariance += _LEVEL_SD**2 * np.outer(level, level) + _JITTER * np.eye(len(mean))
    session = Session(0.05, 0.5 + 0.5 * _rbf(batch, 0.5), _rbf(sm, 0.5), _rbf(quota, 0.5))
    return Belief(lattice, mean, covariance, session, device_noise=0.03, host_noise=0.04)


def charging(lattice: Lattice) -> Belief:
    """What physics says of a node that charges device time to the quota, as Sluice's does, where batches follow each other.

    The account's arithmetic: the slower of the device's time over the quota and, for it bears no wait, the batch's own time, which is the device's
    and the host's around it. A device that idles between batches may be slower than one that does not, by a tenth or so.
    """
    prior = untrained(lattice)
    batch, sm, quota = lattice.axes
    device, stretch, host = parts(lattice)
    log_quota, gaps = np.log(quota / 100), (quota < 100).astype(np.float64)
    mean, covariance = prior.mean.copy(), np.zeros_like(prior.covariance)
    mean[stretch], mean[host] = -log_quota, _AROUND
    covariance[device, device] = _LEVEL_SD**2 + _slopes(lattice) + _BENT_SD**2 * np.kron(_rbf(batch, 1.0), _rbf(sm, 0.7))
    covariance[stretch, stretch] = _GAPS_SD**2 * (np.outer(gaps, gaps) + 0.1 * np.outer(log_quota, log_quota))
    covariance[host, host] = _AROUND_SD**2 * np.kron(0.5 + 0.5 * _rbf(batch, 1.0), np.ones((len(quota), len(quota))))
    covariance += _JITTER * np.eye(len(mean))
    return replace(prior, mean=mean, covariance=covariance, host_noise=prior.device_noise, charged=True)


def physics(lattice: Lattice, rows: Array, log_latency: Array, errors: Array | None = None) -> Belief:
    """What is believed of a device of which no model was learnt from: a node that charges device time, unless the measurements speak against it.

    They also say how far they spread beyond their own `errors` (n,): the mean over the sizes, each as likely as it makes them.
    """
    believed = charging(lattice), untrained(lattice)
    if not len(rows):
        return believed[0]
    points, own = Points.at(lattice, rows), np.zeros(len(rows)) if errors is None else errors**2
    spreads = np.log(np.array(_NOISES) / _NOISE) / _NOISE_WIDTH
    evidence = np.array(
        [[_evidence(replace(each, device_noise=sd, host_noise=sd), points, log_latency - points.beyond, own) for sd in _NOISES] for each in believed]
    )
    likely = np.exp(evidence - evidence.max() - 0.5 * spreads**2)
    best = int(np.argmax(likely.sum(axis=1)))
    sd = _OF_NORMAL * float(np.sqrt(likely[best] @ np.square(_NOISES) / likely[best].sum()))
    return replace(believed[best], device_noise=sd, host_noise=sd)


def _slopes(lattice: Lattice) -> Array:
    """Covariance of the device's values where work grows as a power of the batch and falls as a power of the SM share, both nearly unknown."""
    log_batch, log_sm = np.log(lattice.batch), np.log(lattice.sm_percent / 100)
    found = np.kron(np.outer(log_batch, log_batch), np.ones((len(log_sm), len(log_sm))))
    found += np.kron(np.ones((len(log_batch), len(log_batch))), np.outer(log_sm, log_sm))
    return np.asarray(0.1 * found, dtype=np.float64)


def parts(lattice: Lattice) -> tuple[slice, slice, slice]:
    """Where device, stretch and host stand among the unknowns."""
    nb, ns, nq = lattice.shape
    device = nb * ns
    return slice(0, device), slice(device, device + nq), slice(device + nq, device + nq + nb * nq)


def condition(prior: Belief, rows: Array, log_latency: Array, errors: Array | None = None) -> Posterior:
    """What the measurements at the rows (n, 3), maybe none, say on the whole lattice.

    `errors` (n,): what is known of each one's own standard error, beside the spread that the belief expects of all; the next measurement is taken to
    be as good as these.
    """
    everywhere = Points.at(prior.lattice, prior.lattice.rows())
    maps = everywhere.maps(prior)
    if not len(rows):
        blend = Blend.of(maps[0] @ prior.mean, maps[1] @ prior.mean, maps)
        return Posterior(blend.value, _prior_covariance(prior, everywhere, blend), blend.noise(prior))
    points = Points.at(prior.lattice, rows)
    target = log_latency - points.beyond
    own = np.zeros(len(rows)) if errors is None else errors**2
    weights, blend, total = _solve(prior, points, target, own)
    # In terms of the measurements: unknowns = mean + K slope' weights, session = S (1 - part) weights.
    unknowns = prior.mean + prior.covariance @ (blend.slope.T @ weights)
    session = prior.session.covariance(everywhere, points) * (1 - blend.part)
    found = Blend.of(maps[0] @ unknowns, maps[1] @ unknowns + session @ weights, maps)
    shared = found.slope @ (prior.covariance @ blend.slope.T) + (1 - found.part)[:, None] * session
    covariance = _prior_covariance(prior, everywhere, found) - shared @ np.linalg.solve(total, shared.T)
    return Posterior(found.value, covariance, found.noise(prior) + np.median(own))


def _solve(prior: Belief, points: Points, target: Array, own: Array) -> tuple[Array, Blend, Array]:
    """Gauss-Newton in the space of the measurements: weights (n,), the law there, and the measurements' covariance (n, n).

    `own` (n,): what each one's variance is above the belief's noise.
    """
    maps = points.maps(prior)
    device, host = maps[0] @ prior.mean, maps[1] @ prior.mean
    start, session = (device, host), prior.session.covariance(points, points)
    through = [prior.covariance @ each.T for each in maps]
    pace, last = 1.0, np.inf
    for step in range(_STEPS):
        blend = Blend.of(device, host, maps, _SHARPNESS[min(step, len(_SHARPNESS) - 1)])
        part, rest = blend.part, 1 - blend.part
        noise = blend.noise(prior) + own
        if step >= len(_SHARPNESS):
            noise = noise * (_DEGREES + (target - blend.value) ** 2 / noise) / (_DEGREES + 1)
        spread = through[0] * part + through[1] * rest
        total = blend.slope @ spread + rest[:, None] * session * rest + np.diag(noise)
        moved = part * (device - start[0]) + rest * (host - start[1])
        weights = np.asarray(np.linalg.solve(total, target - blend.value + moved), dtype=np.float64)
        to_device = start[0] + maps[0] @ (spread @ weights) - device
        to_host = start[1] + maps[1] @ (spread @ weights) + session @ (rest * weights) - host
        longest = max(float(np.abs(to_device).max()), float(np.abs(to_host).max()))
        if step > len(_SHARPNESS):
            if longest < 2e-3:
                break
            # At the kink of the maximum a point may change sides for ever: shorter steps settle it.
            pace = max(pace * 0.6, 0.1) if longest > 0.7 * last else pace
        last = longest
        length = min(pace, _LONGEST_STEP / max(longest, 1e-12))
        device, host = device + length * to_device, host + length * to_host
    return weights, blend, total


def _evidence(prior: Belief, points: Points, target: Array, own: Array) -> float:
    """Logarithm of the measurements' density, but for a constant, with the law linear about their explanation."""
    weights, _, total = _solve(prior, points, target, own)
    return -0.5 * float(weights @ total @ weights + np.linalg.slogdet(total)[1])


def _prior_covariance(prior: Belief, everywhere: Points, blend: Blend) -> Array:
    rest = 1 - blend.part
    found = prior.session.covariance(everywhere, everywhere) * np.outer(rest, rest)
    return np.asarray(found + blend.slope @ prior.covariance @ blend.slope.T, dtype=np.float64)


def _rbf(levels: Array, length: float) -> Array:
    return np.asarray(np.exp(-0.5 * (log_distance(levels) / length) ** 2), dtype=np.float64)
