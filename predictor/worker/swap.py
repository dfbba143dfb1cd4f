"""The swap engine: copies weights into the slab as far as they are granted, and lets a run wait for the part that it needs next.

`SwapEngine` belongs to the copy thread; a `Transfer` is what the copy thread and the executor share. Grants come from the agent, which alone decides
which copy goes on; the engine only ever copies what is granted, in the order in which it was granted. Where copies outlive the call that issues them,
a thread of its own follows them, so that the copy thread always issues the next grant while the one before is on the link.
"""

from __future__ import annotations

import queue
import threading
import time
from bisect import bisect_left
from collections.abc import Callable
from typing import NoReturn

import torch

from contracts.errors import ExecutionError, ProtocolError
from contracts.lane_wire import CopyProgress
from contracts.units import MIB
from predictor.worker.devices.base import Device, Event

_REPORT_BYTES = 8 * MIB
_NOTHING = torch.empty(0, dtype=torch.uint8)


class Transfer:
    """One copy of a function's weights to a place in the slab, from host memory or from the slab of the device that `peer` names.

    `arrived` follows the device, not the host, and only grows; a run compares it at every gate, without a lock. `weights` are let go of at the end:
    a function keeps its transfer for as long as it is attached.
    """

    __slots__ = (
        "_ends",
        "_events",
        "_moved",
        "arrived",
        "begun_ns",
        "cancelled",
        "copy",
        "issued",
        "nbytes",
        "offset",
        "peer",
        "reported",
        "weights",
    )

    def __init__(self, copy: int, weights: torch.Tensor, offset: int, peer: str = "") -> None:
        self.copy = copy
        self.weights = weights
        self.nbytes = weights.numel()
        self.peer = peer
        self.offset = offset
        self.issued = 0
        self.arrived = 0
        self.reported = 0
        self.begun_ns = 0
        self.cancelled = False
        self._ends: list[int] = []
        self._events: list[Event] = []
        self._moved = threading.Condition()

    @property
    def complete(self) -> bool:
        """All bytes have arrived."""
        return self.arrived == self.nbytes

    def publish(self, end: int, event: Event) -> None:
        """The bytes up to `end` are on their way; they have arrived once `event` has passed."""
        with self._moved:
            self._ends.append(end)
            self._events.append(event)
            self.issued = end
            self._moved.notify_all()

    def arrive(self, end: int) -> None:
        """The bytes up to `end` are there. With the last of them the events are dropped too."""
        with self._moved:
            self.arrived = end
            if self.complete:
                self.weights = _NOTHING
                self._ends.clear()
                self._events.clear()

    def cancel(self) -> None:
        """It will not go on; whoever waits for it is told."""
        with self._moved:
            self.cancelled = True
            self.weights = _NOTHING
            self._moved.notify_all()

    def hold(self, need_bytes: int) -> None:
        """Lets compute go on only after the first `need_bytes` have arrived; ExecutionError if they never will."""
        with self._moved:
            self._moved.wait_for(lambda: self.issued >= need_bytes or self.cancelled)
            if self.issued < need_bytes:
                raise ExecutionError(f"the copy of the weights was given up after {self.issued} of {need_bytes} bytes")
            event = self._events[bisect_left(self._ends, need_bytes)] if self.arrived < need_bytes else None
        if event is not None:
            event.hold_compute()


class SwapEngine:
    """The copies of one lane; `report` sends CopyProgress to the agent."""

    def __init__(self, device: Device, report: Callable[[CopyProgress], None]) -> None:
        self._device = device
        self._report = report
        self._transfers: dict[int, Transfer] = {}
        self._under_way: queue.SimpleQueue[tuple[Transfer, int, bool, Event]] = queue.SimpleQueue()

    def begin(self, transfer: Transfer) -> None:
        """Takes up a copy; nothing moves before `advance`."""
        end = transfer.offset + transfer.nbytes
        if transfer.offset < 0 or end > self._device.slab.numel():
            raise ProtocolError(f"copy {transfer.copy} would end at {end}, outside the slab of {self._device.slab.numel()} bytes")
        self._transfers[transfer.copy] = transfer

    def cancel(self, transfer: Transfer) -> None:
        """Gives a copy up; one that is issued whole stays as it is."""
        self._transfers.pop(transfer.copy, None)
        transfer.cancel()

    def advance(self, copy: int, until_bytes: int) -> None:
        """Copies up to `until_bytes`, piece by piece. A grant for a copy that was given up is ignored: it crossed the news."""
        transfer = self._transfers.get(copy)
        if transfer is None:
            return
        until = min(until_bytes, transfer.nbytes)
        if not transfer.issued:
            transfer.begun_ns = time.monotonic_ns()
        while transfer.issued < until:
            start = transfer.issued
            end = min(start + self._device.piece_bytes, until)
            event = self._device.copy(transfer.weights, start, end, transfer.offset, transfer.peer)
            transfer.publish(end, event)
            if self._device.asynchronous:
                self._under_way.put((transfer, end, end == until, event))
            else:
                self._arrive(transfer, end, end == until)
        if transfer.issued == transfer.nbytes:
            del self._transfers[copy]

    def follow(self) -> NoReturn:
        """Waits for what is on its way, in the order in which it went, for ever: the thread that follows asynchronous copies."""
        while True:
            transfer, end, last, event = self._under_way.get()
            event.wait()
            self._arrive(transfer, end, last)
            if transfer.complete:
                self._device.copied(end, time.monotonic_ns() - transfer.begun_ns, transfer.peer)
            del transfer, event

    def _arrive(self, transfer: Transfer, end: int, last: bool) -> None:
        """Bytes are there; says so at the end of a grant and every few MiB. Always on the same thread, so that what is reported only grows."""
        transfer.arrive(end)
        if last or end - transfer.reported >= _REPORT_BYTES:
            transfer.reported = end
            self._report(CopyProgress(transfer.copy, end))
