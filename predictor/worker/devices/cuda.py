"""A CUDA device as one lane sees it: compute on one stream, copies on another, and between them events that the host does not wait for.

Owns the lane's streams, staging memory and graphs. The slab belongs to the holder process. Nothing in it is written over before the batch that reads
it has ended on the device, which is when `fetch` and `stop` return.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch

from contracts.errors import SluiceError
from contracts.lane_wire import MapPeer
from contracts.units import MIB, S
from predictor.worker.devices import driver as seam
from predictor.worker.devices import seal
from predictor.worker.devices.base import Meter, Place
from predictor.worker.devices.graphs import Graphs, shapes_of
from predictor.worker.devices.proof import prove

if TYPE_CHECKING:
    from predictor.worker.functions import Function, Program

_PIECE_BYTES = 8 * MIB
_FIRST_STAGING_BYTES = MIB
_ALIGNMENT = 256
_SEGMENTS_AHEAD = 1
_NS_PER_MS = 1_000_000


class CudaEvent:
    """The end of a piece on the copy stream."""

    def __init__(self, event: seam.Event, compute: seam.Stream) -> None:
        self._event = event
        self._compute = compute

    def wait(self) -> None:
        """As Event.wait."""
        self._event.synchronize()

    def hold_compute(self) -> None:
        """As Event.hold_compute: the compute stream waits, the host goes on."""
        self._event.wait(self._compute)


class Events:
    """Timed events on the compute stream, used again from batch to batch: none is in use once a batch has ended."""

    def __init__(self, driver: seam.Driver) -> None:
        self._driver = driver
        self._events: list[seam.Event] = []
        self._used = 0

    def renew(self) -> None:
        """All may be used again."""
        self._used = 0

    def mark(self) -> seam.Event:
        """An event at the end of what compute holds now."""
        if self._used == len(self._events):
            self._events.append(self._driver.event(timing=True))
        event = self._events[self._used]
        self._used += 1
        event.record(self._driver.compute)
        return event


class CudaMeter:
    """Time on the compute stream from `start` to `stop`, as its events say it, without the pairs of events around what stood still."""

    def __init__(self, events: Events, preemptible: bool) -> None:
        self.gpu_ns = 0
        self.swap_ns = 0
        self._events = events
        self._preemptible = preemptible
        self._begun: seam.Event | None = None
        self._stalls: list[tuple[seam.Event, seam.Event]] = []
        self._gates: deque[seam.Event] = deque()

    def start(self) -> None:
        """As Meter.start."""
        self.gpu_ns = 0
        self._events.renew()
        self._begun = self._events.mark()

    def pace(self) -> None:
        """A batch that may pause is issued at most one segment ahead of the device: what has been issued cannot be called back."""
        if self._preemptible:
            self._gates.append(self._events.mark())
            if len(self._gates) > _SEGMENTS_AHEAD:
                self._gates.popleft().synchronize()

    def stall(self, hold: Callable[[], None]) -> None:
        """As Meter.stall: on the stream, so that it costs nothing when the weights are there before compute is."""
        before = self._events.mark()
        try:
            hold()
        finally:
            self._stalls.append((before, self._events.mark()))

    def stop(self) -> None:
        """As Meter.stop."""
        if self._begun is None:
            return
        ended = self._events.mark()
        ended.synchronize()
        stood_ns = sum(_between_ns(*pair) for pair in self._stalls)
        self.gpu_ns = max(0, _between_ns(self._begun, ended) - stood_ns)
        self.swap_ns += stood_ns
        self._begun = None
        self._stalls.clear()
        self._gates.clear()


class Staging:
    """Pinned host memory through which the tensors of one batch go in and out. It only grows."""

    def __init__(self, driver: seam.Driver) -> None:
        self._driver = driver
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._used = 0

    def renew(self) -> None:
        """A new batch: nothing of the one before is on its way any more."""
        self._used = 0

    def take(self, like: torch.Tensor) -> torch.Tensor:
        """Contiguous room for a tensor of this shape and dtype."""
        begin, end = self._used, self._used + like.nbytes
        if end > self._memory.numel():
            # What was handed out of the old memory keeps it alive by itself.
            self._memory = self._driver.pinned(max(_FIRST_STAGING_BYTES, 2 * self._memory.numel(), 1 << like.nbytes.bit_length()))
            begin, end = 0, like.nbytes
        self._used = -(-end // _ALIGNMENT) * _ALIGNMENT
        return self._memory[begin:end].view(like.dtype).view(like.shape) if like.nbytes else torch.empty(like.shape, dtype=like.dtype)


class CudaDevice:
    """The slab behind `handle`.

    `whole_ns` is the time of the occupancy kernel on the whole device; a batch may allocate `activation_bytes` (0: no bound).
    """

    asynchronous = True
    host_activations = False

    def __init__(self, driver: seam.Driver, handle: bytes, slab_bytes: int, *, piece_bytes: int, whole_ns: int, activation_bytes: int) -> None:
        self._driver = driver
        self.slab = driver.open(handle, slab_bytes)
        self.piece_bytes = piece_bytes or _PIECE_BYTES
        self.writable_host = not driver.registers_read_only
        driver.warm()
        self.proof = prove(driver, whole_ns)
        driver.trim()
        if activation_bytes:
            driver.bound(activation_bytes)
        self.graphs = Graphs(driver, self.slab)
        self._events = Events(driver)
        self._staging = Staging(driver)
        self._pinned: set[int] = set()
        self._peers: dict[str, torch.Tensor] = {}
        self._bytes_per_s: dict[str, int] = {}
        self._note: Callable[[int], None] | None = None

    def pin(self, weights: torch.Tensor) -> bool:
        """As Device.pin. Until then copies from these weights go through the driver's own staging memory."""
        if weights.numel():
            if not self._driver.register(weights):
                return False
            self._pinned.add(weights.data_ptr())
        return True

    def unpin(self, weights: torch.Tensor) -> None:
        """As Device.unpin; waits for the copies that were issued before."""
        if weights.data_ptr() in self._pinned:
            self._pinned.remove(weights.data_ptr())
            self._await_copies()
            self._driver.unregister(weights)

    def map_peer(self, peer: MapPeer, fd: int) -> int:
        """As Device.map_peer."""
        slab = self._driver.open_peer(peer.handle, peer.slab_bytes + seal.BYTES)
        bytes_per_s = seal.read(self._driver, slab[peer.slab_bytes :], peer.seal)
        self._peers[peer.device] = slab[: peer.slab_bytes]
        return bytes_per_s

    def unmap_peer(self, device: str) -> None:
        """As Device.unmap_peer."""
        if device in self._peers:
            self._await_copies()
            del self._peers[device]

    def peer(self, device: str) -> torch.Tensor | None:
        """As Device.peer."""
        return self._peers.get(device)

    def copy(self, weights: torch.Tensor, start: int, end: int, offset: int, peer: str = "") -> CudaEvent:
        """As Device.copy; from a peer's slab it is a copy between devices on the same stream."""
        self._driver.copy(self.slab[offset + start : offset + end], weights[start:end], self._driver.copies)
        event = self._driver.event()
        event.record(self._driver.copies)
        return CudaEvent(event, self._driver.compute)

    def copied(self, nbytes: int, took_ns: int, peer: str = "") -> None:
        """As Device.copied."""
        self._bytes_per_s[peer] = nbytes * S // max(1, took_ns)

    def replays(self, place: Place, inputs: Mapping[str, torch.Tensor], missing_bytes: int, peer: str = "") -> bool:
        """As Device.replays: a small model costs the host more time than it has to wait for its weights."""
        recorded = self.graphs.find(place, shapes_of(inputs))
        bytes_per_s = self._bytes_per_s.get(peer)
        if recorded is None or not recorded.replay_ns or not bytes_per_s:
            return False
        return missing_bytes * S // bytes_per_s + recorded.replay_ns < recorded.eager_ns

    def execute(self, program: Program, inputs: Mapping[str, torch.Tensor], place: Place | None) -> dict[str, torch.Tensor]:
        """As Device.execute: the graph, if there is one for this place and these shapes."""
        self._note = None
        program.execute.check(inputs)
        self._staging.renew()
        staged = {name: self._staging.take(tensor).copy_(tensor) for name, tensor in inputs.items()}
        if place is None:
            return self._run(program, staged)
        shapes = shapes_of(staged)
        recorded = self.graphs.find(place, shapes)
        if recorded is not None:
            for name, tensor in staged.items():
                self._driver.copy(recorded.inputs[name], tensor, self._driver.compute)
            recorded.graph.replay()
            self._note = partial(setattr, recorded, "replay_ns")
            return recorded.outputs
        self._note = partial(self.graphs.ran, place, shapes)
        return self._run(program, staged)

    def fetch(self, outputs: dict[str, torch.Tensor], meter: Meter) -> dict[str, torch.Tensor]:
        """As Device.fetch; the one wait of a batch is that of its meter."""
        fetched = {}
        for name, tensor in outputs.items():
            fetched[name] = self._staging.take(tensor)
            self._driver.copy(fetched[name], tensor, self._driver.compute)
        meter.stop()
        if self._note is not None:
            self._note(meter.gpu_ns)
            self._note = None
        return fetched

    @property
    def has_idle_work(self) -> bool:
        """As Device.has_idle_work: graphs to record."""
        return self.graphs.wanted

    def work_idly(self) -> None:
        """As Device.work_idly."""
        self.graphs.record_one()

    def forget(self, function: Function) -> None:
        """As Device.forget."""
        self.graphs.forget(function)

    def meter(self, preemptible: bool) -> CudaMeter:
        """As Device.meter."""
        return CudaMeter(self._events, preemptible)

    def survive(self, failure: BaseException) -> None:
        """As Device.survive: an error of CUDA is one of the whole context."""
        if not isinstance(failure, SluiceError) and not self._driver.survives(failure):
            raise failure

    def _await_copies(self) -> None:
        """Returns when all copies that were issued before have ended."""
        issued = self._driver.event()
        issued.record(self._driver.copies)
        issued.synchronize()

    def _run(self, program: Program, staged: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Eagerly; graphs make room for a batch that finds too little memory beside them."""
        try:
            return program.execute(self._placed(staged))
        except torch.OutOfMemoryError:
            if not len(self.graphs):
                self._driver.trim()
                raise
        self.graphs.clear()
        self._driver.trim()
        return program.execute(self._placed(staged))

    def _placed(self, staged: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        placed = {}
        for name, tensor in staged.items():
            placed[name] = self._driver.empty(tensor)
            self._driver.copy(placed[name], tensor, self._driver.compute)
        return placed


def _between_ns(begun: seam.Event, ended: seam.Event) -> int:
    return round(begun.elapsed_time(ended) * _NS_PER_MS)
