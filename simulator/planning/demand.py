"""Who is called when: a trace, or rates step by step, as the calls of a plan's functions; and the spells of it that matter.

Owns how names of a trace become functions and how rates become calls. A plan is made for the busiest spells (`busiest`): what holds there holds in
between. So calls are counted step by step for all of the time, and drawn one by one for a spell alone: a week of a fleet costs no more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt

from contracts.errors import InvalidValue
from contracts.units import S
from simulator.arrivals import Arrivals
from simulator.traces import read

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]
Times = npt.NDArray[np.int64]
_STEP_NS = 60 * S


@dataclass(frozen=True, slots=True)
class Demand:
    """How often each function is called in each step of the time that is looked at: `counts` (function x step), functions in the order of `keys`.

    `calls(seed, function, begin_ns, end_ns)` says when, ascending. The seed decides what the source leaves open, alike for any spell.
    """

    keys: tuple[str, ...]
    span_ns: int
    step_ns: int
    counts: Counts
    calls: Callable[[int, int, int, int], Times]
    notes: tuple[str, ...] = ()

    def mean_per_s(self, function: int) -> float:
        """Its mean rate."""
        return float(self.counts[function].sum() * S / self.span_ns)

    def peak_per_s(self, function: int) -> float:
        """The rate of its busiest step."""
        return float(self.counts[function].max() * S / min(self.step_ns, self.span_ns))


def of_trace(path: Path, keys: Sequence[str]) -> Demand:
    """A trace whose names are the functions' (name, or namespace/name); else its busiest stand for the functions, in the documents' order.

    InvalidValue when it has fewer names than there are functions.
    """
    trace = read(path, np.random.default_rng(0))
    places = {name: at for at, key in enumerate(keys) for name in (key, key.partition("/")[2])}
    if any(name in places for name in trace.names):
        missing = sorted(set(keys) - {keys[places[name]] for name in trace.names if name in places})
        notes = (f"never called in {path.name}: {', '.join(missing)}",) if missing else ()
        return of_calls(keys, trace.span_ns, lambda seed: _named(read(path, np.random.default_rng(seed)), places, keys), notes)
    if len(trace.names) < len(keys):
        raise InvalidValue(f"names {len(trace.names)} functions, none of them one of the {len(keys)} documents'", key="--trace", value=str(path))
    note = f"{path.name} names none of the functions: its {len(keys)} busiest stand for them, in the order of the documents"
    return of_calls(keys, trace.span_ns, lambda seed: by_function(read(path, np.random.default_rng(seed)).busiest(len(keys), keys)), (note,))


def of_calls(keys: Sequence[str], span_ns: int, drawn: Callable[[int], Sequence[Times]], notes: Sequence[str] = ()) -> Demand:
    """From the calls of each function by seed, all of them; in each step there are as many whatever the seed."""
    known = cache(drawn)
    step_ns = min(_STEP_NS, span_ns)
    steps = -(-span_ns // step_ns)
    counts = np.array([np.bincount(times // step_ns, minlength=steps) for times in known(0)], np.int64)

    def calls(seed: int, function: int, begin_ns: int, end_ns: int) -> Times:
        times = known(seed)[function]
        return times[slice(*np.searchsorted(times, (begin_ns, end_ns)))]

    return Demand(tuple(keys), span_ns, step_ns, counts, calls, tuple(notes))


def of_rates(keys: Sequence[str], per_s: Floats, step_ns: int, notes: Sequence[str] = ()) -> Demand:
    """From mean rates (function x step): whole calls in each step, no call lost or gained over time; when in its step a call comes is chance."""
    total = np.floor(np.cumsum(per_s * (step_ns / S), axis=1) + 0.5)
    counts = np.diff(total, axis=1, prepend=0).astype(np.int64)

    def calls(seed: int, function: int, begin_ns: int, end_ns: int) -> Times:
        steps = range(begin_ns // step_ns, -(-end_ns // step_ns))
        drawn = [
            step * step_ns + np.sort(np.random.default_rng((seed, function, step)).integers(0, step_ns, counts[function, step])) for step in steps
        ]
        times = np.concatenate([*drawn, np.empty(0, np.int64)])
        return times[(times >= begin_ns) & (times < end_ns)]

    return Demand(tuple(keys), step_ns * per_s.shape[1], step_ns, counts, calls, tuple(notes))


def by_function(arrivals: Arrivals) -> list[Times]:
    """When each function is called, ascending."""
    order = np.argsort(arrivals.function, kind="stable")
    ends = np.cumsum(np.bincount(arrivals.function, minlength=len(arrivals.names)))
    return np.split(arrivals.at_ns[order], ends[:-1])


def busiest(load: Floats, span_ns: int, step_ns: int, length_ns: int, count: int) -> list[int]:
    """Starts of the `count` spells of this length, apart from each other, with most of a load that is given by step; at most what there is."""
    if span_ns <= length_ns:
        return [0]
    width = max(1, length_ns // step_ns)
    sums = np.convolve(load, np.ones(width), "valid")
    starts: list[int] = []
    while len(starts) < count and sums.max() >= 0:
        at = int(sums.argmax())
        starts.append(min(at * step_ns, span_ns - length_ns))
        sums[max(0, at - width + 1) : at + width] = -1.0
    return starts


def active_part(counts: Counts, step_ns: int, linger_ns: int) -> float:
    """The fraction of the time in which a pod is up that goes when it was not called for so long, to a step."""
    active = counts > 0
    for _ in range(round(linger_ns / step_ns)):
        active[1:] |= active[:-1]
    return float(active.mean())


def _named(trace: Arrivals, places: dict[str, int], keys: Sequence[str]) -> list[Times]:
    found: list[list[Times]] = [[] for _ in keys]
    for name, times in zip(trace.names, by_function(trace), strict=True):
        if name in places:
            found[places[name]].append(times)
    return [np.sort(np.concatenate([*parts, np.empty(0, np.int64)])) for parts in found]
