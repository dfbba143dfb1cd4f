"""Functions to plan for that need no model: their run times are laws."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from contracts.functions import Function, FunctionClass, ModelFormat, ModelRef, Slo
from contracts.units import GIB, MIB, MS, S
from simulator.generators import poisson
from simulator.planning.capacity import Capacity, Machine, Spells
from simulator.planning.demand import Demand, Times, of_calls
from simulator.planning.wanted import Declared, Wanted, of_range, wanted

SPAN_NS = 60 * S
MACHINE = Machine(memory_bytes=4 * GIB, link_gb_per_s=12.0, around_ms=0.0)


def function(
    name: str,
    run_ms: tuple[float, float] = (10.0, 10.0),
    slo_ms: float = 200.0,
    weights: int = 200 * MIB,
    *,
    replicas: int = 1,
    gpus: int = 1,
    max_batch: int = 8,
    cls: FunctionClass = FunctionClass.LATENCY_SENSITIVE,
) -> Wanted:
    found = Function(name, ModelRef(ModelFormat.CATALOG, name), cls=cls, slo=Slo(int(slo_ms * MS)), max_batch=max_batch)
    return wanted(Declared(found, replicas, gpus), of_range(*run_ms, weights, "a test"))


def demand(functions: Sequence[Wanted], per_s: Sequence[float], first_seed: int = 0, span_ns: int = SPAN_NS) -> Demand:
    """Poisson arrivals."""

    def drawn(seed: int) -> list[Times]:
        chance = np.random.default_rng((first_seed, seed))
        return [poisson(rate, span_ns, chance) for rate in per_s]

    return of_calls([one.key for one in functions], span_ns, drawn)


def capacity(functions: Sequence[Wanted], per_s: Sequence[float], machine: Machine = MACHINE) -> Capacity:
    return Capacity(demand(functions, per_s), machine, Spells(SPAN_NS, 1))
