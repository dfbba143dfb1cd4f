"""The driver seam on the CPU: streams are ordered queues that a thread of their own works off, one piece at a time, in whatever order it likes.

Two ways to compute. Deferred: kernels are closures (`launch`) that run when the device comes to them, at times of a virtual clock, so that every
hazard between streams can happen. Inline: kernels are torch's own on the calling thread, which is one legal order of a stream, and copies come late;
this is what a whole lane process runs on. A graph holds addresses and nothing else, as the real one does.
"""

from __future__ import annotations

import contextlib
import os
import random
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from contracts.functions import FunctionClass

PATIENCE_S = 60.0
NS_PER_BYTE = 10
SMS = 132
WHOLE_NS = 2_000_000


class FakeStream:
    """Work in order. `at_ns` is the virtual time to which the device has come."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.at_ns = 0
        self.work: deque[tuple[Callable[[], bool], Callable[[], None]]] = deque()


class FakeEvent:
    """As torch.cuda.Event. An event that was never recorded has passed."""

    def __init__(self, device: FakeCuda) -> None:
        self._device = device
        self._recorded = self._passed = 0
        self.at_ns = 0

    def record(self, stream: FakeStream | None = None) -> None:
        assert stream is not None
        with self._device.changed:
            self._recorded += 1
            turn = self._recorded
        self._device.put(stream, lambda: self._pass(stream, turn))

    def _pass(self, stream: FakeStream, turn: int) -> None:
        self._passed, self.at_ns = max(self._passed, turn), self._device.now_ns(stream)

    def wait(self, stream: FakeStream | None = None) -> None:
        assert stream is not None
        turn = self._recorded

        def go_on() -> None:
            stream.at_ns = max(stream.at_ns, self.at_ns)

        self._device.put(stream, go_on, ready=lambda: self._passed >= turn)

    def query(self) -> bool:
        return self._passed >= self._recorded

    def synchronize(self) -> None:
        with self._device.changed:
            assert self._device.changed.wait_for(self.query, PATIENCE_S), "the device does not come by"

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.query()
        assert later.query()
        return (later.at_ns - self.at_ns) / 1e6


class FakeGraph:
    """What was captured, with the tensors it was captured with."""

    def __init__(self, replay: Callable[[], None]) -> None:
        self._replay = replay
        self.replayed = 0
        self.dropped = False

    def replay(self) -> None:
        assert not self.dropped, "a graph was replayed after it was dropped"
        self.replayed += 1
        self._replay()

    def reset(self) -> None:
        assert not self.dropped
        self.dropped = True


class Broken(RuntimeError):
    """A sticky error: the context is of no more use."""


class FakeCuda:
    """As Driver. `pick` chooses which of the streams that can go on does so next; `halted` stops the device."""

    name = "Fake GPU"
    registers_read_only = True
    pinnable_bytes = sys.maxsize
    pins = ""

    def __init__(
        self,
        *,
        inline: bool = False,
        pick: Callable[[Sequence[FakeStream]], FakeStream] = lambda streams: streams[0],
        sms: int = SMS,
        breaks: str = "",
    ) -> None:
        self.changed = threading.Condition()
        self.compute, self.copies = FakeStream("compute"), FakeStream("copies")
        self.sms = sms
        self.launched = self.copied = self.ran = self.most_ahead = 0
        self.registered: set[int] = set()
        self.graphs: list[FakeGraph] = []
        self._breaks = breaks
        self.bound_bytes = 0
        self._inline = inline
        self._pick = pick
        self._halted = False
        self._capturing: list[tuple[int, Callable[[], None]]] | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work_off, daemon=True)
        self._thread.start()

    def close(self) -> None:
        with self.changed:
            self._closed = True
            self.changed.notify_all()
        self._thread.join(PATIENCE_S)

    @contextlib.contextmanager
    def halted(self) -> Iterator[None]:
        """The device does nothing meanwhile."""
        with self.changed:
            self._halted = True
        try:
            yield
        finally:
            with self.changed:
                self._halted = False
                self.changed.notify_all()

    def until(self, condition: Callable[[], bool]) -> None:
        """Returns once the host has issued so much."""
        with self.changed:
            assert self.changed.wait_for(condition, PATIENCE_S), "it was never issued"

    def now_ns(self, stream: FakeStream) -> int:
        return time.monotonic_ns() if self._inline else stream.at_ns

    def put(self, stream: FakeStream, do: Callable[[], None], ready: Callable[[], bool] = lambda: True) -> None:
        """Gives a stream work that can begin once `ready`."""
        with self.changed:
            if self._inline and stream is self.compute:
                assert self.changed.wait_for(ready, PATIENCE_S), "compute waits for ever"
                do()
            else:
                stream.work.append((ready, do))
            self.changed.notify_all()

    def launch(self, kernel: Callable[[], None], ns: int = 1000) -> None:
        """A kernel on the compute stream."""

        def run() -> None:
            kernel()
            self.compute.at_ns += ns
            self.ran += 1

        if self._capturing is not None:
            self._capturing.append((ns, kernel))
            return
        self.launched += 1
        self.most_ahead = max(self.most_ahead, self.launched - self.ran)
        self.put(self.compute, run)

    def _work_off(self) -> None:
        with self.changed:
            while not self._closed:
                able = [stream for stream in (self.copies, self.compute) if stream.work and stream.work[0][0]()]
                if self._halted or not able:
                    self.changed.wait(PATIENCE_S)
                    continue
                self._pick(able).work.popleft()[1]()
                self.changed.notify_all()
                if self._inline:
                    self.changed.wait(random.random() / 1000)

    def event(self, timing: bool = False) -> FakeEvent:
        return FakeEvent(self)

    def free_bytes(self) -> int:
        return 1 << 30

    def allocate(self, nbytes: int) -> torch.Tensor:
        self._fd = os.memfd_create("fake-slab")
        os.posix_fallocate(self._fd, 0, nbytes)
        return self.open(self.export(torch.empty(0)), nbytes)

    def export(self, memory: torch.Tensor) -> bytes:
        return f"/proc/{os.getpid()}/fd/{self._fd}".encode()

    def open(self, handle: bytes, nbytes: int) -> torch.Tensor:
        return torch.from_file(handle.decode(), shared=True, size=nbytes, dtype=torch.uint8)

    def open_peer(self, handle: bytes, nbytes: int) -> torch.Tensor:
        return self.open(handle, nbytes)

    def register(self, memory: torch.Tensor) -> bool:
        assert memory.data_ptr() not in self.registered
        if self._inline:
            assert ("w" in _access(memory)) != self.registers_read_only, "mapped for more than it need be, or for less"
        if memory.numel() > self.pinnable_bytes:
            return False
        deadline = time.monotonic() + PATIENCE_S
        while self.pins and not os.path.exists(self.pins) and time.monotonic() < deadline:
            time.sleep(0.001)
        self.registered.add(memory.data_ptr())
        return True

    def unregister(self, memory: torch.Tensor) -> None:
        self.registered.remove(memory.data_ptr())

    def pinned(self, nbytes: int) -> torch.Tensor:
        return torch.empty(nbytes, dtype=torch.uint8)

    def empty(self, like: torch.Tensor) -> torch.Tensor:
        return torch.empty(like.shape, dtype=like.dtype)

    def copy(self, target: torch.Tensor, source: torch.Tensor, stream: FakeStream) -> None:
        assert self._capturing is None or stream is self.copies, "a copy from the host was captured"
        if not self.alive():
            raise Broken("CUDA error: an illegal memory access was encountered")

        def move() -> None:
            with torch.inference_mode():
                target.copy_(source)
            stream.at_ns += target.nbytes * NS_PER_BYTE

        self.copied += stream is self.copies
        self.put(stream, move)

    def occupy(self) -> None:
        ns = WHOLE_NS * SMS // self.sms
        self.launch((lambda: time.sleep(ns / 1e9)) if self._inline else (lambda: None), ns)

    def warm(self) -> None:
        pass

    def bound(self, nbytes: int) -> None:
        self.bound_bytes = nbytes

    def trim(self) -> None:
        pass

    def capture(self, run: Callable[[], Any]) -> tuple[FakeGraph, Any]:
        self._capturing = []
        recorder = _Recorder()
        try:
            with recorder:
                result = run()
        finally:
            kernels, self._capturing = self._capturing, None

        def replay() -> None:
            recorder.again()
            for ns, kernel in kernels:
                self.launch(kernel, ns)

        self.graphs.append(FakeGraph(replay))
        return self.graphs[-1], result

    def alive(self) -> bool:
        return not (self._breaks and os.path.exists(self._breaks))

    def survives(self, failure: BaseException) -> bool:
        return self.alive() and not isinstance(failure, Broken)


def connect(backend: str, cls: FunctionClass, first_sm: int, lane_sms: int) -> FakeCuda:
    """In place of `driver.connect` in a process of its own. What the environment says of it:

    FAKE_CUDA_BREAKS: a file; once it is there, the context is broken. FAKE_CUDA_WRITABLE: memory that is mapped read only cannot be registered.
    FAKE_CUDA_PINNABLE: no more bytes can be registered at once. FAKE_CUDA_PINS: a file; nothing is registered before it is there.
    CUDA_MPS_ACTIVE_THREAD_PERCENTAGE: as MPS takes it.
    """
    FakeCuda.registers_read_only = "FAKE_CUDA_WRITABLE" not in os.environ
    FakeCuda.pinnable_bytes = int(os.environ.get("FAKE_CUDA_PINNABLE", sys.maxsize))
    FakeCuda.pins = os.environ.get("FAKE_CUDA_PINS", "")
    percent = int(os.environ.get("CUDA_MPS_ACTIVE_THREAD_PERCENTAGE", "100"))
    return FakeCuda(inline=True, sms=lane_sms if backend == "green" else SMS * percent // 100, breaks=os.environ.get("FAKE_CUDA_BREAKS", ""))


def _access(memory: torch.Tensor) -> str:
    """How the kernel has mapped it: r--s, rw-s and their like."""
    with open("/proc/self/maps") as maps:
        for line in maps:
            span, access, *_ = line.split()
            start, end = (int(address, 16) for address in span.split("-"))
            if start <= memory.data_ptr() < end:
                return access
    raise AssertionError("it is not mapped")


class _Recorder(TorchDispatchMode):
    """Torch's own operators as a CUDA graph holds them: the same calls, on the same memory."""

    def __init__(self) -> None:
        super().__init__()
        self._calls: list[tuple[Any, Any, Any, list[torch.Tensor]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {leaf.untyped_storage().data_ptr() for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)}
        made = [leaf for leaf in pytree.tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if func._schema.is_mutable or not any(leaf.untyped_storage().data_ptr() in given for leaf in made):
            self._calls.append((func, args, kwargs or {}, [] if func._schema.is_mutable else made))
        return result

    def again(self) -> None:
        for func, args, kwargs, made in self._calls:
            fresh = pytree.tree_leaves(func(*args, **kwargs))
            for target, source in zip(made, fresh, strict=False):
                target.copy_(source)
