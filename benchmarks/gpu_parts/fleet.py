"""A fleet of functions for one GPU, the load on it, and what counts as kept: the same for Sluice and for what stands beside it.

Owns the mix, the arrivals, the verdict on a span and the search for the greatest number of functions. Pure: serves nothing and knows no clock.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.node_parts.node import catalogued
from contracts.artifact import ALIGNMENT
from contracts.functions import Function, Slo
from models import catalogue, networks
from models.samples import sample_inputs
from predictor.segment import Array

INPUTS = 2
"""Different inputs that requests for one kind of model carry."""
_OUT_PERCENT = 2


@dataclass(frozen=True, slots=True)
class Kind:
    """Functions of one architecture: a source of the catalogue with a place for the seed, the objective, the weight bytes, the tokens of a text."""

    name: str
    source: str
    slo: Slo
    nbytes: int
    tokens: int = 0


@dataclass(frozen=True, slots=True)
class Fleet:
    """Functions in an order in which every beginning has about the mix of the whole; `kinds` by function name."""

    functions: tuple[Function, ...]
    kinds: Mapping[str, Kind]

    @property
    def nbytes(self) -> int:
        """All weights."""
        return sum(kind.nbytes for kind in self.kinds.values())

    def count(self, kind: Kind) -> int:
        """Functions of a kind."""
        return sum(each == kind for each in self.kinds.values())


@dataclass(frozen=True, slots=True)
class Request:
    """One request: when it is due (seconds from the beginning), for which function of the fleet, and with which of its kind's inputs."""

    due_s: float
    function: int
    input: int


@dataclass(frozen=True, slots=True)
class Served:
    """What became of a request: ms from when it was due until its answer, infinite without one; how its answer compares with the reference."""

    request: Request
    latency_ms: float
    verdict: str
    cold: bool


@dataclass(slots=True)
class Point:
    """`functions` at a rate: what was served of it, and how many functions were out of their SLO; `broken_off`: so many that it was not ended."""

    functions: int
    rate: float
    served: list[Served] = field(default_factory=list)
    out: int = 0
    broken_off: bool = False


def weight_bytes(source: str) -> int:
    """What a model of the catalogue takes of a device: each tensor aligned."""
    module = networks.construct(catalogue.parse(source).config)
    return sum(-(-tensor.nbytes // ALIGNMENT) * ALIGNMENT for tensor in (*module.parameters(), *module.buffers()))


def mix(nbytes: Sequence[int], functions: int, budget_bytes: int) -> tuple[int, ...]:
    """How many of each kind, the lightest first: as many of each if all fit into the budget; else fewer heavy ones, and at last fewer in all."""
    lightest, *heavier = nbytes
    functions = min(functions, budget_bytes // lightest)
    beyond = sum(one - lightest for one in heavier)
    each = min(functions // len(nbytes), (budget_bytes - functions * lightest) // beyond) if heavier else 0
    return (functions - each * len(heavier), *[each] * len(heavier))


def fleet(kinds: Sequence[Kind], counts: Sequence[int]) -> Fleet:
    """Function i of a kind has the weights of seed i + 1."""
    placed = sorted(((number + 0.5) / count, rank, number) for rank, count in enumerate(counts) for number in range(count))
    functions, by_name = [], {}
    for _, rank, number in placed:
        kind = kinds[rank]
        function = Function(f"{kind.name}-{number}", catalogued(kind.source.format(number + 1)), slo=kind.slo, max_batch=1)
        functions.append(function)
        by_name[function.name] = kind
    return Fleet(tuple(functions), by_name)


def arrivals(functions: int, rate_per_minute: float, span_s: float, seed: int) -> list[Request]:
    """Poisson arrivals, independent for each function, in the order of time."""
    chance = random.Random(f"{seed} {functions} {rate_per_minute}")
    per_s = functions * rate_per_minute / 60
    found, due_s = [], chance.expovariate(per_s)
    while due_s < span_s:
        found.append(Request(due_s, chance.randrange(functions), chance.randrange(INPUTS)))
        due_s += chance.expovariate(per_s)
    return found


def inputs(kind: Kind) -> list[dict[str, Array]]:
    """What requests for a kind carry, one row each; texts are as long as the kind says."""
    parts = [sample_inputs(catalogued(kind.source.format(1)), 1, seed) for seed in range(INPUTS)]
    return [{name: np.resize(array, (1, kind.tokens)) if kind.tokens else array for name, array in part.items()} for part in parts]


class Keeper:
    """Counts, while requests are answered, the functions that can no longer keep their SLO over a span whose requests are known."""

    def __init__(self, fleet: Fleet, functions: int, requests: Sequence[Request]) -> None:
        self._slos = [function.slo for function in fleet.functions[:functions]]
        asked = np.bincount([request.function for request in requests], minlength=functions)
        self._may_be_late = [int(count * (100 - slo.percentile) / 100 + 1e-9) for count, slo in zip(asked, self._slos, strict=True)]
        self._late = [0] * functions
        self.out = 0

    @property
    def holds(self) -> bool:
        """Whether enough functions can still be in SLO: 98 %.

        Over some ten requests a function's P98 is its slowest request. If all of a fleet's functions had just the P98 that is asked for, a fifth of
        them would have one request in ten late; 2 % of the functions is a much stricter rule, and yet not that of a single hiccup.
        """
        return 100 * self.out <= _OUT_PERCENT * len(self._slos)

    def add(self, served: Served) -> None:
        """A request was answered, or will not be."""
        number = served.request.function
        if served.latency_ms > self._slos[number].latency_ns / 1e6:
            self._late[number] += 1
            self.out += self._late[number] == self._may_be_late[number] + 1


class Search:
    """The greatest number of functions that hold, on a grid; begins with `guess` and halves what is left."""

    def __init__(self, step: int, most: int, guess: int) -> None:
        self._step = step
        self.least, self._fails = 0, most + step
        self._guess = guess

    @property
    def most(self) -> int:
        """No more than so many hold, as far as is known."""
        return self._fails - self._step

    @property
    def next(self) -> int | None:
        """The number to try; None when it is found."""
        if self.least >= self.most:
            return None
        if self.least < self._guess <= self.most:
            return self._guess
        return self.least + -(-(self.most - self.least) // self._step // 2) * self._step

    def told(self, functions: int, holds: bool) -> None:
        """The outcome of a try."""
        if holds:
            self.least = max(self.least, functions)
        else:
            self._fails = min(self._fails, functions)
