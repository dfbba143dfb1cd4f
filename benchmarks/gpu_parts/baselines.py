"""What serves many models on one GPU without Sluice: a plain torch process with one queue. And the references: each model run by itself.

Whole models are kept on the device, the least recently used one giving way (keep-alive), or each is loaded for its request alone (load on demand).
Neither is made weak: weights are pinned, a model comes over in one asynchronous copy, and the next that waits is copied while one runs. Runs in
a process of its own, whose state is `_here`. The weights are the host store's own files, mapped: nothing is loaded twice.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.gpu_parts.answers import WRONG, Outputs, compare
from benchmarks.gpu_parts.fleet import Fleet, Keeper, Point, Served, arrivals, inputs
from contracts.artifact import WeightIndex
from contracts.errors import Unavailable
from contracts.functions import Function, FunctionClass
from models import huge
from models import store as files
from models.load import load
from models.program import Executable, build
from models.weights import views
from predictor.segment import Array
from predictor.worker.devices import driver as seam

POLICIES = KEEP_ALIVE, ON_DEMAND = "keep_alive", "on_demand"
_PIN_THREADS = 4


class _Device:
    """Where the models run: a GPU by the same calls as a lane's, or, with None for a driver, this CPU."""

    def __init__(self, name: str) -> None:
        self.driver = seam.connect("quota", FunctionClass.LATENCY_SENSITIVE, 0, 0) if name.startswith("cuda") else None
        self.torch = torch.device("cuda" if self.driver else "cpu")
        self._free: dict[int, list[torch.Tensor]] = {}

    def mapped(self, path: Path, nbytes: int) -> torch.Tensor:
        """A file as pinned host memory, uint8; mapped for writing, for not every driver pins what is not, and never written to."""
        with path.open("r+b") as file:
            host = torch.frombuffer(huge.map_file(file.fileno(), nbytes, writable=True), dtype=torch.uint8)
        if self.driver is not None and not self.driver.register(host):
            raise Unavailable(f"the {nbytes} bytes of {path.name} cannot be pinned: the baselines would be too slow to compare with")
        return host

    def fetch(self, host: torch.Tensor) -> tuple[torch.Tensor, seam.Event | None]:
        """Device memory that will hold these bytes, and the event after which it does."""
        free = self._free.setdefault(host.numel(), [])
        memory = free.pop() if free else torch.empty(host.numel(), dtype=torch.uint8, device=self.torch)
        if self.driver is None:
            return memory.copy_(host), None
        self.driver.copy(memory, host, self.driver.copies)
        arrived = self.driver.event()
        arrived.record(self.driver.copies)
        return memory, arrived

    def release(self, memory: torch.Tensor) -> None:
        """Keeps device memory that nothing reads any more for the next model of its size: to allocate would cost more than to copy."""
        self._free.setdefault(memory.numel(), []).append(memory)

    def tensors(self, arrays: Mapping[str, Array]) -> dict[str, torch.Tensor]:
        """Inputs as host tensors, pinned on a GPU."""
        found = {name: torch.from_numpy(array) for name, array in arrays.items()}
        return {name: tensor.pin_memory() for name, tensor in found.items()} if self.driver else found

    @torch.inference_mode()
    def run(self, execute: Executable, inputs: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """Outputs on the host."""
        found = execute({name: tensor.to(self.torch, non_blocking=True) for name, tensor in inputs.items()})
        return {name: tensor.cpu().numpy() for name, tensor in found.items()}


class _Model:
    """One function's weights in host memory, and the module that it shares with its kind."""

    def __init__(self, function: Function, store: Path, device: _Device, programs: dict[str, Executable]) -> None:
        index = files.find(store, function.model)
        if index is None:
            raise Unavailable(f"{function.name} is not in the host store")
        self.index: WeightIndex = index
        self.host = device.mapped(store / f"{index.digest}.weights", index.total_bytes)
        self.execute = programs.get(index.program_id) or programs.setdefault(index.program_id, build(index, store))


@dataclass(slots=True)
class _Resident:
    """A model on the device, or on its way there until `arrived`."""

    memory: torch.Tensor
    weights: Mapping[str, torch.Tensor]
    arrived: seam.Event | None


class Cache:
    """Whole models on the device, `capacity_bytes` of them; without `keep` each goes after its request."""

    def __init__(self, device: _Device, models: Sequence[_Model], capacity_bytes: int, keep: bool) -> None:
        self._device = device
        self._models = models
        self._capacity_bytes = capacity_bytes
        self._keep = keep
        self._here: OrderedDict[int, _Resident] = OrderedDict()
        self._used_bytes = 0

    def fetch(self, number: int, in_use: int | None) -> bool:
        """Has a model come over unless it is here or on its way; True if it must. The one in use stays."""
        if number in self._here:
            self._here.move_to_end(number)
            return False
        model = self._models[number]
        while self._used_bytes + model.index.total_bytes > self._capacity_bytes:
            self._drop(next(other for other in self._here if other != in_use))
        memory, arrived = self._device.fetch(model.host)
        self._here[number] = _Resident(memory, views(memory, model.index), arrived)
        self._used_bytes += model.index.total_bytes
        return True

    def run(self, number: int, inputs: Mapping[str, torch.Tensor]) -> dict[str, Array]:
        """The answer of a model that was fetched; returns when the device has done with it."""
        here, execute = self._here[number], self._models[number].execute
        execute.bind(here.weights)
        if here.arrived is not None:
            here.arrived.wait()
        outputs = self._device.run(execute, inputs)
        if not self._keep:
            self._drop(number)
        return outputs

    def _drop(self, number: int) -> None:
        self._device.release(self._here.pop(number).memory)
        self._used_bytes -= self._models[number].index.total_bytes


class Baselines:
    """The plain process: all models of a fleet, and their references once `refer` has made them."""

    def __init__(self, store: Path, fleet: Fleet, device: str) -> None:
        torch.set_num_threads(1)
        self._device = _Device(device)
        self._fleet = fleet
        programs: dict[str, Executable] = {}
        with ThreadPoolExecutor(_PIN_THREADS) as pool:
            self._models = list(pool.map(lambda function: _Model(function, store, self._device, programs), fleet.functions))
        self._inputs = {kind.name: [self._device.tensors(part) for part in inputs(kind)] for kind in set(fleet.kinds.values())}
        self._references: list[list[Outputs]] = []
        self._caches: dict[str, Cache] = {}

    def refer(self) -> list[list[Outputs]]:
        """Of each function the answers to its kind's inputs, each model alone on the device; one of each kind is made anew from its seed, too."""
        seen: set[str] = set()
        cache = Cache(self._device, self._models, max(model.index.total_bytes for model in self._models), keep=True)
        for number, function in enumerate(self._fleet.functions):
            cache.fetch(number, None)
            given = self._given(number)
            found: list[Outputs] = [cache.run(number, part) for part in given]
            kind = self._fleet.kinds[function.name].name
            if kind not in seen:
                seen.add(kind)
                self._check(function, given, found)
            self._references.append(found)
        return self._references

    def point(self, policy: str, functions: int, rate: float, span_s: float, capacity_bytes: int, seed: int) -> Point:
        """The same arrivals as Sluice's, served one after another; broken off once too many functions are out of their SLO."""
        requests = arrivals(functions, rate, span_s, seed)
        keeper = Keeper(self._fleet, functions, requests)
        cache = self._cache(policy, capacity_bytes)
        point = Point(functions, rate)
        begun = time.monotonic()
        colds: dict[int, bool] = {}
        for at, request in enumerate(requests):
            time.sleep(max(0.0, begun + request.due_s - time.monotonic()))
            if at not in colds:
                colds[at] = cache.fetch(request.function, None)
            if at + 1 < len(requests) and time.monotonic() >= begun + requests[at + 1].due_s and requests[at + 1].function != request.function:
                colds[at + 1] = cache.fetch(requests[at + 1].function, request.function)
            outputs = cache.run(request.function, self._given(request.function)[request.input])
            latency_ms = 1e3 * (time.monotonic() - begun - request.due_s)
            verdict = compare(outputs, self._references[request.function][request.input])
            point.served.append(Served(request, latency_ms, verdict, colds.pop(at)))
            keeper.add(point.served[-1])
            if not keeper.holds:
                break
        point.out, point.broken_off = keeper.out, not keeper.holds
        return point

    def _cache(self, policy: str, capacity_bytes: int) -> Cache:
        """One for each policy, as full as it gets: no point begins with what only the first requests would pay for."""
        if policy not in self._caches:
            self._caches[policy] = cache = Cache(self._device, self._models, capacity_bytes, keep=policy == KEEP_ALIVE)
            for number in range(len(self._models)):
                cache.fetch(number, None)
                cache.run(number, self._given(number)[0])
        return self._caches[policy]

    def _given(self, number: int) -> list[dict[str, torch.Tensor]]:
        return self._inputs[self._fleet.kinds[self._fleet.functions[number].name].name]

    def _check(self, function: Function, given: Sequence[Mapping[str, torch.Tensor]], found: Sequence[Outputs]) -> None:
        """The same model as its seed makes it, without host store and layout, must give the same bits."""
        loaded = load(function.model).executable
        loaded.bind({name: tensor.to(self._device.torch) for name, tensor in loaded.weights().items()})
        for part, outputs in zip(given, found, strict=True):
            if compare(self._device.run(loaded, part), outputs) == WRONG:
                raise Unavailable(f"{function.name}: the weights in the host store are not those of its seed")


_here: list[Baselines] = []


def begin(store: Path, fleet: Fleet, device: str) -> list[list[Outputs]]:
    """Makes this process the plain one; the references by function and input."""
    _here.append(Baselines(store, fleet, device))
    return _here[0].refer()


def point(policy: str, functions: int, rate: float, span_s: float, capacity_bytes: int, seed: int) -> Point:
    """As Baselines.point."""
    return _here[0].point(policy, functions, rate, span_s, capacity_bytes, seed)
