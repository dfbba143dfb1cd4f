"""Who is called when: a trace, or rates by the minute, as arrivals of a plan's functions; and the spells of it that matter.

Owns how names of a trace become functions and how rates become counts. A plan is made for the busiest spells (`busiest`): what holds there holds
in between, and a day need not be simulated call by call.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from contracts.errors import InvalidValue
from contracts.units import S
from simulator.arrivals import Arrivals, of_counts, of_many
from simulator.traces import read

Floats = npt.NDArray[np.float64]
_BIN_NS = 10 * S


@dataclass(frozen=True, slots=True)
class Demand:
    """The arrivals of each function (in the order of the plan's keys) for one seed after another, and what is to be said of their source."""

    keys: tuple[str, ...]
    draw: Callable[[int], Arrivals]
    notes: tuple[str, ...] = ()


def of_trace(path: Path, keys: Sequence[str]) -> Demand:
    """A trace whose names are the functions' (name, or namespace/name); else its busiest stand for the functions, in the documents' order.

    InvalidValue when it has fewer names than there are functions.
    """
    names = read(path, np.random.default_rng(0)).names
    places = {name: at for at, key in enumerate(keys) for name in (key, key.partition("/")[2])}
    if any(name in places for name in names):
        missing = sorted(set(keys) - {keys[places[name]] for name in names if name in places})
        notes = (f"never called in {path.name}: {', '.join(missing)}",) if missing else ()
        return Demand(tuple(keys), lambda seed: _named(read(path, np.random.default_rng(seed)), places, keys), notes)
    if len(names) < len(keys):
        raise InvalidValue(f"names {len(names)} functions, none of them one of the {len(keys)} documents'", key="--trace", value=str(path))
    note = f"{path.name} names none of the functions: its {len(keys)} busiest stand for them, in the order of the documents"
    return Demand(tuple(keys), lambda seed: read(path, np.random.default_rng(seed)).busiest(len(keys), keys), (note,))


def of_rates(keys: Sequence[str], per_s: Floats, step_ns: int, notes: Sequence[str] = ()) -> Demand:
    """From mean rates (function x step): whole calls in each step, no call lost or gained over time; when in its step a call comes is chance."""
    calls = np.floor(np.cumsum(per_s * (step_ns / S), axis=1) + 0.5)
    counts = np.diff(calls, axis=1, prepend=0).astype(np.int64)
    starts = np.arange(per_s.shape[1], dtype=np.int64) * step_ns
    return Demand(tuple(keys), lambda seed: of_counts(keys, starts, step_ns, counts, np.random.default_rng(seed)), tuple(notes))


def by_function(arrivals: Arrivals) -> list[npt.NDArray[np.int64]]:
    """When each function is called, ascending."""
    order = np.argsort(arrivals.function, kind="stable")
    ends = np.cumsum(np.bincount(arrivals.function, minlength=len(arrivals.names)))
    return np.split(arrivals.at_ns[order], ends[:-1])


def busiest(at_ns: Sequence[npt.NDArray[np.int64]], work: Sequence[float], span_ns: int, length_ns: int, count: int) -> list[int]:
    """Starts of the `count` spells of this length, apart from each other, with most work (that of one call, by function); at most what there is."""
    if span_ns <= length_ns:
        return [0]
    bins = -(-span_ns // _BIN_NS)
    load = np.zeros(bins)
    for times, each in zip(at_ns, work, strict=True):
        load += each * np.bincount(times // _BIN_NS, minlength=bins)
    width = max(1, length_ns // _BIN_NS)
    sums = np.convolve(load, np.ones(width), "valid")
    starts: list[int] = []
    while len(starts) < count and sums.max(initial=-1.0) >= 0:
        at = int(sums.argmax())
        starts.append(min(at * _BIN_NS, span_ns - length_ns))
        sums[max(0, at - width + 1) : at + width] = -1.0
    return starts


def active_part(at_ns: npt.NDArray[np.int64], span_ns: int, linger_ns: int) -> float:
    """The fraction of the time in which a pod is up that goes when it was not called for so long."""
    if not len(at_ns):
        return 0.0
    ends = np.minimum(at_ns + linger_ns, span_ns)
    return float(np.minimum(np.diff(at_ns, append=span_ns), ends - at_ns).sum() / span_ns)


def _named(trace: Arrivals, places: dict[str, int], keys: Sequence[str]) -> Arrivals:
    at_ns: list[list[npt.NDArray[np.int64]]] = [[] for _ in keys]
    for name, times in zip(trace.names, by_function(trace), strict=True):
        if name in places:
            at_ns[places[name]].append(times)
    return of_many(keys, [np.concatenate([*parts, np.empty(0, np.int64)]) for parts in at_ns], trace.span_ns)
