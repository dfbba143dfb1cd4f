"""The estimator on the CPU device: three real models are swept, shares that were not probed are predicted, and a recommended share is tried live.

Probes and held-out shares have no SM percentage and no quota in common. Both are visited in turn over the same minutes, and measured at the speed
that the machine usually had then, so that an error is the estimator's and not the machine's. The live run is judged from outside, over HTTP.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass, replace
from pathlib import Path

import msgspec
import numpy as np

from benchmarks.estimator_parts.live import poisson
from benchmarks.result import Metric
from contracts.functions import Function, ModelFormat, ModelRef, Share, Slo
from contracts.units import MS
from models.samples import sample_inputs
from profiler.dataset import samples_of
from profiler.estimator import Estimator, ModelEstimate
from profiler.measure import Sampling
from profiler.need import Need, Objective, need
from profiler.planner import planners
from profiler.points import Config, Point, Points, read
from profiler.profiles import Profile
from profiler.session import NodeOptions, started
from profiler.sweep import Plan, sweep
from profiler.visits import Pooled, pooled

_MODELS = {"minilm": "minilm", "vad": "silero-vad", "cnn": "cnn?size=128"}
_LIVE = "minilm"
_SEED = 1
_VISITS = 3
_MAX_BATCH = 4
_SLO_RUNS = 8
_RATE = 0.15
_PERCENTILE = 99.0


@dataclass(frozen=True, slots=True)
class Prediction:
    """One model's held-out shares: relative errors, and how many lay in the 90 % interval; the probes that were needed."""

    errors: tuple[float, ...]
    inside: int
    probes: int


@dataclass(frozen=True, slots=True)
class Live:
    """A recommended share, tried: the objective, the percentile that was seen, and requests without an answer."""

    needed: Need
    latency_ms: float
    kept_percent: float
    failed: int


def measure(quick: bool) -> dict[str, Metric]:
    """All figures of the CPU device; about five minutes, `quick` one."""
    functions = [Function(name, ModelRef(ModelFormat.CATALOG, source), max_batch=_MAX_BATCH) for name, source in _MODELS.items()]
    functions = functions[:1] if quick else functions
    with tempfile.TemporaryDirectory(prefix="sluice-") as folder:
        points, found, predictions = _sweeps(functions, Path(folder), probes_s=12 if quick else 40, most_seconds=0.4 if quick else 0.9)
    live = _live(functions[0], found[_LIVE], seconds=10 if quick else 60)
    return _metrics(predictions, points, live)


def _sweeps(
    functions: Sequence[Function], folder: Path, probes_s: float, most_seconds: float
) -> tuple[tuple[Point, ...], Mapping[str, Profile], Mapping[str, Prediction]]:
    """Probes each model where it is least certain, its held-out shares in turn with that; all visits, and what the probes say of each model."""
    sampling = Sampling(spread=0.02, fewest=2, enough=35, seconds=0.2, most_seconds=most_seconds)
    probes = Plan((1, 2, _MAX_BATCH), (20, 30, 50, 70, 100), (20, 30, 50, 70, 100), 0.02, probes_s / _VISITS, True, _SEED, sampling)
    held_out = Plan((1, _MAX_BATCH), (40, 85), (40, 85), None, None, True, _SEED, sampling)
    visits: list[Point] = []
    profiles, predictions = {}, {}
    with started(NodeOptions()) as session:
        for function in functions:
            path = folder / f"{function.name}.parquet"
            for round_ in range(1, _VISITS + 1):
                for plan in (probes, held_out):
                    sweep([function], path, planners(Estimator()), replace(plan, visits=round_), session)
            table = read(path)
            profiles[function.name], predictions[function.name] = _judged(function, table, set(held_out.grid(True)))
            visits += table.points
    return tuple(visits), profiles, predictions


def _judged(function: Function, table: Points, held_out: Set[Config]) -> tuple[Profile, Prediction]:
    """What the probes alone say, beside the held-out shares. Visits beside load count: the reference beside each knows how slow the machine was."""
    points = pooled([msgspec.structs.replace(visit, beside_load=False) for visit in table.points])
    known, tested = (tuple(point for point in points if (point.config in held_out) is held) for held in (False, True))
    ((device, facts),) = table.header.devices.items()
    estimate = Estimator().condition(samples_of(function.key, facts, known))
    return Profile(function.key, device, facts, known, estimate), _predict(estimate, tested, len(known))


def _predict(estimate: ModelEstimate, unseen: Sequence[Pooled], probes: int) -> Prediction:
    found = estimate.predict(*zip(*((point.batch, point.sm_percent, point.quota_percent) for point in unseen), strict=True))
    measured = np.array([point.latency_mean_ms for point in unseen])
    inside = int(np.sum((found.low_ms <= measured) & (measured <= found.high_ms)))
    return Prediction(tuple(np.abs(found.mean_ms / measured - 1).tolist()), inside, probes)


def _live(function: Function, known: Profile, seconds: float) -> Live:
    """Asks for the smallest share for an SLO of some runs at a fraction of the whole device's rate, and serves with it."""
    run_ms = float(known.estimate.predict([1], [100], [100]).mean_ms[0])
    objective = Objective(_SLO_RUNS * run_ms, _RATE * 1e3 / run_ms, _PERCENTILE)
    needed = need(known.estimate, objective, _MAX_BATCH, known.tail)
    option = needed.option
    served = msgspec.structs.replace(
        function,
        share=Share.of(option.sm_percent, option.quota_percent, option.quota_percent),
        max_batch=option.max_batch,
        slo=Slo(round(objective.latency_ms * MS), _PERCENTILE),
    )
    one_row = {name: array[:1] for name, array in sample_inputs(function.model, _MAX_BATCH, _SEED).items()}
    answered = poisson(served, one_row, objective.rate_per_s, seconds, _SEED)
    latencies = np.array(answered.latency_ms)
    return Live(needed, float(np.percentile(latencies, _PERCENTILE)), 100 * float(np.mean(latencies <= objective.latency_ms)), answered.failed)


def _metrics(predictions: Mapping[str, Prediction], points: Sequence[Point], live: Live) -> dict[str, Metric]:
    errors = [error for prediction in predictions.values() for error in prediction.errors]
    inside = sum(prediction.inside for prediction in predictions.values())
    option, objective = live.needed.option, live.needed.objective
    return {
        "cpu_held_out_mape": Metric(100 * statistics.fmean(errors), "%", 10),
        **{f"cpu_held_out_mape_{name}": Metric(100 * statistics.fmean(one.errors), "%") for name, one in predictions.items()},
        "cpu_held_out_coverage": Metric(100 * inside / len(errors), "% in the 90 % interval"),
        "cpu_probes": Metric(statistics.fmean(prediction.probes for prediction in predictions.values()), "probes a model"),
        "cpu_beside_load": Metric(100 * statistics.fmean(point.beside_load for point in points), "% of the visits"),
        "live_p99_over_slo": Metric(live.latency_ms / objective.latency_ms, "ratio", 1.0),
        "live_kept": Metric(live.kept_percent, "% of requests in time", _PERCENTILE, "higher"),
        "live_failed": Metric(live.failed, "requests", 0),
        "live_slo": Metric(objective.latency_ms, "ms"),
        "live_rate": Metric(objective.rate_per_s, "1/s"),
        "live_share": Metric(option.area_percent, "% of a device"),
        "live_expected_p99": Metric(option.latency_ms, "ms"),
        "live_p99": Metric(live.latency_ms, "ms"),
    }
