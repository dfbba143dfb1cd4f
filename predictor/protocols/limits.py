"""What a client may take: bytes of a head, connections, bytes of bodies that are not whole yet, and time.

Owns uvicorn's protocol with these bounds. uvicorn by itself gathers a head, chunk extensions, trailers and pipelined requests without end, waits for
ever for the rest of a request, and keeps an answer that nobody reads. A look at every connection once in a while (`check`) costs requests nothing.
"""

from __future__ import annotations

import asyncio
import resource
import socket
import struct
from collections.abc import Iterable, Sized
from typing import Any

import msgspec
from uvicorn._types import ASGI3Application
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from contracts.units import KIB, MIB
from predictor.protocols.gather import GatheringHttp

MAX_HEAD_BYTES = 512 * KIB
"""Request line and headers, with what is read along with them (one read brings 256 KiB at most)."""
_FRAMING_FACTOR = 8
"""Chunk sizes, extensions and trailers may take MAX_HEAD_BYTES and so many times the body: a chunk of one byte takes six."""
_MAX_PIPELINED = 64
"""Requests that a client may send on one connection without having an answer to the first."""
_SPARE_DESCRIPTORS = 64
"""For the agent, the segment, listeners, models' tokenizers and the log."""


class Limits(msgspec.Struct, frozen=True):
    """The bounds of one server.

    `patience_s`: how long a client may take for a head; for a body, and to read its answer, that and what its bytes take at `bytes_per_s` (as in
    Apache's mod_reqtimeout). `keep_alive_s`: how long a connection may be idle between requests. `body_bytes`: of one body.
    """

    max_connections: int = 1024
    patience_s: float = 20.0
    keep_alive_s: float = 75.0
    bytes_per_s: int = 128 * KIB
    body_bytes: int = 64 * MIB

    @property
    def unfinished_bytes(self) -> int:
        """Of all bodies together that are not whole yet."""
        return 4 * self.body_bytes

    def late(self, now_s: float, since_s: float, moved_bytes: int) -> bool:
        """Whether who has moved so many bytes since then stands still for too long."""
        return now_s > since_s + self.patience_s + moved_bytes / self.bytes_per_s

    def fitting(self) -> Limits:
        """The same with no more connections, HTTP's and gRPC's, than this process may have descriptors, of which it takes what it needs."""
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        needed = 2 * self.max_connections + _SPARE_DESCRIPTORS
        if soft != resource.RLIM_INFINITY and soft < needed:
            soft = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
            resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
        elif soft == resource.RLIM_INFINITY:
            soft = needed
        return msgspec.structs.replace(self, max_connections=max(1, min(self.max_connections, (soft - _SPARE_DESCRIPTORS) // 2)))


class Intake:
    """The bytes of bodies that are still being received, over all connections; and whether the server is on its way down."""

    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.unfinished_bytes = 0
        self.closing = False

    def close_connections(self, connections: Iterable[Any]) -> None:
        """From now on each answer says that it is the last of its connection."""
        self.closing = True
        for connection in connections:
            connection.close_next()


class Unread:
    """What a client has not read yet of its answers, looked at once in a while."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._bytes = 0
        self._since_s = 0.0
        self._read_bytes = 0

    def stalled(self, now_s: float, unread_bytes: int) -> bool:
        """Whether the client lets its answer lie, of which so many bytes are left."""
        before, self._bytes = self._bytes, unread_bytes
        if before == 0:
            self._since_s, self._read_bytes = now_s, 0
        self._read_bytes += max(0, before - unread_bytes)
        return unread_bytes > 0 and self._limits.late(now_s, self._since_s, self._read_bytes)


def reset(transport: asyncio.Transport) -> None:
    """Ends a connection so that the kernel, too, forgets what was not read."""
    transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    transport.abort()


class BoundedHttp(GatheringHttp):
    """uvicorn's protocol within an intake's limits; who exceeds them is told (400, 408, 413, 503) where that is still possible, and disconnected."""

    def __init__(self, intake: Intake, **options: Any) -> None:
        super().__init__(**options)
        self._intake = intake
        self._in_head = True
        self._in_body = False
        self._since_s = self.loop.time()
        self._framing_bytes = 0
        self._body_bytes = 0
        self._unread = Unread(intake.limits)
        self._running: RequestResponseCycle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """A client has come; one too many is sent away."""
        super().connection_made(transport)
        self.flow = _Flow(transport, self.pipeline)
        if len(self.connections) > self._intake.limits.max_connections:
            self._refuse(503, "too many connections")

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has gone."""
        self._intake.unfinished_bytes -= self._body_bytes
        self._body_bytes = 0
        if self._running is not None:  # uvicorn tells the last request only, which need not be the one that is being answered
            self._running.disconnected = True
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Part of one or of several requests."""
        before = self._body_bytes
        super().data_received(data)
        if self._in_head or self._in_body:
            self._framing_bytes += len(data) - max(0, self._body_bytes - before)
            if self._framing_bytes > MAX_HEAD_BYTES + _FRAMING_FACTOR * self._body_bytes:
                self._refuse(400, "The head of the request is too long.")

    def on_message_begin(self) -> None:
        """The first byte of a request."""
        self._in_head = True
        self._since_s = self.loop.time()
        self._framing_bytes = 0
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        """The head has ended; what follows is the body."""
        self._in_head = False
        if self.transport.is_closing():
            return
        self._in_body = True
        self._since_s = self.loop.time()
        super().on_headers_complete()
        if self._intake.closing:
            self.cycle.keep_alive = False
        if len(self.pipeline) > _MAX_PIPELINED:
            self._refuse(400, "too many requests without an answer")

    def on_body(self, body: bytes) -> None:
        """Part of the body."""
        if self.transport.is_closing():
            return
        self._body_bytes += len(body)
        self._intake.unfinished_bytes += len(body)
        super().on_body(body)
        if self._body_bytes > self._intake.limits.body_bytes:
            self._refuse(413, f"body: must be at most {self._intake.limits.body_bytes} bytes")
        elif self._intake.unfinished_bytes > self._intake.limits.unfinished_bytes:
            self._refuse(503, "too many bytes of unfinished requests")

    def on_message_complete(self) -> None:
        """The request is whole."""
        self._intake.unfinished_bytes -= self._body_bytes
        self._body_bytes = 0
        self._in_body = False
        if not self.transport.is_closing():
            super().on_message_complete()

    def check(self, now_s: float) -> None:
        """Ends the connection if the client has kept it waiting for too long."""
        late = self._intake.limits.late
        if self._unread.stalled(now_s, self.transport.get_write_buffer_size()):
            reset(self.transport)
        elif self._in_head and late(now_s, self._since_s, 0):
            self._refuse(408, "the head of the request did not come")
        elif self._in_body and not self.flow.read_paused:
            wanted_bytes = 0 if self.cycle.response_complete else self._body_bytes
            if late(now_s, self._since_s, wanted_bytes):
                self._refuse(408, "the body of the request came too slowly")

    def close_next(self) -> None:
        """The next answer says `connection: close`."""
        if self._running is not None and not self._running.response_started:
            self._running.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: ASGI3Application) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _refuse(self, status: int, why: str) -> None:
        """Answers, where no answer has begun, and ends the connection."""
        self._in_head = self._in_body = False
        if self.transport.is_closing():
            return
        if self._running is None or self._running.response_complete or not (self._running.response_started or self.pipeline):
            body = b'{"error":"%s"}' % why.encode()
            again = b"retry-after: 1\r\n" if status == 503 else b""
            head = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close\r\n%s\r\n" % (len(body), again)
            self.transport.write(STATUS_LINE[status] + head + body)
        self.transport.close()


class _Flow(FlowControl):
    """uvicorn's, which reads on after each answer, and when a request wants its body: not while others are waiting that have come whole."""

    def __init__(self, transport: asyncio.Transport, pipeline: Sized) -> None:
        super().__init__(transport)
        self._pipeline = pipeline

    def resume_reading(self) -> None:
        if not self._pipeline:
            super().resume_reading()


async def watch(patience_s: float, *servers: Iterable[Any]) -> None:
    """Checks the connections of all servers again and again, for ever."""
    loop = asyncio.get_running_loop()
    while True:
        await asyncio.sleep(min(1.0, patience_s / 4))
        for connection in [connection for connections in servers for connection in connections]:
            connection.check(loop.time())
