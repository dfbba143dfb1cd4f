"""The seam to CUDA: everything that a lane or a slab holder asks of torch and the driver, and nothing else.

`Driver` is what `cuda.py`, `graphs.py`, `proof.py` and `holder.py` know; `torch_cuda.py` answers it on a GPU, tests answer it with queues in memory.
An `Event` is shaped as torch.cuda.Event is, so that the real one needs no wrapper.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, TypeVar

import torch

from contracts.functions import FunctionClass

_T = TypeVar("_T")


class Stream(Protocol):
    """A queue of work on the device."""


class Event(Protocol):
    """A point in a stream."""

    def record(self, stream: Stream | None = None) -> None:
        """Moves it to the end of what the stream holds now."""

    def wait(self, stream: Stream | None = None) -> None:
        """What the stream is given from now on starts after it; the host goes on."""

    def query(self) -> bool:
        """Whether the device has come by."""

    def synchronize(self) -> None:
        """Blocks the calling thread, asleep, until the device has come by."""

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds from this one to `later`; both recorded, timed and passed."""


class Graph(Protocol):
    """Captured work that can be launched again, at the addresses that it was captured with."""

    def replay(self) -> None:
        """Launches it on the compute stream."""

    def reset(self) -> None:
        """Gives its memory back; it is never replayed again."""


class Driver(Protocol):
    """One device, as one process with one context sees it. Opened on the thread that computes: its current stream is `compute` from then on.

    Every method may raise what CUDA raises; `survives` tells which of these a process may live on after.
    """

    compute: Stream
    copies: Stream
    name: str
    """The product, as NVML would name it."""
    sms: int
    """The SMs that this context really has, read back from the driver."""
    registers_read_only: bool
    """Whether memory that is mapped read only can be registered."""

    def event(self, timing: bool = False) -> Event:
        """A new event, whose `synchronize` sleeps instead of spinning."""

    def free_bytes(self) -> int:
        """What can be allocated on the device now."""

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory, uint8, that other processes can open."""

    def export(self, memory: torch.Tensor) -> bytes:
        """A handle of such memory, for `open`; good as long as this process lives and holds the memory."""

    def open(self, handle: bytes, nbytes: int) -> torch.Tensor:
        """The memory behind another process's handle, uint8."""

    def open_peer(self, handle: bytes, nbytes: int) -> torch.Tensor:
        """The memory behind the handle of another GPU's process, uint8: this device reads it directly. Raises where it cannot be mapped so."""

    def register(self, memory: torch.Tensor) -> bool:
        """Pins host memory that is mapped already; False when the driver will not, and copies from it are slow."""

    def unregister(self, memory: torch.Tensor) -> None:
        """Undoes `register`."""

    def pinned(self, nbytes: int) -> torch.Tensor:
        """New pinned host memory, uint8."""

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """A tensor on the device, contiguous, of the shape and dtype of `like`."""

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """Issues a copy, either way, from any thread."""

    def occupy(self) -> None:
        """Issues work on `compute` that takes every SM it may have, for some milliseconds on all of a GPU, and that only arithmetic bounds."""

    def warm(self) -> None:
        """Makes the libraries that networks use load themselves now and not in the first batch."""

    def bound(self, nbytes: int) -> None:
        """Lets this process allocate at most so many bytes of device memory; opened memory does not count."""

    def trim(self) -> None:
        """Gives back device memory that is allocated and not in use."""

    def capture(self, run: Callable[[], _T]) -> tuple[Graph, _T]:
        """Records what `run` issues on `compute`, without running any of it; other threads may go on copying.

        Raises where `run` would make the host wait for the device.
        """

    def alive(self) -> bool:
        """Whether the device still does what it is asked; a context that is broken stays so."""

    def survives(self, failure: BaseException) -> bool:
        """Whether the process may go on after a failure: most errors of CUDA end its context for good."""


def connect(backend: str, cls: FunctionClass, first_sm: int, lane_sms: int) -> Driver:
    """Opens the one device that the environment shows.

    The backend "green" confines compute to `lane_sms` SMs from the `first_sm`-th on; with any other, the environment has told the driver what to do.
    """
    from predictor.worker.devices.torch_cuda import TorchCuda

    return TorchCuda(backend, cls, first_sm, lane_sms)
