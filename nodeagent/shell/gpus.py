"""What is known of a GPU before anything runs on it: the driver's own facts, the processors near it, and the host link that it shares.

Asks the driver in a process of its own (`cuda_driver`) and sysfs; changes nothing.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec

from contracts.errors import InvalidValue, Unavailable

GPUS_COMMAND = (sys.executable, "-m", "nodeagent.shell.cuda_driver")
_PCI = Path("/sys/bus/pci/devices")
_ASK_S = 60.0


class Gpu(msgspec.Struct, frozen=True):
    """A GPU or MIG instance: SMs, compute capability, memory in bytes, CUDA version of the driver (13010: 13.1), PCI address in lower case.

    `peers`: the GPUs, of those that were shown together with it, whose memory it reads over a link of their own (NVLink).
    """

    uuid: str
    name: str
    sms: int
    capability: tuple[int, int]
    total_bytes: int
    driver: int
    bus_id: str
    mig: bool = False
    peers: tuple[str, ...] = ()


async def find_gpus(command: Sequence[str], visible: str | None = None) -> list[Gpu]:
    """The GPUs that `visible` (as CUDA_VISIBLE_DEVICES; None: as it is) shows, in PCI order. Unavailable when the driver does not work."""
    environment = {**os.environ, "CUDA_DEVICE_ORDER": "PCI_BUS_ID"} | ({} if visible is None else {"CUDA_VISIBLE_DEVICES": visible})
    pipe = asyncio.subprocess.PIPE
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=asyncio.subprocess.DEVNULL, stdout=pipe, stderr=pipe, env=environment)
    except OSError as error:
        raise Unavailable(f"the CUDA driver cannot be asked: {error}") from None
    try:
        async with asyncio.timeout(_ASK_S):
            out, err = await process.communicate()
    except TimeoutError:
        process.kill()
        await process.wait()
        raise Unavailable(f"the CUDA driver did not answer within {_ASK_S:.0f} s") from None
    try:
        if process.returncode == 0:
            return msgspec.json.decode(out, type=list[Gpu])
    except msgspec.DecodeError as error:
        raise Unavailable(f"what was said of the GPUs is not understood: {error}") from None
    raise Unavailable(f"the CUDA driver does not work: {err.decode(errors='replace').strip() or f'exit {process.returncode}'}")


async def find_gpu(command: Sequence[str], device: str) -> Gpu:
    """The GPU that a device names: `cuda:N`, the N-th that is visible, or `cuda:GPU-...` or `cuda:MIG-...` by its UUID. InvalidValue without one."""
    name = device.partition(":")[2]
    found = await find_gpus(command, None if name.isdecimal() else name)
    at = int(name) if name.isdecimal() else 0
    if at >= len(found):
        raise InvalidValue(f"there is no such GPU; {len(found)} are visible", key="device", value=device)
    return found[at]


def near_cpus(bus_id: str, root: Path = _PCI) -> tuple[int, ...]:
    """The processors of the device's NUMA node that this process may use; empty when there is but one node, or none is known."""
    with contextlib.suppress(OSError, ValueError):
        if int((root / bus_id / "numa_node").read_text("ascii")) >= 0:
            allowed = os.sched_getaffinity(0)
            near = allowed & set(_cpus((root / bus_id / "local_cpulist").read_text("ascii")))
            if near and near != allowed:
                return tuple(sorted(near))
    return ()


def host_link(bus_id: str, root: Path = _PCI) -> str:
    """A name for the way to the host: devices behind one root port share it. The address itself where sysfs does not say."""
    with contextlib.suppress(OSError):
        parts = (root / bus_id).resolve(strict=True).parts
        bridges = [at for at, part in enumerate(parts) if part.startswith("pci")]
        if bridges and bridges[-1] + 1 < len(parts):
            return f"pci-{parts[bridges[-1] + 1]}"
    return f"pci-{bus_id}"


def _cpus(text: str) -> list[int]:
    """The numbers of a list as the kernel writes it: 0-3,8."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found.extend(range(int(first), int(last or first) + 1))
    return found
