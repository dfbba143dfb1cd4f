"""The CPU device: the slab is shared memory, a copy is a memcpy on the thread that asks for it, and SM percentages are paced in time.

Owns the lane's mapping of the slab. Copies release the interpreter's lock, so that the model computes meanwhile.
"""

from __future__ import annotations

import ctypes
import mmap
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch

from contracts.lane_wire import MapPeer
from contracts.units import MIB, S
from predictor.worker.devices.base import Meter, Place, Proof

if TYPE_CHECKING:
    from predictor.worker.functions import Function, Program

_MADV_POPULATE_READ = 22
_MADV_POPULATE_WRITE = 23
_SHORTEST_SLEEP_NS = 200_000
_LATE_NS = 1_000_000
_libc = ctypes.CDLL(None, use_errno=True)


class CpuEvent:
    """The end of a copy that has already happened."""

    def wait(self) -> None:
        """Returns at once."""

    def hold_compute(self) -> None:
        """Nothing to hold."""


class Pacer:
    """Keeps a link to its speed on an absolute schedule: a wait that took too long shortens the next. It never sleeps itself."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bytes_per_s = bytes_per_s
        self._due_ns = 0

    def due_ns(self, nbytes: int, begun_ns: int) -> int:
        """When `nbytes` that began at `begun_ns` may have arrived. Time in which the link stood idle is lost."""
        if self._due_ns < begun_ns - _LATE_NS:
            self._due_ns = begun_ns
        self._due_ns += nbytes * S // self._bytes_per_s
        return self._due_ns


class CpuMeter:
    """Wall time of compute. At s percent of the SMs, t ns of compute occupy the lane, and cost, t * 100 / s: what is missing it sleeps."""

    def __init__(self, sm_percent: int, clock: Callable[[], int] = time.monotonic_ns, sleep: Callable[[float], None] = time.sleep) -> None:
        self._sm_percent = sm_percent
        self._clock = clock
        self._sleep = sleep
        self._since_ns: int | None = None
        self._compute_ns = 0
        self._slept_ns = 0
        self.swap_ns = 0

    @property
    def gpu_ns(self) -> int:
        """As Meter.gpu_ns."""
        return self._compute_ns * 100 // self._sm_percent

    def start(self) -> None:
        """As Meter.start."""
        self._compute_ns = self._slept_ns = 0
        self._since_ns = self._clock()

    def pace(self) -> None:
        """Sleeps what the share demands, once that is long enough to sleep."""
        if self._sm_percent < 100:
            self._halt(_SHORTEST_SLEEP_NS)
            self._since_ns = self._clock()

    def stall(self, hold: Callable[[], None]) -> None:
        """As Meter.stall."""
        self._halt(0)
        begun_ns = self._clock()
        hold()
        self._since_ns = self._clock()
        self.swap_ns += self._since_ns - begun_ns

    def stop(self) -> None:
        """As Meter.stop."""
        if self._since_ns is not None:
            self._halt(0)
            self._since_ns = None

    def _halt(self, shortest_ns: int) -> None:
        assert self._since_ns is not None
        now_ns = self._clock()
        self._compute_ns += now_ns - self._since_ns
        owed_ns = self.gpu_ns - self._compute_ns - self._slept_ns
        if owed_ns > shortest_ns:
            self._sleep(owed_ns / S)
            self._slept_ns += self._clock() - now_ns


class CpuDevice:
    """The slab behind `slab_fd` (which stays the caller's), copied into at no more than `link_bytes_per_s` (0: as fast as it goes)."""

    piece_bytes = 2 * MIB
    proof = Proof()
    asynchronous = False
    writable_host = False
    host_activations = True
    has_idle_work = False

    def __init__(self, slab_fd: int, slab_bytes: int, sm_percent: int, link_bytes_per_s: int) -> None:
        self.slab = torch.frombuffer(mmap.mmap(slab_fd, slab_bytes), dtype=torch.uint8)
        _populate(self.slab, _MADV_POPULATE_WRITE)
        self._sm_percent = sm_percent
        self._pacers = {"": Pacer(link_bytes_per_s)} if link_bytes_per_s else {}
        self._peers: dict[str, torch.Tensor] = {}
        self._done = CpuEvent()

    def pin(self, weights: torch.Tensor) -> bool:
        """Maps every page now, so that a copy meets no page fault."""
        _populate(weights, _MADV_POPULATE_READ)
        return True

    def unpin(self, weights: torch.Tensor) -> None:
        """Nothing was pinned."""

    def map_peer(self, peer: MapPeer, fd: int) -> int:
        """As Device.map_peer: shared memory needs no proof, and is as fast as it is said to be."""
        slab = torch.frombuffer(mmap.mmap(fd, peer.slab_bytes, prot=mmap.PROT_READ), dtype=torch.uint8)
        _populate(slab, _MADV_POPULATE_READ)
        self._peers[peer.device] = slab
        if peer.bytes_per_s:
            self._pacers[peer.device] = Pacer(peer.bytes_per_s)
        return peer.bytes_per_s

    def unmap_peer(self, device: str) -> None:
        """As Device.unmap_peer."""
        self._peers.pop(device, None)

    def peer(self, device: str) -> torch.Tensor | None:
        """As Device.peer."""
        return self._peers.get(device)

    def copy(self, weights: torch.Tensor, start: int, end: int, offset: int, peer: str = "") -> CpuEvent:
        """As Device.copy; returns when the bytes are there."""
        begun_ns = time.monotonic_ns()
        self.slab[offset + start : offset + end].copy_(weights[start:end])
        pacer = self._pacers.get(peer)
        if pacer is not None:
            wait_ns = pacer.due_ns(end - start, begun_ns) - time.monotonic_ns()
            if wait_ns > 0:
                time.sleep(wait_ns / S)
        return self._done

    def copied(self, nbytes: int, took_ns: int, peer: str = "") -> None:
        """Nobody asks."""

    def replays(self, place: Place, inputs: Mapping[str, torch.Tensor], missing_bytes: int, peer: str = "") -> bool:
        """Nothing is recorded."""
        return False

    def execute(self, program: Program, inputs: Mapping[str, torch.Tensor], place: Place | None) -> dict[str, torch.Tensor]:
        """As Device.execute: on the calling thread."""
        return program.execute(inputs)

    def fetch(self, outputs: dict[str, torch.Tensor], meter: Meter) -> dict[str, torch.Tensor]:
        """The outputs themselves."""
        return outputs

    def work_idly(self) -> None:
        """Nothing to do."""

    def forget(self, function: Function) -> None:
        """Nothing to forget."""

    def meter(self, preemptible: bool) -> CpuMeter:
        """As Device.meter."""
        return CpuMeter(self._sm_percent)

    def survive(self, failure: BaseException) -> None:
        """No batch harms a CPU."""


def _populate(mapped: torch.Tensor, advice: int) -> None:
    """Fills the page tables of a mapping (Linux 5.14 or later; on an older kernel the first copy meets the page faults instead)."""
    if mapped.numel():
        _libc.madvise(ctypes.c_void_p(mapped.data_ptr()), ctypes.c_size_t(mapped.numel()), advice)
