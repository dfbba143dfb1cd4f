"""One visit to a point: a function's latency in one configuration, through the agent and a real lane.

Owns how a point is measured: the share set live with the quota as the limit, so that it binds; batches one at a time, the next at the answer; the
account brought to its steady state first; as many samples as their spread asks for. And how fast the machine is just now. Knows no grid and writes
nothing.
"""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from contracts.functions import Share
from contracts.units import MS, S
from contracts.wire import Answer
from profiler.points import Config
from profiler.session import Caller, Session

_WARM_UP = 1
_LEAST_BP = 1
_REFERENCE_FEWEST, _REFERENCE_ENOUGH, _REFERENCE_NS = 3, 15, S // 6


@dataclass(frozen=True, slots=True)
class Sampling:
    """How many batches a visit to a point takes: until the standard error of the mean latency is below `spread` of it.

    At least `enough` batches, or as many as fit `seconds`, and no fewer than `fewest`; but after `most_seconds` those that there are will do,
    whatever their spread: under a small quota a batch takes minutes, and hardly anything of that is chance.
    """

    spread: float = 0.02
    fewest: int = 3
    enough: int = 35
    seconds: float = 0.35
    most_seconds: float = 3.5


@dataclass(frozen=True, slots=True)
class Spread:
    """Mean and percentiles in ms."""

    mean_ms: float
    p50_ms: float
    p95_ms: float
    p99_ms: float

    @classmethod
    def of(cls, values_ns: Sequence[int]) -> Spread:
        """Of times in ns."""
        p50, p95, p99 = np.percentile(values_ns, (50, 95, 99))
        return cls(statistics.fmean(values_ns) / MS, float(p50) / MS, float(p95) / MS, float(p99) / MS)


@dataclass(frozen=True, slots=True)
class Measured:
    """What one configuration gave. `service` is the latency without the wait in the agent's queue."""

    samples: int
    latency: Spread
    service: Spread
    gpu_ms: float


@dataclass(slots=True)
class _Samples:
    latency_ns: list[int] = dataclasses.field(default_factory=list)
    queue_ns: list[int] = dataclasses.field(default_factory=list)
    run_ns: list[int] = dataclasses.field(default_factory=list)

    def add(self, answer: Answer, took_ns: int) -> None:
        self.latency_ns.append(took_ns)
        self.queue_ns.append(answer.queue_ns)
        self.run_ns.append(answer.run_ns)

    def suffice(self, sampling: Sampling) -> bool:
        count, passed_s = len(self.latency_ns), sum(self.latency_ns) / S
        if passed_s >= sampling.most_seconds:
            return True
        if count < max(2, sampling.fewest) or (count < sampling.enough and passed_s < sampling.seconds):
            return False
        error_ns = statistics.stdev(self.latency_ns) / math.sqrt(count)
        return error_ns <= sampling.spread * statistics.fmean(self.latency_ns)


def measure(session: Session, caller: Caller, key: str, config: Config, sampling: Sampling, rest: Callable[[float], None] = time.sleep) -> Measured:
    """Measures one configuration of a function. The caller's batch is the configuration's. `rest` lets the function stand idle for some seconds."""
    session.set_share(key, Share.of(config.sm_percent, 100))
    for _ in range(_WARM_UP):
        caller.call()
    _settle(session, caller, key, Share.of(config.sm_percent, config.quota_percent, config.quota_percent))
    samples = _Samples()
    while not samples.suffice(sampling):
        answer, took_ns = caller.call()
        if not answer.cold:
            samples.add(answer, took_ns)
    # What the last batch owes is paid at full quota, in its own time: at the next one's quota it could take minutes.
    session.set_share(key, Share.of(config.sm_percent, 100))
    rest(samples.run_ns[-1] / S)
    service_ns = [took - queued for took, queued in zip(samples.latency_ns, samples.queue_ns, strict=True)]
    return Measured(len(service_ns), Spread.of(samples.latency_ns), Spread.of(service_ns), statistics.fmean(samples.run_ns) / MS)


def reference_ms(session: Session, caller: Caller, key: str) -> float:
    """The machine's speed now: the median GPU time of the caller's batch on the whole device, over some batches or a sixth of a second."""
    session.set_share(key, Share.of(100, 100))
    caller.call()
    run_ns: list[int] = []
    while len(run_ns) < _REFERENCE_FEWEST or (len(run_ns) < _REFERENCE_ENOUGH and sum(run_ns) < _REFERENCE_NS):
        run_ns.append(caller.call()[0].run_ns)
    return statistics.median(run_ns) / MS


def _settle(session: Session, caller: Caller, key: str, share: Share) -> None:
    """Brings the function's account to where it stays while batches follow each other: nothing saved, one batch owed.

    Of what was saved no more is kept than a window of the new share's worth, which is next to nothing of the least share. The first batch then
    starts at once, or when what is still owed is paid; those behind it wait for what the one before cost.
    """
    session.set_share(key, Share(share.sm_percent, _LEAST_BP, _LEAST_BP))
    session.set_share(key, share)
    caller.call()


def cold_ms(caller: Caller, chill: Callable[[], None], times: int = 5) -> float:
    """What a cold answer takes longer than the warm one after it, without the wait in the queue; the median of some. `chill` makes it cold."""
    extra_ns = []
    for _ in range(times):
        chill()
        answer, cold_ns = caller.call()
        _, warm_ns = caller.call()
        extra_ns.append(cold_ns - answer.queue_ns - warm_ns)
    return max(0.0, statistics.median(extra_ns) / MS)
