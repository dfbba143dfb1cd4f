"""How long a batch runs, by rows and SM share: a simple law, or a table that was measured and is read between its points.

All of them give the time on the SMs alone: what a quota costs is decided by the simulated node agent, not looked up. Times measured on a device of
one's own are `simulator.measured`'s.
"""

from __future__ import annotations

import csv
import gzip
import math
import random
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol, runtime_checkable

from contracts.errors import InvalidArtifact, InvalidValue
from contracts.units import MS


class Latency(Protocol):
    """One model's run time."""

    def run_ms(self, rows: int, sm_percent: int) -> float:
        """Mean GPU time of one warm batch, alone on these SMs."""


@runtime_checkable
class Varying(Latency, Protocol):
    """A latency that differs from batch to batch."""

    def factors(self, rows: int, sm_percent: int) -> Sequence[float]:
        """What a batch takes over the mean: equally likely values, 1 on average."""


class Law:
    """`fixed_ms` whatever the share (launches, host), and `row_ms` for each row on all SMs.

    One row can fill `needs_sm` percent of the SMs: on more it is no faster, until more rows fill them too.
    """

    def __init__(self, fixed_ms: float, row_ms: float, needs_sm: float = 100.0) -> None:
        self._fixed_ms = fixed_ms
        self._row_ms = row_ms
        self._needs_sm = needs_sm

    def run_ms(self, rows: int, sm_percent: int) -> float:
        """`Latency`."""
        filled = min(100.0, self._needs_sm * rows)
        return self._fixed_ms + self._row_ms * rows * max(1.0, filled / sm_percent)


class Table:
    """Measured times (rows, SM percent) -> ms on a full grid; logarithms are read linearly between points, outside time is in proportion."""

    def __init__(self, points: Mapping[tuple[int, int], float]) -> None:
        self._rows = sorted({rows for rows, _ in points})
        self._sm = sorted({sm for _, sm in points})
        missing = [(rows, sm) for rows in self._rows for sm in self._sm if (rows, sm) not in points]
        if missing or not points:
            raise InvalidValue("the table has no time for a batch and SM share", key="batch, sm_percent", value=missing[:1])
        wrong = [time for time in points.values() if not 0 < time < math.inf]
        if wrong:
            raise InvalidValue("must be greater than 0", key="latency_ms", value=wrong[0])
        self._log = {point: math.log(time) for point, time in points.items()}

    def run_ms(self, rows: int, sm_percent: int) -> float:
        """`Latency`."""
        low, high, weight, beyond = _between(self._rows, rows)
        at_low, at_high = self._at(low, sm_percent), self._at(high, sm_percent)
        return math.exp(at_low + weight * (at_high - at_low)) * max(1.0, beyond)

    def _at(self, rows: int, sm_percent: int) -> float:
        low, high, weight, beyond = _between(self._sm, sm_percent)
        log_ms = self._log[rows, low] + weight * (self._log[rows, high] - self._log[rows, low])
        return log_ms - math.log(min(1.0, beyond))


def _between(axis: list[int], value: int) -> tuple[int, int, float, float]:
    """The neighbours of a value on an axis, its place between them on a logarithmic scale, and how many times it lies beyond the ends."""
    inside = min(max(value, axis[0]), axis[-1])
    at = bisect_left(axis, inside)
    high = axis[at]
    low = high if high == inside else axis[at - 1]
    weight = math.log(inside / low) / math.log(high / low) if high > low else 0.0
    return low, high, weight, value / inside


class RunTimes:
    """The functions of a scenario, at their means (`simulator.node.RunTimes`); what was asked for once is remembered."""

    def __init__(self, latencies: Mapping[str, Latency]) -> None:
        self._latencies = latencies
        self._known: dict[tuple[str, int, int], int] = {}

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        """Mean GPU time of one warm batch."""
        key = (function, rows, sm_percent)
        found = self._known.get(key)
        if found is None:
            found = self._known[key] = max(1, int(self._latencies[function].run_ms(rows, sm_percent) * MS))
        return found


class Draws(RunTimes):
    """The same, each batch with its own time where the latency varies: drawn from a generator with this seed."""

    def __init__(self, latencies: Mapping[str, Latency], seed: int) -> None:
        super().__init__(latencies)
        self._choose = random.Random(seed).random
        self._drawn: dict[tuple[str, int, int], tuple[int, ...]] = {}

    def run_ns(self, function: str, rows: int, sm_percent: int) -> int:
        """GPU time of this warm batch."""
        key = (function, rows, sm_percent)
        found = self._drawn.get(key)
        if found is None:
            found = self._drawn[key] = self._possible(*key)
        return found[int(self._choose() * len(found))] if len(found) > 1 else found[0]

    def _possible(self, function: str, rows: int, sm_percent: int) -> tuple[int, ...]:
        mean_ns, latency = super().run_ns(function, rows, sm_percent), self._latencies[function]
        factors = latency.factors(rows, sm_percent) if isinstance(latency, Varying) else ()
        return tuple(max(1, round(mean_ns * factor)) for factor in factors) or (mean_ns,)


def tables(path: Path, quota_percent: int = 100) -> dict[str, Table]:
    """Every model of a CSV with the columns model, batch, sm_percent, quota_percent, latency_ms, at this quota; InvalidArtifact names the file."""
    points: dict[str, dict[tuple[int, int], float]] = {}
    try:
        with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
            for row in csv.DictReader(file):
                if int(row["quota_percent"]) == quota_percent:
                    points.setdefault(row["model"], {})[int(row["batch"]), int(row["sm_percent"])] = float(row["latency_ms"])
        if not points:
            raise InvalidValue(f"has no times at a quota of {quota_percent} %")
        return {model: Table(times) for model, times in points.items()}
    except (OSError, EOFError, KeyError, TypeError, ValueError, InvalidValue) as error:
        raise InvalidArtifact(f"is no latency table ({type(error).__name__}: {error})", key="table", value=str(path)) from None
