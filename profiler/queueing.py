"""What requests wait for a function under its share: the node's own rules, played with random arrivals.

Owns the replay of one function's queue: requests arrive at random (Poisson), join into batches as the predictor joins them (a batch leaves when
nothing is in flight, when one returns, or when it is full), and start when the token account allows (the node agent's leaky bucket: an idle function
saves at most one window, and a batch may leave a debt). The formulas for such queues assume one of these away (M/G/1 tokens and batches, bulk
service the tokens); a replay of 20,000 arrivals takes milliseconds and assumes neither. Draws from its seed alone, and knows no other function.
"""

from __future__ import annotations

import math
from bisect import bisect_right
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
ARRIVALS = 20_000
_Z99 = 2.3263
_MINUTE_MS = 60_000.0
_MINUTES_KEPT, _LEAST_MINUTES = 0.9, 20


@dataclass(frozen=True, slots=True)
class Server:
    """What a share gives to batches of 1, 2, ... rows: `service_ms` is a run after idle time, `interval_ms` what each costs of the share's time.

    A share of quota q gets a batch of g ms GPU time every g / q: its interval. The longest batch is as long as these are.
    """

    service_ms: tuple[float, ...]
    interval_ms: tuple[float, ...]

    @property
    def capacity_per_s(self) -> float:
        """Requests a second that it can answer at most."""
        return max(1000.0 * (rows + 1) / max(pair) for rows, pair in enumerate(zip(self.service_ms, self.interval_ms, strict=True)))


@dataclass(frozen=True, slots=True)
class Load:
    """Arrivals in ms from 0, for a rate of one a millisecond (see `sojourn_ms`), and the run times' spread: a factor with mean 1 for each batch."""

    arrivals: Array
    noise: Array


@dataclass(frozen=True, slots=True)
class Waited:
    """Outcome of a replay: the time from arrival to answer of each request in ms, the part of the share that was used, and the mean batch."""

    sojourn_ms: Array
    utilisation: float
    mean_batch: float


def poisson(tail: float = 1.0, arrivals: int = ARRIVALS, seed: int = 0) -> Load:
    """Random arrivals. `tail` is the 99th percentile of a run's time over its mean: 1 for runs that take always as long, else lognormal."""
    random = np.random.default_rng(seed)
    sigma = math.log(max(tail, 1.0)) / _Z99
    noise = np.exp(sigma * random.standard_normal(arrivals) - sigma**2 / 2)
    return Load(np.cumsum(random.exponential(size=arrivals)), noise)


def replay(server: Server, load: Load, rate_per_s: float, window_ms: float) -> Waited:
    """Plays the load at a rate. Beyond the capacity every wait grows without end, and so infinite waits are returned at once."""
    if rate_per_s >= server.capacity_per_s:
        return Waited(np.full(1, math.inf), rate_per_s / server.capacity_per_s, float(len(server.service_ms)))
    arrivals = (load.arrivals * (1000.0 / rate_per_s)).tolist()
    ends, sizes, used = _batches(server, arrivals, load.noise.tolist(), window_ms)
    sojourn = np.repeat(ends, sizes) - np.array(arrivals)
    return Waited(sojourn, used / max(ends[-1], arrivals[-1]), len(arrivals) / len(sizes))


def keeps(server: Server, load: Load, rate_per_s: float, window_ms: float, latency_ms: float, percentile: float) -> bool:
    """Whether that percentile of the requests is answered in time: of all of them, and of those of each minute in nine minutes of ten.

    Late requests come in crowds, so where the long run just holds, every third minute or so does not. Gives up as soon as it is a no.
    """
    if server.service_ms[0] > latency_ms or rate_per_s >= server.capacity_per_s:
        return False
    arrivals = (load.arrivals * (1000.0 / rate_per_s)).tolist()
    bound = int(len(arrivals) * (1 - percentile / 100))
    ends, sizes, _ = _batches(server, arrivals, load.noise.tolist(), window_ms, latency_ms, bound)
    if sum(sizes) < len(arrivals):
        return False
    late = np.repeat(ends, sizes) - np.array(arrivals) > latency_ms
    return int(late.sum()) <= bound and _minutes_kept(late, np.array(arrivals), percentile) >= _MINUTES_KEPT


def _minutes_kept(late: npt.NDArray[np.bool_], arrivals: Array, percentile: float) -> float:
    """The part of the minutes in which that percentile of their requests was in time; the last, cut short, does not count.

    At high rates, at which the load lasts a few minutes alone, they are shorter ones.
    """
    minute = (arrivals // min(_MINUTE_MS, arrivals[-1] / _LEAST_MINUTES)).astype(np.int64)
    came, missed = np.bincount(minute), np.bincount(minute, weights=late)
    return float(np.mean((missed <= came * (1 - percentile / 100))[:-1]))


def _batches(
    server: Server, arrivals: list[float], noise: list[float], window_ms: float, late_ms: float = math.inf, bound: int = 0
) -> tuple[list[float], list[int], float]:
    """(end, rows) of every batch and the time of the share that they took; cut short when more than `bound` batches were late."""
    service, interval, longest, total = server.service_ms, server.interval_ms, len(server.service_ms), len(arrivals)
    ends: list[float] = []
    sizes: list[int] = []
    due, used, last = -window_ms, 0.0, 0.0
    first = late = 0
    while first < total and late <= bound:
        came = arrivals[first]
        rows, leaves = 1, came
        if last > came and longest > 1:
            returns = ends[bisect_right(ends, came)]
            rows = bisect_right(arrivals, returns, first + 1, min(first + longest, total)) - first
            leaves = returns if rows < longest else arrivals[first + rows - 1]
        start = leaves
        if last > leaves:
            start = last
        elif due < leaves - window_ms:
            due = leaves - window_ms
        if due > start:
            start = due
        factor = noise[len(ends)]
        cost = interval[rows - 1] * factor
        last = start + service[rows - 1] * factor
        due += cost
        used += cost
        if last - came > late_ms:
            late += 1
        ends.append(last)
        sizes.append(rows)
        first += rows
    return ends, sizes, used
