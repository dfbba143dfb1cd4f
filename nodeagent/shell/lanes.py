"""The lanes of a node: asks the fork server for them, waits for their proof, and sees to their end.

Owns the slabs, the fork server and every Lane. A lane is reported lost only once its process has gone: until then it may still write into the slab.
Decides nothing: which lane starts, runs and stops comes as a command.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Protocol

from contracts.errors import ProtocolError, Unavailable
from contracts.lane_page import LanePage
from contracts.units import KIB, format_bytes
from contracts.wire import Spawn
from nodeagent.events import StartLane
from nodeagent.shell.forkserver import ForkServer
from nodeagent.shell.lane import Lane, LaneOwner
from nodeagent.shell.options import Options
from nodeagent.shell.outbox import Outbox

_log = logging.getLogger(__name__)
_READY_S = 120.0
_EXIT_S = 5.0
_CGROUP = Path("/sys/fs/cgroup")


class LanesOwner(LaneOwner, Protocol):
    """Who hears what the lanes do."""

    def lane_up(self, lane: Lane) -> None:
        """It serves."""

    def lane_lost(self, lane: Lane) -> None:
        """Its process has gone; `lane.running` is what it still held."""


class Lanes:
    """Every lane by its id. Unavailable from the constructor: a slab does not fit into memory."""

    def __init__(self, options: Options, outbox: Outbox, owner: LanesOwner) -> None:
        self._options = options
        self._outbox = outbox
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[int, Lane] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._endings: set[asyncio.Task[None]] = set()
        _check_memory(len(options.devices) * options.device_bytes)
        self._slabs = {device: _make_slab(device, options.device_bytes) for device in options.devices}
        self._fork_server = ForkServer(options.worker_command)

    def __getitem__(self, lane: int) -> Lane:
        return self._lanes[lane]

    def pid(self, lane: int) -> int:
        """The process of a lane, 0 before it is known."""
        return self._lanes[lane].pid if lane in self._lanes else 0

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    def start(self, spec: StartLane) -> None:
        """Asks for a lane; `lane_up` or `lane_lost` follows."""
        page_fd = LanePage.create()
        lane = self._lanes[spec.lane] = Lane(spec, LanePage(page_fd), self._outbox, self._owner, self)
        run, lane_run = socket.socketpair()
        copy, lane_copy = socket.socketpair()
        lane.connect(run, copy)
        self._deadlines[spec.lane] = self._loop.call_later(_READY_S, lane.close, ProtocolError(f"not ready within {_READY_S:.0f} s"))
        with lane_run, lane_copy:
            self._fork_server.spawn(self._spawn(spec), [lane_run.fileno(), lane_copy.fileno(), self._slabs[spec.device], page_fd])
        os.close(page_fd)

    def stop(self, lane: int) -> None:
        """Ends a lane that is idle, or that hangs; `lane_lost` follows."""
        ending = self._lanes[lane]
        ending.close(Unavailable("its batch hangs") if ending.at_work else None)

    async def close(self) -> None:
        """Ends every lane and the fork server, and waits until they have gone."""
        for lane in self:
            lane.close()
        while self._endings:
            await asyncio.wait(self._endings)
        await self._fork_server.stop()
        for fd in self._slabs.values():
            os.close(fd)

    def lane_proved(self, lane: Lane) -> None:
        """It serves (`LaneKeeper`)."""
        self._deadlines.pop(lane.spec.lane).cancel()
        self._owner.lane_up(lane)

    def lane_closed(self, lane: Lane, error: Exception | None) -> None:
        """Its channels are closed; its process follows (`LaneKeeper`)."""
        spec = lane.spec
        deadline = self._deadlines.pop(spec.lane, None)
        if deadline is not None:
            deadline.cancel()
        if error is not None or deadline is not None or lane.at_work:
            _log.warning(
                "lane %d (%s, %d %% SM, %s, pid %d) is lost: %s", spec.lane, spec.device, spec.sm_percent, spec.cls, lane.pid, error or "it ended"
            )
        ending = self._loop.create_task(self._end(lane))
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    def _spawn(self, spec: StartLane) -> Spawn:
        options = self._options
        return Spawn(
            lane=spec.lane,
            device=spec.device,
            sm_percent=spec.sm_percent,
            cls=spec.cls,
            slab_bytes=options.device_bytes,
            threads=options.threads,
            link_bytes_per_s=options.link_bytes_per_s,
            activation_bytes=options.activation_bytes,
        )

    async def _end(self, lane: Lane) -> None:
        """Waits until the lane's process has gone: one that was working is killed, an idle one has `_EXIT_S` to leave by itself."""
        if lane.pidfd >= 0:
            if lane.at_work:
                lane.kill()
            try:
                await asyncio.wait_for(_exited(lane.pidfd), _EXIT_S)
            except TimeoutError:
                lane.kill()
                await _exited(lane.pidfd)
            os.close(lane.pidfd)
            lane.pidfd = -1
        del self._lanes[lane.spec.lane]
        self._owner.lane_lost(lane)


def _check_memory(nbytes: int) -> None:
    """Unavailable when the slabs cannot fit: reserving them would call the kernel's OOM killer on others before it failed."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text("ascii").splitlines())
    available = int(fields["MemAvailable"].split()[0]) * KIB
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((_CGROUP / name).read_text("ascii")) for name in ("memory.max", "memory.current"))
        available = min(available, limit - used)
    if nbytes > available:
        raise Unavailable(f"the devices need {format_bytes(nbytes)}, {format_bytes(available)} of memory are free: use a smaller --device-memory")


def _make_slab(device: str, nbytes: int) -> int:
    """A memfd, reserved whole, so that no lane can fail later for want of memory."""
    fd = os.memfd_create(f"sluice-slab-{device}", os.MFD_CLOEXEC)
    try:
        os.posix_fallocate(fd, 0, nbytes)
    except OSError as error:
        os.close(fd)
        raise Unavailable(f"no memory for {format_bytes(nbytes)} of device {device} ({error.strerror}): use a smaller --device-memory") from None
    return fd


async def _exited(pidfd: int) -> None:
    """Returns when the process behind a pidfd has ended."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
