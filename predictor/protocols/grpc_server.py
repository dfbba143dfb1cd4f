"""A gRPC server of unary methods on the event loop: connections, their calls, and the bounds of both.

HTTP/2 itself (frames, header compression, flow control, and what a hostile peer may not do) is libnghttp2's, by ngh2; a message's form is
`grpc_calls`. Owns the transports, the calls under way and how long a client may keep them waiting. Knows no service and no tensors.
"""

from __future__ import annotations

import asyncio
import logging
import random
import socket
from collections.abc import Mapping
from typing import cast

import ngh2
from ngh2 import Setting

from contracts.errors import DeadlineExceeded, Refused, SluiceError, Unavailable
from contracts.units import KIB, MIB, S
from predictor.protocols.codes import NotServed, codes
from predictor.protocols.gather import Body
from predictor.protocols.grpc_calls import PREFIX_BYTES, Headers, Method, Request, message_of, prefix_of, status_headers, timeout_ns, too_large
from predictor.protocols.limits import Intake, Unread, reset

_WINDOW_BYTES = 4 * MIB
"""What a client may send of one call, and of all on its connection, before it hears from us."""
_WRITE_BYTES = 256 * KIB
_HEADS_BYTES = 64 * MIB
"""Of all calls that are open, over all connections; who opens one beyond is refused, and beyond twice as much disconnected."""
_FIELD_BYTES = 128
_CALL_BYTES = 1 * KIB
"""What a header field, and a call, take in memory besides their text: by header compression, a byte on the wire may be a field."""
_MAX_AGE_S = 1800.0
"""Clients are told to make another connection then, so that they find new servers; calls under way go on."""
_CONTENT_TYPE = (b"content-type", b"application/grpc")
_HEAD = ((b":status", b"200"), _CONTENT_TYPE, (b"grpc-accept-encoding", b"identity, deflate, gzip"))
_OK = ((b"grpc-status", b"0"),)
_NO_GRPC = ((b":status", b"415"),)
_SETTINGS = {Setting.INITIAL_WINDOW_SIZE: _WINDOW_BYTES, Setting.MAX_HEADER_LIST_SIZE: 64 * KIB}
_CONFIGURATION = ngh2.Configuration(stream_reset_rate_limit=(10_000, 1_000))
"""A proxy brings many clients on one connection, and under overload each deadline that passes is a reset; libnghttp2's 33 a second would be few."""
log = logging.getLogger("sluice.predictor")


class GrpcServer:
    """Every connection. `methods` by path ("/package.Service/Method")."""

    def __init__(self, methods: Mapping[str, Method], intake: Intake) -> None:
        self.methods = {path.encode(): method for path, method in methods.items()}
        self.intake = intake
        self.connections: set[Connection] = set()
        self.calls = 0
        """Those that run, over all connections."""
        self.head_bytes = 0
        """What the heads of all open calls take."""
        self._left = asyncio.Event()
        self._listening: asyncio.Server | None = None

    async def listen(self, listener: socket.socket) -> None:
        """Takes connections from a socket that listens, until `stop`."""
        self._listening = await asyncio.get_running_loop().create_server(lambda: Connection(self), sock=listener)

    def leave(self, connection: Connection) -> None:
        """A connection has ended."""
        self.connections.discard(connection)
        self._left.set()

    async def stop(self, grace_s: float) -> None:
        """Finishes the calls under way, in no more than `grace_s`, and closes every connection."""
        if self._listening is not None:
            self._listening.close()
        for connection in list(self.connections):
            connection.wind_up()
        try:
            async with asyncio.timeout(grace_s):
                while self.connections:
                    self._left.clear()
                    await self._left.wait()
        except TimeoutError:
            for connection in list(self.connections):
                connection.abort()


class _Call:
    """One stream, until HTTP/2 has done with it. `whole`: its message has come; `answered`: nothing more is to be sent but what is queued."""

    __slots__ = ("answered", "body", "head_bytes", "headers", "method", "since_s", "stream", "task", "whole")

    def __init__(self, stream: int, headers: Headers, method: Method, since_s: float) -> None:
        self.stream = stream
        self.headers = headers
        self.head_bytes = _CALL_BYTES + sum(_FIELD_BYTES + len(name) + len(value) for name, value in headers)
        self.method = method
        self.since_s = since_s
        self.body = Body()
        self.whole = False
        self.answered = False
        self.task: asyncio.Task[None] | None = None


class Connection(asyncio.Protocol):
    """One client. Who exceeds the limits is told so by a status where that is possible, and disconnected where it is not."""

    def __init__(self, server: GrpcServer) -> None:
        self._server = server
        self._limits = server.intake.limits
        self._loop = asyncio.get_running_loop()
        self._http2 = ngh2.Connection(ngh2.Role.SERVER, _CONFIGURATION)
        self._calls: dict[int, _Call] = {}
        self._refused: list[int] = []
        """Streams whose client is told to stop once the answer has gone: a reset would overtake it."""
        self._since_s = self._loop.time()
        self._idle_since_s = self._since_s
        self._max_age_s = _MAX_AGE_S * random.uniform(0.9, 1.1)  # connections that were made together need not end together
        self._unread = Unread(self._limits)
        self._greeted = False
        self._paused = False
        self._pumping = False
        """Whether `_pump` will be called in this turn of the loop."""
        self._winding_up_since_s: float | None = None
        self._last = False
        """Whether the client knows that no new call will be taken."""
        self._finished = False
        """Whether HTTP/2 has nothing more to say here, be it for an error."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """A client has come; one too many is sent away."""
        self._transport = cast(asyncio.Transport, transport)
        if len(self._server.connections) >= self._limits.max_connections:
            self._transport.abort()
            return
        self._server.connections.add(self)
        self._http2.initiate_connection({**_SETTINGS, Setting.MAX_CONCURRENT_STREAMS: self._limits.max_connections})
        self._http2.set_local_window_size(_WINDOW_BYTES)
        self._pump()

    def connection_lost(self, error: Exception | None) -> None:
        """The client has gone."""
        for stream in list(self._calls):
            self._forget(stream)
        self._server.leave(self)

    def data_received(self, data: bytes) -> None:
        """Part of one or of several frames."""
        if self._transport.is_closing():
            return
        try:
            self._http2.receive_data(data)
        except ngh2.NGH2Error as error:
            log.debug("a gRPC client is sent away: %s", error)
            self.abort()
        else:
            self._pump()

    def pause_writing(self) -> None:
        """The client reads too slowly: answers wait where they are."""
        self._paused = True

    def resume_writing(self) -> None:
        """It has caught up."""
        self._paused = False
        self._pump()

    def abort(self) -> None:
        """Ends the connection at once."""
        self._transport.abort()

    def wind_up(self) -> None:
        """Ends the connection once its calls have been answered; those that the client is sending while it hears of it are taken."""
        if self._winding_up_since_s is None and not self._over:
            self._winding_up_since_s = self._loop.time()
            self._http2.send_shutdown_notice()
            self._http2.ping()  # its answer says that the notice has been heard
            self._pump()

    def check(self, now_s: float) -> None:
        """Ends what the client has kept waiting for too long: a connection that nobody uses, a message, or an answer that nobody reads."""
        late = self._limits.late
        if self._unread.stalled(now_s, self._transport.get_write_buffer_size() + self._http2.queued_body_size()):
            reset(self._transport)  # also where the end waits for what was written last to be read
            return
        if self._over:
            return
        for call in list(self._calls.values()):
            if not call.whole and not call.answered and late(now_s, call.since_s, call.body.nbytes):
                self._fail(call, DeadlineExceeded("the message came too slowly"))
        if not self._greeted and late(now_s, self._since_s, 0):
            self.abort()
        elif self._winding_up_since_s is not None:
            if not self._last and late(now_s, self._winding_up_since_s, 0):
                self._take_no_more()
        elif now_s > self._since_s + self._max_age_s or (not self._calls and now_s > self._idle_since_s + self._limits.keep_alive_s):
            self.wind_up()
        self._pump()

    @property
    def _over(self) -> bool:
        """Whether nothing more can be said, though the last of it may not have left."""
        return self._finished or self._transport.is_closing()

    def _pump(self) -> None:
        """Handles what has happened, and writes what may be written, until there is no more of either."""
        self._pumping = False
        try:
            while True:
                for event in self._http2.events():
                    self._handle(event)
                if self._paused or self._transport.is_closing():
                    return
                data = self._http2.data_to_send(_WRITE_BYTES)
                if data:
                    self._transport.write(data)
                elif self._refused:
                    self._http2.reset_stream(self._refused.pop(), ngh2.ErrorCode.NO_ERROR)
                elif self._finished or (self._last and not self._calls):
                    self._transport.close()
                else:
                    return
        except ngh2.NGH2Error as error:
            log.debug("a gRPC client is sent away: %s", error)
            self.abort()

    def _handle(self, event: ngh2.Event) -> None:
        match event:
            case ngh2.DataReceived(stream_id=stream, data=data, end_stream=end):
                self._on_data(stream, data, end)
            case ngh2.RequestReceived(stream_id=stream, headers=headers, end_stream=end):
                self._on_headers(stream, cast(Headers, headers), end)
            case ngh2.StreamClosed(stream_id=stream):
                self._forget(stream)
            case ngh2.TrailersReceived(stream_id=stream):
                self._on_data(stream, b"", True)
            case ngh2.SettingsReceived():
                self._greeted = True
            case ngh2.PingAcknowledged():
                self._take_no_more()
            case ngh2.ConnectionClosed():
                self._finished = True

    def _on_headers(self, stream: int, headers: Headers, end: bool) -> None:
        fields = dict(headers)
        path = fields.get(b":path", b"")
        method = self._server.methods.get(path)
        call = self._calls[stream] = _Call(stream, headers, method or _not_served, self._loop.time())
        self._server.head_bytes += call.head_bytes
        if self._server.head_bytes > 2 * _HEADS_BYTES:
            self.abort()
        elif self._server.head_bytes > _HEADS_BYTES:
            self._fail(call, Unavailable("too many open calls", retry_after_ms=1000))
        elif not fields.get(b"content-type", b"").startswith(b"application/grpc"):
            self._end(call, _NO_GRPC)
        elif method is None:  # perhaps of many messages, so that there is nothing to wait for
            self._fail(call, NotServed(f"there is no method {path.decode('latin-1')}"))
        elif end:
            self._run(call)

    def _on_data(self, stream: int, data: bytes, end: bool) -> None:
        call = self._calls.get(stream)
        if call is None or call.answered:
            return
        intake = self._server.intake
        call.body.add(data)
        intake.unfinished_bytes += len(data)
        if call.body.nbytes > self._limits.body_bytes + PREFIX_BYTES:
            self._fail(call, too_large(self._limits.body_bytes))
        elif intake.unfinished_bytes > self._limits.unfinished_bytes:
            self._fail(call, Unavailable("too many bytes of unfinished requests", retry_after_ms=1000))
        elif end:
            self._run(call)

    def _run(self, call: _Call) -> None:
        call.whole = True
        self._server.intake.unfinished_bytes -= call.body.nbytes
        if self._server.calls >= self._limits.max_connections:
            self._fail(call, Refused("too many calls at a time", retry_after_ms=1000))
            return
        self._server.calls += 1
        call.task = self._loop.create_task(self._answer(call))

    async def _answer(self, call: _Call) -> None:
        try:
            answer = await call.method(self._request(call))
        except SluiceError as error:
            self._fail(call, error)
        except Exception as error:
            log.exception("a gRPC request could not be handled")
            self._fail(call, SluiceError(f"{type(error).__name__}: {error}"))
        else:
            if not self._over:
                self._http2.send_response(call.stream, _HEAD)
                self._http2.send_data(call.stream, prefix_of(answer))
                self._http2.send_data(call.stream, answer)
                self._http2.send_trailers(call.stream, _OK)
            call.answered = True
        if not self._pumping:
            self._pumping = True
            self._loop.call_soon(self._pump)  # once for all the calls of a batch

    def _request(self, call: _Call) -> Request:
        fields = dict(call.headers)
        message = message_of(call.body.whole(), fields.get(b"grpc-encoding", b"identity"), self._limits.body_bytes)
        limit_ns = timeout_ns(fields.get(b"grpc-timeout"))
        taken_ns = int((self._loop.time() - call.since_s) * S)
        return Request(message, call.headers, None if limit_ns is None else max(1, limit_ns - taken_ns))

    def _fail(self, call: _Call, error: SluiceError) -> None:
        _, status, more = codes(error)
        self._end(call, ((b":status", b"200"), _CONTENT_TYPE, *status_headers(status, error.message, more)))

    def _end(self, call: _Call, head: Headers) -> None:
        """Answers with no more than a head; a client that still sends is told to stop."""
        call.answered = True
        if self._over:
            return
        try:
            self._http2.send_response(call.stream, head, end_stream=True)
        except ngh2.StreamUnavailableError:
            return  # given up in the same read; the event that says so is the next
        if not call.whole:
            self._server.intake.unfinished_bytes -= call.body.nbytes
            call.whole = True
            self._refused.append(call.stream)

    def _forget(self, stream: int) -> None:
        """HTTP/2 has done with a call: answered, or given up by the client."""
        call = self._calls.pop(stream, None)
        if call is None:
            return
        self._server.head_bytes -= call.head_bytes
        if not call.whole:
            self._server.intake.unfinished_bytes -= call.body.nbytes
        if call.task is not None:
            self._server.calls -= 1
            if not call.answered:
                call.task.cancel()
        self._idle_since_s = self._loop.time()

    def _take_no_more(self) -> None:
        if not self._last:
            self._last = True
            self._http2.send_goaway()


async def _not_served(_request: Request) -> bytes:
    raise AssertionError("a call without a method has been answered")
