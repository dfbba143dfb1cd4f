"""The driver seam on a real GPU, by torch.cuda and, where torch has no name for it, by the driver's own API.

Owns the process's context: which stream computes, which copies, what was exported and registered. Decides nothing.
"""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Callable
from typing import TypeVar, cast

import msgspec
import torch

from contracts.errors import Unavailable
from contracts.functions import FunctionClass
from predictor.worker.devices import green
from predictor.worker.devices.captures import Captures
from predictor.worker.devices.driver import Event, Graph, Stream
from predictor.worker.devices.libcuda import READ_ONLY, LibCuda

_T = TypeVar("_T")
_ERROR_MEMORY_ALLOCATION = 2
_CAPTURE_ERRORS = range(900, 909)
"""cudaErrorStreamCapture...: they break the capture and not the context."""
_OCCUPY_ELEMENTS = 1 << 24
_PRIORITY = {FunctionClass.LATENCY_SENSITIVE: -1, FunctionClass.BEST_EFFORT: 0}


class TorchCuda:
    """As Driver. Unavailable when the device cannot be opened as asked."""

    def __init__(self, backend: str, cls: FunctionClass, first_sm: int, lane_sms: int) -> None:
        torch.cuda.init()
        torch.cuda.set_device(0)
        properties = torch.cuda.get_device_properties(0)
        self.name: str = properties.name
        self._total_bytes: int = properties.total_memory
        self._device = torch.device("cuda", 0)
        self._beat = torch.zeros(1, device=self._device)
        self._cuda = LibCuda()
        self._operands: list[torch.Tensor] = []
        self._cannot_pin = False
        self._captures = Captures()
        self._partition: green.Partition | None = None
        self.compute: Stream
        if backend == "green" and lane_sms < properties.multi_processor_count:
            self._partition = green.split(first_sm, lane_sms, _PRIORITY[cls])
            self.compute = torch.cuda.ExternalStream(self._partition.stream, device=self._device)
            self.sms = self._partition.sms
        else:
            self.compute = torch.cuda.Stream(self._device, priority=_PRIORITY[cls])
            self.sms = min(properties.multi_processor_count, self._cuda.affinity_sms() or properties.multi_processor_count)
        self.copies: Stream = torch.cuda.Stream(self._device)
        self.registers_read_only = self._try_read_only()
        torch.cuda.set_stream(self.compute)

    def event(self, timing: bool = False) -> Event:
        """As Driver.event."""
        return cast(Event, torch.cuda.Event(enable_timing=timing, blocking=True))

    def free_bytes(self) -> int:
        """As Driver.free_bytes."""
        return int(torch.cuda.mem_get_info(self._device)[0])

    def allocate(self, nbytes: int) -> torch.Tensor:
        """As Driver.allocate."""
        return torch.empty(nbytes, dtype=torch.uint8, device=self._device)

    def export(self, memory: torch.Tensor) -> bytes:
        """What torch's own reduction of a CUDA tensor sends, but as data: the fields of its storage's IPC handle."""
        return msgspec.msgpack.encode(memory.untyped_storage()._share_cuda_())

    def open(self, handle: bytes, nbytes: int) -> torch.Tensor:
        """As Driver.open. The event that comes with a handle is not asked: the owner has waited for all that it wrote."""
        _, *fields, _ = msgspec.msgpack.decode(handle)
        storage = torch.UntypedStorage._new_shared_cuda(0, *fields, False)
        opened = torch.empty(0, dtype=torch.uint8, device=self._device).set_(storage)
        if opened.numel() < nbytes:
            raise Unavailable(f"the slab has {opened.numel()} bytes, not {nbytes}")
        return opened[:nbytes]

    def open_peer(self, handle: bytes, nbytes: int) -> torch.Tensor:
        """As Driver.open_peer. The other GPU need not be visible: its memory is mapped into this device's addresses, with peer access.

        torch opens handles with cudaIpcMemLazyEnablePeerAccess.
        """
        return self.open(handle, nbytes)

    def register(self, memory: torch.Tensor) -> bool:
        """As Driver.register."""
        code = self._register(memory, READ_ONLY if self.registers_read_only else 0)
        if code and not self._cannot_pin:
            self._cannot_pin = True
            print(f"host memory cannot be pinned (cuMemHostRegister: error {code}); swaps from it are slow", file=sys.stderr)
        return code == 0

    def _try_read_only(self) -> bool:
        """Asks with one page: not every driver and device can."""
        fd = os.memfd_create("sluice-page", os.MFD_CLOEXEC)
        os.ftruncate(fd, mmap.PAGESIZE)
        page = torch.frombuffer(mmap.mmap(fd, mmap.PAGESIZE, prot=mmap.PROT_READ), dtype=torch.uint8)
        os.close(fd)
        if self._register(page, READ_ONLY):
            return False
        self.unregister(page)
        return True

    def _register(self, memory: torch.Tensor, flags: int) -> int:
        """The driver's error code, 0 for success."""
        return self._cuda.register(memory.data_ptr(), memory.numel(), flags)

    def unregister(self, memory: torch.Tensor) -> None:
        """As Driver.unregister."""
        self._cuda.unregister(memory.data_ptr())

    def pinned(self, nbytes: int) -> torch.Tensor:
        """As Driver.pinned."""
        return torch.empty(nbytes, dtype=torch.uint8, pin_memory=True)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        """As Driver.empty."""
        return torch.empty(like.shape, dtype=like.dtype, device=self._device)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: Stream) -> None:
        """As Driver.copy."""
        if stream is self.compute:
            # The current stream of the one thread that asks for this.
            target.copy_(source, non_blocking=True)
            return
        with torch.cuda.stream(stream):  # type: ignore[arg-type]
            target.copy_(source, non_blocking=True)

    def occupy(self) -> None:
        """As Driver.occupy, by the incomplete gamma function: a loop of divisions for each element.

        A product of matrices would be bounded by power, and a small lane, whose clock is then higher, would seem larger than it is.
        """
        if not self._operands:
            # Once: a value that is copied to the device makes it wait for the host, and would be measured, too.
            self._operands = [torch.full((1,), value, device=self._device).expand(_OCCUPY_ELEMENTS) for value in (19.0, 20.0)]
        torch.igamma(*self._operands)

    def warm(self) -> None:
        """As Driver.warm: cuBLAS and cuDNN."""
        with torch.inference_mode():
            image = torch.zeros(1, 8, 8, 8, device=self._device)
            torch.nn.functional.conv2d(image, torch.zeros(8, 8, 3, 3, device=self._device))
            image.view(8, 64) @ torch.zeros(64, 8, device=self._device)
        torch.cuda.synchronize()

    def bound(self, nbytes: int) -> None:
        """As Driver.bound, by the limit of torch's caching allocator."""
        torch.cuda.set_per_process_memory_fraction(min(1.0, nbytes / self._total_bytes), self._device)

    def trim(self) -> None:
        """As Driver.trim."""
        torch.cuda.empty_cache()

    def capture(self, run: Callable[[], _T]) -> tuple[Graph, _T]:
        """As Driver.capture."""
        return self._captures.capture(run)

    def alive(self) -> bool:
        """As Driver.alive: has the device do something, since a wait for nothing may well succeed."""
        try:
            self._beat.add_(1)
            torch.cuda.synchronize()
        except RuntimeError as error:
            print(f"the CUDA context is broken: {error}", file=sys.stderr)
            return False
        return True

    def survives(self, failure: BaseException) -> bool:
        """As Driver.survives. An error of CUDA's own is not survived, whatever the device says, unless it is one of memory or of a capture."""
        code = getattr(failure, "error_code", None) if isinstance(failure, torch.AcceleratorError) else _ERROR_MEMORY_ALLOCATION
        return (code == _ERROR_MEMORY_ALLOCATION or code in _CAPTURE_ERRORS) and self.alive()
