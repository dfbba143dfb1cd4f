"""The estimator: predictions of unseen configurations and unseen models on the published V100 data; real sweeps and a live run on the CPU device.

The figures of other methods stand beside it in the same table. Accuracy does not depend on the machine; the two times do.
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.estimator_parts import cpu
from benchmarks.result import Metric, Result
from profiler.estimator import Estimator, ModelSamples
from profiler.evaluate import SEED, Score, evaluate
from profiler.v100 import read

_TARGETS = {("unseen configurations", None): 3.0, ("unseen models", 16): 6.0, ("unseen models", 29): 5.0}
_QUICK_MODELS = 5
_TURNS = 21


def run(quick: bool) -> Result:
    """Measures all of it; `quick` takes every fifth model. Without the V100 data (SLUICE_DATA names its folder) the CPU device's figures alone."""
    data = Path(os.environ.get("SLUICE_DATA", Path(__file__).parents[2] / "shared" / "data")) / "v100-latency"
    metrics = cpu.measure(quick)
    if data.is_dir():
        metrics |= _v100(read(data)[:: _QUICK_MODELS if quick else 1], (4, 16) if quick else None)
    return Result(metrics, seeds=(SEED,))


def _v100(samples: Sequence[ModelSamples], probes: Sequence[int] | None) -> dict[str, Metric]:
    scores = evaluate(samples) if probes is None else evaluate(samples, probes)
    return _times(samples) | {name: metric for score in scores for name, metric in _figures(score)}


def _times(samples: Sequence[ModelSamples]) -> dict[str, Metric]:
    begun = time.perf_counter()
    estimator = Estimator.fit(samples)
    fitted_s = time.perf_counter() - begun
    estimate = estimator.condition(samples[0])
    rows = samples[0].rows()
    times = []
    for _ in range(_TURNS):
        begun = time.perf_counter()
        estimate.predict(rows[:, 0], rows[:, 1], rows[:, 2])
        times.append(time.perf_counter() - begun)
    return {
        "fit_s": Metric(fitted_s, "s", 120),
        "predict_800_ms": Metric(statistics.median(times) * 1e3 * 800 / len(rows), "ms", 10),
    }


def _figures(score: Score) -> Iterable[tuple[str, Metric]]:
    name = "_".join([score.case, score.method, *([] if score.probes is None else [str(score.probes)])]).replace(" ", "_")
    target = _TARGETS.get((score.case, score.probes)) if score.method == "estimator" else None
    yield f"{name}_mape_percent", Metric(100 * score.mape, "%", target)
    yield f"{name}_median_percent", Metric(100 * score.median_ape, "%")
    if score.coverage is not None:
        distance = abs(score.coverage - 0.9)
        yield f"{name}_coverage_percent", Metric(100 * score.coverage, "%")
        yield f"{name}_coverage_off_90_points", Metric(100 * distance, "points", 5 if target is not None else None)
    if score.non_monotone is not None:
        yield f"{name}_non_monotone", Metric(float(score.non_monotone), "pairs", 0)
