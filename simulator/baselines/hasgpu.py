"""HAS-GPU (Euro-Par 2025) as its paper states it: quotas are scaled first, pods second.

A GPU is cut into rows, each with its SMs; the pods of a row share its time. A Kalman filter predicts each function's rate. Above 0.9 of the capacity
quotas grow by 10 %, in the pods with most SMs first; then a pod is added on a GPU in use that is occupied to less than 0.95, then on a new one.
Below 0.3 quotas shrink and pods end, once in 10 s at most. Every function keeps one pod.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import msgspec

from contracts.units import S
from simulator.shared_gpu import Pod, SharedGpus, Size

UP_AT, DOWN_AT = 0.9, 0.3
STEP_PERCENT = 10
COOLDOWN_NS = 10 * S
FULL = 0.95
SM_PERCENT = tuple(range(5, 101, 5))
BATCHES = (8, 4, 2, 1)


class Kalman:
    """A rate as a random walk (A = H = 1) with noise Q = 1, measured with noise R = 10; the prediction leaves room for its own uncertainty."""

    def __init__(self, alpha: float = 1.0) -> None:
        self._alpha = alpha
        self._estimate = 0.0
        self._variance = 1.0

    def predict(self, measured: float) -> float:
        """The rate to expect after this measurement."""
        variance = self._variance + 1.0
        gain = variance / (variance + 10.0)
        self._estimate += gain * (measured - self._estimate)
        self._variance = (1 - gain) * variance
        return self._estimate + self._alpha * math.sqrt(self._variance)


class Row:
    """Some SMs of a GPU, and the part of their time that pods have."""

    __slots__ = ("quota_percent", "sm_percent")

    def __init__(self, sm_percent: int) -> None:
        self.sm_percent = sm_percent
        self.quota_percent = 0

    @property
    def area(self) -> int:
        """What pods have of it, in ten-thousandths of the GPU."""
        return self.sm_percent * self.quota_percent


class Rows:
    """One GPU."""

    def __init__(self) -> None:
        self.rows: list[Row] = []

    @property
    def occupancy(self) -> float:
        """The part of the GPU that pods have."""
        return sum(row.area for row in self.rows) / 10_000

    def fits(self, size: Size) -> bool:
        """Whether there is a row of its SMs with so much time, or room for one."""
        unused = 100 - sum(row.sm_percent for row in self.rows)
        return unused >= size.sm_percent or any(
            row.sm_percent == size.sm_percent and row.quota_percent + size.quota_percent <= 100 for row in self.rows
        )

    def take(self, size: Size) -> Row:
        """The fullest row that it fits into, else a new one."""
        open_rows = [row for row in self.rows if row.sm_percent == size.sm_percent and row.quota_percent + size.quota_percent <= 100]
        row = max(open_rows, key=lambda row: row.quota_percent, default=None)
        if row is None:
            row = Row(size.sm_percent)
            self.rows.append(row)
        row.quota_percent += size.quota_percent
        return row

    def give_back(self, row: Row, quota_percent: int) -> None:
        """A row that no pod needs is no row any more."""
        row.quota_percent -= quota_percent
        if not row.quota_percent:
            self.rows.remove(row)


class HasGpu:
    """One Kalman filter for each function."""

    def __init__(self, gpus: int) -> None:
        self._gpus = [Rows() for _ in range(gpus)]
        self._filters: dict[int, Kalman] = {}
        self._sizes: dict[int, list[Size]] = {}
        self._shrunk_ns: dict[int, int] = {}
        self._departures = 0
        self._failed: dict[int, int] = {}

    def scale(self, gpus: SharedGpus, function: int, per_s: float) -> None:
        """`Scaler`."""
        predicted = self._filters.setdefault(function, Kalman()).predict(per_s)
        pods = [pod for pod in gpus.pods[function] if not pod.stopping]
        capacity = sum(gpus.per_s(function, pod.size) for pod in pods)
        if predicted > UP_AT * capacity:
            missing = self._grow(gpus, pods, predicted - UP_AT * capacity)
            if missing > 0:
                self._add_pods(gpus, function, missing)
        elif predicted < DOWN_AT * capacity and gpus.now_ns - self._shrunk_ns.get(function, -COOLDOWN_NS) >= COOLDOWN_NS:
            self._shrink(gpus, pods, UP_AT * capacity - predicted)

    def left(self, pod: Pod) -> None:
        """`Scaler`."""
        row: Row = pod.place
        self._gpus[pod.gpu].give_back(row, pod.size.quota_percent)
        self._departures += 1

    def _resize(self, gpus: SharedGpus, pod: Pod, quota_percent: int) -> float:
        """Gives a pod another quota; returns the throughput that this adds."""
        before = gpus.per_s(pod.function, pod.size)
        pod.place.quota_percent += quota_percent - pod.size.quota_percent
        gpus.resize(pod, quota_percent)
        return gpus.per_s(pod.function, pod.size) - before

    def _grow(self, gpus: SharedGpus, pods: Iterable[Pod], missing: float) -> float:
        """More quota where there is some; returns what is still missing."""
        for pod in sorted(pods, key=lambda pod: -pod.size.sm_percent):
            while missing > 0 and pod.place.quota_percent + STEP_PERCENT <= 100:
                missing -= self._resize(gpus, pod, pod.size.quota_percent + STEP_PERCENT)
        return missing

    def _shrink(self, gpus: SharedGpus, pods: list[Pod], surplus: float) -> None:
        """Ends pods that can be spared, those with few SMs first, and takes quota from the next while the objective can still be kept."""
        left = len(pods)
        for pod in sorted(pods, key=lambda pod: pod.size.sm_percent):
            per_s = gpus.per_s(pod.function, pod.size)
            if per_s <= surplus and left > 1:
                left -= 1
                surplus -= per_s
                self._shrunk_ns[pod.function] = gpus.now_ns
                gpus.end(pod)
                continue
            while (smaller := self._smaller(gpus, pod)) is not None and per_s - gpus.per_s(pod.function, smaller) <= surplus:
                surplus += self._resize(gpus, pod, smaller.quota_percent)
                per_s = gpus.per_s(pod.function, pod.size)
                self._shrunk_ns[pod.function] = gpus.now_ns
                self._departures += 1

    def _smaller(self, gpus: SharedGpus, pod: Pod) -> Size | None:
        """A step less, if that keeps the objective."""
        if pod.size.quota_percent <= STEP_PERCENT:
            return None
        smaller = msgspec.structs.replace(pod.size, quota_percent=pod.size.quota_percent - STEP_PERCENT)
        return smaller if gpus.keeps(pod.function, smaller) else None

    def _add_pods(self, gpus: SharedGpus, function: int, missing: float) -> None:
        """Pods until nothing is missing, or nothing fits; then not again before something has been freed."""
        if self._failed.get(function) == self._departures:
            return
        while missing > 0:
            found = self._choose(gpus, function, missing)
            if found is None:
                self._failed[function] = self._departures
                return
            gpu, size = found
            gpus.add(function, gpu, size, self._gpus[gpu].take(size))
            missing -= gpus.per_s(function, size)

    def _choose(self, gpus: SharedGpus, function: int, missing: float) -> tuple[int, Size] | None:
        """The smallest pod that suffices on the fullest GPU in use, else on a new one, else the most efficient that fits anywhere."""
        sizes = self._sizes.get(function) or self._possible(gpus, function)
        enough = [size for size in sizes if gpus.per_s(function, size) >= missing]
        with_memory = [gpu for gpu in range(len(self._gpus)) if gpus.has_memory(gpu, function)]
        used = sorted((gpu for gpu in with_memory if self._gpus[gpu].rows), key=lambda gpu: -self._gpus[gpu].occupancy)
        below = [gpu for gpu in used if self._gpus[gpu].occupancy < FULL]
        new = [gpu for gpu in with_memory if not self._gpus[gpu].rows]
        efficient = sorted(sizes, key=lambda size: (-gpus.per_s(function, size) / size.area, size.area))
        for candidates, wanted in ((below + new[:1], enough), (new[:1] + below, efficient)):
            for gpu in candidates:
                size = next((size for size in wanted if self._gpus[gpu].fits(size)), None)
                if size is not None:
                    return gpu, size
        return None

    def _possible(self, gpus: SharedGpus, function: int) -> list[Size]:
        """The sizes that keep the objective, smallest area first, each with the largest batch that does; the fastest alone when none does."""
        grid = [(sm, quota) for sm in SM_PERCENT for quota in range(STEP_PERCENT, 101, STEP_PERCENT)]
        batches = [batch for batch in BATCHES if batch <= gpus.models[function].max_batch]
        largest = (next((size for batch in batches if gpus.keeps(function, size := Size(*point, batch))), None) for point in grid)
        found = sorted((size for size in largest if size is not None), key=lambda size: (size.area, -gpus.per_s(function, size)))
        fastest = min((Size(*point) for point in grid), key=lambda size: (gpus.latency_ns(function, size), size.area))
        sizes = self._sizes[function] = found or [fastest]
        return sizes
