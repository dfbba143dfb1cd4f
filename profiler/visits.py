"""Several short visits to each configuration, spread over a sweep, as one point: pure arithmetic on rows of the table.

A machine's speed moves while a sweep goes on: by a fifth within minutes on a shared CPU. A configuration that is measured once carries the machine's
mood of that moment into the model. So each is visited several times, beside each visit stands the GPU time of one reference batch, and a point is
the median of its visits, each divided by how much slower the reference was then than usually. What still lies between visits is the point's `spread`.
Owns what visits make of a point, and which visits are owed. Measures nothing and knows no clock.
"""

from __future__ import annotations

import math
import random
import statistics
from collections import Counter
from collections.abc import Iterator, Sequence

import msgspec

from profiler.points import Config, Point

_TIMES = (*(f"{kind}_{part}_ms" for kind in ("latency", "service") for part in ("mean", "p50", "p95", "p99")), "gpu_ms")
_TAILS = ("latency_p99_ms", "service_p99_ms")
_ENOUGH_FOR_A_TAIL = 100
_OF_MEDIAN = 1.25
"""Standard error of a median over that of a mean, for three values or more that are normally distributed."""
_COMMON = 4.0
"""The variance between visits of all of a model's configurations counts like that many degrees of freedom for each of them."""


class Pooled(Point, frozen=True, kw_only=True):
    """A configuration as all visits to it saw it, at the machine's usual speed.

    `spread`: the standard error of the logarithm of its mean latency, as far as visits tell; 0 where no configuration was visited twice.
    """

    spread: float


def pooled(rows: Sequence[Point]) -> tuple[Pooled, ...]:
    """One point for each configuration of each model on each device, in the order of their first visits; those beside load are pooled apart."""
    models: dict[tuple[object, ...], list[Point]] = {}
    for row in rows:
        models.setdefault(_model(row), []).append(row)
    found = {(_model(point), point.config): point for model in models.values() for point in _of_model(model)}
    return tuple(found[key] for key in dict.fromkeys((_model(row), row.config) for row in rows))


def quietest(rows: Sequence[Point]) -> list[Point]:
    """Without the visits beside load to a configuration that was visited without it, too. Of one function, model and device."""
    quiet = {row.config for row in rows if not row.beside_load}
    return [row for row in rows if not (row.beside_load and row.config in quiet)]


def _model(row: Point) -> tuple[object, ...]:
    return row.function, row.model_digest, row.device, row.beside_load


def _of_model(rows: Sequence[Point]) -> Iterator[Pooled]:
    references = [row.reference_ms for row in rows if row.reference_ms]
    usual_ms = statistics.median(references) if references else 0.0
    visits: dict[Config, list[Point]] = {}
    for row in rows:
        visits.setdefault(row.config, []).append(_at_usual_speed(row, usual_ms))
    variances = {config: _variance(each) for config, each in visits.items()}
    freedom = sum(len(each) - 1 for each in visits.values())
    common = sum(variances[config] * (len(each) - 1) for config, each in visits.items()) / freedom if freedom else 0.0
    for config, each in visits.items():
        own = len(each) - 1
        variance = (_COMMON * common + own * variances[config]) / (_COMMON + own)
        yield _one(each, math.sqrt(variance / len(each)) * (_OF_MEDIAN if len(each) > 2 else 1.0))


def _at_usual_speed(row: Point, usual_ms: float) -> Point:
    """As if the reference had taken its usual time; as it is where there is none."""
    if row.reference_ms in (0.0, usual_ms):
        return row
    factor = usual_ms / row.reference_ms
    return msgspec.structs.replace(row, reference_ms=usual_ms, **{name: getattr(row, name) * factor for name in _TIMES})


def _variance(visits: Sequence[Point]) -> float:
    """Of the logarithms of the mean latencies; 0 of a single one."""
    return statistics.variance(math.log(visit.latency_mean_ms) for visit in visits) if len(visits) > 1 else 0.0


def _one(visits: Sequence[Point], spread: float) -> Pooled:
    """Medians. But the tail of a visit with few batches is hardly more than its slowest one: of such visits it is the greatest."""
    few = min(visit.samples for visit in visits) < _ENOUGH_FOR_A_TAIL
    fields = msgspec.structs.asdict(visits[0]) | {
        name: (max if few and name in _TAILS else statistics.median)([getattr(visit, name) for visit in visits]) for name in _TIMES
    }
    fields["samples"] = sum(visit.samples for visit in visits)
    fields["duration_s"] = sum(visit.duration_s for visit in visits)
    return Pooled(**fields, spread=spread)


def owed(rows: Sequence[Point], visits: int) -> dict[Config, float]:
    """Configurations that were begun and lack visits, and how long (s) those will take if they take as long as the ones before."""
    made = Counter(row.config for row in rows)
    took: dict[Config, list[float]] = {}
    for row in rows:
        took.setdefault(row.config, []).append(row.duration_s)
    return {config: (visits - count) * statistics.fmean(took[config]) for config, count in made.items() if count < visits}


def next_owed(rows: Sequence[Point], visits: int, seed: int) -> Config:
    """Whom to visit again: by chance one of those that were visited least, so that each round has an order of its own. Something must be owed."""
    made = Counter(row.config for row in rows)
    fewest = min(made.values())
    assert fewest < visits
    return random.Random(f"{seed} {len(rows)}").choice(sorted(config for config, count in made.items() if count == fewest))
