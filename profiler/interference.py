"""How much slower a function runs beside another on the same device: a factor from what both demand of its memory and of its SMs.

Owns the model, its fit and its file. Pure but for the file; it measures nothing (`profiler.pairs` does). The factor is linear in the neighbours'
demands, with coefficients that are not negative: more demand never makes a neighbour look cheaper, and nothing runs faster for having company. Least
squares under that constraint: Lawson and Hanson, Solving Least Squares Problems (1974), chapter 23.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import msgspec
import numpy as np
import numpy.typing as npt
from scipy.optimize import nnls

from contracts.errors import InvalidArtifact, InvalidValue
from profiler.device import DeviceFacts

VERSION = 1
_SHRINK = 1e-2
TERMS = ("memory", "compute", "memory x memory", "compute x compute")


class Demand(msgspec.Struct, frozen=True):
    """What a function takes of a device while it runs alone in its share: fractions of the memory bandwidth and FLOP/s that were measured there.

    Either may exceed 1 a little, for caches serve bytes that a graph counts as moved.
    """

    memory: float
    compute: float

    @classmethod
    def of(cls, nbytes: float, flops: float, gpu_ms: float, facts: DeviceFacts) -> Demand:
        """Of a run that moves so many bytes and does so many FLOPs in `gpu_ms`."""
        if not gpu_ms > 0 or nbytes < 0 or flops < 0:
            raise InvalidValue("a run takes time, and moves and computes no less than nothing", key="run", value=(nbytes, flops, gpu_ms))
        seconds = gpu_ms / 1e3
        return cls(nbytes / seconds / facts.memory_bytes_per_s, flops / seconds / facts.flops_per_s)


class Pair(msgspec.Struct, frozen=True):
    """One observation: `function` ran `slowdown` times as long beside `neighbour` as alone, each saturating its share of the SMs."""

    function: str
    neighbour: str
    sm_percent: int
    neighbour_sm_percent: int
    demand: Demand
    neighbour_demand: Demand
    slowdown: float


class Interference(msgspec.Struct, frozen=True):
    """The fitted model of one device. `error`: the mean absolute error of the factor for pairs of functions that were left out of the fit."""

    device: str
    coefficients: tuple[float, ...]
    error: float
    pairs: tuple[Pair, ...]
    version: int = VERSION

    def slowdown(self, one: Demand, *neighbours: Demand) -> float:
        """How many times as long `one` runs beside these neighbours as alone; 1 beside none."""
        together = Demand(sum(each.memory for each in neighbours), sum(each.compute for each in neighbours))
        return 1.0 + float(np.dot(_terms(one, together), self.coefficients))

    def save(self, path: Path) -> None:
        """Writes JSON, whole or not at all."""
        temporary = path.with_name(f"{path.name}.new")
        temporary.write_bytes(msgspec.json.format(msgspec.json.encode(self), indent=1))
        os.replace(temporary, path)


def fit(device: str, pairs: Sequence[Pair]) -> Interference:
    """The model that these observations give; InvalidValue when there is none, or one that cannot be."""
    if not pairs:
        raise InvalidValue("there is no pair to learn interference from")
    for pair in pairs:
        if not 0 < pair.slowdown < float("inf"):
            raise InvalidValue("must be greater than 0", key=f"slowdown of {pair.function} beside {pair.neighbour}", value=pair.slowdown)
    coefficients = _coefficients(pairs)
    return Interference(device, tuple(map(float, coefficients)), float(np.mean(_left_out(pairs))), tuple(pairs))


def load(path: Path) -> Interference:
    """Reads `save`'s file; InvalidArtifact when it is torn, foreign or of another version."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=Interference)
    except msgspec.MsgspecError as error:
        raise InvalidArtifact(f"{path} is no model of interference, or a torn one ({error}): measure it again") from None
    if found.version != VERSION or len(found.coefficients) != len(TERMS) or min(found.coefficients) < 0:
        raise InvalidArtifact(f"{path} was written by another Sluice: measure it again", key="version", value=found.version)
    return found


def _left_out(pairs: Sequence[Pair]) -> list[float]:
    """Absolute errors of the factor for each pair of functions by a fit to all others."""
    couples: dict[frozenset[str], list[Pair]] = {}
    for pair in pairs:
        couples.setdefault(frozenset((pair.function, pair.neighbour)), []).append(pair)
    errors: list[float] = []
    for couple in couples.values():
        coefficients = _coefficients([pair for pair in pairs if pair not in couple])
        errors += [abs(1 + float(_terms(pair.demand, pair.neighbour_demand) @ coefficients) - pair.slowdown) for pair in couple]
    return errors


def _terms(one: Demand, other: Demand) -> npt.NDArray[np.float64]:
    return np.array([other.memory, other.compute, one.memory * other.memory, one.compute * other.compute])


def _coefficients(pairs: Sequence[Pair]) -> npt.NDArray[np.float64]:
    """Non-negative least squares, drawn a little towards no interference at all, since few pairs cannot tell the terms apart."""
    if not pairs:
        return np.zeros(len(TERMS))
    rows = np.array([_terms(pair.demand, pair.neighbour_demand) for pair in pairs])
    extra = np.array([pair.slowdown - 1 for pair in pairs])
    scale = np.sqrt(np.mean(rows**2, axis=0))
    scale[scale == 0] = 1
    shrink = np.sqrt(_SHRINK * len(pairs)) * np.eye(len(TERMS))
    found, _ = nnls(np.vstack([rows / scale, shrink]), np.concatenate([extra, np.zeros(len(TERMS))]))
    result: npt.NDArray[np.float64] = found / scale
    return result
