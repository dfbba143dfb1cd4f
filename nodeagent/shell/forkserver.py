"""The fork server: the process that has torch loaded and forks a lane for each Spawn.

Owns the process and its channel; starts it again when it dies, more slowly each time that it dies young. Lanes that it forked live on without it: the
agent holds their channels. Never talks to a lane.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Sequence

from contracts.channel import AsyncChannel
from contracts.errors import Unavailable
from contracts.lane_wire import Spawn
from contracts.wire import Message
from nodeagent.shell import children

_log = logging.getLogger(__name__)
_YOUNG_S = 5.0
_FIRST_DELAY_S = 0.1
_LAST_DELAY_S = 5.0
_EXIT_S = 5.0


class ForkServer:
    """Supervises one fork server. `spawn` may be called at any time: what cannot be sent now waits for the next server."""

    def __init__(self, command: Sequence[str]) -> None:
        self._command = command
        self._loop = asyncio.get_running_loop()
        self._channel: AsyncChannel | None = None
        self._process: children.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._waiting: list[tuple[Spawn, tuple[int, ...]]] = []
        self._delay_s = 0.0
        self._stopping = False
        self._died = asyncio.Event()
        self._task = self._loop.create_task(self._supervise())

    def spawn(self, message: Spawn, fds: Sequence[int]) -> None:
        """Asks for a lane; the descriptors stay the caller's."""
        if self._channel is not None:
            self._channel.send(message, fds=fds)
        else:
            self._waiting.append((message, tuple(os.dup(fd) for fd in fds)))

    async def stop(self) -> None:
        """Ends the server (EOF, then SIGKILL) and waits until it has gone."""
        self._stopping = True
        self._died.set()
        await self._task
        for _, fds in self._waiting:
            for fd in fds:
                os.close(fd)
        self._waiting.clear()

    async def _supervise(self) -> None:
        while not self._closing():
            self._died.clear()
            started = time.monotonic()
            await self._start()
            await self._died.wait()
            await self._reap()
            if self._closing():
                return
            young = time.monotonic() - started < _YOUNG_S
            self._delay_s = min(max(2 * self._delay_s, _FIRST_DELAY_S), _LAST_DELAY_S) if young else 0.0
            _log.warning("the fork server died (exit %s); the next starts in %.1f s", self._process and self._process.returncode, self._delay_s)
            self._died.clear()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._died.wait(), self._delay_s)

    def _closing(self) -> bool:
        return self._stopping

    async def _start(self) -> None:
        try:
            self._process, ours = await children.start(self._command)
        except Unavailable as error:
            _log.error("the fork server: %s", error.message)
            self._process = None
            self._died.set()
            return
        self._watch = self._loop.create_task(self._watch_exit(self._process))
        self._channel = AsyncChannel(ours, Message, self._on_message, self._on_close)
        waiting, self._waiting = self._waiting, []
        for message, fds in waiting:
            self._channel.send(message, fds=fds)
            for fd in fds:
                os.close(fd)

    async def _reap(self) -> None:
        if self._channel is not None:
            self._channel.close()
        if self._process is not None and self._watch is not None:
            await children.end(self._process, _EXIT_S)
            await self._watch

    async def _watch_exit(self, process: children.Process) -> None:
        """Its end counts, not the channel's: a lane might hold the other end open."""
        await process.wait()
        self._died.set()

    def _on_message(self, message: Message, fds: list[int]) -> None:
        raise AssertionError(f"a fork server sends nothing, got {message!r} {fds!r}")

    def _on_close(self, error: Exception | None) -> None:
        self._channel = None
        self._died.set()
