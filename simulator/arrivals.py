"""When which function is called: the one form that every trace and generator gives, and the ways to cut, scale and join it.

Open loop always: a request comes when it comes, however long those before it wait. Pure arrays; every random choice takes a generator with a seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from contracts.errors import InvalidValue
from contracts.units import S


@dataclass(frozen=True, slots=True)
class Arrivals:
    """`at_ns` (int64, ascending, from 0) and `function` (int32, an index into `names`), one entry a request; `span_ns` is how long was looked on."""

    names: tuple[str, ...]
    at_ns: npt.NDArray[np.int64]
    function: npt.NDArray[np.int32]
    span_ns: int

    def __len__(self) -> int:
        return len(self.at_ns)

    @property
    def per_s(self) -> float:
        """Requests a second, over all functions."""
        return len(self) * S / self.span_ns

    def between(self, start_ns: int, end_ns: int) -> Arrivals:
        """What comes from `start_ns` until before `end_ns`, which becomes the whole; InvalidValue if that is no part of it."""
        if not 0 <= start_ns < end_ns <= self.span_ns:
            raise InvalidValue(f"must lie within the {self.span_ns / S:g} s of the trace", key="from, until", value=(start_ns / S, end_ns / S))
        first, last = np.searchsorted(self.at_ns, (start_ns, end_ns))
        return Arrivals(self.names, self.at_ns[first:last] - start_ns, self.function[first:last], end_ns - start_ns)

    def faster(self, factor: float) -> Arrivals:
        """The same requests in 1/factor of the time."""
        _positive("speed", factor)
        return Arrivals(self.names, (self.at_ns / factor).astype(np.int64), self.function, max(1, int(self.span_ns / factor)))

    def at_rate(self, factor: float, chance: np.random.Generator) -> Arrivals:
        """`factor` times as many requests in the same time: each is kept by chance, or comes again, within a second of itself."""
        _positive("rate", factor)
        copies = np.full(len(self), int(factor)) + (chance.random(len(self)) < factor % 1)
        at_ns = np.repeat(self.at_ns, copies)
        again = np.ones(len(at_ns), bool)
        again[np.cumsum(copies)[copies > 0] - copies[copies > 0]] = False
        at_ns[again] += chance.integers(-S, S, int(again.sum()))
        return _sorted(self.names, np.clip(at_ns, 0, self.span_ns - 1), np.repeat(self.function, copies), self.span_ns)

    def busiest(self, count: int, names: Sequence[str] | None = None) -> Arrivals:
        """The `count` functions that are called most, under new names if they are given; InvalidValue if there are not so many."""
        if not 0 < count <= len(self.names):
            raise InvalidValue(f"must be from 1 to {len(self.names)}", key="functions", value=count)
        calls = np.bincount(self.function, minlength=len(self.names))
        chosen = np.argsort(-calls, kind="stable")[:count]
        index = np.full(len(self.names), -1, np.int32)
        index[chosen] = np.arange(count, dtype=np.int32)
        function = index[self.function]
        kept = function >= 0
        found = tuple(names) if names is not None else tuple(self.names[number] for number in chosen)
        return Arrivals(found, self.at_ns[kept], function[kept], self.span_ns)


def joined(parts: Sequence[Arrivals]) -> Arrivals:
    """All of them at once; functions of one name are one function."""
    names = tuple(dict.fromkeys(name for part in parts for name in part.names))
    numbers = {name: number for number, name in enumerate(names)}
    function = [np.array([numbers[name] for name in part.names], np.int32)[part.function] for part in parts]
    return _sorted(names, np.concatenate([part.at_ns for part in parts]), np.concatenate(function), max(part.span_ns for part in parts))


def of_one(name: str, at_ns: npt.NDArray[np.int64], span_ns: int) -> Arrivals:
    """The arrivals of a single function."""
    return _sorted((name,), at_ns, np.zeros(len(at_ns), np.int32), span_ns)


def of_many(names: Sequence[str], at_ns: Sequence[npt.NDArray[np.int64]], span_ns: int) -> Arrivals:
    """From the arrivals of each function."""
    function = np.repeat(np.arange(len(names), dtype=np.int32), [len(each) for each in at_ns])
    return _sorted(tuple(names), np.concatenate([*at_ns, np.empty(0, np.int64)]), function, span_ns)


def of_counts(
    names: Sequence[str], starts_ns: npt.NDArray[np.int64], step_ns: int, counts: npt.NDArray[np.int64], chance: np.random.Generator
) -> Arrivals:
    """From how often each function was called (a row of `counts`) in the steps that begin at `starts_ns`; when in its step a call comes is chance."""
    at_ns = [np.repeat(starts_ns, row) + chance.integers(0, step_ns, row.sum()) for row in counts]
    return of_many(names, at_ns, int(starts_ns[-1]) + step_ns)


def _sorted(names: tuple[str, ...], at_ns: npt.NDArray[np.int64], function: npt.NDArray[np.int32], span_ns: int) -> Arrivals:
    order = np.argsort(at_ns, kind="stable")
    return Arrivals(names, at_ns[order].astype(np.int64), function[order].astype(np.int32), span_ns)


def _positive(key: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise InvalidValue("must be greater than 0", key=key, value=value)
