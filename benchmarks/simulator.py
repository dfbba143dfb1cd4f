"""The simulator: its speed, memory and fidelity, and what it says of the policies. `simulator_parts` measures, each part with targets of its own."""

from __future__ import annotations

from benchmarks.result import Metric, Result
from benchmarks.simulator_parts import fidelity, speed, studies

_PARTS = (speed, fidelity, studies)


def run(quick: bool) -> Result:
    """Measures all parts, one after another."""
    metrics: dict[str, Metric] = {}
    for part in _PARTS:
        metrics |= part.measure(quick)
    return Result(metrics, seeds=tuple(dict.fromkeys(part.SEED for part in _PARTS)))
