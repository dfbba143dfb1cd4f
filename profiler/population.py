"""What many measured models say about the next one: the belief that its probes are conditioned on.

Owns expectation-maximisation over the law's unknowns, the spread of measurements, what differs between measured processes, and how cautious
intervals have to be. Works with three models as with sixty: what they cannot say is filled from `law.untrained`. No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from profiler.lattice import Array, Lattice
from profiler.law import Belief, Blend, Points, Session, condition, parts, untrained
from profiler.probes import best_probe

_ROUNDS = 8
_FIRST_STEPS, _MORE_STEPS = 14, 6
_DEGREES = 4.0
_PRIOR_MODELS, _PRIOR_PART = 5.0, 0.4
"""The prior counts as that many models, or as that part of those measured where it is more."""
_SHAPE = 0.1
"""How much of the untrained covariance counts beside what was seen; its level stays as wide as it was."""
_HOST_PART = 0.3
_LARGEST_RESIDUAL = 0.6
_SESSION_PART = 0.85
_ALIKE = 2 / 3
"""How much of a large population's spread is taken to lie between its members; the rest is about each of them."""
_GRAPH = 2.0
"""What a member's weight loses, in logarithms, by each mean squared standard deviation between its graph's features and the model's."""
_PRIOR_PAIRS = 20.0
_CALIBRATED_MODELS, _CALIBRATED_AT = 12, (8, 16)
_COVERED, _Z90 = 0.9, 1.6449


@dataclass(slots=True)
class _Model:
    """One model's measurements, its maps, and what is believed about its unknowns so far."""

    rows: Array
    target: Array
    maps: tuple[Array, Array]
    mean: Array
    covariance: Array
    features: Array | None = None
    met: bool = False

    @classmethod
    def of(cls, belief: Belief, rows: Array, log_latency: Array, features: Array | None = None) -> _Model:
        """A model of which so far no more is known than of any."""
        points = Points.at(belief.lattice, rows)
        return cls(rows, log_latency - points.beyond, (points.device(), points.host()), belief.mean, belief.covariance, features)


@dataclass(frozen=True, slots=True)
class Population:
    """What measured models say about the next one: the belief about any, and the members' unknowns (m, u) and graphs' features (m, f; f may be 0)."""

    belief: Belief
    members: Array
    features: Array

    @classmethod
    def without_members(cls, belief: Belief) -> Population:
        """Where nothing was measured yet."""
        return cls(belief, np.zeros((0, len(belief.mean))), np.zeros((0, 0)))

    def like(self, rows: Array, log_latency: Array, features: Array | None = None) -> Belief:
        """The belief about a model that was measured so: members that explain its measurements, and whose graphs are like its own, count for more.

        The prior is a kernel density over the members. Kernels are drawn to the mean, so that together they spread as the population does (Liu and
        West, 2001). How a model uses the device says little about how it launches kernels: device and host are weighed apart.
        """
        if not len(rows) or not len(self.members):
            return self.belief
        belief, points = self.belief, Points.at(self.belief.lattice, rows)
        model = _Model.of(belief, rows, log_latency)
        loose = replace(belief, host_noise=float(np.hypot(belief.host_noise, belief.session.sd)))
        blend = _explain(model, loose, np.asarray(np.linalg.inv(belief.covariance), dtype=np.float64))
        left = model.target - blend.value + blend.slope @ (model.mean - belief.mean)
        own = belief.session.covariance(points, points) * np.outer(1 - blend.part, 1 - blend.part) + np.diag(blend.noise(belief))
        width = 1 - _ALIKE * len(self.members) / (len(self.members) + _PRIOR_MODELS)
        apart = np.sqrt(1 - width) * (self.members - belief.mean)
        mean, covariance = belief.mean.copy(), width * belief.covariance
        device, _, host = parts(belief.lattice)
        for part in (device, host):
            scale = np.ones(len(mean))
            scale[part] = np.sqrt(width)
            spread = blend.slope @ (belief.covariance * np.outer(scale, scale)) @ blend.slope.T + own
            weights = _weights(left - apart[:, part] @ blend.slope[:, part].T, spread, self._distance(features))
            middle = weights @ apart[:, part]
            between = apart[:, part] - middle
            mean[part] += middle
            covariance[part, part] += (between.T * weights) @ between
        return replace(belief, mean=mean, covariance=covariance)

    def _distance(self, features: Array | None) -> Array:
        """Mean squared differences (m,) of the features from the members', in the members' standard deviations; 0 where they are not known."""
        if features is None or not self.features.size or self.features.shape[1:] != features.shape:
            return np.zeros(len(self.members))
        apart = (self.features - features) / np.maximum(self.features.std(axis=0), 1e-9)
        return np.asarray(np.mean(apart**2, axis=1), dtype=np.float64)


def learn(lattice: Lattice, measured: Sequence[tuple[Array, Array, Array | None]]) -> Population:
    """The population from (rows (n, 3), log latency (n,), the graph's features or None) of each model."""
    start = _with_stretch(untrained(lattice), [(rows, log_latency) for rows, log_latency, _ in measured])
    models = [_Model.of(start, *model) for model in measured]
    belief = start
    for _ in range(_ROUNDS):
        belief = _round(belief, start, models)
    belief = _with_session(belief, models)
    return _population(replace(belief, caution=_caution(belief, start, models)), models)


def _population(belief: Belief, models: Sequence[_Model]) -> Population:
    """These models; without features unless all have them, in one form."""
    features = [model.features for model in models if model.features is not None]
    alike = len(features) == len(models) and len({len(vector) for vector in features}) == 1
    return Population(belief, np.stack([model.mean for model in models]), np.stack(features) if alike else np.zeros((len(models), 0)))


def _weights(errors: Array, spread: Array, distance: Array) -> Array:
    """Of members (m,), with sum 1: how likely a Gaussian of this covariance (n, n) makes their errors (m, n), and how near their graphs are."""
    logs = -0.5 * np.einsum("mn,nm->m", errors, np.linalg.solve(spread, errors.T)) - _GRAPH * distance
    found = np.exp(logs - logs.max())
    return np.asarray(found / found.sum(), dtype=np.float64)


def _round(belief: Belief, start: Belief, models: Sequence[_Model]) -> Belief:
    """One round of expectation and maximisation: every model's unknowns, then their mean, covariance and the measurements' spread."""
    inverse = np.asarray(np.linalg.inv(belief.covariance), dtype=np.float64)
    sums = np.zeros(4)
    for model in models:
        blend = _explain(model, belief, inverse)
        error = (model.target - blend.value) ** 2
        noise = blend.noise(belief)
        error *= (_DEGREES + 1) / (_DEGREES + error / noise)
        sums += [error @ blend.part, blend.part.sum(), error @ (1 - blend.part), (1 - blend.part).sum()]
    mean, covariance = _moments(models, start)
    device, host = (sums[0] + 1e-4) / (sums[1] + 1), (sums[2] + 1e-4) / (sums[3] + 1)
    return replace(belief, mean=mean, covariance=covariance, device_noise=float(np.sqrt(device)), host_noise=float(np.sqrt(host)))


def _explain(model: _Model, belief: Belief, inverse: Array) -> Blend:
    """The model's unknowns given all of its measurements, from where the last round left them."""
    unknowns = model.mean
    for step in range(_MORE_STEPS if model.met else _FIRST_STEPS):
        blend = Blend.of(model.maps[0] @ unknowns, model.maps[1] @ unknowns, model.maps)
        error, noise = model.target - blend.value, blend.noise(belief)
        weight = 1 / noise
        if step > 2 or model.met:
            weight *= (_DEGREES + 1) / (_DEGREES + error**2 / noise)
        weighted = blend.slope.T * weight
        precision = inverse + weighted @ blend.slope
        change = belief.mean + np.linalg.solve(precision, weighted @ (error + blend.slope @ (unknowns - belief.mean))) - unknowns
        longest = float(np.abs(change).max())
        unknowns = unknowns + change * min(1.0, 1.5 / max(longest, 1e-12))
        if longest < 1e-3 and step > 3:
            break
    model.mean, model.covariance, model.met = unknowns, np.asarray(np.linalg.inv(precision), dtype=np.float64), True
    return Blend.of(model.maps[0] @ unknowns, model.maps[1] @ unknowns, model.maps)


def _moments(models: Sequence[_Model], start: Belief) -> tuple[Array, Array]:
    """Mean and covariance of the models' unknowns; the prior counts as some models more. The stretch stays what it was."""
    means = np.stack([model.mean for model in models])
    mean = (means.sum(axis=0) + start.mean * _SHAPE) / (len(means) + _SHAPE)
    apart = means - mean
    within = np.sum([model.covariance for model in models], axis=0)
    weight = max(_PRIOR_MODELS, _PRIOR_PART * len(means))
    covariance = (apart.T @ apart + within + weight * _SHAPE * start.covariance) / (len(means) + weight)
    _, stretch, _ = parts(start.lattice)
    mean[stretch] = start.mean[stretch]
    covariance[stretch, :], covariance[:, stretch] = start.covariance[stretch, :], start.covariance[:, stretch]
    return mean, (covariance + covariance.T) / 2


def _with_stretch(start: Belief, measured: Sequence[tuple[Array, Array]]) -> Belief:
    """The token policy's own arithmetic: what a quota does to the device's time, which is a property of the device and not of the model.

    Taken from pairs of measurements that differ in the quota alone, where each model is slowest. Gated launches can only add to it, so the least
    of the models' ratios are the device's.
    """
    lattice = start.lattice
    ratios: dict[float, list[float]] = {}
    for rows, log_latency in measured:
        whole = {(batch, sm): value for (batch, sm, quota), value in zip(rows.tolist(), log_latency, strict=True) if quota == 100}
        slowest: dict[float, tuple[float, float]] = {}
        for (batch, sm, quota), value in zip(rows.tolist(), log_latency, strict=True):
            if quota < 100 and (batch, sm) in whole:
                slowest[quota] = max(slowest.get(quota, (-np.inf, 0.0)), (whole[batch, sm], value - whole[batch, sm]))
        for quota, (_, ratio) in slowest.items():
            ratios.setdefault(quota, []).append(ratio)
    if not ratios:
        return start
    levels = np.array([*sorted(ratios), 100.0])
    least = np.array([max(float(np.quantile(ratios[level], 0.1)), 0.0) for level in levels[:-1]] + [0.0])
    _, stretch, _ = parts(lattice)
    mean, covariance = start.mean.copy(), start.covariance.copy()
    mean[stretch] = np.interp(np.log(lattice.quota_percent), np.log(levels), np.minimum.accumulate(least))
    covariance[stretch, :], covariance[:, stretch] = 0.0, 0.0
    covariance[stretch, stretch] = 1e-6 * np.eye(len(lattice.quota_percent))
    return replace(start, mean=mean, covariance=covariance)


def _with_session(belief: Belief, models: Sequence[_Model]) -> Belief:
    """Splits what the host's curve leaves unexplained into the session's part, with its correlations, and single measurements' noise."""
    default = belief.session
    everywhere = belief.lattice.rows()
    index = {tuple(row): at for at, row in enumerate(everywhere.tolist())}
    left = np.zeros((len(models), len(everywhere)))
    seen = np.zeros_like(left)
    for number, model in enumerate(models):
        blend = Blend.of(model.maps[0] @ model.mean, model.maps[1] @ model.mean, model.maps)
        for row, error, part in zip(model.rows.tolist(), model.target - blend.value, blend.part, strict=True):
            if part < _HOST_PART and tuple(row) in index:
                left[number, index[tuple(row)]] = np.clip(error, -_LARGEST_RESIDUAL, _LARGEST_RESIDUAL)
                seen[number, index[tuple(row)]] = 1.0
    count = float(seen.sum())
    if count < _PRIOR_PAIRS:
        return belief
    variance = float((left**2).sum() / count)
    shape = (len(models), *belief.lattice.shape)
    axes = [
        _correlation(np.moveaxis(left.reshape(shape), axis, -1), np.moveaxis(seen.reshape(shape), axis, -1), variance, prior)
        for axis, prior in ((1, default.batch), (2, default.sm), (3, default.quota))
    ]
    session = Session(float(np.sqrt(variance * _SESSION_PART)), *axes)
    return replace(belief, session=session, host_noise=float(np.sqrt(variance * (1 - _SESSION_PART))))


def _correlation(left: Array, seen: Array, variance: float, prior: Array) -> Array:
    """Correlation along the last axis, drawn to the prior where few pairs were seen; positive definite."""
    levels = left.shape[-1]
    values, known = left.reshape(-1, levels), seen.reshape(-1, levels)
    found = (values.T @ values + _PRIOR_PAIRS * variance * prior) / (known.T @ known + _PRIOR_PAIRS)
    scale = np.sqrt(np.diag(found))
    strength, directions = np.linalg.eigh(found / np.outer(scale, scale))
    found = (directions * np.maximum(strength, 1e-3)) @ directions.T
    scale = np.sqrt(np.diag(found))
    return np.asarray(found / np.outer(scale, scale), dtype=np.float64)


def _caution(belief: Belief, start: Belief, models: Sequence[_Model]) -> float:
    """Leave one model out, give its probes alone, and see how much wider the rest of it spreads than was believed (conformal over models)."""
    if len(models) < 3:
        return 1.5
    errors, variances, noises = [], [], []
    for number in np.unique(np.linspace(0, len(models) - 1, _CALIBRATED_MODELS).round().astype(int)):
        model = models[number]
        others = [other for other in models if other is not model]
        mean, covariance = _moments(others, start)
        without = _population(replace(belief, mean=mean, covariance=covariance), others)
        probed: list[int] = []
        weights = Points.at(belief.lattice, model.rows).lattice()
        while len(probed) < min(max(_CALIBRATED_AT), len(model.rows) // 2):
            found = condition(without.belief, model.rows[probed], model.target[probed])
            probed.append(best_probe(belief.lattice, found, model.rows, model.rows[probed]))
            if len(probed) in _CALIBRATED_AT:
                seen = model.rows[probed], model.target[probed]
                found = condition(without.like(*seen, model.features), *seen)
                rest = np.setdiff1d(np.arange(len(model.rows)), probed)
                errors.append(np.abs(model.target - weights @ found.value)[rest])
                variances.append((weights @ np.diag(found.covariance))[rest])
                noises.append((weights @ found.noise)[rest])
    error, variance, noise = (np.concatenate(each) for each in (errors, variances, noises))
    needed = np.sqrt(np.maximum((error / _Z90) ** 2 - noise, 0.0) / np.maximum(variance, 1e-12))
    return float(np.clip(np.quantile(needed, _COVERED), 0.5, 5.0))
