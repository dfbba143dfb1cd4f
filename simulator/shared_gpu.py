"""GPUs that pods share, each with a rectangle of its own: some SMs, for a part of every window of time. The world of the baselines that reserve.

Owns the functions' queues, pods with their start, tokens, weights in GPU memory, and what is charged: the area that is reserved, and the whole GPUs
that are in use. How many pods there are, how large and where, is decided by a `Scaler`, one module for each paper.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from typing import Any, Protocol

import msgspec

from contracts.units import MS, S
from simulator.engine import Engine
from simulator.node import RunTimes
from simulator.pool import TIMED_OUT, Model
from simulator.record import Record

WINDOW_NS = 40 * MS
"""The period over which a quota is counted: HAS-GPU's."""
WITHIN = 0.5
"""The part of an objective that a batch may take; the rest is for waiting. Of 0.33 to 1 this lets most functions keep theirs, under either scaler."""


class Size(msgspec.Struct, frozen=True, order=True):
    """A pod: its SMs, its part of every window, and the most requests that it runs together."""

    sm_percent: int
    quota_percent: int
    batch: int = 1

    @property
    def area(self) -> int:
        """In ten-thousandths of a GPU."""
        return self.sm_percent * self.quota_percent


class Tokens:
    """The GPU time that a pod has left in this window. What it does not use is lost."""

    __slots__ = ("_left_ns", "_window")

    def __init__(self) -> None:
        self._window = -1
        self._left_ns = 0

    def spend(self, now_ns: int, run_ns: int, quota_percent: int) -> int:
        """Takes the tokens of a batch that starts now, window by window; returns when it will have run."""
        allowance_ns = WINDOW_NS * quota_percent // 100
        window = now_ns // WINDOW_NS
        if window > self._window:
            self._window, self._left_ns = window, allowance_ns
        here_ns = min(self._left_ns, (window + 1) * WINDOW_NS - now_ns)
        if run_ns <= here_ns:
            self._left_ns -= run_ns
            return now_ns + run_ns
        whole, rest_ns = divmod(run_ns - here_ns, allowance_ns)
        if not rest_ns:
            whole, rest_ns = whole - 1, allowance_ns
        self._window, self._left_ns = window + 1 + whole, allowance_ns - rest_ns
        return self._window * WINDOW_NS + rest_ns


class Pod:
    """One pod of a function on a GPU. `place` is the scaler's own note of where it lies."""

    __slots__ = ("busy", "function", "gpu", "place", "ready", "size", "stopping", "tokens")

    def __init__(self, function: int, gpu: int, size: Size, place: Any) -> None:
        self.function = function
        self.gpu = gpu
        self.size = size
        self.place = place
        self.ready = self.busy = self.stopping = False
        self.tokens = Tokens()


class Scaler(Protocol):
    """Decides pods. A pod that it ends keeps its place until what it runs is done: then `left` is called."""

    def scale(self, gpus: SharedGpus, function: int, per_s: float) -> None:
        """Once before the load (with no requests yet), and then every second, with the requests of the last second."""

    def left(self, pod: Pod) -> None:
        """A pod has gone."""


class SharedGpus:
    """All GPUs and functions. With `sharing` the pods of a function on one GPU hold its weights once, else each has its own.

    `times` are what a scaler expects, `drawn` those of each batch, where they vary.
    """

    def __init__(
        self,
        engine: Engine,
        models: Sequence[Model],
        times: RunTimes,
        memory: Sequence[int],
        scaler: Scaler,
        *,
        pod_start_ns: int,
        sharing: bool,
        drawn: RunTimes | None = None,
    ) -> None:
        self.models = models
        self.pods: list[list[Pod]] = [[] for _ in models]
        self.records = [Record(model.objective_ns) for model in models]
        self.free_bytes = list(memory)
        self.on_gpu: list[Counter[int]] = [Counter() for _ in memory]
        self.area_ns = self.whole_ns = self.busy_ns = self.starts = self.most_used = 0
        self._engine = engine
        self._times = times
        self._drawn = drawn or times
        self._scaler = scaler
        self._pod_start_ns = pod_start_ns
        self._sharing = sharing
        self._area = 0
        self._charged_ns = engine.now_ns
        self._queues: list[deque[int]] = [deque() for _ in models]
        self._arrived = [0] * len(models)
        self._loaded = self._over = False

    # What a scaler asks.

    @property
    def now_ns(self) -> int:
        """The present."""
        return self._engine.now_ns

    def latency_ns(self, function: int, size: Size) -> int:
        """What a batch takes in a pod of this size: it comes when the tokens of the window are spent, and runs at the pace of the quota."""
        run_ns = self._times.run_ns(self.models[function].key, size.batch, size.sm_percent)
        return run_ns * 100 // size.quota_percent + WINDOW_NS * (100 - size.quota_percent) // 100

    def keeps(self, function: int, size: Size) -> bool:
        """Whether a pod of this size is fast enough for the function's objective."""
        return self.latency_ns(function, size) <= WITHIN * self.models[function].objective_ns

    def per_s(self, function: int, size: Size) -> float:
        """The throughput of a pod of this size: requests a second."""
        run_ns = self._times.run_ns(self.models[function].key, size.batch, size.sm_percent)
        return size.batch * size.quota_percent / 100 * S / run_ns

    def has_memory(self, gpu: int, function: int) -> bool:
        """Whether the weights of one more pod have room there."""
        held = self._sharing and self.on_gpu[gpu][function] > 0
        return held or self.free_bytes[gpu] >= self.models[function].weight_bytes

    # What a scaler does.

    def add(self, function: int, gpu: int, size: Size, place: Any) -> None:
        """A new pod, ready when it has started; before the load at once, so that nobody is judged by an empty start."""
        self._charge()
        pod = Pod(function, gpu, size, place)
        if not (self._sharing and self.on_gpu[gpu][function]):
            self.free_bytes[gpu] -= self.models[function].weight_bytes
        self.on_gpu[gpu][function] += 1
        self.pods[function].append(pod)
        self._area += size.area
        self.starts += self._loaded
        self.most_used = max(self.most_used, self.used)
        self._engine.at(self.now_ns + (self._pod_start_ns if self._loaded else 0), self._ready, pod)

    def resize(self, pod: Pod, quota_percent: int) -> None:
        """Another quota for a pod, from its next batch on."""
        self._charge()
        self._area -= pod.size.area
        pod.size = msgspec.structs.replace(pod.size, quota_percent=quota_percent)
        self._area += pod.size.area

    def end(self, pod: Pod) -> None:
        """The pod takes no more requests, and goes when it is done."""
        pod.stopping = True
        if not pod.busy:
            self._gone(pod)

    @property
    def used(self) -> int:
        """GPUs that hold pods."""
        return sum(bool(functions) for functions in self.on_gpu)

    # The course of time.

    def start(self) -> None:
        """Before the first arrival: the first pods, and a decision every second until `stop`."""
        for function in range(len(self.models)):
            self._scaler.scale(self, function, 0.0)
        self._loaded = True
        self._engine.at(self.now_ns + S, self._second)

    def stop(self) -> None:
        """The span is over: no more decisions. What waits is still served by the pods there are, which then go."""
        self._over = True
        for function, pods in enumerate(self.pods):
            for pod in list(pods):
                if not pod.busy and not self._queues[function] and not pod.stopping:
                    self.end(pod)
            if not pods:
                self.records[function].reject("no pod until the end", len(self._queues[function]))
                self._queues[function].clear()

    def forget(self) -> None:
        """The warm-up is over: what was recorded until now does not count. What is reserved is charged from the beginning."""
        for record in self.records:
            record.clear()

    def arrive(self, function: int) -> None:
        """A request of the function with this number."""
        self._arrived[function] += 1
        self._queues[function].append(self.now_ns)
        self._feed(function)

    def _second(self) -> None:
        if not self._over:
            for function in range(len(self.models)):
                self._expire(function)
                per_s, self._arrived[function] = self._arrived[function], 0
                self._scaler.scale(self, function, per_s)
            self._engine.at(self.now_ns + S, self._second)

    def _ready(self, pod: Pod) -> None:
        if not pod.stopping:
            pod.ready = True
            self._feed(pod.function)
            self._rest(pod)

    def _expire(self, function: int) -> None:
        queue, oldest_ns = self._queues[function], self.now_ns - self.models[function].timeout_ns
        while queue and queue[0] < oldest_ns:
            queue.popleft()
            self.records[function].reject(TIMED_OUT)

    def _feed(self, function: int) -> None:
        """Waiting requests go to whichever pod is idle, the fastest first."""
        self._expire(function)
        queue = self._queues[function]
        while queue:
            idle = [pod for pod in self.pods[function] if pod.ready and not pod.busy and not pod.stopping]
            if not idle:
                return
            self._run(max(idle, key=lambda pod: self.per_s(function, pod.size)))

    def _run(self, pod: Pod) -> None:
        queue, size = self._queues[pod.function], pod.size
        arrived_ns = [queue.popleft() for _ in range(min(len(queue), size.batch))]
        run_ns = self._drawn.run_ns(self.models[pod.function].key, len(arrived_ns), size.sm_percent)
        pod.busy = True
        self.busy_ns += run_ns * size.sm_percent // 100
        self._engine.at(pod.tokens.spend(self.now_ns, run_ns, size.quota_percent), self._finish, pod, arrived_ns, self.now_ns)

    def _finish(self, pod: Pod, arrived_ns: list[int], started_ns: int) -> None:
        pod.busy = False
        run_ns, around_ns = self.now_ns - started_ns, self.models[pod.function].around_ns
        for at_ns in arrived_ns:
            total_ns = self.now_ns - at_ns + around_ns
            self.records[pod.function].answer(total_ns, total_ns - run_ns, 0, run_ns, cold=False)
        if pod.stopping:
            self._gone(pod)
        self._feed(pod.function)
        self._rest(pod)

    def _rest(self, pod: Pod) -> None:
        """Once the span is over a pod goes that has nothing more to do."""
        if self._over and not (pod.busy or pod.stopping):
            self.end(pod)

    def _gone(self, pod: Pod) -> None:
        self._charge()
        self.pods[pod.function].remove(pod)
        self._area -= pod.size.area
        held = self.on_gpu[pod.gpu]
        held[pod.function] -= 1
        if not (self._sharing and held[pod.function]):
            self.free_bytes[pod.gpu] += self.models[pod.function].weight_bytes
        if not held[pod.function]:
            del held[pod.function]
        self._scaler.left(pod)

    def _charge(self) -> None:
        """What was reserved since the last change."""
        passed_ns, self._charged_ns = self.now_ns - self._charged_ns, self.now_ns
        self.area_ns += self._area * passed_ns // 10_000
        self.whole_ns += self.used * passed_ns
