"""The control socket: the supervisor and the command line declare, remove and grant functions, change shares, ask for the status, and watch.

Owns its connections. Every message gets one Reply; a Declare gets it when the function is ready or has failed, and holds up nothing meanwhile.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections.abc import Callable

from contracts.channel import AsyncChannel
from contracts.errors import SluiceError, to_wire
from contracts.status import NodeStatus
from contracts.wire import Control, Declare, FunctionChanged, GetStatus, Grant, Message, Remove, Reply, SetShare, Watch
from nodeagent.shell.functions import Entry, Functions
from nodeagent.shell.listener import credentials
from nodeagent.shell.peers import Peers

_log = logging.getLogger(__name__)


class Controls:
    """All control connections. Only the agent's own user (or root) may connect."""

    def __init__(self, functions: Functions, peers: Peers, status: Callable[[], NodeStatus]) -> None:
        self._functions = functions
        self._peers = peers
        self._status = status
        self._loop = asyncio.get_running_loop()
        self._channels: set[AsyncChannel] = set()
        self._watching: set[AsyncChannel] = set()
        self._declaring: set[asyncio.Task[None]] = set()

    def connect(self, sock: socket.socket) -> None:
        """A process connected to `control.sock`."""
        peer = credentials(sock)
        if peer.uid not in (0, os.geteuid()):
            _log.warning("process %d of user %d may not control this agent", peer.pid, peer.uid)
            sock.close()
            return
        channel = AsyncChannel(sock, Control, lambda message, _: self._on_message(channel, message), lambda _: self._on_close(channel))
        self._channels.add(channel)

    def function_changed(self, entry: Entry) -> None:
        """Tells those who watch. What was sent is theirs even if this agent is killed now: the kernel keeps it until they read it."""
        for channel in self._watching:
            channel.send(FunctionChanged(entry.info))

    def close(self) -> None:
        """Closes every connection and gives up what is being declared."""
        for channel in list(self._channels):
            channel.close()
        for task in self._declaring:
            task.cancel()

    def _on_close(self, channel: AsyncChannel) -> None:
        self._channels.discard(channel)
        self._watching.discard(channel)

    def _on_message(self, channel: AsyncChannel, message: Message) -> None:
        if isinstance(message, Declare):
            task = self._loop.create_task(self._declare(channel, message))
            self._declaring.add(task)
            task.add_done_callback(self._declaring.discard)
            return
        if isinstance(message, Watch):
            self._watching.add(channel)
            channel.send(Reply(message.id))
            return
        assert isinstance(message, Remove | SetShare | Grant | GetStatus)
        try:
            channel.send(Reply(message.id, status=self._carry_out(message)))
        except SluiceError as error:
            channel.send(Reply(message.id, error=to_wire(error)))

    def _carry_out(self, message: Remove | SetShare | Grant | GetStatus) -> NodeStatus | None:
        if isinstance(message, GetStatus):
            return self._status()
        if isinstance(message, Remove):
            self._functions.remove(message.function)
        elif isinstance(message, SetShare):
            self._functions.set_share(message.function, message.share)
        else:
            self._peers.grant(message.pid, message.functions)
        return None

    async def _declare(self, channel: AsyncChannel, message: Declare) -> None:
        try:
            await self._functions.declare(message.function)
        except SluiceError as error:
            _log.warning("%s is not served: %s", message.function.key, error.message)
            channel.send(Reply(message.id, error=to_wire(error)))
        else:
            channel.send(Reply(message.id))
