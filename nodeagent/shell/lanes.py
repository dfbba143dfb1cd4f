"""The lanes of a node: asks the fork server for them, waits for their proof, and sees to their end.

Owns the fork server and every Lane; uses the devices' slabs. A lane is reported lost only once its process has gone: until then it may still write
into the slab. Decides nothing: which lane starts, runs and stops comes as a command.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import Counter
from collections.abc import Coroutine, Iterator, Mapping
from typing import Protocol

from contracts.errors import ProtocolError, Unavailable
from contracts.lane_page import LanePage
from contracts.lane_wire import PeerMapped
from nodeagent.events import StartLane
from nodeagent.shell.backends import Backend
from nodeagent.shell.forkserver import ForkServer
from nodeagent.shell.lane import Lane, LaneOwner
from nodeagent.shell.options import Options
from nodeagent.shell.outbox import Outbox
from nodeagent.shell.peer_slabs import PeerSlabs
from nodeagent.shell.slabs import Slab

_log = logging.getLogger(__name__)
_READY_S = 120.0
_EXIT_S = 5.0
_TRIES = 3


class LanesOwner(LaneOwner, Protocol):
    """Who hears what the lanes do."""

    def lane_up(self, lane: Lane) -> None:
        """It serves."""

    def lane_lost(self, lane: Lane) -> None:
        """Its process has gone; `lane.running` is what it still held."""

    def device_lost(self, device: str) -> None:
        """Its memory has gone; its lanes have to end."""

    def device_up(self, device: str) -> None:
        """It has memory again; none of its old lanes is left."""

    def size_failed(self, device: str, sm_percent: int, reason: str) -> None:
        """No lane of this size could prove its cap, however often it was tried."""


class Lanes:
    """Every lane by its id."""

    def __init__(self, options: Options, slabs: Mapping[str, Slab], outbox: Outbox, owner: LanesOwner) -> None:
        self._slabs = slabs
        self._outbox = outbox
        self._owner = owner
        self._loop = asyncio.get_running_loop()
        self._lanes: dict[int, Lane] = {}
        self._deadlines: dict[int, asyncio.TimerHandle] = {}
        self._endings: set[asyncio.Task[None]] = set()
        self._ended = asyncio.Condition()
        self._failures: Counter[tuple[str, int]] = Counter()
        self._lost: set[str] = set()
        self._peer_slabs = PeerSlabs(slabs)
        self._fork_server = ForkServer(options.worker_command)
        for slab in slabs.values():
            slab.watch(self)

    def __getitem__(self, lane: int) -> Lane:
        return self._lanes[lane]

    def __iter__(self) -> Iterator[Lane]:
        return iter(list(self._lanes.values()))

    def start(self, spec: StartLane) -> None:
        """Asks for a lane; `lane_up` or `lane_lost` follows."""
        slab = self._slabs[spec.device]
        page_fd = LanePage.create()
        lane = self._lanes[spec.lane] = Lane(spec, LanePage(page_fd), self._outbox, self._owner, self, slab.prove)
        run, lane_run = socket.socketpair()
        copy, lane_copy = socket.socketpair()
        lane.connect(run, copy)
        self._deadlines[spec.lane] = self._loop.call_later(_READY_S, lane.close, ProtocolError(f"not ready within {_READY_S:.0f} s"))
        with lane_run, lane_copy:
            self._fork_server.spawn(slab.spawn(spec), [lane_run.fileno(), lane_copy.fileno(), slab.fd, page_fd])
        os.close(page_fd)

    def stop(self, lane: int) -> None:
        """Ends a lane that is idle, or that hangs, or whose device is lost; `lane_lost` follows."""
        ending = self._lanes[lane]
        if ending.spec.device in self._lost:
            ending.close(Unavailable("its device is lost") if ending.at_work else None)
        elif ending.at_work:
            self._keep(self._break_off(ending, Unavailable("its batch or its copy hangs, or it copies from memory that is lost")))
        else:
            ending.close()

    async def close(self) -> None:
        """Ends every lane and the fork server, and waits until they have gone."""
        for slab in self._slabs.values():
            slab.unwatch()
        for lane in self:
            if lane.at_work:
                self._keep(self._break_off(lane, None))
            else:
                lane.close()
        while self._endings:
            await asyncio.wait(self._endings)
        await self._fork_server.stop()

    def lane_proved(self, lane: Lane) -> None:
        """It serves (`LaneKeeper`)."""
        self._deadlines.pop(lane.spec.lane).cancel()
        del self._failures[lane.spec.device, lane.spec.sm_percent]
        self._peer_slabs.lane_up(lane)
        self._owner.lane_up(lane)

    def peer_mapped(self, lane: Lane, message: PeerMapped) -> None:
        """It has tried to map another device's slab (`LaneKeeper`)."""
        if self._peer_slabs.mapped(lane, message):
            self._owner.peer_up(lane, message.device, message.bytes_per_s)

    def lane_closed(self, lane: Lane, error: Exception | None) -> None:
        """Its channels are closed; its process follows (`LaneKeeper`)."""
        spec = lane.spec
        if error is not None or spec.device not in self._lost:
            self._peer_slabs.lane_closed(lane)
        deadline = self._deadlines.pop(spec.lane, None)
        if deadline is not None:
            deadline.cancel()
        if error is not None or deadline is not None or lane.at_work:
            _log.warning(
                "lane %d (%s, %d %% SM, %s, pid %d) is lost: %s", spec.lane, spec.device, spec.sm_percent, spec.cls, lane.pid, error or "it ended"
            )
            if spec.device not in self._lost:
                self._slabs[spec.device].suspect()
        self._keep(self._end(lane, unready=deadline is not None, error=error))

    def slab_lost(self, device: str) -> None:
        """The state ends its lanes (`SlabOwner`)."""
        self._lost.add(device)
        self._peer_slabs.slab_lost(device, self)
        self._owner.device_lost(device)

    async def lanes_gone(self, device: str) -> None:
        """Returns when none of its lanes is left (`SlabOwner`)."""
        async with self._ended:
            await self._ended.wait_for(lambda: all(lane.spec.device != device for lane in self))

    def slab_up(self, device: str) -> None:
        """Lanes may start there again (`SlabOwner`)."""
        self._lost.discard(device)
        for key in [key for key in self._failures if key[0] == device]:
            del self._failures[key]
        self._peer_slabs.slab_up(device, self)
        self._owner.device_up(device)

    def _keep(self, work: Coroutine[None, None, None]) -> None:
        ending = self._loop.create_task(work)
        self._endings.add(ending)
        ending.add_done_callback(self._endings.discard)

    async def _break_off(self, lane: Lane, error: Exception | None) -> None:
        """Ends a lane that is at work: its device is freed of it first."""
        if lane.pid:
            await self._slabs[lane.spec.device].release(lane.pid)
        lane.close(error)

    def _count_failure(self, spec: StartLane, error: Exception | None) -> None:
        """A lane of a GPU never served: its size is given up after some tries, or its functions would wait for ever."""
        if self._slabs[spec.device].backend is Backend.PACE or spec.device in self._lost:
            return
        key = spec.device, spec.sm_percent
        self._failures[key] += 1
        if self._failures[key] >= _TRIES:
            del self._failures[key]
            self._owner.size_failed(spec.device, spec.sm_percent, str(error or "it ended as it started"))

    async def _end(self, lane: Lane, *, unready: bool, error: Exception | None) -> None:
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
        self._slabs[lane.spec.device].ended(lane.spec.lane)
        self._owner.lane_lost(lane)
        if unready:
            self._count_failure(lane.spec, error)
        async with self._ended:
            self._ended.notify_all()


async def _exited(pidfd: int) -> None:
    """Returns when the process behind a pidfd has ended."""
    loop = asyncio.get_running_loop()
    gone = asyncio.Event()
    loop.add_reader(pidfd, gone.set)
    try:
        await gone.wait()
    finally:
        loop.remove_reader(pidfd)
