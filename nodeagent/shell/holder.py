"""The process that holds the memory of a GPU: one slab for all lanes, theirs by its handle for as long as the process lives.

Owns the process and its channel. Never opens the handle; the agent knows no CUDA.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from contracts.channel import AsyncChannel
from contracts.errors import ProtocolError, Unavailable
from contracts.lane_wire import Hold, SlabReady
from contracts.wire import Message
from nodeagent.shell import children

_log = logging.getLogger(__name__)
_READY_S = 180.0
_EXIT_S = 5.0


class Holder:
    """One process. `died` is set when it has gone; `start` and `stop` are called once each."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self.died = asyncio.Event()
        self.pid = 0
        self._command = command
        self._environment = environment
        self._loop = asyncio.get_running_loop()
        self._ready: asyncio.Future[SlabReady] = self._loop.create_future()
        self._channel: AsyncChannel | None = None
        self._process: children.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._stopping = False
        self._hold: Hold

    async def start(self, hold: Hold) -> SlabReady:
        """Asks for the slab, and returns when it is there; Unavailable when it is not. Call `stop` then too."""
        self._hold = hold
        self._process, ours = await children.start(self._command, self._environment)
        self.pid = self._process.pid
        self._channel = AsyncChannel(ours, SlabReady, self._on_message, self._on_close)
        self._watch = self._loop.create_task(self._watch_exit(self._process))
        self._channel.send(hold)
        try:
            async with asyncio.timeout(_READY_S):
                return await self._ready
        except TimeoutError:
            raise Unavailable(f"the slab of {hold.device} is not there after {_READY_S:.0f} s") from None

    async def stop(self) -> None:
        """Ends the process (the end of its channel, then SIGKILL) and waits until it has gone, and the slab with it."""
        self._stopping = True
        if self._channel is not None:
            self._channel.close()
        if self._process is not None and self._watch is not None:
            await children.end(self._process, _EXIT_S)
            await self._watch

    async def _watch_exit(self, process: children.Process) -> None:
        code = await process.wait()
        self._fail(f"the slab holder of {self._hold.device} ended with exit code {code}; what it said stands above")
        self.died.set()

    def _on_message(self, message: Message, fds: list[int]) -> None:
        assert isinstance(message, SlabReady)
        if self._ready.done() or message.device != self._hold.device or not message.handle or min(message.nbytes, message.sms) < 1:
            raise ProtocolError(f"the slab holder of {self._hold.device} says of {message.device} what it was not asked")
        self._ready.set_result(message)

    def _on_close(self, error: Exception | None) -> None:
        """Without its channel a holder is of no use."""
        if self._stopping:
            return
        if error is not None:
            _log.error("the slab holder of %s broke off: %s", self._hold.device, error)
        self._fail(f"the slab holder of {self._hold.device} broke off: {error or 'it ended'}")
        if self._process is not None:
            children.kill(self._process)

    def _fail(self, reason: str) -> None:
        if not self._ready.done():
            self._ready.set_exception(Unavailable(reason))
            # Nobody may be waiting for it any more.
            self._ready.exception()
