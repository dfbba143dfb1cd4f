"""Devices that run whole requests one after another and keep whole models: the world of the baselines that share no GPU at a time.

Owns queues, what each device holds and how long things take: a model that is not there is loaded by its framework, or swapped in from host memory.
Which request goes where and which models have to go is decided by a `Scheduler`, one module for each paper.
"""

from __future__ import annotations

from collections import Counter, OrderedDict, deque
from collections.abc import Iterator, Sequence
from typing import Protocol

import msgspec

from contracts.functions import MAX_NS
from contracts.units import S
from simulator.engine import Engine
from simulator.node import RunTimes
from simulator.record import Record

TIMED_OUT = "the deadline passed"
"""Why a request got no answer."""


class Model(msgspec.Struct, frozen=True):
    """What one request costs: GPU time, weights, and a framework's time to load them. `percentile` of the requests should take `objective_ns`.

    A request that has waited for `timeout_ns` is given up. `max_batch` counts where requests are run together. `around_ns` passes outside of any GPU.
    """

    key: str
    run_ns: int
    weight_bytes: int
    load_ns: int
    objective_ns: int
    percentile: float = 98.0
    timeout_ns: int = MAX_NS
    max_batch: int = 1
    around_ns: int = 0


class Swapping(msgspec.Struct, frozen=True):
    """Weights come from host memory, layer by layer while the first already run: `per_link` devices share a link, whole copies go one after another.

    `tail` is the part of a run that follows the last weights. With `peer_bytes_per_s` a model that another of the `per_node` devices of a node holds
    comes from there.
    """

    bytes_per_s: int
    per_link: int = 1
    per_node: int = 1 << 30
    tail: float = 0.1
    peer_bytes_per_s: int = 0


class Request:
    """One request in a queue. `skipped` counts those that were dispatched before it although they came later."""

    __slots__ = ("arrived_ns", "model", "skipped")

    def __init__(self, model: int, arrived_ns: int) -> None:
        self.model = model
        self.arrived_ns = arrived_ns
        self.skipped = 0


class Queue:
    """What waits before all devices, in order of arrival: of all models, and of each. What is taken is the first of its model."""

    def __init__(self) -> None:
        self.models: dict[int, deque[Request]] = {}
        self._all: OrderedDict[Request, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._all)

    def __iter__(self) -> Iterator[Request]:
        return iter(self._all)

    @property
    def head(self) -> Request:
        """The one that came first of all; there must be one."""
        return next(iter(self._all))

    def add(self, request: Request) -> None:
        """The latest."""
        self._all[request] = None
        self.models.setdefault(request.model, deque()).append(request)

    def take(self, request: Request) -> Request:
        """It waits here no more."""
        del self._all[request]
        of_model = self.models[request.model]
        first = of_model.popleft()
        assert first is request
        if not of_model:
            del self.models[request.model]
        return request


class PoolDevice:
    """A device: its models from least to most recently used, its own queue, and when what runs and waits on it will be done."""

    __slots__ = ("busy", "busy_ns", "done_ns", "expected", "free_bytes", "loading_ns", "loads", "models", "number", "queue")

    def __init__(self, number: int, capacity_bytes: int) -> None:
        self.number = number
        self.free_bytes = capacity_bytes
        self.models: OrderedDict[int, None] = OrderedDict()
        self.queue: deque[Request] = deque()
        self.expected: Counter[int] = Counter()
        self.busy = False
        self.busy_ns = self.done_ns = self.loading_ns = self.loads = 0

    @property
    def idle(self) -> bool:
        """Nothing runs or waits here."""
        return not self.busy and not self.queue

    def will_hold(self, model: int) -> bool:
        """It holds the model, or will when what waits here has begun."""
        return model in self.models or self.expected[model] > 0


class Scheduler(Protocol):
    """Puts requests on devices."""

    def dispatch(self, pool: Pool) -> list[tuple[Request, PoolDevice]]:
        """Takes requests out of `pool.queue`, each for a device: an idle one runs it at once, a busy one keeps it in its own queue."""

    def victim(self, pool: Pool, device: PoolDevice) -> int:
        """The model that has to go next from a device that needs room."""


class LeastRecentlyUsed:
    """The usual victim."""

    def victim(self, pool: Pool, device: PoolDevice) -> int:
        """`Scheduler`."""
        return next(iter(device.models))


class Pool:
    """All devices and the queue before them. `models` by the number that arrivals use; without `swapping` frameworks load them.

    `times` are those of each run, where they vary. `last_ns` is when the last answer was given.
    `changed` are the models whose queue or record is not what it was when a scheduler last emptied it.
    """

    def __init__(
        self,
        engine: Engine,
        models: Sequence[Model],
        devices: int,
        capacity_bytes: int,
        scheduler: Scheduler,
        swapping: Swapping | None = None,
        times: RunTimes | None = None,
    ) -> None:
        self.models = models
        self.swapping = swapping
        self.devices = [PoolDevice(number, capacity_bytes) for number in range(devices)]
        self.queue = Queue()
        self.changed: set[int] = set()
        self.records = [Record(model.objective_ns) for model in models]
        self.last_ns = engine.now_ns
        self._engine = engine
        self._scheduler = scheduler
        self._times = times
        self._link_free_ns = [0] * devices

    @property
    def now_ns(self) -> int:
        """The present."""
        return self._engine.now_ns

    def preload(self) -> None:
        """Models are on the devices before the first request comes, in turn, as many as there is room for: nobody is judged by an empty start."""
        for number, model in enumerate(self.models):
            device = max(self.devices, key=lambda device: device.free_bytes)
            if device.free_bytes >= model.weight_bytes:
                device.models[number] = None
                device.free_bytes -= model.weight_bytes

    def forget(self) -> None:
        """The warm-up is over: what was recorded until now does not count."""
        for record in self.records:
            record.clear()
        self.changed.update(range(len(self.models)))

    def arrive(self, model: int) -> None:
        """A request of this model."""
        self.queue.add(Request(model, self._engine.now_ns))
        self.changed.add(model)
        self._dispatch()

    def _dispatch(self) -> None:
        """As long as there is something to give: a device whose requests have all been given up is idle again."""
        while self.queue:
            if self._late(self.queue.head):
                self._give_up(self.queue.take(self.queue.head))
                continue
            given = self._scheduler.dispatch(self)
            if not given:
                return
            for request, device in given:
                model = self.models[request.model]
                load_ns = 0 if device.will_hold(request.model) else self.expected_load_ns(model)
                device.done_ns = max(device.done_ns, self.now_ns) + model.run_ns + load_ns
                device.queue.append(request)
                device.expected[request.model] += 1
                self._start(device)

    def _late(self, request: Request) -> bool:
        return self.now_ns - request.arrived_ns > self.models[request.model].timeout_ns

    def _give_up(self, request: Request) -> None:
        self.records[request.model].reject(TIMED_OUT)
        self.changed.add(request.model)

    def _start(self, device: PoolDevice) -> None:
        if device.busy:
            return
        while device.queue and self._late(device.queue[0]):
            request = self._next(device)
            device.done_ns -= self.models[request.model].run_ns
            self._give_up(request)
        if not device.queue:
            return
        request = self._next(device)
        model, cold = self.models[request.model], request.model not in device.models
        load_ns = self._load(device, request.model) if cold else 0
        run_ns = model.run_ns if self._times is None else self._times.run_ns(model.key, 1, 100)
        device.models.move_to_end(request.model)
        device.busy = True
        self._engine.at(self.now_ns + load_ns + run_ns, self._finish, device, request, load_ns, run_ns, cold)

    def _next(self, device: PoolDevice) -> Request:
        request = device.queue.popleft()
        device.expected[request.model] -= 1
        return request

    def expected_load_ns(self, model: Model) -> int:
        """What a load onto an idle device adds to a run, if its link is free."""
        if self.swapping is None:
            return model.load_ns
        return self._added_ns(model, model.weight_bytes * S // self.swapping.bytes_per_s)

    def _load(self, device: PoolDevice, number: int) -> int:
        """Makes room and loads; returns what that adds to the run."""
        model = self.models[number]
        swapping = self.swapping
        peers = () if swapping is None or not swapping.peer_bytes_per_s else self._node(device, swapping.per_node)
        held_elsewhere = any(number in other.models for other in peers)
        while device.free_bytes < model.weight_bytes:
            victim = self._scheduler.victim(self, device)
            del device.models[victim]
            device.free_bytes += self.models[victim].weight_bytes
        device.free_bytes -= model.weight_bytes
        device.loads += 1
        device.models[number] = None
        if swapping is None:
            return model.load_ns
        if held_elsewhere:
            return self._added_ns(model, model.weight_bytes * S // swapping.peer_bytes_per_s)
        link = device.number // swapping.per_link
        begin_ns = max(self.now_ns, self._link_free_ns[link])
        device.loading_ns = self._link_free_ns[link] = begin_ns + model.weight_bytes * S // swapping.bytes_per_s
        return self._added_ns(model, device.loading_ns - self.now_ns)

    def _node(self, device: PoolDevice, per_node: int) -> Sequence[PoolDevice]:
        first = device.number // per_node * per_node
        return self.devices[first : first + per_node]

    def _added_ns(self, model: Model, copy_ns: int) -> int:
        assert self.swapping is not None
        return max(0, copy_ns + int(model.run_ns * self.swapping.tail) - model.run_ns)

    def _finish(self, device: PoolDevice, request: Request, load_ns: int, run_ns: int, cold: bool) -> None:
        device.busy_ns += load_ns + run_ns
        device.busy = False
        self.last_ns = self.now_ns
        self.changed.add(request.model)
        total_ns = self.now_ns - request.arrived_ns + self.models[request.model].around_ns
        self.records[request.model].answer(total_ns, total_ns - load_ns - run_ns, load_ns, run_ns, cold=cold)
        self._start(device)
        self._dispatch()
