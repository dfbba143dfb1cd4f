"""From measured points to what the estimator learns from and is conditioned on. Pure: reads no file, measures nothing."""

from __future__ import annotations

from collections.abc import Sequence

import numpy.typing as npt

from profiler.device import DeviceFacts
from profiler.estimator import ModelSamples
from profiler.points import Point, Points
from profiler.visits import Pooled, pooled, quietest

LATENCY = "latency_mean_ms"


def device_key(facts: DeviceFacts) -> str:
    """What the estimator calls a device: equal for devices on which a model is equally fast."""
    return f"{facts.name} x{facts.processors}"


def samples_of(
    name: str, facts: DeviceFacts, points: Sequence[Pooled], statistic: str = LATENCY, features: npt.ArrayLike | None = None
) -> ModelSamples:
    """The points (maybe none) of one model on one device, by one of the table's latency columns."""
    return ModelSamples(
        name=name,
        device=device_key(facts),
        batch=[point.batch for point in points],
        sm_percent=[point.sm_percent for point in points],
        quota_percent=[point.quota_percent for point in points],
        latency_ms=[getattr(point, statistic) for point in points],
        features=features,
        spread=[point.spread for point in points],
    )


def population(table: Points, statistic: str = LATENCY) -> list[ModelSamples]:
    """All models of a table, each on each of its devices. Points measured beside load are left out where a configuration has others."""
    groups: dict[tuple[str, str, str], list[Point]] = {}
    for point in table.points:
        groups.setdefault((point.function, point.model_digest, point.device), []).append(point)
    found = []
    for (function, _, device), points in groups.items():
        found.append(samples_of(function, table.header.devices[device], pooled(quietest(points)), statistic))
    return found
