"""A KServe cluster without Sluice: each pod has a whole GPU, the KPA decides how many there are, the activator holds requests while there is none.

Owns pods with their start time, the queue before them, and the GPU time that is reserved (busy or idle, starting and ending pods included: what a
cloud charges). The decisions are `kpa`'s.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import msgspec

from contracts.units import S
from simulator.baselines.kpa import TICK_S, Kpa, Spec, WindowAverage
from simulator.engine import Engine
from simulator.node import RunTimes
from simulator.pool import TIMED_OUT, Model
from simulator.record import Record

SCALE_TO_ZERO_GRACE_S = 30


class Cluster(msgspec.Struct, frozen=True):
    """`pod_start_ns`: from the decision until the pod is ready (scheduling, image, container, weights, CUDA context)."""

    gpus: int
    pod_start_ns: int = 15 * S
    pod_stop_ns: int = 2 * S
    max_scale: int = 0
    min_scale: int = 0


class Gpus:
    """The cluster's GPUs: who is given one keeps it."""

    def __init__(self, count: int) -> None:
        self.free = count
        self.most_used = 0
        self.reserved_ns = 0
        self._count = count

    def take(self) -> bool:
        """One GPU, or False when none is left: the pod is pending."""
        if not self.free:
            return False
        self.free -= 1
        self.most_used = max(self.most_used, self._count - self.free)
        return True

    def give_back(self, held_ns: int) -> None:
        """It was reserved for so long."""
        self.free += 1
        self.reserved_ns += held_ns


class _Pod:
    __slots__ = ("in_flight", "queue", "ready", "since_ns", "stopping")

    def __init__(self, since_ns: int) -> None:
        self.since_ns = since_ns
        self.ready = self.stopping = False
        self.in_flight = 0
        self.queue: deque[int] = deque()


class Revision:
    """One function. Its pod runs one request at a time; `spec.total` of them may be in a pod, the rest wait at the activator."""

    def __init__(self, engine: Engine, model: Model, spec: Spec, cluster: Cluster, gpus: Gpus, times: RunTimes | None) -> None:
        self.record = Record(model.objective_ns)
        self.busy_ns = 0
        self._engine = engine
        self._model = model
        self._times = times
        self._spec = spec
        self._cluster = cluster
        self._gpus = gpus
        self._kpa = Kpa(spec, ready=0)
        self._stable = WindowAverage(spec.stable_window_s)
        self._panic = WindowAverage(max(1, spec.panic_window_s))
        self._pods: list[_Pod] = []
        self._waiting: deque[int] = deque()
        self._in_flight = 0
        self._since_ns = 0
        self._request_ns = 0.0
        self._idle_since_s: int | None = None

    def start(self) -> None:
        """Brings up the least number of pods, and begins to decide; ends with `stop`."""
        self._scale(self._cluster.min_scale)
        self._running = True
        self._engine.at(self._engine.now_ns + S, self._second)

    def stop(self) -> None:
        """The span is over: no more decisions. What waits is still served by the pods there are, which then go; without one it has no answer."""
        self._running = False
        for pod in list(self._pods):
            if not pod.in_flight and not self._waiting:
                self._gone(pod)
        if not self._pods:
            self.record.reject("no pod until the end", len(self._waiting))
            self._waiting.clear()

    def arrive(self) -> None:
        """A request comes."""
        self._count(1)
        self._waiting.append(self._engine.now_ns)
        if not any(not pod.stopping for pod in self._pods):
            self._scale(1)  # the activator pokes the autoscaler, which does not wait for its tick
        self._feed()

    # Requests.

    def _feed(self) -> None:
        """The activator and the ingress together: the pod with the fewest requests, as long as one has room."""
        self._expire(self._waiting)
        while self._waiting:
            open_pods = [pod for pod in self._pods if pod.ready and not pod.stopping and pod.in_flight < self._spec.total]
            if not open_pods:
                return
            pod = min(open_pods, key=lambda pod: pod.in_flight)
            pod.in_flight += 1
            pod.queue.append(self._waiting.popleft())
            if pod.in_flight == 1:
                self._run(pod)

    def _expire(self, queue: deque[int]) -> int:
        """Gives up what has waited too long at the head of a queue; returns how many requests that were."""
        oldest_ns, found = self._engine.now_ns - self._model.timeout_ns, 0
        while queue and queue[0] < oldest_ns:
            queue.popleft()
            found += 1
        if found:
            self._count(-found)
            self.record.reject(TIMED_OUT, found)
        return found

    def _run(self, pod: _Pod) -> None:
        model = self._model
        run_ns = model.run_ns if self._times is None else self._times.run_ns(model.key, 1, 100)
        self._engine.at(self._engine.now_ns + run_ns, self._finish, pod, pod.queue.popleft(), run_ns)

    def _finish(self, pod: _Pod, arrived_ns: int, run_ns: int) -> None:
        now_ns = self._engine.now_ns
        self._count(-1)
        pod.in_flight -= 1
        self.busy_ns += run_ns
        total_ns = now_ns - arrived_ns + self._model.around_ns
        self.record.answer(total_ns, total_ns - run_ns, 0, run_ns, cold=False)
        pod.in_flight -= self._expire(pod.queue)
        if pod.queue:
            self._run(pod)
        elif pod.stopping:
            self._end(pod)
        self._feed()
        if not self._running and not pod.in_flight:
            self._gone(pod)

    # Scaling.

    def _count(self, change: int) -> None:
        now_ns = self._engine.now_ns
        self._request_ns += self._in_flight * (now_ns - self._since_ns)
        self._since_ns = now_ns
        self._in_flight += change

    def _second(self) -> None:
        """Once a second the concurrency is scraped, every other second there is a decision."""
        if not self._running:
            return
        self._expire(self._waiting)
        self._count(0)
        now_s = self._engine.now_ns // S
        ready = sum(pod.ready and not pod.stopping for pod in self._pods)
        concurrency, self._request_ns = self._request_ns / S, 0.0
        if ready or self._in_flight:
            self._stable.record(now_s, concurrency)
            self._panic.record(now_s, concurrency)
        if now_s % TICK_S == 0:
            self._decide(now_s, ready)
        self._engine.at(self._engine.now_ns + S, self._second)

    def _decide(self, now_s: int, ready: int) -> None:
        wanted = self._kpa.decide(self._stable.average(now_s), self._panic.average(now_s), ready, now_s).pods
        if wanted:
            self._idle_since_s = None
        elif self._idle_since_s is None:
            self._idle_since_s = now_s
        if wanted == 0 and (self._waiting or now_s - (self._idle_since_s or now_s) < SCALE_TO_ZERO_GRACE_S):
            wanted = min(1, len([pod for pod in self._pods if not pod.stopping])) or min(1, len(self._waiting))
        most = self._cluster.max_scale or wanted
        self._scale(max(self._cluster.min_scale, min(wanted, most)))

    def _scale(self, wanted: int) -> None:
        """Asks for pods, or ends some: those first that are not ready yet, then the least busy."""
        now_ns = self._engine.now_ns
        serving = [pod for pod in self._pods if not pod.stopping]
        for _ in range(wanted - len(serving)):
            if not self._gpus.take():
                return
            pod = _Pod(now_ns)
            self._pods.append(pod)
            self._engine.at(now_ns + self._cluster.pod_start_ns, self._ready, pod)
        for pod in sorted(serving, key=lambda pod: (pod.ready, pod.in_flight))[: max(0, len(serving) - wanted)]:
            pod.stopping = True
            if not pod.in_flight:
                self._end(pod)

    def _ready(self, pod: _Pod) -> None:
        if not pod.stopping:
            pod.ready = True
            self._feed()
            if not self._running and not pod.in_flight:
                self._gone(pod)

    def _end(self, pod: _Pod) -> None:
        self._engine.at(self._engine.now_ns + self._cluster.pod_stop_ns, self._gone, pod)

    def _gone(self, pod: _Pod) -> None:
        if pod in self._pods:
            self._pods.remove(pod)
            self._gpus.give_back(self._engine.now_ns - pod.since_ns)


class Knative:
    """All functions of a scenario on one cluster. `times` are those of each run, where they vary."""

    def __init__(self, engine: Engine, models: Sequence[Model], spec: Spec, cluster: Cluster, times: RunTimes | None = None) -> None:
        self.gpus = Gpus(cluster.gpus)
        self.revisions = [Revision(engine, model, spec, cluster, self.gpus, times) for model in models]

    def start(self) -> None:
        """Before the first arrival."""
        for revision in self.revisions:
            revision.start()

    def forget(self) -> None:
        """The warm-up is over: what was recorded until now does not count. GPUs that are held are charged from the beginning."""
        for revision in self.revisions:
            revision.record.clear()

    def arrive(self, number: int) -> None:
        """A request of the function with this number."""
        self.revisions[number].arrive()

    def stop(self) -> None:
        """When the span of the scenario is over."""
        for revision in self.revisions:
            revision.stop()
