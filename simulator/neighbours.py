"""How much a batch is slowed by those that run beside it: the factors of `sluice profile interference`, for the functions of a scenario.

Owns the demands of the scenario's functions. The model of them, its fit and its file are `profiler.interference`'s.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

from contracts.errors import InvalidValue, SluiceError
from profiler.interference import Demand, Interference, load
from simulator.latency import Latency


class Neighbours:
    """Factors of pairs that were measured (`simulator.node.Beside`).

    A function's demand on its device was measured at some shares of the SMs; at others it does the same work in the time that it takes there.
    """

    def __init__(self, interference: Interference, latencies: Mapping[str, Latency], models: Mapping[str, str]) -> None:
        """`models`: each function's name in the file, with or without its namespace. InvalidValue for one that is not there."""
        self._interference = interference
        self._latencies = latencies
        self._measured = {function: _measured(interference, model) for function, model in models.items()}
        self._demands: dict[tuple[str, int], Demand] = {}
        self._extra: dict[tuple[str, int, str, int], float] = {}

    @classmethod
    def read(cls, path: Path, latencies: Mapping[str, Latency], models: Mapping[str, str]) -> Neighbours:
        """From a file; InvalidValue names it."""
        try:
            return cls(load(path), latencies, models)
        except (OSError, SluiceError) as error:
            raise InvalidValue(f"cannot be used ({error})", key="interference", value=str(path)) from None

    def slowdown(self, function: str, sm_percent: int, others: Iterable[tuple[str, int]]) -> float:
        """How many times as long a batch takes beside batches of these functions on so many percent of the SMs."""
        # The model is linear in what all neighbours demand together, so that pairs can be remembered and added.
        return 1.0 + sum(self._pair(function, sm_percent, other, other_sm) for other, other_sm in others)

    def _pair(self, function: str, sm_percent: int, other: str, other_sm: int) -> float:
        key = (function, sm_percent, other, other_sm)
        found = self._extra.get(key)
        if found is None:
            slowdown = self._interference.slowdown(self._demand(function, sm_percent), self._demand(other, other_sm))
            found = self._extra[key] = slowdown - 1.0
        return found

    def _demand(self, function: str, sm_percent: int) -> Demand:
        key = (function, sm_percent)
        found = self._demands.get(key)
        if found is None:
            measured, latency = self._measured[function], self._latencies[function]
            near = min(measured, key=lambda sm: abs(sm - sm_percent))
            faster = latency.run_ms(1, near) / latency.run_ms(1, sm_percent)
            found = self._demands[key] = Demand(measured[near].memory * faster, measured[near].compute * faster)
        return found


def _measured(interference: Interference, model: str) -> dict[int, Demand]:
    """SM percentage -> demand."""
    found = {pair.sm_percent: pair.demand for pair in interference.pairs if model in (pair.function, pair.function.partition("/")[2])}
    if not found:
        known = ", ".join(sorted({pair.function for pair in interference.pairs}))
        raise InvalidValue(f"was not measured beside others (there are: {known})", key="function", value=model)
    return found
