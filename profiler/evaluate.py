"""How well the estimator predicts what it has not seen, beside a formula without learning and a plain gradient-boosted tree.

Pure: samples in, scores out. Two questions: configurations left out of known models (a random tenth), and models left out whole (grouped folds), of
which only the probes are seen. No probe is ever scored. Splits and seeds are in here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from sklearn.ensemble import HistGradientBoostingRegressor

from contracts.errors import InvalidValue
from profiler.estimator import Estimator, ModelEstimate, ModelSamples
from profiler.lattice import Array

SEED = 20261122
FOLDS = 5
PROBES = (1, 2, 4, 8, 12, 16, 20, 24, 29)
TREES = 600
_LEFT_OUT = 0.1
_MARGIN = 1e-9
Case = Literal["unseen configurations", "unseen models"]
Method = Literal["estimator", "formula", "boosted tree"]


@dataclass(frozen=True, slots=True)
class Score:
    """One line of the table. Errors are fractions; a mean over models of each one's mean. `coverage`: of the 90 % interval, None without one.

    `non_monotone`: pairs of neighbouring shares where more SMs or quota were predicted to be slower.
    """

    case: Case
    method: Method
    probes: int | None
    models: int
    mape: float
    median_ape: float
    coverage: float | None
    non_monotone: int | None


@dataclass(slots=True)
class _Tally:
    """Errors of one line of the table while they come in."""

    errors: list[Array] = field(default_factory=list)
    inside: list[float] = field(default_factory=list)
    non_monotone: int | None = None

    def score(self, case: Case, method: Method, probes: int | None) -> Score:
        means = [float(error.mean()) for error in self.errors]
        coverage = float(np.mean(self.inside)) if self.inside else None
        return Score(
            case, method, probes, len(means), float(np.mean(means)), float(np.median(np.concatenate(self.errors))), coverage, self.non_monotone
        )


def evaluate(
    samples: Sequence[ModelSamples], probes: Sequence[int] = PROBES, progress: Callable[[str], None] = lambda _: None, trees: int = TREES
) -> list[Score]:
    """The whole table; takes minutes. InvalidValue when there are too few models for the folds. `progress` is told what was done."""
    return [*unseen_configurations(samples, progress, trees), *unseen_models(samples, probes, progress, trees)]


def unseen_configurations(samples: Sequence[ModelSamples], progress: Callable[[str], None] = lambda _: None, trees: int = TREES) -> list[Score]:
    """A random tenth of every model's configurations is left out; all others are known."""
    random = np.random.default_rng(SEED)
    known, hidden = [], []
    for model in samples:
        out = random.random(len(model.rows())) < _LEFT_OUT
        out[int(random.integers(len(out)))] = True
        known.append(_part(model, ~out))
        hidden.append(_part(model, out))
    estimator = Estimator.fit(known)
    ours, tree = _Tally(non_monotone=0), _Tally()
    fitted = _tree([(_tree_rows(model), model.log_latency() - _level(model)) for model in known], trees)
    for seen, unseen in zip(known, hidden, strict=True):
        _add(ours, estimator.condition(seen), unseen)
        tree.errors.append(_relative(np.exp(fitted.predict(_tree_rows(unseen)) + _level(seen)), unseen))
        progress(f"unseen configurations of {seen.name}")
    case: Case = "unseen configurations"
    return [ours.score(case, "estimator", None), tree.score(case, "boosted tree", None)]


def unseen_models(
    samples: Sequence[ModelSamples],
    probes: Sequence[int] = PROBES,
    progress: Callable[[str], None] = lambda _: None,
    trees: int = TREES,
) -> list[Score]:
    """Grouped folds by model. The estimator chooses its probes itself, one after another; formula and tree get 29 on a fixed cross of the grid."""
    ours = {count: _Tally(non_monotone=0) for count in probes}
    formula, tree = _Tally(), _Tally()
    for train, test in _folds(samples):
        estimator = Estimator.fit(train)
        crosses = [_part(model, _cross(model)) for model in train]
        fitted = _tree([(_tree_rows(model, cross), model.log_latency() - _level(cross)) for model, cross in zip(train, crosses, strict=True)], trees)
        for model in test:
            for count, estimate, rest in probe(estimator, model, probes):
                _add(ours[count], estimate, rest)
            cross = _cross(model)
            rest_of_cross = np.setdiff1d(np.arange(len(model.rows())), cross)
            unseen, seen = _part(model, rest_of_cross), _part(model, cross)
            formula.errors.append(_relative(np.exp(_formula(seen, unseen)), unseen))
            tree.errors.append(_relative(np.exp(fitted.predict(_tree_rows(unseen, seen)) + _level(seen)), unseen))
            progress(f"unseen model {model.name}")
    case: Case = "unseen models"
    lines = [tally.score(case, "estimator", count) for count, tally in ours.items()]
    return [*lines, formula.score(case, "formula", _CROSS), tree.score(case, "boosted tree", _CROSS)]


def probe(estimator: Estimator, model: ModelSamples, counts: Sequence[int]) -> Iterator[tuple[int, ModelEstimate, ModelSamples]]:
    """(probes, the estimate from them, everything that was not probed) at each count; the next probe follows from the values of those before."""
    rows = model.rows()
    chosen: list[int] = []
    for count in range(min(max(counts), len(rows) - 1) + 1):
        estimate = estimator.condition(_part(model, np.array(chosen, dtype=np.int64)))
        if count in counts:
            yield count, estimate, _part(model, np.setdiff1d(np.arange(len(rows)), chosen))
        chosen.append(estimate.next_probe(rows[:, 0], rows[:, 1], rows[:, 2]))


def _folds(samples: Sequence[ModelSamples]) -> Iterator[tuple[list[ModelSamples], list[ModelSamples]]]:
    if len(samples) < 2 * FOLDS:
        raise InvalidValue(f"{FOLDS} folds need at least {2 * FOLDS} models", key="models", value=len(samples))
    order = np.random.default_rng(SEED).permutation(len(samples))
    for fold in range(FOLDS):
        out = set(order[fold::FOLDS].tolist())
        yield [model for index, model in enumerate(samples) if index not in out], [model for index, model in enumerate(samples) if index in out]


def _part(model: ModelSamples, index: Any) -> ModelSamples:
    rows = model.rows()[index]
    latency_ms = np.exp(model.log_latency()[index])
    return replace(model, batch=rows[:, 0], sm_percent=rows[:, 1], quota_percent=rows[:, 2], latency_ms=latency_ms, spread=model.errors()[index])


def _relative(predicted_ms: Array, unseen: ModelSamples) -> Array:
    return np.asarray(np.abs(predicted_ms / np.exp(unseen.log_latency()) - 1), dtype=np.float64)


def _add(tally: _Tally, estimate: ModelEstimate, unseen: ModelSamples) -> None:
    rows = unseen.rows()
    found = estimate.predict(rows[:, 0], rows[:, 1], rows[:, 2])
    true_ms = np.exp(unseen.log_latency())
    tally.errors.append(_relative(found.mean_ms, unseen))
    tally.inside.append(float(np.mean((found.low_ms <= true_ms) & (true_ms <= found.high_ms))))
    if tally.non_monotone is not None:
        tally.non_monotone += _violations(estimate, np.unique(rows[:, 0]))


def _violations(estimate: ModelEstimate, batches: Array) -> int:
    """Neighbours on a grid of single percents of SM and of quota where more is slower."""
    levels = np.arange(1.0, 101.0, 3.0)
    count = 0
    for batch in batches:
        sm, quota = (axis.ravel() for axis in np.meshgrid(levels, levels, indexing="ij"))
        found = estimate.predict(batch, sm, quota)
        for line in (found.mean_ms, found.low_ms, found.high_ms):
            square = np.log(line).reshape(len(levels), len(levels))
            count += int((np.diff(square, axis=0) > _MARGIN).sum() + (np.diff(square, axis=1) > _MARGIN).sum())
    return count


_CROSS = 29
_CROSS_SM = (5.0, 10.0, 25.0, 50.0, 100.0)
_CROSS_BATCH = 4.0


def _cross(model: ModelSamples) -> Any:
    """The formula's probes: every batch at five SM shares with all of the time, and every quota with all SMs at batch 4."""
    rows = model.rows()
    whole_time = (rows[:, 2] == 100) & np.isin(rows[:, 1], _CROSS_SM)
    whole_device = (rows[:, 0] == _CROSS_BATCH) & (rows[:, 1] == 100)
    return np.flatnonzero(whole_time | whole_device)


def _formula(probes: ModelSamples, wanted: ModelSamples) -> Array:
    """max(latency(batch, SM, 100 %), latency(4, 100 %, quota)), interpolated in logarithms; a batch without probes takes the next lower one's."""
    rows, log_latency, ask = probes.rows(), probes.log_latency(), wanted.rows()
    device = np.empty(len(ask))
    for batch in np.unique(ask[:, 0]):
        there = (rows[:, 2] == 100) & (rows[:, 0] == max(level for level in rows[:, 0] if level <= batch))
        order = np.argsort(rows[there, 1])
        of_batch = ask[:, 0] == batch
        device[of_batch] = np.interp(np.log(ask[of_batch, 1]), np.log(rows[there, 1][order]), log_latency[there][order])
    there = (rows[:, 0] == _CROSS_BATCH) & (rows[:, 1] == 100)
    order = np.argsort(rows[there, 2])
    host = np.interp(np.log(ask[:, 2]), np.log(rows[there, 2][order]), log_latency[there][order])
    return np.asarray(np.maximum(device, host), dtype=np.float64)


def _tree(models: Sequence[tuple[Array, Array]], trees: int) -> Any:
    """Fitted to each model's inputs and its logarithms of latencies about their level."""
    inputs, about_level = (np.concatenate(each) for each in zip(*models, strict=True))
    tree = HistGradientBoostingRegressor(max_iter=trees, learning_rate=0.2, max_leaf_nodes=63, min_samples_leaf=5, random_state=SEED)
    return tree.fit(inputs, about_level)


def _level(seen: ModelSamples) -> float:
    """The mean log latency of what is known of a model: the tree is told it, since it cannot add to what it has seen."""
    return float(seen.log_latency().mean())


def _tree_rows(model: ModelSamples, probes: ModelSamples | None = None) -> Array:
    """Logarithms of the configuration, the graph's features and the probes' log latencies about their level, padded where a model lacks some."""
    rows = np.log(model.rows())
    known = np.zeros(0) if probes is None else np.pad(probes.log_latency() - _level(probes), (0, _CROSS - len(probes.rows())))
    features = np.zeros(0) if model.features is None else np.asarray(model.features, dtype=np.float64)
    return np.hstack([rows, np.tile(np.concatenate([features, known]), (len(rows), 1))])
