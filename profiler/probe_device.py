"""`python -m profiler.probe_device --device cpu:0 --memory BYTES`: measures a device with torch and prints its facts as JSON.

A process of its own, so that whoever asks stays without torch.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import psutil
import torch

from contracts.units import MIB
from profiler.device import DeviceFacts, check

_SECONDS = 0.5
_MATRIX = 1024
_BUFFER_BYTES = 128 * MIB  # more than the caches hold


def probe(device: str, memory_bytes: int, threads: int) -> DeviceFacts:
    """Measures a device; InvalidValue when lanes cannot run on it."""
    check(device)
    torch.set_num_threads(threads)
    left, right = torch.rand(2, _MATRIX, _MATRIX)
    product = torch.empty_like(left)
    source = torch.ones(_BUFFER_BYTES, dtype=torch.uint8)
    target = torch.zeros_like(source)
    flops_per_s = 2 * _MATRIX**3 / _seconds(lambda: torch.mm(left, right, out=product))
    memory_bytes_per_s = 2 * _BUFFER_BYTES / _seconds(lambda: target.copy_(source))
    torch.set_num_threads(1)  # as the copy thread of a lane
    copy_bytes_per_s = _BUFFER_BYTES / _seconds(lambda: target.copy_(source))
    frequency = psutil.cpu_freq()
    return DeviceFacts(
        kind="cpu",
        name=_cpu_name(),
        processors=threads,
        clock_mhz=(frequency.max or frequency.current) if frequency else 0.0,
        flops_per_s=flops_per_s,
        memory_bytes_per_s=memory_bytes_per_s,
        copy_bytes_per_s=copy_bytes_per_s,
        memory_bytes=memory_bytes,
    )


def _seconds(work: Callable[[], object]) -> float:
    """The median time of a call, over half a second after a first one that is not counted."""
    work()
    times: list[float] = []
    begun = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begun < _SECONDS:
        before = time.perf_counter()
        work()
        times.append(time.perf_counter() - before)
    return statistics.median(times)


def _cpu_name() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def main() -> None:
    """Reads the command line, prints the facts."""
    parser = argparse.ArgumentParser(prog="python -m profiler.probe_device", description="Measures a device and prints its facts as JSON.")
    parser.add_argument("--device", required=True, metavar="KIND:N")
    parser.add_argument("--memory", type=int, required=True, metavar="BYTES", help="the slab that holds weights")
    parser.add_argument("--threads", type=int, default=1, help="compute threads of a CPU lane")
    given = parser.parse_args()
    print(msgspec.json.encode(probe(given.device, given.memory, given.threads)).decode())


if __name__ == "__main__":
    main()
