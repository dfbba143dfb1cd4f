"""What `sluice up` was asked for, parsed once and frozen, and where its files lie."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from contracts.functions import Function
from sluice.ports import authority


@dataclass(frozen=True, slots=True)
class Plan:
    """One node: its functions, devices and limits (bytes, seconds; `link_bytes_per_s` None: as fast as it goes), and how it is reached."""

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

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"http://{authority(self.host)}:{self.port}"

    def agent_arguments(self) -> list[str]:
        """The node agent's command line, without the interpreter."""
        arguments = ["--run-dir", str(self.run_dir), "--device-memory", str(self.device_memory), "--host-memory", str(self.host_memory)]
        for device in self.devices:
            arguments += ["--device", device]
        if self.link_bytes_per_s is not None:
            arguments += ["--link-bandwidth", str(self.link_bytes_per_s)]
        return [*arguments, "--threads", str(self.threads)]


def default_run_dir() -> Path:
    """$XDG_RUNTIME_DIR/sluice, or a folder of this user in /tmp."""
    runtime = os.environ.get("XDG_RUNTIME_DIR")
    return Path(runtime) / "sluice" if runtime else Path(f"/tmp/sluice-{os.getuid()}")


def default_device_memory() -> int:
    """A quarter of this machine's memory, at most 4 GiB: the size of a CPU device when nobody names one."""
    return min(4 << 30, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4)


def default_host_memory() -> int:
    """Four fifths of what is free in /dev/shm, where weights lie."""
    stat = os.statvfs("/dev/shm")
    return stat.f_bavail * stat.f_frsize * 4 // 5
