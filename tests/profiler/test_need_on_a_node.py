"""What `need` promises, held against the predictor's own batcher and the node agent's own state in virtual time, where the estimate is exact."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from contracts.functions import Function, ModelFormat, ModelRef, Share, Slo
from contracts.units import MIB, MS, S
from nodeagent.events import FunctionDeclared, FunctionSpec
from nodeagent.settings import DeviceSpec
from profiler.need import FRONT_MS, Objective, Option, need
from simulator.arrivals import of_one
from simulator.engine import Engine
from simulator.front import Fronts
from simulator.generators import poisson
from simulator.node import Hardware, SimulatedNode

START_NS = 20 * S
MINUTES = 20


class Exact:
    """A model's true run times, as the simulated device's and as an estimate without an interval: `fixed_ms` and `row_ms` a row at all SMs."""

    def __init__(self, fixed_ms: float, row_ms: float) -> None:
        self.fixed_ms, self.row_ms = fixed_ms, row_ms

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        return round((self.fixed_ms + self.row_ms * rows) * 100 / sm_percent * MS)

    def predict(self, batch: Any, sm: Any, quota: Any) -> Any:
        mean = (self.fixed_ms + self.row_ms * np.asarray(batch)) * 100 / np.asarray(sm) * 100 / np.asarray(quota)
        return SimpleNamespace(mean_ms=mean, low_ms=mean, high_ms=mean)


class Recorder:
    """In a `Record`'s place: latencies in ms in the order of the answers; no request is refused."""

    def __init__(self) -> None:
        self.latency_ms: list[float] = []

    def answer(self, total_ns: int, *_: int, cold: bool) -> None:
        self.latency_ms.append(total_ns / MS)

    def reject(self, reason: str, requests: int = 1) -> None:
        raise AssertionError(reason)


def served(model: Exact, option: Option, objective: Objective, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """Latencies (n,) in ms, with what the front takes, of twenty minutes of random arrivals under the share and nothing borrowed."""
    monkeypatch.setattr("simulator.front.Record", lambda _: Recorder())
    engine = Engine()
    node = SimulatedNode(engine, [DeviceSpec("gpu:0", 64 * MIB)], model, Hardware())
    share = Share.of(option.sm_percent, option.quota_percent, option.quota_percent)
    slo = Slo(round(objective.latency_ms * MS), objective.percentile)
    function = Function("f", ModelRef(ModelFormat.CATALOG, "none"), share=share, slo=slo, max_batch=option.max_batch)
    fronts = Fronts(engine, [function], [node])
    node.handle(FunctionDeclared(FunctionSpec(function.key, function.cls, share, slo, MIB, 10 * MS)))
    engine.settle(START_NS // 2)
    span_ns = 60 * MINUTES * S
    arrivals = poisson(objective.rate_per_s, span_ns, np.random.default_rng(1)) + START_NS
    engine.run(of_one("f", arrivals, START_NS + span_ns), fronts.arrive)
    recorder: Any = fronts.records[function.key]
    return np.array(recorder.latency_ms) + FRONT_MS


LOADS = {
    "a sixth of the device, eight runs' time": (Exact(10, 8), 8, 0.15),
    "half of the device": (Exact(10, 8), 8, 0.5),
    "most of the device, batches carry it": (Exact(10, 8), 15, 0.7),
    "an SLO of three runs": (Exact(2, 9), 3, 0.15),
}


@pytest.mark.parametrize(("model", "runs", "load"), LOADS.values(), ids=LOADS)
def test_the_share_that_is_needed_keeps_the_objective_minute_by_minute(
    model: Exact, runs: float, load: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_ms = model.run_ns("f", 1, 100) / MS
    objective = Objective(runs * run_ms, load * 1000 / run_ms)
    found = need(model, objective, max_batch=4)  # type: ignore[arg-type]
    assert found.verdict == "share"
    latency_ms = served(model, found.option, objective, monkeypatch)
    p99_ms = np.percentile(latency_ms, 99)
    assert p99_ms <= objective.latency_ms
    assert 0.8 < p99_ms / found.option.latency_ms < 1.1, "what is expected is what comes"
    minutes = np.array_split(latency_ms > objective.latency_ms, MINUTES)
    kept = [minute.sum() <= 0.01 * len(minute) for minute in minutes]
    assert np.mean(kept) >= 0.8, "nine of ten, but for chance"
