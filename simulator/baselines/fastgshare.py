"""FaST-GShare (ICPP 2023): pods with a rectangle of SMs x time, scaled by efficiency and packed by maximal rectangles.

The missing rate is R less the throughput T of all pods. Where whole pods are missing, the size with the best throughput for its area (RPR = T / SQ)
is taken first, by RPR descending; what remains is given the smallest size that suffices. Sizes are those that the paper profiles.
"""

from __future__ import annotations

from collections import deque

from simulator.baselines.rectangles import Rectangle, Rectangles
from simulator.shared_gpu import Pod, SharedGpus, Size

SM_PERCENT = (6, 12, 24, 50, 60, 80, 100)
QUOTA_PERCENT = (20, 40, 60, 80, 100)
RATE_OVER_S = 10
"""The rate is the mean of so many seconds."""


class FastGShare:
    """Every function has one pod at least."""

    def __init__(self, gpus: int) -> None:
        self._gpus = [Rectangles() for _ in range(gpus)]
        self._rates: dict[int, deque[float]] = {}
        self._sizes: dict[int, list[Size]] = {}
        self._departures = 0
        self._failed: dict[int, int] = {}

    def scale(self, gpus: SharedGpus, function: int, per_s: float) -> None:
        """`Scaler`."""
        rates = self._rates.setdefault(function, deque(maxlen=RATE_OVER_S))
        rates.append(per_s)
        pods = [pod for pod in gpus.pods[function] if not pod.stopping]
        missing = sum(rates) / len(rates) - sum(gpus.per_s(function, pod.size) for pod in pods)
        if missing > 0 or not pods:
            self._up(gpus, function, max(missing, 0.0))
        else:
            self._down(gpus, pods, -missing)

    def left(self, pod: Pod) -> None:
        """`Scaler`."""
        place: Rectangle = pod.place
        self._gpus[pod.gpu].take_away(place)
        self._departures += 1

    def _up(self, gpus: SharedGpus, function: int, missing: float) -> None:
        """Pods until nothing is missing, or nothing fits; then not again before another pod has gone."""
        if self._failed.get(function) == self._departures:
            return
        while True:
            size = next((size for size in self._wanted(gpus, function, missing) if self._add(gpus, function, size)), None)
            if size is None:
                self._failed[function] = self._departures
                return
            missing -= gpus.per_s(function, size)
            if missing <= 0:
                return

    def _wanted(self, gpus: SharedGpus, function: int, missing: float) -> list[Size]:
        """The sizes in the order in which they are tried."""
        sizes = self._sizes.get(function) or self._profiled(gpus, function)
        if missing >= gpus.per_s(function, sizes[0]):
            return sizes
        enough = [size for size in sizes if gpus.per_s(function, size) >= missing]
        return sorted(enough, key=lambda size: (gpus.per_s(function, size), size.area)) + [size for size in sizes if size not in enough]

    def _profiled(self, gpus: SharedGpus, function: int) -> list[Size]:
        """The sizes that keep the objective, by RPR descending; the fastest alone when none does."""
        sizes = [Size(sm, quota) for sm in SM_PERCENT for quota in QUOTA_PERCENT]
        kept = [size for size in sizes if gpus.keeps(function, size)]
        kept.sort(key=lambda size: (-gpus.per_s(function, size) / size.area, size))
        found = self._sizes[function] = kept or [min(sizes, key=lambda size: (gpus.latency_ns(function, size), size.area))]
        return found

    def _add(self, gpus: SharedGpus, function: int, size: Size) -> bool:
        """Puts a pod where the rectangle that it takes is filled best."""
        fits = [
            (free.area, gpu)
            for gpu, rectangles in enumerate(self._gpus)
            if gpus.has_memory(gpu, function) and (free := rectangles.fit(size.sm_percent, size.quota_percent)) is not None
        ]
        if not fits:
            return False
        _, gpu = min(fits)
        gpus.add(function, gpu, size, self._gpus[gpu].place(size.sm_percent, size.quota_percent))
        return True

    def _down(self, gpus: SharedGpus, pods: list[Pod], surplus: float) -> None:
        """Ends the least efficient pods that can be spared."""
        for pod in sorted(pods, key=lambda pod: gpus.per_s(pod.function, pod.size) / pod.size.area)[:-1]:
            per_s = gpus.per_s(pod.function, pod.size)
            if per_s <= surplus:
                surplus -= per_s
                gpus.end(pod)
