"""Synthetic load with a seed: Poisson, bursty (Markov-modulated Poisson), diurnal, popularity with a heavy tail. Arrival times are ns."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from contracts.units import S

Times = npt.NDArray[np.int64]


def poisson(per_s: float, span_ns: int, chance: np.random.Generator) -> Times:
    """Independent arrivals at a constant rate."""
    count = chance.poisson(per_s * span_ns / S)
    return np.sort(chance.integers(0, span_ns, count))


def bursty(per_s: float, span_ns: int, chance: np.random.Generator, *, burst: float = 8.0, busy: float = 0.1, hold_s: float = 10.0) -> Times:
    """A two-state Markov-modulated Poisson process with the mean rate `per_s`.

    For a fraction `busy` of the time the rate is `burst` times the mean (at most 1 / busy); a busy spell lasts `hold_s` seconds on average, both
    kinds of spell being exponential.
    """
    high = min(burst, 1 / busy)
    low = (1 - busy * high) / (1 - busy)
    spells: list[Times] = []
    now_ns, loud = 0, bool(chance.random() < busy)
    while now_ns < span_ns:
        mean_s = hold_s if loud else hold_s * (1 - busy) / busy
        end_ns = min(span_ns, now_ns + max(1, int(chance.exponential(mean_s) * S)))
        spells.append(now_ns + poisson(per_s * (high if loud else low), end_ns - now_ns, chance))
        now_ns, loud = end_ns, not loud
    return np.concatenate(spells)


def diurnal(per_s: float, span_ns: int, chance: np.random.Generator, *, period_s: float = 86_400.0, swing: float = 0.8, peak: float = 0.5) -> Times:
    """A Poisson process whose rate follows the hour: per_s x (1 + swing cos), greatest at the fraction `peak` of each period. By thinning."""
    at_ns = poisson(per_s * (1 + swing), span_ns, chance)
    rate = 1 + swing * np.cos(2 * np.pi * (at_ns / S / period_s - peak))
    return at_ns[chance.random(len(at_ns)) * (1 + swing) < rate]


def popularity(functions: int, exponent: float, chance: np.random.Generator) -> npt.NDArray[np.float64]:
    """Each function's part of all requests: Zipf's law with this exponent (0: all alike), in random order; sums to 1."""
    weights = np.arange(1, functions + 1) ** -float(exponent)
    shuffled: npt.NDArray[np.float64] = chance.permutation(weights / weights.sum())
    return shuffled
