"""CUDA graphs of resident models: recorded while the lane is idle, replayed as long as the weights lie where they were recorded.

Owns the graphs of a lane and what is still to be recorded. Only the main thread touches a graph; others may say that a function was detached. Nothing
is recorded on the way of a request.
"""

from __future__ import annotations

import sys
import weakref
from collections import OrderedDict, deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from predictor.worker.devices import driver as seam
from predictor.worker.devices.base import Place

if TYPE_CHECKING:
    from predictor.worker.functions import Function, Program

_MOST_GRAPHS = 64
_MOST_WANTED = 16
_RUNS_BEFORE = 2

Shapes = tuple[tuple[str, torch.dtype, torch.Size], ...]


@dataclass(slots=True)
class Recorded:
    """A graph at the addresses of its weights (`offset`), inputs and outputs; how long a run took before, and a replay takes (0: unknown)."""

    offset: int
    graph: seam.Graph
    inputs: dict[str, torch.Tensor]
    outputs: dict[str, torch.Tensor]
    eager_ns: int
    replay_ns: int = 0


class Graphs:
    """At most `_MOST_GRAPHS` graphs, the least recently used given up first. A shape is recorded after it has been run twice at one place."""

    def __init__(self, driver: seam.Driver, slab: torch.Tensor) -> None:
        self._driver = driver
        self._slab = slab
        self._recorded: OrderedDict[tuple[int, Shapes], Recorded] = OrderedDict()
        self._runs: dict[tuple[int, Shapes], tuple[int, int]] = {}
        self._wanted: OrderedDict[tuple[int, Shapes], tuple[weakref.ref[Function], int, int]] = OrderedDict()
        self._refused: weakref.WeakSet[Program] = weakref.WeakSet()
        self._forgotten: deque[int] = deque()

    def __len__(self) -> int:
        return len(self._recorded)

    def find(self, place: Place, shapes: Shapes) -> Recorded | None:
        """The graph for a function at this very place and these shapes; one that was recorded at another place is dropped."""
        self._drain()
        key = place.function.serial, shapes
        recorded = self._recorded.get(key)
        if recorded is not None and recorded.offset != place.offset:
            self._drop(place.function.serial)
            return None
        if recorded is not None:
            self._recorded.move_to_end(key)
        return recorded

    def ran(self, place: Place, shapes: Shapes, took_ns: int) -> None:
        """These shapes were run eagerly at this place: worth a graph if they come again."""
        function = place.function
        if function.program is None or not function.program.recordable or function.program in self._refused:
            return
        key = function.serial, shapes
        offset, runs = self._runs.get(key, (place.offset, 0))
        runs = runs + 1 if offset == place.offset else 1
        self._runs[key] = place.offset, runs
        if runs >= _RUNS_BEFORE:
            del self._runs[key]
            self._wanted[key] = weakref.ref(function), place.offset, took_ns
            if len(self._wanted) > _MOST_WANTED:
                self._wanted.popitem(last=False)
        elif len(self._runs) > _MOST_GRAPHS:
            del self._runs[next(iter(self._runs))]

    @property
    def wanted(self) -> bool:
        """Whether there is a graph to record."""
        return bool(self._wanted)

    def record_one(self) -> None:
        """Records the graph that was wanted last, if there is one. A model that cannot be recorded stays eager."""
        self._drain()
        if not self._wanted:
            return
        (serial, shapes), (reference, offset, eager_ns) = self._wanted.popitem()
        function = reference()
        if function is None or function.program is None:
            return
        try:
            with torch.inference_mode():
                self._recorded[serial, shapes] = self._record(function, offset, shapes, eager_ns)
        except Exception as failure:
            self._refused.add(function.program)
            print(f"{function.name} runs without a CUDA graph: {failure}", file=sys.stderr)
            if not self._driver.survives(failure):
                raise
        if len(self._recorded) > _MOST_GRAPHS:
            self._recorded.popitem(last=False)[1].graph.reset()

    def forget(self, function: Function) -> None:
        """Its graphs go with the next batch or idle moment; from any thread."""
        self._forgotten.append(function.serial)

    def clear(self) -> None:
        """Gives all graphs and their memory up."""
        for recorded in self._recorded.values():
            recorded.graph.reset()
        self._recorded.clear()

    def _record(self, function: Function, offset: int, shapes: Shapes, eager_ns: int) -> Recorded:
        """Nothing is run: the weights may not be there any more, and who knows what lies there now."""
        program = function.bind(self._slab, offset)
        program.gates.disarm()
        inputs = {name: self._driver.empty(torch.empty(size, dtype=dtype, device="meta")).zero_() for name, dtype, size in shapes}
        graph, outputs = self._driver.capture(lambda: program.execute(inputs))
        return Recorded(offset, graph, inputs, outputs, eager_ns)

    def _drain(self) -> None:
        while self._forgotten:
            self._drop(self._forgotten.popleft())

    def _drop(self, serial: int) -> None:
        """All there is of one function."""
        for key in [key for key in self._recorded if key[0] == serial]:
            self._recorded.pop(key).graph.reset()
        for key in [key for key in self._runs if key[0] == serial]:
            del self._runs[key]
        for key in [key for key in self._wanted if key[0] == serial]:
            del self._wanted[key]


def shapes_of(inputs: Mapping[str, torch.Tensor]) -> Shapes:
    """What a graph is for: the name, dtype and shape of every input."""
    return tuple((name, tensor.dtype, tensor.shape) for name, tensor in sorted(inputs.items()))
