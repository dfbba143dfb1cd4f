"""What a lane needs of its device: one slab, a copy stream with events, a meter of GPU time, and a way in and out for tensors.

The swap engine and the executor know a device by these protocols alone. On the CPU device a copy has ended when `copy` returns and compute is the
calling thread; on a CUDA device both are streams and an Event is a cudaEvent, which compute waits for without the host.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from contracts.lane_wire import MapPeer

if TYPE_CHECKING:
    from predictor.worker.functions import Function, Program


class Proof(NamedTuple):
    """What a lane found about its cap: `sms` read back from its context, `measured_sm_percent` by the occupancy kernel (0 and 0.0 on the CPU)."""

    sms: int = 0
    measured_sm_percent: float = 0.0


class Place(NamedTuple):
    """A function whose weights are all there, at `offset` of the slab: its addresses stay valid until it is run elsewhere."""

    function: Function
    offset: int


class Event(Protocol):
    """A point on the copy stream."""

    def wait(self) -> None:
        """Blocks the calling thread until the copy stream has come by."""

    def hold_compute(self) -> None:
        """Compute that is issued from now on starts after it."""


class Meter(Protocol):
    """The GPU time of one batch: compute between `start` and `stop`, without the time that it stood still for weights or was paused."""

    @property
    def gpu_ns(self) -> int:
        """GPU time since the batch started or last went on after a pause; final once `stop` or `pause` has returned."""

    @property
    def swap_ns(self) -> int:
        """All the time that the batch stood still for weights."""

    def start(self) -> None:
        """Compute begins, or goes on after a pause."""

    def pace(self) -> None:
        """At a gate: lets the lane fall back to its share where nothing else holds it there, and a batch that may pause stay close to its device."""

    def stall(self, hold: Callable[[], None]) -> None:
        """Compute stands still for weights while `hold` runs."""

    def stop(self) -> None:
        """Compute has ended, or pauses; returns when the device has done it. Does nothing when compute does not run."""


class Device(Protocol):
    """One device as one lane sees it."""

    piece_bytes: int
    """How much the swap engine hands to `copy` at once: the group between two events."""

    slab: torch.Tensor
    """The device's memory, uint8, shared with all its lanes."""

    proof: Proof
    """What was found about the lane's cap when the device was opened."""

    asynchronous: bool
    """Whether `copy` returns before the bytes are there."""

    writable_host: bool
    """Whether `pin` needs memory that is mapped for writing too."""

    host_activations: bool
    """Whether what a batch allocates is memory of the process, so that RLIMIT_DATA bounds it."""

    def pin(self, weights: torch.Tensor) -> bool:
        """Prepares mapped host weights (uint8) for fast copies, off the request path; False when it cannot: copies from them are right but slow."""

    def unpin(self, weights: torch.Tensor) -> None:
        """No copy of these weights will come any more; returns when none is under way."""

    def map_peer(self, peer: MapPeer, fd: int) -> int:
        """Makes another device's slab one to copy from (`fd` stays the caller's); the bytes/s that it gave. Raises when it cannot be proven."""

    def unmap_peer(self, device: str) -> None:
        """Lets another device's slab go, if it is mapped; returns when no copy reads it any more."""

    def peer(self, device: str) -> torch.Tensor | None:
        """Another device's slab, uint8, to take the weights for `copy` from; None when it is not mapped."""

    def copy(self, weights: torch.Tensor, start: int, end: int, offset: int, peer: str = "") -> Event:
        """Copies weights[start:end] to `offset + start` of the slab, in the order of the calls; called from the copy thread only.

        `peer`: they lie in the slab of that device, else in host memory.
        """

    def copied(self, nbytes: int, took_ns: int, peer: str = "") -> None:
        """A copy of so many bytes took so long, from its first piece to the arrival of its last; where copies are asynchronous."""

    def replays(self, place: Place, inputs: Mapping[str, torch.Tensor], missing_bytes: int, peer: str = "") -> bool:
        """Whether a recorded run that begins when so many more bytes have been copied would end before one that goes on beside the copy."""

    def execute(self, program: Program, inputs: Mapping[str, torch.Tensor], place: Place | None) -> dict[str, torch.Tensor]:
        """Runs a bound program on inputs in host memory. `place` is given when nothing needs the gates: the run may then be a recorded one."""

    def fetch(self, outputs: dict[str, torch.Tensor], meter: Meter) -> dict[str, torch.Tensor]:
        """The outputs in host memory, valid until the next batch; may stop the meter."""

    @property
    def has_idle_work(self) -> bool:
        """Whether there is work that had better be done while no batch waits."""

    def work_idly(self) -> None:
        """Does a piece of it."""

    def forget(self, function: Function) -> None:
        """The function was detached; from any thread."""

    def meter(self, preemptible: bool) -> Meter:
        """A meter for one batch."""

    def survive(self, failure: BaseException) -> None:
        """Returns if the device still works after a batch failed so; otherwise raises what ends the lane."""
