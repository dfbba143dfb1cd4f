"""What a plan is made for: functions as InferenceService documents declare them, and what is known of their models.

Owns which facts of a document count (name, namespace, Sluice's annotations, replicas, GPUs) and the three levels of every run time: the lower end,
the middle and the upper end of what is believed. A plan never loads a model, so documents for any runtime are taken.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from contracts.errors import InvalidFunction
from contracts.functions import PREFIX, Function, FunctionClass, Share, Slo, from_inference_service
from contracts.units import MS
from profiler.profiles import Profile
from simulator.latency import Latency, Law, Table

Level = Literal["low", "mean", "high"]
LEVELS: tuple[Level, ...] = ("low", "mean", "high")
SM_LEVELS = (25, 50, 75, 100)
"""Shares of the SMs that a plan gives: few, since every size takes a lane of its own on each device."""
_NEARLY = 1.1
_GPU = "nvidia.com/gpu"
_TABLE_SM = (5, 10, 15, 20, 25, 30, 40, 50, 60, 75, 90, 100)


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


@dataclass(frozen=True, slots=True)
class Wanted:
    """A function to plan for. `function.share` is what the plan gives it."""

    declared: Declared
    known: Known
    function: Function

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
        return self.known.times[level].run_ms(rows, self.function.share.sm_percent)

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
    metadata, spec = _part(root, "metadata"), _part(root, "spec")
    predictor = _part(spec, "predictor")
    if not predictor:
        raise InvalidFunction("must be a mapping", key="spec.predictor", value=spec.get("predictor"))
    notes = {PREFIX + "catalog": "-", **_part(metadata, "annotations")}
    model = {"model": {"modelFormat": {"name": "sluice-catalog"}}}
    function = from_inference_service({**root, "metadata": {**metadata, "annotations": notes}, "spec": {"predictor": model}})
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
    times = known.times["mean"]
    rows = (1, function.max_batch)
    sm = next(sm for sm in SM_LEVELS if all(times.run_ms(row, sm) <= _NEARLY * times.run_ms(row, 100) for row in rows))
    return Wanted(declared, known, msgspec.structs.replace(function, share=Share(sm, 1)))


def of_profile(profile: Profile, max_batch: int) -> Known:
    """From measurements: the estimate of a batch that has its SMs all of the time, with the estimate's 90 % interval."""
    rows = sorted({1 << power for power in range(max_batch.bit_length())} | {max_batch})
    grid = [(row, sm) for row in rows for sm in _TABLE_SM]
    found = profile.estimate.predict([row for row, _ in grid], [sm for _, sm in grid], 100.0)
    ends = {"low": found.low_ms, "mean": found.mean_ms, "high": found.high_ms}
    times = {level: Table(dict(zip(grid, ends[level].tolist(), strict=True))) for level in LEVELS}
    weight_bytes = max(point.device_bytes for point in profile.points)
    return Known(weight_bytes, times, f"{len(profile.points)} measurements on {profile.device}")


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
