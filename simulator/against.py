"""A simulation held against the same scenario run for real: how far each figure is off.

Owns the record of a real run (the benchmark `fidelity` writes one) and the comparison. It runs neither of the two.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from rich.table import Table

from contracts.errors import InvalidArtifact, InvalidValue

_PERCENTILES = (50, 99)


class RealFunction(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one function's clients saw: ms of every answer after the warm-up, and requests without one."""

    function: str
    latency_ms: tuple[float, ...]
    failed: int


class Real(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A scenario's arrivals with this seed, sent to a node; GPU time and swaps are those of the whole run. `beside`: what else ran then, in words."""

    scenario: str
    seed: int
    functions: tuple[RealFunction, ...]
    gpu_s: float
    swaps: int
    beside: str = ""


class Line(msgspec.Struct, frozen=True):
    """One figure of both; `error_percent` is what the simulated one is off, None where the real one is 0."""

    figure: str
    real: float
    simulated: float
    error_percent: float | None

    @classmethod
    def of(cls, figure: str, real: float, simulated: float) -> Line:
        """With its error."""
        return cls(figure, real, simulated, 100 * (simulated / real - 1) if real else None)


def encode(real: Real) -> bytes:
    """As `read` takes it."""
    return msgspec.json.encode(real)


def read(path: Path, scenario: str, seeds: int) -> Real:
    """A record of this scenario, of one of so many seeds; InvalidArtifact names the file, InvalidValue what does not fit."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Real)
    except (OSError, msgspec.MsgspecError) as error:
        raise InvalidArtifact(f"is no record of a real run ({error})", key="--against", value=str(path)) from None
    if found.scenario != scenario:
        raise InvalidValue(f"{path} is of another scenario than {scenario!r}", key="--against", value=found.scenario)
    if not 0 <= found.seed < seeds:
        raise InvalidValue(f"{path} is of a seed that is not simulated: ask for more --seeds", key="--against", value=found.seed)
    return found


def compare(real: Real, figures: Mapping[str, float], functions: Sequence[Mapping[str, Any]]) -> list[Line]:
    """First all functions together, then each; from `report.figures` and `report.functions` of a simulation.

    InvalidValue when the two have not the same functions.
    """
    simulated = {str(row["function"]): row for row in functions}
    if sorted(simulated) != sorted(one.function for one in real.functions):
        raise InvalidValue(f"has not the functions that were simulated ({', '.join(simulated)})", key="--against", value=real.scenario)
    together = [ms for one in real.functions for ms in one.latency_ms]
    lines = list(_latencies("", together, figures))
    lines.append(Line.of("GPU seconds", real.gpu_s, figures["gpu_seconds_busy"]))
    lines.append(Line.of("swaps", real.swaps, figures["loads"]))
    lines.append(Line.of("answered", len(together), figures["answered"]))
    for one in real.functions:
        lines += _latencies(f"{one.function} ", one.latency_ms, simulated[one.function])
    return lines


def _latencies(of: str, real: Sequence[float], simulated: Mapping[str, float]) -> Iterator[Line]:
    for percent in _PERCENTILES if len(real) else ():
        exact = float(np.percentile(real, percent, method="inverted_cdf"))
        yield Line.of(f"{of}p{percent} ms", exact, float(simulated[f"total_p{percent}_ms"]))


def table(real: Real, lines: Sequence[Line]) -> Table:
    """For people."""
    shown = Table(title=f"{real.scenario}: simulated against real" + (f" (beside other load: {real.beside})" if real.beside else ""))
    for column in ("", "real", "simulated", "error %"):
        shown.add_column(column, justify="right" if column else "left")
    for line in lines:
        error = "-" if line.error_percent is None else f"{line.error_percent:+.1f}"
        shown.add_row(line.figure, f"{line.real:,.2f}", f"{line.simulated:,.2f}", error)
    return shown
