"""What a request costs the simulator and the node agent's state, in calls instead of seconds: it does not grow with the number of functions."""

from __future__ import annotations

import sys
from types import FrameType

import numpy as np

from contracts.functions import Function, ModelFormat, ModelRef, Share, Slo
from contracts.units import GIB, MIB, MS, S
from nodeagent.events import FunctionDeclared, FunctionSpec
from nodeagent.settings import DeviceSpec
from simulator.arrivals import Arrivals
from simulator.engine import Engine
from simulator.front import Fronts
from simulator.node import Hardware, SimulatedNode

GAP_NS = 5 * MS
COUNTED = 500
DEVICES = 8


class Fixed:
    """Every row takes as long."""

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        """`RunTimes`."""
        return 7 * MS * rows


def calls_per_request(functions: int) -> float:
    """Python and C functions that are called for a request, once every function has been called once."""
    engine = Engine()
    node = SimulatedNode(engine, [DeviceSpec(f"gpu:{n}", 16 * GIB, 10**10) for n in range(DEVICES)], Fixed(), Hardware())
    every = [
        Function(f"f{n}", ModelRef(ModelFormat.CATALOG, "none"), share=Share(100, DEVICES * 9000 // functions), slo=Slo(100 * MS))
        for n in range(functions)
    ]
    fronts = Fronts(engine, every, [node] * functions)
    for function in every:
        node.handle(FunctionDeclared(FunctionSpec(function.key, function.cls, function.share, function.slo, 10 * MIB, 7 * MS)))
    engine.settle(10 * S)
    requests = np.arange(functions + COUNTED)
    arrivals = Arrivals(tuple(function.key for function in every), requests * GAP_NS, (requests % functions).astype(np.int32), len(requests) * GAP_NS)
    calls = 0

    def count(frame: FrameType, event: str, argument: object) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    engine.at(10 * S + functions * GAP_NS, sys.setprofile, count)
    try:
        engine.run(arrivals, fronts.arrive, start_ns=10 * S)
    finally:
        sys.setprofile(None)
    assert sum(record.answered for record in fronts.records.values()) == len(requests)
    assert all(record.cold == 1 for record in fronts.records.values()), "from then on the weights are there"
    return calls / COUNTED


def test_ten_times_the_functions_cost_no_more_calls_for_a_request() -> None:
    few, many = calls_per_request(200), calls_per_request(2000)
    assert many < 1.05 * few
    assert few < 150
