"""What physics alone says of a node that charges device time to the quota, where the truth is known: with noise and without."""

from __future__ import annotations

import numpy as np
import pytest

from profiler.estimator import Estimator, ModelSamples
from profiler.lattice import Array

PROBES = [
    *((1, 100, 100), (4, 100, 100), (1, 20, 100), (1, 100, 20), (2, 50, 50), (4, 20, 20), (4, 50, 100), (1, 50, 70), (2, 100, 70), (4, 100, 30)),
    *((1, 30, 30), (2, 20, 100), (4, 30, 50), (1, 70, 100), (2, 70, 20)),
]
UNSEEN = [(batch, sm, quota) for batch in (1, 4) for sm in (40, 85) for quota in (40, 85)]
MODELS = {"long runs": (10.0, 7.0, 0.7), "short runs, much around them": (2.0, 2.0, 1.5), "work in proportion to the rows": (2.0, 9.0, 0.9)}


def charged(rows: Array, fixed_ms: float, row_ms: float, around_ms: float) -> Array:
    """The account's arithmetic, exactly (tests/profiler/test_measure.py holds the node to it)."""
    batch, sm, quota = rows.T
    gpu_ms = (fixed_ms + row_ms * batch) * 100 / sm
    return np.asarray(np.maximum(gpu_ms + around_ms, gpu_ms * 100 / quota))


def predicted(model: tuple[float, float, float], noise: float, seed: int, probes: int = len(PROBES)) -> tuple[Array, Array]:
    """Relative errors at the unseen shares, and whether their noisy measurements lie in the 90 % interval."""
    random = np.random.default_rng(seed)
    seen, unseen = np.array(PROBES[:probes], float), np.array(UNSEEN, float)
    measured, later = (charged(rows, *model) * np.exp(noise * random.normal(size=len(rows))) for rows in (seen, unseen))
    found = Estimator().condition(ModelSamples("m", "a device nobody knows", *seen.T, measured)).predict(*unseen.T)
    return found.mean_ms / charged(unseen, *model) - 1, (found.low_ms <= later) & (later <= found.high_ms)


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_without_noise_unseen_shares_are_predicted_to_a_few_percent(model: tuple[float, float, float]) -> None:
    errors, _ = predicted(model, 0.0, 0)
    assert np.abs(errors).mean() < 0.04
    assert np.abs(errors).max() < 0.08


def test_eight_probes_do_for_a_rough_idea() -> None:
    assert all(np.abs(predicted(model, 0.0, 0, probes=8)[0]).mean() < 0.08 for model in MODELS.values())


@pytest.mark.parametrize("noise", [0.04, 0.08])
def test_noise_is_evened_out_and_intervals_know_it(noise: float) -> None:
    """The mean of the true latency is met better than a single measurement would, and nine of ten later measurements lie in the interval."""
    found = [predicted(model, noise, seed) for model in MODELS.values() for seed in range(8)]
    errors, inside = (np.concatenate(each) for each in zip(*found, strict=True))
    assert np.abs(errors).mean() < noise * np.sqrt(2 / np.pi)
    assert 0.85 <= inside.mean() <= 0.99
