"""What a plan is made for: functions as InferenceService documents declare them, and what is known of their models.

Owns which facts of a document count (name, namespace, Sluice's annotations, replicas, GPUs), the share of the SMs that a plan gives, and the three
levels of every run time: the lower end, the middle and the upper end of what is believed. No model is loaded, so documents for any runtime are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from contracts.errors import InvalidFunction
from contracts.functions import PREFIX, Function, FunctionClass, Share, Slo, from_inference_service
from contracts.units import MS
from simulator.latency import Latency, Law, Table, Varying
from simulator.measured import Level, Profiles

LEVELS: tuple[Level, ...] = ("low", "mean", "high")
SM_LEVELS = (25, 50, 75, 100)
"""Shares of the SMs that a plan gives: few, since every size takes a lane of its own on each device."""
_NEARLY = 1.1
_GPU = "nvidia.com/gpu"


@dataclass(frozen=True, slots=True)
class Declared:
    """A function as declared for a cluster: `replicas` at least (0: scaled to zero when idle), each on `gpus` whole GPUs."""

    function: Function
    replicas: int = 1
    gpus: int = 1


@dataclass(frozen=True, slots=True)
class Known:
    """What is known of a function's model: its weights, its run times alone on some SMs at each level, and where that comes from."""

    weight_bytes: int
    times: Mapping[Level, Latency]
    source: str


class Sampled:
    """A latency on one share of the SMs and on all, read once for batches up to a size: quick to ask, and small enough to send to a process."""

    def __init__(self, latency: Latency, max_batch: int, sm_percent: int, at_least: Latency | None = None) -> None:
        """`at_least`: another one, which this is nowhere below."""
        self._sm_percent = sm_percent
        self._rows = sorted({1 << power for power in range(max_batch.bit_length())} | {max_batch})
        bounds = (latency, at_least or latency)
        points = {(row, sm): max(bound.run_ms(row, sm) for bound in bounds) for row in self._rows for sm in {sm_percent, 100}}
        self._times = Table(points)
        self._factors = {row: latency.factors(row, sm_percent) for row in self._rows} if isinstance(latency, Varying) else {}

    def run_ms(self, rows: int, sm_percent: int) -> float:
        """`Latency`."""
        return self._times.run_ms(rows, sm_percent)

    def factors(self, rows: int, sm_percent: int) -> Sequence[float]:
        """`Varying`, for batches of its share."""
        return self._factors[max(row for row in self._rows if row <= rows)] if self._factors else ()


@dataclass(frozen=True, slots=True)
class Wanted:
    """A function to plan for. `function.share` holds the SMs that the plan gives it, `times` what it takes on them."""

    declared: Declared
    known: Known
    function: Function
    times: Mapping[Level, Sampled]

    @property
    def key(self) -> str:
        """The function's key."""
        return self.function.key

    @property
    def guaranteed(self) -> bool:
        """Whether its objective counts; best-effort work must be answered, however late."""
        return self.function.cls is FunctionClass.LATENCY_SENSITIVE

    def run_ms(self, level: Level, rows: int = 1) -> float:
        """The run time of a batch on the SMs of its share."""
        return self.times[level].run_ms(rows, self.function.share.sm_percent)

    def work_ms(self, level: Level) -> float:
        """Whole-device time of one request in the batches that serve most."""
        rows = {1, self.function.max_batch}
        return min(self.run_ms(level, row) / row for row in rows) * self.function.share.sm_percent / 100

    def batched(self, max_batch: int) -> Wanted:
        """The same with shorter batches."""
        return _wanted(self.declared, self.known, msgspec.structs.replace(self.function, max_batch=max_batch))


def declared(document: object) -> Declared:
    """The function of an InferenceService of any runtime; InvalidFunction names the key."""
    root = document if isinstance(document, Mapping) else {}
    metadata, predictor = _part(root, "metadata"), _part(_part(root, "spec"), "predictor")
    notes = {PREFIX + "catalog": "-", **_part(metadata, "annotations")}
    model = {"model": {"modelFormat": {"name": "sluice-catalog"}}}
    function = from_inference_service({**root, "metadata": {**metadata, "annotations": notes}, "spec": {"predictor": model}})
    if not predictor:
        raise InvalidFunction("must be a mapping that says something", key="spec.predictor", value=None)
    replicas = predictor.get("minReplicas", 1)
    if isinstance(replicas, bool) or not isinstance(replicas, int) or replicas < 0:
        raise InvalidFunction("must be a whole number", key="spec.predictor.minReplicas", value=replicas)
    return Declared(function, replicas, sum(_gpus(predictor)) or 1)


def wanted(declared: Declared, known: Known, slo_ms: float | None = None) -> Wanted:
    """A function with the share of the SMs that the plan gives it: the smallest on which neither one row nor a full batch takes notably longer."""
    function = declared.function
    if slo_ms is not None:
        function = msgspec.structs.replace(function, slo=Slo(round(slo_ms * MS), function.slo.percentile))
    return _wanted(declared, known, function)


def _wanted(declared: Declared, known: Known, function: Function) -> Wanted:
    mean, batch = known.times["mean"], function.max_batch
    sm = next(sm for sm in SM_LEVELS if all(mean.run_ms(rows, sm) <= _NEARLY * mean.run_ms(rows, 100) for rows in (1, batch)))
    times: dict[Level, Sampled] = {}
    for level, below in zip(LEVELS, (None, *LEVELS), strict=False):
        times[level] = Sampled(known.times[level], batch, sm, times[below] if below else None)
    return Wanted(declared, known, msgspec.structs.replace(function, share=Share(sm, 1)), times)


def of_profile(profiles: Profiles, function: str, device: str | None, weight_bytes: int) -> Known:
    """From measurements: the estimate and the ends of its 90 % interval, with the spread of the batches that were measured."""
    return Known(weight_bytes, {level: profiles.latency(function, device, level) for level in LEVELS}, "measurements")


def of_range(low_ms: float, high_ms: float, weight_bytes: int, source: str, mean_ms: float | None = None) -> Known:
    """From a run time of one row that lies between two ends. Cautiously: it needs all SMs, and a batch is no faster than its rows one by one."""
    middle = (low_ms + high_ms) / 2 if mean_ms is None else mean_ms
    return Known(weight_bytes, {"low": Law(0, low_ms), "mean": Law(0, middle), "high": Law(0, high_ms)}, source)


def _part(whole: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    found = whole.get(key)
    return found if isinstance(found, Mapping) else {}


def _gpus(value: object) -> Iterator[int]:
    """GPUs of every container in a part of a document."""
    if isinstance(value, list):
        for item in value:
            yield from _gpus(item)
    elif isinstance(value, Mapping):
        for key, item in value.items():
            if key == "resources" and isinstance(item, Mapping):
                counts = [_part(item, kind).get(_GPU, 0) for kind in ("limits", "requests")]
                yield max(int(count) if str(count).isascii() and str(count).isdecimal() else 0 for count in counts)
            else:
                yield from _gpus(item)
