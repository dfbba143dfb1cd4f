"""The functions attached to a lane: their mapped weights, and the torch module that functions of one program share.

Four threads meet here: the copy thread attaches and detaches, one thread makes functions ready, one pins their weights, the main thread runs them. A
run waits for the first two alone: pinning a large model takes seconds. A program's module lives as long as a function needs it. Never runs a module.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import queue
import threading
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path

import torch

from contracts.artifact import Signature, WeightIndex, decode_index
from contracts.errors import InvalidArtifact, SluiceError, Unavailable, from_wire, to_wire
from contracts.lane_wire import Attach, Attached
from models import huge
from models.program import build
from models.weights import views
from predictor.worker.devices.base import Device
from predictor.worker.gates import Gates, Needs, needs_of
from predictor.worker.memory import ActivationBound
from predictor.worker.swap import Transfer

_ARRIVAL_S = 10.0
_serials = itertools.count(1)


class Program:
    """A module without weights of its own. `bound` says whose views its parameters are: (function's serial, slab offset).

    `recordable`: a run is the same calls each time; TorchScript changes its own code as it runs.
    """

    def __init__(self, index: WeightIndex, store: Path) -> None:
        self.execute = build(index, store)
        self.recordable = index.program.kind != "torchscript"
        self.gates = Gates(self.execute.module)
        self.bound = (0, 0)


class Function:
    """One attached function. It is ready once `program` is set, lost once `error` is; `transfer` is its latest copy by this lane."""

    def __init__(self, name: str, weights: torch.Tensor) -> None:
        self.name = name
        self.weights = weights
        self.index: WeightIndex | None = None
        self.program: Program | None = None
        self.needs: Needs = ()
        self.error: SluiceError | None = None
        self.transfer: Transfer | None = None
        self.serial = next(_serials)
        self._views: tuple[int, Mapping[str, torch.Tensor]] = (-1, {})

    @property
    def signature(self) -> Signature:
        """Its own: functions of one program may differ in what pads them."""
        assert self.index is not None
        return self.index.signature

    def bind(self, slab: torch.Tensor, offset: int) -> Program:
        """Its program with its weights at `offset` of the slab. Views are made once for a place, and bound only if they are not yet."""
        program, index = self.program, self.index
        assert program is not None and index is not None
        if program.bound != (self.serial, offset):
            if self._views[0] != offset:
                self._views = offset, views(slab[offset : offset + index.total_bytes], index)
            program.bound = (0, 0)
            program.execute.bind(self._views[1])
            program.bound = (self.serial, offset)
        return program


class Functions:
    """What is attached. `report` sends Attached to the agent."""

    def __init__(self, device: Device, bound: ActivationBound, report: Callable[[Attached], None]) -> None:
        self._device = device
        self._bound = bound
        self._report = report
        self._functions: dict[str, Function] = {}
        self._programs: weakref.WeakValueDictionary[str, Program] = weakref.WeakValueDictionary()
        self._changed = threading.Condition()
        self._unready: queue.SimpleQueue[tuple[Function, Attach | None]] = queue.SimpleQueue()
        self._unpinned: queue.SimpleQueue[tuple[Function, bool]] = queue.SimpleQueue()

    def attach(self, message: Attach, weights_fd: int) -> None:
        """Maps the weights (closing the descriptor), so that a copy may begin at once; `prepare` and `pin` do the rest. Replaces one of that name."""
        try:
            function = Function(message.function, _map(weights_fd, self._device.writable_host))
        finally:
            os.close(weights_fd)
        with self._changed:
            self._functions[message.function] = function
            self._changed.notify_all()
        self._unready.put((function, message))

    def detach(self, name: str) -> Function | None:
        """Forgets a function; its mapping, views and, if nobody else needs it, its module go with the last reference."""
        function = self._functions.pop(name, None)
        if function is not None:
            self._device.forget(function)
            self._unready.put((function, None))
        return function

    def prepare(self) -> None:
        """Makes attached functions ready, one after another, for ever: a thread of its own."""
        while True:
            function, message = self._unready.get()
            if message is not None:
                with self._bound.lifted():
                    self._make_ready(function, message)
            self._unpinned.put((function, message is not None))
            del function, message

    def pin(self) -> None:
        """Pins what was made ready, says that it is attached, and lets what is detached go, one after another, for ever: a thread of its own."""
        while True:
            function, attached = self._unpinned.get()
            if not attached:
                self._device.unpin(function.weights)
            elif self._functions.get(function.name) is function:
                if function.error is None:
                    self._report(Attached(function.name, pinned=self._device.pin(function.weights)))
                else:
                    self._report(Attached(function.name, function.error.message))
            del function

    def get(self, name: str) -> Function | None:
        """An attached function, ready or not."""
        return self._functions.get(name)

    def ready(self, name: str) -> Function:
        """A function that can run; waits until it is made ready, and a little for an Attach that is still on its way.

        Its own error if it cannot be made ready, Unavailable if it is not attached.
        """
        function = self._functions.get(name)
        if function is None:
            with self._changed:
                self._changed.wait_for(lambda: name in self._functions, _ARRIVAL_S)
            function = self._functions.get(name)
            if function is None:
                raise Unavailable(f"function {name!r} is not attached to this lane")
        if function.program is None:
            with self._changed:
                self._changed.wait_for(lambda: function.program is not None or function.error is not None)
        if function.error is not None:
            raise from_wire(*to_wire(function.error))
        return function

    def started(self, function: Function, transfer: Transfer) -> None:
        """A copy of its weights has begun."""
        with self._changed:
            function.transfer = transfer
            self._changed.notify_all()

    def transfer(self, function: Function, copy: int) -> Transfer:
        """The copy that a run has to wait for; waits a little for a Copy that is still on its way, Unavailable if it never came or was replaced."""
        if function.transfer is None or function.transfer.copy != copy:
            with self._changed:
                self._changed.wait_for(lambda: function.transfer is not None and function.transfer.copy >= copy, _ARRIVAL_S)
        transfer = function.transfer
        if transfer is None or transfer.copy != copy:
            raise Unavailable(f"copy {copy} of function {function.name!r} is not made by this lane")
        return transfer

    def _make_ready(self, function: Function, message: Attach) -> None:
        try:
            index = decode_index(message.index)
            program, error = self._program(function, index, Path(message.store)), None
            function.index = index
            function.needs = needs_of(index.gates, index.total_bytes)
        except Exception as failure:
            reason = failure if isinstance(failure, SluiceError) else InvalidArtifact(f"cannot be built ({type(failure).__name__}: {failure})")
            program, error = None, reason.with_traceback(None)
        with self._changed:
            function.program, function.error = program, error
            self._changed.notify_all()

    def _program(self, function: Function, index: WeightIndex, store: Path) -> Program:
        if index.total_bytes != function.weights.numel():
            raise InvalidArtifact(f"must have {index.total_bytes} bytes", key=f"{index.digest}.weights", value=function.weights.numel())
        program = self._programs.get(index.program_id)
        if program is None:
            program = self._programs[index.program_id] = Program(index, store)
        for gate in index.gates:
            program.execute.module.get_submodule(gate.module)
        return program


def _map(weights_fd: int, writable: bool) -> torch.Tensor:
    """The whole file as uint8: read only, except where the device cannot pin it so and the file may be opened otherwise. Nobody writes to it."""
    nbytes = os.fstat(weights_fd).st_size
    if not nbytes:
        return torch.empty(0, dtype=torch.uint8)
    if writable:
        with contextlib.suppress(OSError), open(f"/proc/self/fd/{weights_fd}", "r+b", buffering=0) as file:
            return torch.frombuffer(huge.map_file(file.fileno(), nbytes, writable=True), dtype=torch.uint8)
    return torch.frombuffer(huge.map_file(weights_fd, nbytes), dtype=torch.uint8)
