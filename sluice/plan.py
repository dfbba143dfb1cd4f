"""What `sluice up` was asked for, parsed once and frozen, and where its files lie."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contracts.errors import InvalidValue, Unavailable
from contracts.functions import Function
from nodeagent.shell.gpus import GPUS_COMMAND, find_gpus
from sluice.ports import authority


@dataclass(frozen=True, slots=True)
class Plan:
    """One node: its functions, devices and limits (bytes, seconds), and how it is reached.

    `device_memory` 0: of each GPU what its lanes leave; `link_bytes_per_s` None: as fast as it goes; `sm_backend` as of the agent.
    """

    functions: tuple[Function, ...]
    run_dir: Path
    devices: tuple[str, ...]
    device_memory: int
    host_memory: int
    link_bytes_per_s: int | None
    threads: int
    host: str
    port: int
    isolate: bool
    idle_s: float
    grpc_port: int | None = None
    sm_backend: str = "auto"
    require_limits: bool = False

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"http://{authority(self.host)}:{self.port}"

    @property
    def gpus(self) -> bool:
        """Whether any of its devices is a GPU."""
        return any(map(_is_gpu, self.devices))

    def agent_arguments(self) -> list[str]:
        """The node agent's command line, without the interpreter."""
        arguments = ["--run-dir", str(self.run_dir), "--device-memory", str(self.device_memory), "--host-memory", str(self.host_memory)]
        for device in self.devices:
            arguments += ["--device", device]
        if self.link_bytes_per_s is not None:
            arguments += ["--link-bandwidth", str(self.link_bytes_per_s)]
        if self.gpus:
            arguments += ["--sm-backend", self.sm_backend]
            arguments += ["--require-limits"] if self.require_limits else []
        return [*arguments, "--threads", str(self.threads)]


def _is_gpu(device: str) -> bool:
    return device.startswith("cuda:")


def default_run_dir() -> Path:
    """$XDG_RUNTIME_DIR/sluice, or a folder of this user in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "sluice" if runtime else Path(f"/tmp/sluice-{os.getuid()}")


def default_devices(dev: Path = Path("/dev"), command: Sequence[str] = GPUS_COMMAND) -> tuple[str, ...]:
    """All GPUs that the driver shows, or the CPU device without any. Unavailable when GPUs are there and the driver does not work."""
    if not any(dev.glob("nvidia[0-9]*")):
        return ("cpu:0",)
    try:
        found = asyncio.run(find_gpus(command))
    except Unavailable as error:
        raise Unavailable(f"{error.message}; serve without GPUs with --device cpu:0") from None
    return tuple(f"cuda:{number}" for number in range(len(found))) or ("cpu:0",)


def default_device_memory(devices: Sequence[str] = ("cpu:0",)) -> int:
    """The size of each device when nobody names one: 0 (what lanes leave) of GPUs, of CPU devices a quarter of the memory here, at most 4 GiB."""
    if all(map(_is_gpu, devices)):
        return 0
    if any(map(_is_gpu, devices)):
        raise InvalidValue("must be named where GPUs and CPU devices serve together", key="--device-memory", value=None)
    return min(4 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def default_host_memory() -> int:
    """Four fifths of what is free in /dev/shm, where weights lie."""
    stat = os.statvfs("/dev/shm")
    return stat.f_bavail * stat.f_frsize * 4 // 5
