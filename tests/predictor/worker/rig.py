"""An executor and a swap engine on the fake CUDA device, with a model whose kernels run when the device comes to them and not before."""

from __future__ import annotations

import mmap
import os
import queue
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from contracts.artifact import Gate, Signature, TensorEntry, TensorSpec, WeightIndex
from contracts.artifact import Program as ProgramRef
from contracts.lane_page import LanePage
from contracts.lane_wire import BatchDone, CopyProgress, Run
from contracts.wire import Part, TensorRef
from models.program import Executable
from predictor.worker.devices.cuda import CudaDevice
from predictor.worker.executor import Executor
from predictor.worker.functions import Function, Functions, Program
from predictor.worker.gates import Gates, needs_of
from predictor.worker.memory import ActivationBound
from predictor.worker.segments import Segments
from predictor.worker.swap import SwapEngine, Transfer
from tests.predictor.worker.fake_cuda import PATIENCE_S, FakeCuda

SLAB_BYTES = 1 << 16
KERNEL_NS = 50_000


class Layer(nn.Module):
    """A kernel that reads its weights from the slab, and the input, when the device runs it."""

    def __init__(self, driver: FakeCuda, nbytes: int) -> None:
        super().__init__()
        self._driver = driver
        self.register_buffer("w", torch.empty(nbytes, dtype=torch.uint8, device="meta"))

    def forward(self, x: Tensor, out: Tensor) -> None:
        weights = self.w

        def kernel() -> None:
            with torch.inference_mode():
                torch.bitwise_xor(weights, x[0, 0], out=out)

        self._driver.launch(kernel, KERNEL_NS)


class Reader(nn.Module):
    """[1, 1] uint8 -> all weights, in their order, each xor the input."""

    def __init__(self, driver: FakeCuda, sizes: list[int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(driver, size) for size in sizes)
        self._sizes = sizes

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros(1, sum(self._sizes), dtype=torch.uint8)
        end = 0
        for layer, size in zip(self.layers, self._sizes, strict=True):
            layer(x, out[0, end : end + size])
            end += size
        return out


def reader(driver: FakeCuda, name: str, sizes: list[int], content: bytes) -> Function:
    """A function that is ready; its tensors lie one after another in `content`."""
    entries, gates, end = [], [], 0
    for number, size in enumerate(sizes):
        entries.append(TensorEntry(f"layers.{number}.w", "uint8", (size,), end, size))
        end += size
        gates.append(Gate(f"layers.{number}", end))
    signature = Signature((TensorSpec("x", "UINT8", ("batch", 1)),), (TensorSpec("y", "UINT8", ("batch", end)),))
    function = Function(name, torch.frombuffer(bytearray(content), dtype=torch.uint8))
    function.index = WeightIndex("0" * 64, end, tuple(entries), tuple(gates), ProgramRef("catalog", name), signature, 1)
    function.needs = needs_of(gates, end)
    program = Program.__new__(Program)
    program.execute = Executable(Reader(driver, sizes), signature)
    program.gates = Gates(program.execute.module)
    program.bound = (0, 0)
    program.recordable = True
    function.program = program
    return function


class Rig:
    """A lane's parts without its process. The copy thread takes what `copying` holds; batches run on the calling thread."""

    def __init__(self, driver: FakeCuda, functions: list[Function], piece_bytes: int = 256, device: Any = CudaDevice) -> None:
        self.driver = driver
        self.slab_fd = os.memfd_create("rig-slab")
        os.posix_fallocate(self.slab_fd, 0, SLAB_BYTES)
        handle = f"/proc/{os.getpid()}/fd/{self.slab_fd}".encode()
        self.device = device(driver, handle, SLAB_BYTES, piece_bytes=piece_bytes, whole_ns=0, activation_bytes=0)
        self.functions = Functions(self.device, ActivationBound(0), lambda attached: None)
        for function in functions:
            self.functions._functions[function.name] = function
        self.reported: list[CopyProgress] = []
        self._moved = threading.Condition()
        self.engine = SwapEngine(self.device, self._report)
        self.segments = Segments()
        segment_fd = os.memfd_create("rig-segment")
        os.ftruncate(segment_fd, SLAB_BYTES)
        self.memory = mmap.mmap(segment_fd, SLAB_BYTES)
        self.segments.map(1, segment_fd, SLAB_BYTES)
        page_fd = LanePage.create()
        self.page = LanePage(page_fd)
        os.close(page_fd)
        self.paused: list[tuple[int, int]] = []
        self.executor = Executor(self.device, self.functions, self.segments, ActivationBound(0), self.page, self._pause)
        self.copying: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self.failures: list[BaseException] = []
        for work in (self._copy, self.engine.follow):
            threading.Thread(target=work, daemon=True).start()
        self._batches = 0

    def close(self) -> None:
        self.driver.close()
        os.close(self.slab_fd)

    def begin(self, copy: int, function: Function, offset: int) -> None:
        """The copy thread takes up a copy; nothing moves before it is granted."""
        transfer = Transfer(copy, function.weights, offset)

        def start() -> None:
            self.engine.begin(transfer)
            self.functions.started(function, transfer)

        self.copying.put(start)

    def grant(self, copy: int, until: int) -> None:
        self.copying.put(lambda: self.engine.advance(copy, until))

    def until_copied(self, copy: int, nbytes: int) -> None:
        with self._moved:
            assert self._moved.wait_for(lambda: CopyProgress(copy, nbytes) in self.reported, PATIENCE_S), self.failures

    def run(self, function: Function, offset: int, x: int, *, copy: int = 0, preemptible: bool = False) -> tuple[BatchDone, bytes]:
        """Runs a batch to its end; what it says, and its output."""
        self._batches += 1
        total = function.weights.numel()
        self.memory[:1] = bytes([x])
        self.memory[64 : 64 + total] = bytes(total)
        part = Part(1, (TensorRef("x", "UINT8", (1, 1), 0, 1),), (TensorRef("y", "UINT8", (1, total), 64, total),))
        done = self.executor.run(Run(self._batches, function.name, offset, copy, 1, (part,), preemptible))
        return done, self.memory[64 : 64 + total]

    def scribble(self, start: int, end: int, value: int) -> None:
        """What other functions write over a place that nothing is resident at any more."""
        with mmap.mmap(self.slab_fd, SLAB_BYTES) as slab:
            slab[start:end] = bytes([value]) * (end - start)

    def _report(self, message: CopyProgress) -> None:
        with self._moved:
            self.reported.append(message)
            self._moved.notify_all()

    def _pause(self, batch: int, gpu_ns: int) -> None:
        self.paused.append((batch, gpu_ns))

    def _copy(self) -> None:
        while True:
            try:
                self.copying.get()()
            except BaseException as failure:
                self.failures.append(failure)


def answer(content: bytes, x: int) -> bytes:
    """What a Reader with these weights must give."""
    return (np.frombuffer(content, np.uint8) ^ np.uint8(x)).tobytes()
