"""Clients of the agent's control socket: one on asyncio for the supervisor, one blocking call for the command line.

Owns the matching of replies to requests. Never starts or stops an agent.
"""

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Callable
from pathlib import Path

from contracts.channel import AsyncChannel, Channel, connect
from contracts.errors import Unavailable, from_wire
from contracts.functions import Function, Share
from contracts.status import NodeStatus
from contracts.wire import Control, Declare, FromControl, FunctionChanged, GetStatus, Grant, Message, Remove, Reply, SetShare, Watch

SOCKET_NAME = "control.sock"


def call(run_dir: Path, make: Callable[[int], Control], timeout_s: float = 30.0) -> Reply:
    """One request (`make(id)` builds it), its reply; Unavailable when no node runs there, the error of the reply when it holds one."""
    channel = Channel(_connect(run_dir, timeout_s), Reply)
    try:
        channel.send(make(1))
        received = channel.receive()
    except OSError as error:
        raise Unavailable(f"the node at {run_dir} does not answer ({error})") from None
    finally:
        channel.close()
    if received is None:
        raise Unavailable(f"the node at {run_dir} ended before it answered")
    reply = received[0]
    assert isinstance(reply, Reply)  # the channel decodes nothing else
    return _checked(reply)


def read_status(run_dir: Path, timeout_s: float = 30.0) -> NodeStatus:
    """The node's status; Unavailable when no node runs there."""
    return _status(call(run_dir, GetStatus, timeout_s))


def _connect(run_dir: Path, timeout_s: float | None) -> socket.socket:
    try:
        sock = connect(str(run_dir / SOCKET_NAME))
    except OSError as error:
        hint = "start one with `sluice up FILE`, or name its --run-dir"
        raise Unavailable(f"no node runs at {run_dir} ({error.strerror or error}): {hint}") from None
    sock.settimeout(timeout_s)
    return sock


def _checked(reply: Reply) -> Reply:
    if reply.error is not None:
        raise from_wire(*reply.error)
    return reply


def _status(reply: Reply) -> NodeStatus:
    if reply.status is None:
        raise Unavailable("the node answered without a status")
    return reply.status


class Client:
    """The asyncio client: many requests at a time on one connection. Every call raises Unavailable once the agent has gone."""

    def __init__(self, run_dir: Path) -> None:
        """Connects at once; Unavailable when nobody listens. Needs a running loop."""
        self._ids = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[Reply]] = {}
        self._on_change: Callable[[Function], None] = lambda _: None
        self._ended = asyncio.Event()
        self._channel = AsyncChannel(_connect(run_dir, None), FromControl, self._on_message, self._on_close)

    @property
    def closed(self) -> bool:
        """Whether the connection has ended."""
        return self._channel.closed

    async def declare(self, function: Function) -> None:
        """Returns when the function is ready; raises why it cannot be served."""
        await self._request(lambda id_: Declare(id_, function))

    async def remove(self, function: str) -> None:
        """Stops serving a function."""
        await self._request(lambda id_: Remove(id_, function))

    async def set_share(self, function: str, share: Share) -> None:
        """Changes a share, live."""
        await self._request(lambda id_: SetShare(id_, function, share))

    async def grant(self, pid: int, functions: tuple[str, ...] = ()) -> None:
        """Lets a predictor process use these functions (none: all)."""
        await self._request(lambda id_: Grant(id_, pid, functions))

    async def status(self) -> NodeStatus:
        """The node's status."""
        return _status(await self._request(GetStatus))

    async def watch(self, on_change: Callable[[Function], None]) -> None:
        """From now on `on_change` gets each function that appears or changes; a share that was acknowledged to anyone was told here before."""
        self._on_change = on_change
        await self._request(Watch)

    async def wait_ended(self) -> None:
        """Returns when the connection has ended and all that came before its end was heard."""
        await self._ended.wait()

    def close(self) -> None:
        """Ends the connection; calls under way raise Unavailable."""
        self._channel.close()

    async def _request(self, make: Callable[[int], Control]) -> Reply:
        if self.closed:
            raise Unavailable("the node agent has gone")
        id_ = next(self._ids)
        future: asyncio.Future[Reply] = asyncio.get_running_loop().create_future()
        self._waiting[id_] = future
        self._channel.send(make(id_))
        try:
            return _checked(await future)
        finally:
            self._waiting.pop(id_, None)

    def _on_message(self, message: Message, _fds: list[int]) -> None:
        if isinstance(message, FunctionChanged):
            self._on_change(message.info.function)
            return
        assert isinstance(message, Reply)  # the channel decodes nothing else
        future = self._waiting.pop(message.id, None)
        if future is not None and not future.done():
            future.set_result(message)

    def _on_close(self, _error: Exception | None) -> None:
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(Unavailable("the node agent ended before it answered"))
        self._waiting.clear()
        self._ended.set()
