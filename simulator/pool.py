"""Devices that run whole requests one after another and keep whole models: the world of the baselines that share no GPU.

Owns queues, what each device holds and how long things take: a model that is not there is loaded before its request runs. Which request goes where is
decided by a `Scheduler`, one module for each paper.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Sequence
from typing import Protocol

import msgspec

from simulator.engine import Engine
from simulator.record import Record


class Model(msgspec.Struct, frozen=True):
    """What one request costs: GPU time, weights, and the time to load them onto a device (not counting what runs there)."""

    key: str
    run_ns: int
    weight_bytes: int
    load_ns: int
    objective_ns: int


class Request:
    """One request in a queue. `skipped` counts those that were dispatched before it although they came later."""

    __slots__ = ("arrived_ns", "model", "skipped")

    def __init__(self, model: int, arrived_ns: int) -> None:
        self.model = model
        self.arrived_ns = arrived_ns
        self.skipped = 0


class PoolDevice:
    """A device: its models from least to most recently used, its own queue, and when what runs and waits on it will be done."""

    __slots__ = ("busy", "busy_ns", "done_ns", "free_bytes", "loads", "models", "number", "queue")

    def __init__(self, number: int, capacity_bytes: int) -> None:
        self.number = number
        self.free_bytes = capacity_bytes
        self.models: OrderedDict[int, None] = OrderedDict()
        self.queue: deque[Request] = deque()
        self.busy = False
        self.busy_ns = self.done_ns = self.loads = 0


class Scheduler(Protocol):
    """Puts requests on devices."""

    def dispatch(self, pool: Pool) -> list[tuple[Request, PoolDevice]]:
        """Takes requests out of `pool.queue`, each for a device: an idle one runs it at once, a busy one keeps it in its own queue."""


class Pool:
    """All devices and the queue before them. `models` by the number that arrivals use."""

    def __init__(self, engine: Engine, models: Sequence[Model], devices: int, capacity_bytes: int, scheduler: Scheduler) -> None:
        self.models = models
        self.devices = [PoolDevice(number, capacity_bytes) for number in range(devices)]
        self.queue: deque[Request] = deque()
        self.records = [Record(model.objective_ns) for model in models]
        self._engine = engine
        self._scheduler = scheduler

    @property
    def now_ns(self) -> int:
        """The present."""
        return self._engine.now_ns

    def forget(self) -> None:
        """The warm-up is over: what was recorded until now does not count."""
        for record in self.records:
            record.clear()

    def arrive(self, model: int) -> None:
        """A request of this model."""
        self.queue.append(Request(model, self._engine.now_ns))
        self._dispatch()

    def _dispatch(self) -> None:
        for request, device in self._scheduler.dispatch(self):
            model = self.models[request.model]
            held = request.model in device.models or any(other.model == request.model for other in device.queue)
            device.done_ns = max(device.done_ns, self.now_ns) + model.run_ns + (0 if held else model.load_ns)
            device.queue.append(request)
            self._start(device)

    def _start(self, device: PoolDevice) -> None:
        if device.busy or not device.queue:
            return
        request = device.queue.popleft()
        model, cold = self.models[request.model], request.model not in device.models
        if cold:
            self._make_room(device, model.weight_bytes)
            device.free_bytes -= model.weight_bytes
            device.loads += 1
            device.models[request.model] = None
        device.models.move_to_end(request.model)
        device.busy = True
        load_ns = model.load_ns if cold else 0
        self._engine.at(self.now_ns + load_ns + model.run_ns, self._finish, device, request, self.now_ns, load_ns)

    def _make_room(self, device: PoolDevice, nbytes: int) -> None:
        """Forgets the models that were used longest ago."""
        while device.free_bytes < nbytes:
            oldest, _ = device.models.popitem(last=False)
            device.free_bytes += self.models[oldest].weight_bytes

    def _finish(self, device: PoolDevice, request: Request, started_ns: int, load_ns: int) -> None:
        run_ns = self.models[request.model].run_ns
        device.busy_ns += load_ns + run_ns
        device.busy = False
        record = self.records[request.model]
        record.answer(self.now_ns - request.arrived_ns, started_ns - request.arrived_ns, load_ns, run_ns, cold=load_ns > 0)
        self._start(device)
        self._dispatch()
