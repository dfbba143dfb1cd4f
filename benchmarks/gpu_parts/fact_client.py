"""`python -m benchmarks.gpu_parts.fact_client BACKEND FIRST SMS`: a process with a context of its own that does to a GPU what it is told.

One JSON list a line on standard input, [verb, argument...]; one answer a line on standard output, {"found": ...} or {"error": ...}.
Goes to the GPU through the lane's own driver seam, so that what is found holds for lanes. Its environment says which GPU, and whose MPS daemon.
Decides nothing.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from contracts.functions import FunctionClass, ModelFormat, ModelRef
from contracts.units import MIB
from models import catalogue, networks
from models.samples import sample_inputs
from predictor.worker.devices import driver as seam
from predictor.worker.devices.holder import timed_copies
from predictor.worker.devices.libcuda import LibCuda
from predictor.worker.devices.proof import occupancy_ns

_PIECES_MIB = (1, 2, 4, 8, 16, 32)
_WAITS = 200
_COPY_S = 1.0


class Client:
    """The verbs. Memory in bytes, times as named; `slab` is what `open` has opened."""

    def __init__(self, driver: seam.Driver) -> None:
        self.driver = driver
        self._slab = torch.empty(0, dtype=torch.uint8)

    def occupy(self) -> int:
        """The best time of the occupancy kernel, in ns."""
        return occupancy_ns(self.driver)

    def works(self) -> bool:
        """Whether the context still does what it is asked."""
        return self.driver.alive()

    def repeat(self, seconds: float) -> float:
        """The median of its times over so long, in ms, each waited for."""
        until, times = time.monotonic() + seconds, []
        while time.monotonic() < until:
            times.append(self._timed_ms(self.driver.occupy))
        return statistics.median(times)

    def busy(self, kernels: int) -> None:
        """Issues so many kernels and waits for none."""
        for _ in range(kernels):
            self.driver.occupy()

    def open(self, handle: str, nbytes: int) -> float:
        """Opens a slab by its handle (hexadecimal): the seconds that takes."""
        begun = time.monotonic()
        self._slab = self.driver.open(bytes.fromhex(handle), nbytes)
        return time.monotonic() - begun

    def fill(self, start: int, end: int, value: int) -> None:
        """Writes to the slab and waits."""
        self._slab[start:end].fill_(value)
        self._wait()

    def holds(self, start: int, end: int, value: int) -> bool:
        """Whether the slab holds this value there."""
        return bool((self._slab[start:end] == value).all())

    def graph(self, runs: int) -> dict[str, float]:
        """The occupancy kernel eagerly and from a graph, in ms: whether a graph keeps to the SMs of its stream."""
        eager = min(self._timed_ms(self.driver.occupy) for _ in range(runs))
        begun = time.monotonic()
        graph, _ = self.driver.capture(self.driver.occupy)
        captured_ms = 1e3 * (time.monotonic() - begun)
        return {"eager_ms": eager, "replay_ms": min(self._timed_ms(graph.replay) for _ in range(runs)), "capture_ms": captured_ms}

    def pin(self, nbytes: int) -> dict[str, Any]:
        """What pinning shared memory costs, and how fast copies from it are beside other memory."""
        device = self.driver.allocate(nbytes)
        with _shared(nbytes, not self.driver.registers_read_only) as host:
            begun = time.monotonic()
            found: dict[str, Any] = {"read_only": self.driver.registers_read_only, "pinned": self.driver.register(host)}
            found |= {"s_per_gb": (time.monotonic() - begun) * 1e9 / nbytes, "torch_sees_it": host.is_pinned()}
            found["gb_per_s"] = self._speed(device, host)
            begun = time.monotonic()
            self.driver.unregister(host)
            found["unpin_s_per_gb"] = (time.monotonic() - begun) * 1e9 / nbytes
        found["torch_pinned_gb_per_s"] = self._speed(device, self.driver.pinned(nbytes))
        return found | {"pageable_gb_per_s": self._speed(device, torch.ones(nbytes, dtype=torch.uint8))}

    def copy_while_pinning(self, nbytes: int) -> dict[str, float]:
        """The speed of copies piece by piece, alone and while another thread pins memory, in GB/s, and the longest piece in ms."""
        device, host = self.driver.allocate(nbytes), self.driver.pinned(nbytes)
        alone_speed, alone_ms = self._pieces(device, host)
        ended = threading.Event()

        def keep_pinning() -> None:
            while not ended.is_set():
                with _shared(nbytes, not self.driver.registers_read_only) as other:
                    if not self.driver.register(other):
                        return
                    self.driver.unregister(other)

        thread = threading.Thread(target=keep_pinning)
        thread.start()
        try:
            speed, longest_ms = self._pieces(device, host)
        finally:
            ended.set()
            thread.join()
        return {"alone_gb_per_s": alone_speed, "alone_longest_ms": alone_ms, "pinning_gb_per_s": speed, "pinning_longest_ms": longest_ms}

    def pieces(self, nbytes: int) -> dict[str, float]:
        """GB/s of pinned copies by the size of a piece."""
        device, host = self.driver.allocate(nbytes), self.driver.pinned(nbytes)
        sizes = [size for size in _PIECES_MIB if size * MIB <= nbytes]
        return {f"{size}_mib": max(timed_copies(self.driver, device, host, size * MIB) for _ in range(5)) / 1e9 for size in sizes}

    def wait(self, nbytes: int) -> dict[str, float]:
        """What the host adds at the end of a small copy, in us, asleep and spinning: the median, the 99th percentile, and processor time."""

        def spin(event: seam.Event) -> None:
            while not event.query():
                pass

        device, host = self.driver.allocate(nbytes), self.driver.pinned(nbytes)
        found: dict[str, float] = {}
        for name, wait in (("asleep", lambda event: event.synchronize()), ("spinning", spin)):
            worked, added = time.thread_time(), []
            for _ in range(_WAITS):
                begun = time.perf_counter()
                took_ms = self._timed_ms(lambda: self.driver.copy(device, host, self.driver.compute), wait)
                added.append(1e6 * (time.perf_counter() - begun) - 1e3 * took_ms)
            found |= {f"{name}_p50_us": statistics.median(added), f"{name}_p99_us": sorted(added)[_WAITS * 99 // 100]}
            found[f"{name}_processor_us"] = 1e6 * (time.thread_time() - worked) / _WAITS
        return found

    def _pieces(self, device: torch.Tensor, host: torch.Tensor) -> tuple[float, float]:
        """GB/s over a second, and the longest time of a piece in ms as the host sees it."""
        until, copied, longest = (begun := time.monotonic()) + _COPY_S, 0, 0.0
        while (now := time.monotonic()) < until:
            for start in range(0, host.numel(), 8 * MIB):
                piece = slice(start, min(start + 8 * MIB, host.numel()))
                self.driver.copy(device[piece], host[piece], self.driver.copies)
                event = self.driver.event()
                event.record(self.driver.copies)
                event.synchronize()
                copied, longest, now = copied + piece.stop - piece.start, max(longest, time.monotonic() - now), time.monotonic()
        return copied / (time.monotonic() - begun) / 1e9, 1e3 * longest

    def _speed(self, device: torch.Tensor, host: torch.Tensor) -> float:
        return max(timed_copies(self.driver, device, host, 8 * MIB) for _ in range(3)) / 1e9

    def _timed_ms(self, issue: Callable[[], object], wait: Callable[[seam.Event], None] = lambda event: event.synchronize()) -> float:
        begun, ended = self.driver.event(timing=True), self.driver.event(timing=True)
        begun.record(self.driver.compute)
        issue()
        ended.record(self.driver.compute)
        wait(ended)
        return begun.elapsed_time(ended)

    def _wait(self) -> None:
        event = self.driver.event()
        event.record(self.driver.compute)
        event.synchronize()


class GpuClient(Client):
    """And those that only a real GPU can do."""

    def says(self) -> dict[str, Any]:
        """What the driver and torch say of this context."""
        properties = torch.cuda.get_device_properties(0)
        found = {"name": properties.name, "sms": self.driver.sms, "multiprocessors": properties.multi_processor_count}
        found |= {"affinity_sms": LibCuda().affinity_sms(), "memory_bytes": properties.total_memory, "torch": torch.__version__}
        return found | {"cuda": torch.version.cuda, "priorities": list(torch.cuda.Stream().priority_range())}

    def warm(self) -> float:
        """The seconds until the libraries of networks are loaded."""
        begun = time.monotonic()
        self.driver.warm()
        return time.monotonic() - begun

    def record(self, source: str) -> dict[str, float]:
        """How long a model's graph takes to record: what a request has to wait that comes meanwhile. In ms, beside an eager run and a replay."""
        config = catalogue.parse(source).config
        module = networks.construct(config).to_empty(device="cuda").eval()
        for tensor in (*module.parameters(), *module.buffers()):
            torch.nn.init.zeros_(tensor)
        inputs = [torch.zeros(size, dtype=kind, device="cuda") for size, kind in _shapes(source)]
        with torch.inference_mode():
            eager_ms = min(self._timed_ms(lambda: module(*inputs)) for _ in range(5))
            begun = time.monotonic()
            graph, _ = self.driver.capture(lambda: module(*inputs))
            capture_ms = 1e3 * (time.monotonic() - begun)
        return {"capture_ms": capture_ms, "eager_ms": eager_ms, "replay_ms": min(self._timed_ms(graph.replay) for _ in range(5))}

    def fault(self) -> str:
        """Breaks the context by an index that is not there; what is then said."""
        try:
            torch.zeros(4, device="cuda")[torch.tensor([9], device="cuda")].cpu()
        except RuntimeError as error:
            return str(error).splitlines()[0]
        return "nothing was said"


def serve(client: Client) -> None:
    """Does what standard input says, until its end."""
    for line in sys.stdin:
        verb, *arguments = json.loads(line)
        answer: Mapping[str, Any]
        try:
            answer = {"found": getattr(client, verb)(*arguments)}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}".splitlines()[0]}
        print(json.dumps(answer), flush=True)
    # Whatever is still under way on the device ends with the process, or when the MPS server is told so.
    os._exit(0)


def _shapes(source: str) -> list[tuple[tuple[int, ...], torch.dtype]]:
    arrays = sample_inputs(ModelRef(ModelFormat.CATALOG, source), 1, seed=1).values()
    return [(array.shape, torch.from_numpy(array).dtype) for array in arrays]


@contextlib.contextmanager
def _shared(nbytes: int, writable: bool) -> Iterator[torch.Tensor]:
    """Shared memory as host weights have it: written by another, mapped as it is asked for."""
    fd = os.memfd_create("facts", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, nbytes)
        with mmap.mmap(fd, nbytes) as whole:
            for start in range(0, nbytes, MIB):
                whole[start : start + MIB] = b"\x01" * min(MIB, nbytes - start)
        access = mmap.PROT_READ | mmap.PROT_WRITE if writable else mmap.PROT_READ
        yield torch.frombuffer(mmap.mmap(fd, nbytes, prot=access), dtype=torch.uint8)
    finally:
        os.close(fd)


def main() -> None:
    """Opens the one visible GPU as asked."""
    backend, first, sms = sys.argv[1:]
    warnings.filterwarnings("ignore", "The given buffer is not writable")
    serve(GpuClient(seam.connect(backend, FunctionClass.LATENCY_SENSITIVE, int(first), int(sms))))


if __name__ == "__main__":
    main()
