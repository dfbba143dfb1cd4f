"""A recommended share, tried: one function on a whole node under an open-loop load with random arrivals."""

from __future__ import annotations

import random
from dataclasses import dataclass

from benchmarks.open_loop import Request, play, serving
from contracts.functions import Function
from models.samples import Arrays

_WARM_UP = 20


@dataclass(frozen=True, slots=True)
class Answered:
    """Latencies in ms of the requests that were answered, and how many were not."""

    latency_ms: tuple[float, ...]
    failed: int


def poisson(function: Function, inputs: Arrays, rate_per_s: float, seconds: float, seed: int) -> Answered:
    """Serves the function as it is (share, batch, SLO) and sends it these inputs at random times for so long, after some that are not counted."""
    request = Request.of(function, inputs)
    with serving([function]) as node:
        for _ in range(_WARM_UP):
            play(node, [(0.0, request)])
        found = play(node, [(due, request) for due in _arrivals(rate_per_s, seconds, seed)])
    latencies = tuple(reply.latency_ms for reply in found if reply is not None)
    return Answered(latencies, len(found) - len(latencies))


def _arrivals(rate_per_s: float, seconds: float, seed: int) -> list[float]:
    draw = random.Random(seed)
    found, at = [], draw.expovariate(rate_per_s)
    while at < seconds:
        found.append(at)
        at += draw.expovariate(rate_per_s)
    return found
