"""The memory of the node's devices as lanes see it: one slab each, and what a lane must be told, and must prove, to use it.

A CPU device's slab is a memfd of the agent. A GPU's is another process's (`cuda_slab`), and may be lost and come back. Never schedules: what is lost
or up again is told to the owner.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from contracts.errors import ProtocolError, Unavailable
from contracts.lane_wire import LaneReady, MapPeer, Spawn
from contracts.units import KIB, format_bytes
from nodeagent.events import StartLane
from nodeagent.settings import DeviceSpec
from nodeagent.shell.backends import Backend
from nodeagent.shell.options import Options

_CGROUP = Path("/sys/fs/cgroup")


class SlabOwner(Protocol):
    """Who ends and starts the lanes of a device whose slab comes and goes."""

    def slab_lost(self, device: str) -> None:
        """Nothing of it is left; its lanes have to end."""

    async def lanes_gone(self, device: str) -> None:
        """Returns when none of its lanes is left."""

    def slab_up(self, device: str) -> None:
        """It is there again, empty."""


class Slab(Protocol):
    """One device's memory; `fd` goes to every lane."""

    fd: int
    spec: DeviceSpec
    cpus: tuple[int, ...]
    """The processors near the device; empty: all are."""
    peers: tuple[str, ...]
    """The devices whose slabs its lanes may copy weights from, once each has proved that it can."""

    @property
    def backend(self) -> Backend:
        """What holds its lanes."""

    @property
    def why(self) -> str:
        """Why it is no other, for people."""

    @property
    def uuid(self) -> str:
        """As the driver knows the device, "" where there is no driver."""

    def refusal(self, sm_percent: int) -> str | None:
        """Why no lane can be held to this size, None if one can."""

    def spawn(self, lane: StartLane) -> Spawn:
        """What a new lane is told."""

    def lend(self) -> MapPeer:
        """What a lane of another device is told to copy from it; `fd` goes along."""

    def ended(self, lane: int) -> None:
        """A lane of it has gone."""

    def prove(self, lane: StartLane, ready: LaneReady) -> None:
        """ProtocolError when a lane did not prove the cap that it was asked for."""

    def suspect(self) -> None:
        """A lane of it died that was not told to."""

    async def release(self, pid: int) -> None:
        """Frees the device of a lane that may be at work, before the lane is killed."""

    def watch(self, owner: SlabOwner) -> None:
        """From now on the owner is told when it is lost."""

    def unwatch(self) -> None:
        """From now on nobody is told."""

    async def close(self) -> None:
        """Gives the memory back. Its lanes have gone."""


class CpuSlab:
    """A memfd, reserved whole, so that no lane can fail later for want of memory. Its lanes pace themselves; it is never lost."""

    cpus: tuple[int, ...] = ()
    backend = Backend.PACE
    why = "lanes pace themselves"
    uuid = ""

    def __init__(self, device: str, options: Options) -> None:
        """Unavailable when the memory is not there."""
        self._options = options
        nbytes = options.device_bytes
        self.peers = tuple(other for other in options.devices if other.startswith("cpu:") and other != device) if options.peer_bytes_per_s else ()
        self.spec = DeviceSpec(device, nbytes, options.link_bytes_per_s) if options.link_bytes_per_s else DeviceSpec(device, nbytes)
        self.fd = os.memfd_create(f"sluice-slab-{device}", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.fd, 0, nbytes)
        except OSError as error:
            os.close(self.fd)
            reason = f"no memory for {format_bytes(nbytes)} of device {device} ({error.strerror})"
            raise Unavailable(f"{reason}: use a smaller --device-memory") from None

    def refusal(self, sm_percent: int) -> str | None:
        """Any size can be paced."""
        return None

    def spawn(self, lane: StartLane) -> Spawn:
        """As Slab.spawn."""
        options = self._options
        return Spawn(
            lane=lane.lane,
            device=lane.device,
            sm_percent=lane.sm_percent,
            cls=lane.cls,
            slab_bytes=options.device_bytes,
            threads=options.threads,
            link_bytes_per_s=options.link_bytes_per_s,
            activation_bytes=options.activation_bytes,
        )

    def lend(self) -> MapPeer:
        """As Slab.lend."""
        return MapPeer(self.spec.id, self._options.device_bytes, self._options.peer_bytes_per_s)

    def ended(self, lane: int) -> None:
        """Nothing was kept of it."""

    def prove(self, lane: StartLane, ready: LaneReady) -> None:
        """As Slab.prove."""
        if ready.sm_percent != lane.sm_percent:
            raise ProtocolError(f"lane {lane.lane} proved {ready.sm_percent} % of the SMs, not {lane.sm_percent} %")

    def suspect(self) -> None:
        """The memory is the agent's own."""

    async def release(self, pid: int) -> None:
        """Killing is enough."""

    def watch(self, owner: SlabOwner) -> None:
        """It is never lost."""

    def unwatch(self) -> None:
        """It is never lost."""

    async def close(self) -> None:
        """As Slab.close."""
        os.close(self.fd)


async def open_slabs(options: Options) -> dict[str, Slab]:
    """The slabs of all devices, each ready for lanes. Unavailable or InvalidValue when one cannot be had; nothing is left then."""
    # Imported here: an agent of CPU devices alone does without.
    from nodeagent.shell.cuda_slab import CudaSlab, clean_up, find_all, peers_of

    gpus = await find_all(options)
    check_memory((len(options.devices) - len(gpus)) * options.device_bytes)
    if gpus:
        clean_up(options.run_dir)
    slabs: dict[str, Slab] = {}
    opening = {device: asyncio.ensure_future(CudaSlab.open(device, options, gpu, peers_of(device, gpus))) for device, gpu in gpus.items()}
    try:
        for device in options.devices:
            slabs[device] = await opening[device] if device in opening else CpuSlab(device, options)
    except BaseException:
        for slab in opening.values():
            slab.cancel()
        results = await asyncio.gather(*opening.values(), return_exceptions=True)
        opened = {slab.spec.id: slab for slab in results if isinstance(slab, CudaSlab)}
        await close_slabs(slabs | opened)
        raise
    return slabs


async def close_slabs(slabs: Mapping[str, Slab]) -> None:
    """Closes all of them, the one as the other fails."""
    await asyncio.gather(*(slab.close() for slab in slabs.values()), return_exceptions=True)


def check_memory(nbytes: int) -> None:
    """Unavailable when the slabs cannot fit: reserving them would call the kernel's OOM killer on others before it failed."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    available = int(fields["MemAvailable"].split()[0]) * KIB
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    if nbytes > available:
        raise Unavailable(f"the devices need {format_bytes(nbytes)}, {format_bytes(available)} of memory are free: use a smaller --device-memory")
