"""500 functions on one GPU with memory for a tenth of them: the greatest number that keeps its SLO, beside keep-alive and load on demand.

A benchmark of its own, since it takes up to 9.5 minutes. SLUICE_DEVICE names another device than cuda:0, SLUICE_RATES other rates than 10,20,40
requests a minute and function, SLUICE_SM_PERCENT another size of lanes than 50 % (two run at once: one batch of one row hardly fills a GPU),
SLUICE_LIMIT_S another time than 500 s: what was not reached by then is left out, or said as a bound. The weights lie in /dev/shm: where that is small
(`mount -o remount,size=100G /dev/shm` makes it larger), fewer functions are of the heavy kinds, and then fewer in all.
"""

from __future__ import annotations

import asyncio
import math
import os

import numpy as np

from benchmarks.gpu_parts import functions
from benchmarks.gpu_parts.answers import NEAR, SAME
from benchmarks.gpu_parts.baselines import POLICIES
from benchmarks.gpu_parts.fleet import Kind, Point, weight_bytes
from benchmarks.result import Metric, Result
from contracts.functions import Slo
from contracts.units import MS

_SOURCES = {"resnet50": "resnet50?seed={}", "resnet152": "resnet152?seed={}", "bert": "bert-base?seed={}"}
_VISION, _TEXT = Slo(80 * MS, 98.0), Slo(200 * MS, 98.0)
_TOKENS = 128


def run(quick: bool) -> Result:
    """One search for each system and rate."""
    limit_s = float(os.environ.get("SLUICE_LIMIT_S", "240" if quick else "500"))
    rates = tuple(float(rate) for rate in os.environ.get("SLUICE_RATES", "10" if quick else "10,20,40").split(","))
    sm_percent = int(os.environ.get("SLUICE_SM_PERCENT", "50"))
    size = functions.Size(os.environ.get("SLUICE_DEVICE", "cuda:0"), kinds(), 100 if quick else 500, rates, limit_s, sm_percent)
    return Result(metrics(size, asyncio.run(functions.measure(size))), seeds=(size.seed,))


def kinds() -> tuple[Kind, ...]:
    """The issue's, the lightest first."""
    return tuple(
        Kind(name, source, _TEXT if name == "bert" else _VISION, weight_bytes(source.format(1)), _TOKENS if name == "bert" else 0)
        for name, source in _SOURCES.items()
    )


def metrics(size: functions.Size, found: functions.Found) -> dict[str, Metric]:
    """The figures; a search that time cut short also says what it could not rule out (`_at_most`)."""
    named = {f"functions_of_{kind.name}": Metric(found.fleet.count(kind), "functions") for kind in size.kinds}
    named |= {
        "weights_gb": Metric(found.fleet.nbytes / 1e9, "GB"),
        "device_gb": Metric(found.device_bytes / 1e9, "GB"),
        "sm_percent": Metric(found.sm_percent, "%"),
        "load_s": Metric(found.load_s, "s"),
        "searches_broken": Metric(found.broken, "searches", 0),
    }
    for (system, rate), kept in found.kept.items():
        name = f"{system}_{rate:g}_per_minute"
        named[f"{name}_kept"] = Metric(kept.least, "functions")
        if kept.most > kept.least:
            named[f"{name}_kept_at_most"] = Metric(kept.most, "functions")
        if kept.best is not None:
            named |= _of_point(name, kept.best, size, found)
    for rate in size.rates:
        for policy in POLICIES:
            ours, theirs = (found.kept.get((system, rate)) for system in (functions.SLUICE, policy))
            if ours and theirs and theirs.least and theirs.least == theirs.most:
                named[f"times_{policy}_{rate:g}_per_minute"] = Metric(ours.least / theirs.least, "times")
    for system, served in found.served.items():
        verdicts = [each.verdict for each in served]
        wrong = sum(verdict == "wrong" for verdict in verdicts)
        right = sum(verdict in (SAME, NEAR) for verdict in verdicts)
        named |= {
            f"{system}_answers": Metric(right + wrong, "answers"),
            f"{system}_wrong": Metric(wrong, "answers", 0),
            f"{system}_failed": Metric(len(verdicts) - right - wrong, "requests", 0),
            f"{system}_same_bits_percent": Metric(100 * verdicts.count(SAME) / max(1, right + wrong), "%"),
        }
    return named


def _of_point(name: str, point: Point, size: functions.Size, found: functions.Found) -> dict[str, Metric]:
    """The fleet's own percentiles at the greatest number that held, and how many requests needed a swap."""
    named = {f"{name}_out_of_slo": Metric(point.out, "functions")}
    named |= {f"{name}_swapped_percent": Metric(100 * sum(each.cold for each in point.served) / max(1, len(point.served)), "%")}
    for kind in size.kinds:
        ms = [each.latency_ms for each in point.served if found.fleet.kinds[found.fleet.functions[each.request.function].name] == kind]
        if ms:
            named[f"{name}_{kind.name}_p98_ms"] = Metric(_nearest_rank(ms, 98), "ms", kind.slo.latency_ns / MS)
            named[f"{name}_{kind.name}_p50_ms"] = Metric(_nearest_rank(ms, 50), "ms")
    return named


def _nearest_rank(values: list[float], percentile: float) -> float:
    """A value that was measured, never one between two."""
    return float(np.sort(values)[max(0, math.ceil(percentile / 100 * len(values)) - 1)])
