"""The smallest share with which a function keeps its objective at a rate: the question that profiles are made for.

Owns the search over batch x SM x quota and the answer in words. Decides on the upper end of the estimate's 90 % interval, counts no borrowed time
and no swap (the weights are resident), and takes the function as alone on its share. Reads no files.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product, starmap
from typing import Literal, NamedTuple

import msgspec
import numpy as np

from contracts.errors import InvalidValue
from profiler.estimator import ModelEstimate
from profiler.queueing import Array, Server, Waited, keeps, poisson, replay

WINDOW_MS = 100.0
FRONT_MS = 1.0
"""What a request meets outside of node and queue: HTTP and the predictor, at their 99th percentile (`scripts/bench node`: 0.75 ms)."""
SM_LEVELS = (5, 10, 15, 20, 25, 30, 35, 40, 45, 50, 55, 60, 65, 70, 75, 80, 85, 90, 95, 100)
QUOTA_LEVELS = (0.1, 0.2, 0.5, 1.0, 2.0, 3.0, 5.0, 7.5, *np.arange(10.0, 101.0, 5.0).tolist())
PROOF_ARRIVALS = 100_000
_RATE_STEPS = 14
End = Literal["low", "mean", "high"]


class Objective(msgspec.Struct, frozen=True):
    """`percentile` of the requests, which arrive at random at `rate_per_s`, are to be answered within `latency_ms`, in nine minutes of ten too."""

    latency_ms: float
    rate_per_s: float
    percentile: float = 99.0

    def __post_init__(self) -> None:
        for key, value in (("slo-ms", self.latency_ms), ("rate", self.rate_per_s)):
            if not 0 < value < float("inf"):
                raise InvalidValue("must be greater than 0", key=key, value=value)
        if not 0 < self.percentile < 100:
            raise InvalidValue("must lie between 0 and 100", key="percentile", value=self.percentile)


class Option(msgspec.Struct, frozen=True):
    """A share and what it gives.

    Latencies are those of the objective's percentile in the long run, queueing and front included; `low_ms` and `high_ms` are what they would be at
    the ends of the estimate's interval (infinite where the rate is then too high). `utilisation` is the part of the share that the rate uses,
    `area_percent` the part of a device that is paid for.
    """

    sm_percent: int
    quota_percent: float
    max_batch: int
    area_percent: float
    latency_ms: float
    low_ms: float
    high_ms: float
    utilisation: float
    mean_batch: float


class Need(msgspec.Struct, frozen=True):
    """The answer. "share": `option` is the smallest. "whole-device": nothing less will do. "nothing": not even that; `option` is what comes closest.

    `smaller_batch`: with batches as long as the function allows, no share would do. `reachable_rate_per_s`: the greatest rate at which the whole
    device keeps the objective, when this one is too high for it; 0 when no rate is low enough.
    """

    objective: Objective
    verdict: Literal["share", "whole-device", "nothing"]
    option: Option
    reason: str
    smaller_batch: bool = False
    reachable_rate_per_s: float | None = None


def need(
    estimate: ModelEstimate, objective: Objective, max_batch: int = 8, tail: float = 1.0, window_ms: float = WINDOW_MS, front_ms: float = FRONT_MS
) -> Need:
    """The smallest area with which the objective holds.

    `max_batch` bounds the batches; `tail` is the 99th percentile of the function's run times over their mean; `window_ms` is the node's quota window;
    `front_ms` is what a request meets outside of the node.
    """
    search = _Search(estimate, objective, max_batch, tail, window_ms, front_ms)
    batches = sorted({1 << power for power in range(max_batch.bit_length())} | {max_batch})
    fit = [batch for batch in batches if search.holds(_Config(batch, 100, 100.0))]
    if not fit:
        return _nothing(search, batches)
    smaller = max_batch not in fit
    option = search.option(_smallest(search, fit))
    note = f"; batches of at most {option.max_batch}, since with {max_batch} not even the whole device would do" if smaller else ""
    held = f"p{objective.percentile:g} of {option.latency_ms:.1f} ms (at most {option.high_ms:.1f}) against {objective.latency_ms:g} ms{note}"
    if option.area_percent >= 100:
        return Need(objective, "whole-device", option, f"only the whole device will do: {held}", smaller)
    return Need(objective, "share", option, f"{option.sm_percent} % of the SMs for {option.quota_percent:g} % of the time: {held}", smaller)


class _Config(NamedTuple):
    batch: int
    sm: int
    quota: float

    @property
    def area(self) -> float:
        return self.sm * self.quota / 100


class _Search:
    """What shares give to one objective's load."""

    def __init__(self, estimate: ModelEstimate, objective: Objective, max_batch: int, tail: float, window_ms: float, front_ms: float) -> None:
        self.objective = objective
        self._load, self._proof = poisson(tail), poisson(tail, PROOF_ARRIVALS, seed=1)
        self._window_ms = window_ms
        self._front_ms = front_ms
        axes = np.meshgrid(np.arange(1.0, max_batch + 1), np.array(SM_LEVELS, float), np.array(QUOTA_LEVELS), indexing="ij")
        found = estimate.predict(*(axis.ravel() for axis in axes))
        # A longer batch is never faster, whatever the estimate's noise says.
        ends: dict[End, Array] = {"low": found.low_ms, "mean": found.mean_ms, "high": found.high_ms}
        self._latency = {end: np.maximum.accumulate(values.reshape(axes[0].shape), axis=0) for end, values in ends.items()}

    def server(self, config: _Config, end: End) -> Server:
        """What a share gives to batches up to that many rows: a run takes as long as with all of the time, and costs as long as with its quota."""
        latency = self._latency[end][: config.batch, SM_LEVELS.index(config.sm)]
        return Server(tuple(latency[:, -1].tolist()), tuple(latency[:, QUOTA_LEVELS.index(config.quota)].tolist()))

    def holds(self, config: _Config, rate_per_s: float | None = None) -> bool:
        """Whether the objective is kept, at its rate or another, even at the upper end of the estimate.

        Under some arrivals, and then under others and many more: of a thousand shares the smallest that holds owes something to luck.
        """
        server, objective = self.server(config, "high"), self.objective
        rate, within_ms = rate_per_s or objective.rate_per_s, objective.latency_ms - self._front_ms
        return all(keeps(server, load, rate, self._window_ms, within_ms, objective.percentile) for load in (self._load, self._proof))

    def option(self, config: _Config) -> Option:
        """A share in full."""
        low, mean, high = (self._replayed(config, end) for end in ("low", "mean", "high"))
        latency, least, greatest = (
            self._front_ms + float(np.percentile(waited.sojourn_ms, self.objective.percentile, method="higher")) for waited in (mean, low, high)
        )
        share = config.sm, config.quota, config.batch, config.area
        return Option(*share, latency, least, greatest, mean.utilisation, mean.mean_batch)

    def _replayed(self, config: _Config, end: End) -> Waited:
        return replay(self.server(config, end), self._proof, self.objective.rate_per_s, self._window_ms)


def _smallest(search: _Search, batches: Sequence[int]) -> _Config:
    """The smallest area; of equal ones that with more of the SMs, which waits less. Most that are too small are told so at once."""
    configs = sorted(starmap(_Config, product(batches, SM_LEVELS, QUOTA_LEVELS)), key=lambda config: (round(config.area, 6), -config.sm))
    return next((config for config in configs if search.holds(config)), _Config(batches[-1], 100, 100.0))


def _nothing(search: _Search, batches: Sequence[int]) -> Need:
    """The whole device at its best, and the rate that it would keep."""
    objective = search.objective
    configs = [_Config(batch, 100, 100.0) for batch in batches]
    best = min((search.option(config) for config in configs), key=lambda option: (option.high_ms, option.latency_ms))
    rate = max(_reachable_per_s(search, config) for config in configs)
    alone = search.server(configs[0], "high").service_ms[0]
    reason = f"nothing will do at {objective.rate_per_s:g} requests/s: the whole device keeps {objective.latency_ms:g} ms up to {rate:.3g} requests/s"
    if not rate:
        reason = f"nothing will do: alone on the whole device a request takes up to {alone:.1f} ms, the objective is {objective.latency_ms:g} ms"
    if best.latency_ms <= objective.latency_ms < best.high_ms:
        reason += f". Its middle, {best.latency_ms:.1f} ms, would do: more measurements may narrow the estimate"
    return Need(objective, "nothing", best, reason, reachable_rate_per_s=rate)


def _reachable_per_s(search: _Search, config: _Config) -> float:
    """The greatest rate below the objective's at which it is kept, by bisection; 0 when there is none."""
    low, high = 0.0, search.objective.rate_per_s
    for _ in range(_RATE_STEPS):
        middle = (low + high) / 2
        low, high = (middle, high) if search.holds(config, middle) else (low, middle)
    return low
