"""The executor: binds a function's weights, runs one batch, and says what it cost.

Runs on the lane's main thread, one batch at a time. Waits at gates for weights that are still being copied, and stands still there when the agent
asks a preemptible batch to pause. Never decides what runs, and fails only with its device: a model's error becomes the batch's answer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch

from contracts.errors import to_wire
from contracts.lane_page import LanePage
from contracts.lane_wire import BatchDone, Run
from predictor.worker.devices.base import Device, Meter, Place
from predictor.worker.functions import Function, Functions, Program
from predictor.worker.memory import ActivationBound
from predictor.worker.segments import Segments
from predictor.worker.swap import Transfer

_LONGEST_MESSAGE = 2000

Pause = Callable[[int, int], None]
"""pause(batch, gpu_ns): reports that a batch stands still; returns when it may go on."""


class Executor:
    """Runs batches of attached functions on one device."""

    def __init__(self, device: Device, functions: Functions, segments: Segments, bound: ActivationBound, page: LanePage, pause: Pause) -> None:
        self._device = device
        self._functions = functions
        self._segments = segments
        self._bound = bound
        self._page = page
        self._pause = pause
        self._meter: Meter
        self._batch = 0
        self._awaited: Transfer | None = None
        self._held_bytes = 0

    def run(self, run: Run) -> BatchDone:
        """Runs a batch to its end; its outputs lie where they were reserved, and the device has done with it, when this returns."""
        self._meter = meter = self._device.meter(run.preemptible)
        error: tuple[str, str] | None = None
        try:
            function = self._functions.ready(run.function)
            awaited = self._functions.transfer(function, run.copy) if run.copy else None
            self._bound.settle()
            meter.start()
            program = function.bind(self._device.slab, run.offset)
            self._run(run, function, program, awaited)
        except Exception as failure:
            self._device.survive(failure)
            kind, message, _ = to_wire(failure)
            error = kind, message[:_LONGEST_MESSAGE]
        meter.stop()
        self._awaited = None
        return BatchDone(run.batch, meter.gpu_ns, meter.swap_ns, error)

    @torch.inference_mode()
    def _run(self, run: Run, function: Function, program: Program, awaited: Transfer | None) -> None:
        inputs = self._segments.inputs(run.segment, run.parts, function.signature)
        place = Place(function, run.offset)
        gated = self._open(run, place, program, awaited, inputs)
        outputs = self._device.execute(program, inputs, None if gated else place)
        self._segments.write(run.segment, run.parts, self._device.fetch(outputs, self._meter), function.signature)

    def _open(self, run: Run, place: Place, program: Program, awaited: Transfer | None, inputs: Mapping[str, torch.Tensor]) -> bool:
        """Arms the gates if this batch has anything to do there, and passes the one before the model itself; whether it did."""
        self._awaited = None if awaited is None or awaited.complete else awaited
        self._batch = run.batch if run.preemptible else 0
        self._held_bytes = 0
        if self._awaited is not None and not self._batch:
            self._await_all(self._awaited, place, inputs)
        if self._awaited is None and not self._batch:
            program.gates.disarm()
            return False
        needs = place.function.needs
        program.gates.arm(needs, self._pass)
        name, need_bytes = needs[0]
        self._pass(0 if name else need_bytes)
        return True

    def _await_all(self, awaited: Transfer, place: Place, inputs: Mapping[str, torch.Tensor]) -> None:
        """Waits for all weights here where the device can then do better than beside their copy."""
        if self._device.replays(place, inputs, awaited.nbytes - awaited.arrived, awaited.peer):
            self._meter.stall(lambda: awaited.hold(awaited.nbytes))
            self._awaited = None

    def _pass(self, need_bytes: int) -> None:
        """At a gate: falls back to the share, waits for weights unless compute is held for them already, pauses if asked to."""
        self._meter.pace()
        awaited = self._awaited
        if awaited is not None and awaited.arrived < need_bytes and self._held_bytes < need_bytes:
            self._meter.stall(lambda: awaited.hold(need_bytes))
            self._held_bytes = need_bytes
        if self._batch and self._page.pause_batch == self._batch:
            self._meter.stop()
            self._pause(self._batch, self._meter.gpu_ns)
            self._meter.start()
