"""What a device is, in numbers that were measured on it, so that one estimator can serve several kinds of devices.

Owns the words for a device's facts and the way to get them: a process of its own (`profiler.probe_device`) measures them. Imports no torch.
"""

from __future__ import annotations

import math
import re
import subprocess
import sys

import msgspec

from contracts.errors import InvalidValue, Unavailable

_PROBE_S = 300.0


class DeviceFacts(msgspec.Struct, frozen=True):
    """One device. `kind` is what stands before the colon of its id ("cpu"), `name` the hardware's own name.

    `processors`: SMs of a GPU; compute threads of a lane on the CPU device. `clock_mhz`: their clock, 0 where nobody knows it. Measured:
    `flops_per_s` of a large float32 matrix product, `memory_bytes_per_s` read and written by a copy within the device's memory,
    `copy_bytes_per_s` of weights from host memory to the device. `memory_bytes` is the slab that holds weights.
    """

    kind: str
    name: str
    processors: int
    clock_mhz: float
    flops_per_s: float
    memory_bytes_per_s: float
    copy_bytes_per_s: float
    memory_bytes: int

    def __post_init__(self) -> None:
        for key in ("processors", "flops_per_s", "memory_bytes_per_s", "copy_bytes_per_s", "memory_bytes"):
            value = getattr(self, key)
            if not (value > 0 and math.isfinite(value)):
                raise InvalidValue("must be greater than 0", key=f"device.{key}", value=value)


def check(device: str) -> None:
    """InvalidValue unless lanes can run on such a device."""
    if not re.fullmatch(r"cpu:[0-9]+", device):
        raise InvalidValue("must be cpu:N", key="device", value=device)


def measure(device: str, memory_bytes: int, threads: int = 1) -> DeviceFacts:
    """The facts of a device ("cpu:0") as a lane with that many threads meets it; takes some seconds.

    InvalidValue for a device that there is not; Unavailable when the probe cannot run.
    """
    check(device)
    arguments = ["--device", device, "--memory", str(memory_bytes), "--threads", str(threads)]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "profiler.probe_device", *arguments], capture_output=True, text=True, check=False, timeout=_PROBE_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Unavailable(f"the device {device!r} could not be measured: {error}") from None
    try:
        return msgspec.json.decode(done.stdout, type=DeviceFacts)
    except msgspec.MsgspecError:
        raise Unavailable(f"the device {device!r} could not be measured: {done.stderr.strip()[-2000:]}") from None
