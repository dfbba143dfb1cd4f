"""Knative's own autoscaler (KPA), decision for decision: the baseline that a KServe cluster has without Sluice.

Source: Knative Serving, `pkg/autoscaler/scaling` and `pkg/autoscaler/aggregation` (2026-08), as behaviour: what they give for recorded input
is the check. Pure: the caller brings time and averages. It scales pods, and knows nothing of devices or requests.
"""

from __future__ import annotations

import math
from collections import deque
from typing import Annotated

import msgspec
from msgspec import Meta

TICK_S = 2
"""Seconds between two decisions."""

_Positive = Annotated[float, Meta(gt=0)]
_Count = Annotated[int, Meta(ge=1)]


class Spec(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the KPA is configured with; the defaults are Knative's. `target` and `total` are concurrent requests a pod: aimed at, and held at most."""

    target: _Positive = 70.0
    total: _Positive = 100.0
    max_scale_up_rate: _Positive = 1000.0
    max_scale_down_rate: _Positive = 2.0
    panic_threshold: _Positive = 2.0
    target_burst_capacity: float = 211.0
    stable_window_s: _Count = 60
    panic_window_s: _Count = 6
    scale_down_delay_s: Annotated[int, Meta(ge=0)] = 0
    activation_scale: _Count = 1


class Decision(msgspec.Struct, frozen=True):
    """Wanted pods; `excess_burst_capacity` below 0 keeps the activator in the path of requests."""

    pods: int
    excess_burst_capacity: int


class Kpa:
    """The decider of one revision. It starts in panic when more than one pod is ready, so that its own restart scales nothing down."""

    def __init__(self, spec: Spec, ready: int, now_s: int = 0) -> None:
        self._spec = spec
        self._panic_s: int | None = now_s if ready > 1 else None
        self._most_in_panic = ready if ready > 1 else 0
        self._delayed = _MaximumWindow(math.ceil(spec.scale_down_delay_s / TICK_S))

    def decide(self, stable: float, panic: float, ready: int, now_s: int, *, reachable: bool = True) -> Decision:
        """From the average concurrency of all pods over the stable and the panic window. Without data there is no decision: do not call."""
        spec, pods = self._spec, max(1, ready)
        most = math.ceil(spec.max_scale_up_rate * pods)
        least = math.floor(pods / spec.max_scale_down_rate) if reachable else 0
        for_stable, for_panic = math.ceil(stable / spec.target), math.ceil(panic / spec.target)
        wanted = min(max(for_stable, least), most)
        wanted_now = min(max(for_panic, least), most)
        if for_stable > 0 and spec.activation_scale > 1:
            wanted, wanted_now = max(wanted, spec.activation_scale), max(wanted_now, spec.activation_scale)
        if for_panic / pods >= spec.panic_threshold:
            self._panic_s = now_s
        elif self._panic_s is not None and self._panic_s + spec.stable_window_s < now_s:
            self._panic_s, self._most_in_panic = None, 0
        if self._panic_s is not None:
            wanted = self._most_in_panic = max(self._most_in_panic, wanted, wanted_now)
        if reachable:
            wanted = self._delayed.of(now_s // TICK_S, wanted)
        return Decision(wanted, self._excess_burst_capacity(ready, panic))

    def _excess_burst_capacity(self, ready: int, panic: float) -> int:
        burst = self._spec.target_burst_capacity
        if burst <= 0:
            return 0 if burst == 0 else -1
        return math.floor(ready * self._spec.total - burst - panic)


class _MaximumWindow:
    """The greatest value of the last `ticks` ticks; with none, the value itself."""

    def __init__(self, ticks: int) -> None:
        self._ticks = ticks
        self._values: deque[tuple[int, int]] = deque()

    def of(self, tick: int, value: int) -> int:
        if not self._ticks:
            return value
        while self._values and self._values[-1][1] <= value:
            self._values.pop()
        self._values.append((tick, value))
        while self._values[0][0] <= tick - self._ticks:
            self._values.popleft()
        return self._values[0][1]


class WindowAverage:
    """The mean over the last `window_s` seconds of what was recorded, in buckets of a second. A gap counts as zero, silence at the end not at all."""

    def __init__(self, window_s: int) -> None:
        self._buckets = [0.0] * window_s
        self._total = 0.0
        self._first_s = 0
        self._last_s: int | None = None

    def record(self, now_s: int, value: float) -> None:
        """Adds to this second's bucket; what is older than the window is ignored."""
        room = len(self._buckets)
        if self._last_s is None or now_s - self._last_s >= room:
            self._buckets = [0.0] * room
            self._total = 0.0
            self._first_s = self._last_s = now_s
        elif now_s > self._last_s:
            for second in range(self._last_s + 1, now_s + 1):
                self._total -= self._buckets[second % room]
                self._buckets[second % room] = 0.0
            self._last_s = now_s
        elif now_s <= self._last_s - room:
            return
        self._buckets[now_s % room] += value
        self._total += value

    def average(self, now_s: int) -> float:
        """Rounded to six digits; 0 after a window without any record."""
        room = len(self._buckets)
        if self._last_s is None or now_s - self._last_s >= room:
            return 0.0
        silent = range(self._last_s + 1, now_s + 1)
        total = self._total - sum(self._buckets[second % room] for second in silent)
        return math.floor(total / min(self._last_s - self._first_s + 1, room - len(silent)) * 1e6 + 0.5) / 1e6


def scraped_pods(ready: int) -> int:
    """How many of the ready pods are asked for their concurrency: all of three, then a sample for 95 % confidence within 0.2 sigma."""
    return ready if ready <= 3 else math.ceil(ready * 15.3664 / (ready + 14.3664))
