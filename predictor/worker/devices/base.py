"""What a lane needs of its device: one slab, a copy stream with events, a meter of GPU time, and a way in for input tensors.

The swap engine and the executor know a device by these protocols alone. On the CPU device a copy has ended when `copy` returns and compute is the
calling thread; on a CUDA device both are streams and an Event is a cudaEvent, which compute waits for without the host.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch


class Event(Protocol):
    """A point on the copy stream."""

    def passed(self) -> bool:
        """Whether the copy stream has come by."""

    def wait(self) -> None:
        """Blocks the calling thread until it has."""

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
        """Lets the lane fall back to its share of the device, where nothing else holds it there."""

    def stall(self, hold: Callable[[], None]) -> None:
        """Compute stands still for weights while `hold` runs."""

    def stop(self) -> None:
        """Compute has ended, or pauses; returns when the device has done it."""


class Device(Protocol):
    """One device as one lane sees it."""

    piece_bytes: int
    """How much the swap engine hands to `copy` at once: the group between two events."""

    slab: torch.Tensor
    """The device's memory, uint8, shared with all its lanes."""

    def pin(self, weights: torch.Tensor) -> None:
        """Prepares mapped host weights (uint8) for fast copies, off the request path."""

    def copy(self, weights: torch.Tensor, start: int, end: int, offset: int) -> Event:
        """Copies weights[start:end] to `offset + start` of the slab, in the order of the calls; called from the copy thread only."""

    def place(self, tensor: torch.Tensor) -> torch.Tensor:
        """An input in host memory as the model takes it."""

    def meter(self) -> Meter:
        """A meter for one batch."""
