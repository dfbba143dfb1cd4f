"""The gRPC server by itself, with gRPC's own client and with clients that do what that one never would."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from collections.abc import AsyncIterator, Callable

import grpc
import ngh2
import pytest
import pytest_asyncio

from contracts.errors import Unavailable
from contracts.units import KIB, MIB, S
from predictor.protocols import grpc_server
from predictor.protocols.grpc_calls import Request
from predictor.protocols.grpc_server import Connection, GrpcServer
from predictor.protocols.limits import Intake, Limits, watch

PATIENCE_S = 60.0
LIMITS = Limits(max_connections=8, patience_s=1.0, keep_alive_s=3.0, bytes_per_s=1 * MIB, body_bytes=1 * MIB)
HEADERS = [(b":method", b"POST"), (b":scheme", b"http"), (b":authority", b"x"), (b":path", b"/t.T/Echo"), (b"content-type", b"application/grpc")]


class Service:
    """A server of few methods on a port of its own, and what became of its calls."""

    def __init__(self) -> None:
        self.intake = Intake(LIMITS)
        self.requests: list[Request] = []
        self.cancelled = 0
        self.gate = asyncio.Event()
        methods = {"/t.T/Echo": self._echo, "/t.T/Wait": self._wait, "/t.T/Fail": self._fail, "/t.T/Break": self._break, "/t.T/Large": self._large}
        self.server = GrpcServer(methods, self.intake)
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self.listener.getsockname()[1]}"

    async def _echo(self, request: Request) -> bytes:
        self.requests.append(request)
        return bytes(request.message)

    async def _wait(self, request: Request) -> bytes:
        self.requests.append(request)
        try:
            await self.gate.wait()
        except asyncio.CancelledError:
            self.cancelled += 1
            raise
        return bytes(request.message)

    async def _fail(self, _request: Request) -> bytes:
        raise Unavailable("not now: 50 % süß", retry_after_ms=2500)

    async def _break(self, _request: Request) -> bytes:
        raise RuntimeError("broken")

    async def _large(self, _request: Request) -> bytes:
        return bytes(64 * MIB)


@pytest_asyncio.fixture
async def service() -> AsyncIterator[Service]:
    """Afterwards nothing is left of any call."""
    service = Service()
    await service.server.listen(service.listener)
    watching = asyncio.create_task(watch(LIMITS.patience_s, service.server.connections))
    yield service
    service.gate.set()
    await service.server.stop(PATIENCE_S)
    watching.cancel()
    assert (service.server.calls, service.server.head_bytes, service.intake.unfinished_bytes, service.server.connections) == (0, 0, 0, set())


async def until(condition: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_S):
        while not condition():
            await asyncio.sleep(0.01)


class Raw:
    """An HTTP/2 client that sends what it is told to. `events` are all that came."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.http2 = ngh2.Connection(ngh2.Role.CLIENT)
        self.http2.initiate_connection({ngh2.Setting.INITIAL_WINDOW_SIZE: 128 * MIB})
        self.events: list[ngh2.Event] = []
        self.writer = writer
        self._reader = reader

    def send(self) -> None:
        self.writer.write(self.http2.data_to_send())

    def call(self, path: bytes = b"/t.T/Echo") -> int:
        return self.http2.send_request([(name, path if name == b":path" else value) for name, value in HEADERS])

    async def receive(self, kind: type[ngh2.Event]) -> ngh2.Event:
        """Reads until an event of a kind comes."""
        async with asyncio.timeout(PATIENCE_S):
            while not (found := [event for event in self.events if isinstance(event, kind)]):
                data = await self._reader.read(64 * KIB)
                assert data, f"the connection was closed after {self.events}"
                self.http2.receive_data(data)
                self.events += self.http2.events()
                self.send()
        self.events.remove(found[0])
        return found[0]

    async def gone(self) -> None:
        """Reads until the other end closes."""
        async with asyncio.timeout(PATIENCE_S):
            with contextlib.suppress(ConnectionError):
                while data := await self._reader.read(64 * KIB):
                    with contextlib.suppress(ngh2.NGH2Error):
                        self.http2.receive_data(data)
                        self.events += self.http2.events()
                        self.send()


@pytest_asyncio.fixture
async def raw(service: Service) -> AsyncIterator[Raw]:
    reader, writer = await asyncio.open_connection(*service.listener.getsockname())
    raw = Raw(reader, writer)
    raw.send()
    await raw.receive(ngh2.SettingsReceived)
    yield raw
    writer.close()


def framed(message: bytes) -> bytes:
    return struct.pack(">BI", 0, len(message)) + message


def status_of(event: ngh2.Event) -> bytes:
    assert isinstance(event, ngh2.ResponseReceived | ngh2.TrailersReceived)
    return dict(event.headers)[b"grpc-status"]


@pytest.mark.asyncio
@pytest.mark.parametrize("compression", [grpc.Compression.NoCompression, grpc.Compression.Gzip, grpc.Compression.Deflate], ids=str)
@pytest.mark.parametrize("size", [0, 1, 100_000, 1 * MIB])
async def test_messages_come_and_go_whole(service: Service, compression: grpc.Compression, size: int) -> None:
    message = bytes(range(256)) * (size // 256) + bytes(size % 256)
    async with grpc.aio.insecure_channel(service.address) as channel:
        assert await channel.unary_unary("/t.T/Echo")(message, compression=compression, timeout=PATIENCE_S) == message


@pytest.mark.asyncio
async def test_many_calls_share_a_connection(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        messages = [b"%d" % number * 100 for number in range(200)]
        call = channel.unary_unary("/t.T/Echo")
        for at in range(0, len(messages), LIMITS.max_connections):
            asked = messages[at : at + LIMITS.max_connections]
            assert await asyncio.gather(*(call(message) for message in asked)) == asked
        assert len(service.server.connections) == 1


@pytest.mark.asyncio
async def test_metadata_and_the_deadline_reach_the_method(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        await channel.unary_unary("/t.T/Echo")(b"", metadata=[("mine", "yes")], timeout=PATIENCE_S)
        await channel.unary_unary("/t.T/Echo")(b"")
    first, second = service.requests
    assert (b"mine", b"yes") in first.headers
    assert first.timeout_ns is not None
    assert 0 < first.timeout_ns <= PATIENCE_S * S
    assert second.timeout_ns is None


ERRORS = {
    "an error with a reason": ("/t.T/Fail", grpc.StatusCode.UNAVAILABLE, "not now: 50 % süß"),
    "a defect": ("/t.T/Break", grpc.StatusCode.INTERNAL, "RuntimeError: broken"),
    "no such method": ("/t.T/Nothing", grpc.StatusCode.UNIMPLEMENTED, "there is no method /t.T/Nothing"),
}


@pytest.mark.asyncio
@pytest.mark.parametrize(("path", "code", "details"), ERRORS.values(), ids=ERRORS)
async def test_errors_have_a_code_and_a_reason(service: Service, path: str, code: grpc.StatusCode, details: str) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await channel.unary_unary(path)(b"abc")
    assert (caught.value.code(), caught.value.details()) == (code, details)
    if code is grpc.StatusCode.UNAVAILABLE:
        assert caught.value.trailing_metadata()["retry-after"] == "3"


@pytest.mark.asyncio
async def test_a_client_that_cancels_cancels_its_call(service: Service) -> None:
    async with grpc.aio.insecure_channel(service.address) as channel:
        call = channel.unary_unary("/t.T/Wait")(b"")
        await until(lambda: service.requests)
        call.cancel()
        await until(lambda: service.cancelled == 1 and service.server.calls == 0)
        assert await channel.unary_unary("/t.T/Echo")(b"abc") == b"abc"


@pytest.mark.asyncio
async def test_many_clients_behind_a_proxy_may_give_up(service: Service, raw: Raw) -> None:
    for _ in range(2_000):
        given_up = raw.call(b"/t.T/Wait")
        raw.http2.send_data(given_up, framed(b""), end_stream=True)
        raw.send()
        raw.http2.reset_stream(given_up)
        raw.send()
    raw.http2.send_data(raw.call(), framed(b"abc"), end_stream=True)
    raw.send()
    assert status_of(await raw.receive(ngh2.TrailersReceived)) == b"0"


@pytest.mark.asyncio
@pytest.mark.parametrize("wrong", [(b":path", b"/t.T/Nothing"), (b"content-type", b"text/plain")], ids=["no such method", "no gRPC"])
async def test_a_refused_call_that_is_given_up_in_the_same_read_ends_nobody_elses(raw: Raw, wrong: tuple[bytes, bytes]) -> None:
    waiting = raw.call()
    given_up = raw.http2.send_request([(name, {**dict(HEADERS), **dict([wrong])}[name]) for name, _ in HEADERS])
    sent = raw.http2.data_to_send()
    raw.http2.reset_stream(given_up)
    raw.writer.write(sent + raw.http2.data_to_send())
    raw.http2.send_data(waiting, framed(b"abc"), end_stream=True)
    raw.send()
    assert status_of(await raw.receive(ngh2.TrailersReceived)) == b"0"


@pytest.mark.asyncio
async def test_a_client_that_vanishes_cancels_its_calls(service: Service, raw: Raw) -> None:
    raw.http2.send_data(raw.call(b"/t.T/Wait"), framed(b""), end_stream=True)
    raw.send()
    await until(lambda: service.requests)
    raw.writer.transport.abort()
    await until(lambda: service.cancelled == 1 and not service.server.connections)


@pytest.mark.asyncio
async def test_a_message_that_stalls_is_given_up_and_the_connection_lives(service: Service, raw: Raw) -> None:
    stalled = raw.call()
    raw.http2.send_data(stalled, framed(b"abcdef")[:-3])
    raw.send()
    answer = await raw.receive(ngh2.ResponseReceived)
    assert status_of(answer) == b"4"
    raw.http2.send_data(raw.call(), framed(b"abc"), end_stream=True)
    raw.send()
    assert status_of(await raw.receive(ngh2.TrailersReceived)) == b"0"


TORN = {"no message": (b"", b"3"), "half a message": (framed(b"abc")[:-1], b"3"), "two messages": (framed(b"abc") * 2, b"12")}


@pytest.mark.asyncio
@pytest.mark.parametrize(("body", "status"), TORN.values(), ids=TORN)
async def test_a_body_that_is_no_message(raw: Raw, body: bytes, status: bytes) -> None:
    raw.http2.send_data(raw.call(), body, end_stream=True)
    raw.send()
    assert status_of(await raw.receive(ngh2.ResponseReceived)) == status


@pytest.mark.asyncio
async def test_what_is_no_grpc_is_told_by_http(raw: Raw) -> None:
    raw.http2.send_request([(b":method", b"GET"), (b":scheme", b"http"), (b":authority", b"x"), (b":path", b"/t.T/Echo")], end_stream=True)
    raw.send()
    answer = await raw.receive(ngh2.ResponseReceived)
    assert isinstance(answer, ngh2.ResponseReceived)
    assert dict(answer.headers)[b":status"] == b"415"


@pytest.mark.asyncio
@pytest.mark.parametrize(
    "sent", [b"GET / HTTP/1.1\r\nHost: x\r\n\r\n" + b" " * 40, b"\xff" * 1000, b"PRI"], ids=["HTTP/1", "noise", "half a preface"]
)
async def test_what_is_no_http2_is_sent_away(service: Service, sent: bytes) -> None:
    reader, writer = await asyncio.open_connection(*service.listener.getsockname())
    writer.write(sent)
    await Raw(reader, writer).gone()
    writer.close()


@pytest.mark.asyncio
async def test_an_idle_connection_is_closed_in_order(raw: Raw) -> None:
    await raw.receive(ngh2.GoAwayReceived)
    await raw.gone()


@pytest.mark.asyncio
async def test_an_answer_that_nobody_reads_is_thrown_away(service: Service) -> None:
    sock = socket.create_connection(service.listener.getsockname())
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 64 * KIB)
    raw = Raw(*await asyncio.open_connection(sock=sock))
    raw.http2.set_local_window_size(128 * MIB)
    raw.http2.send_data(raw.call(b"/t.T/Large"), framed(b""), end_stream=True)
    raw.send()
    await until(lambda: service.server.calls == 1)
    await until(lambda: not service.server.connections)
    raw.writer.close()


class Full(asyncio.Transport):
    """A transport whose client reads no more: all that is written stays, and each write is one too many."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__({"socket": sock})
        self.connection: Connection | None = None
        self.kept = b""
        self.ended: list[str] = []

    def write(self, data: bytes | bytearray | memoryview) -> None:
        self.kept += data
        if self.connection is not None:
            self.connection.pause_writing()

    def get_write_buffer_size(self) -> int:
        return len(self.kept)

    def is_closing(self) -> bool:
        return bool(self.ended)

    def close(self) -> None:
        self.ended.append("closed")

    def abort(self) -> None:
        self.ended.append("aborted")


@pytest.mark.asyncio
@pytest.mark.parametrize("full", [False, True], ids=["it closes", "its last words wait"])
async def test_a_client_that_broke_the_rules_and_reads_no_more_is_reset(service: Service, full: bool) -> None:
    """Its last words, that the connection ends, lie unread, with a call that waits for its answer and one that is half a message."""
    client = ngh2.Connection(ngh2.Role.CLIENT)
    client.initiate_connection()
    with socket.socket() as sock:
        transport = Full(sock)
        connection = Connection(service.server)
        connection.connection_made(transport)
        waiting = client.send_request([(name, b"/t.T/Wait" if name == b":path" else value) for name, value in HEADERS])
        client.send_data(waiting, framed(b""), end_stream=True)
        client.send_data(client.send_request(HEADERS), framed(b"abc")[:-1])
        connection.data_received(client.data_to_send())
        await until(lambda: service.requests)
        transport.connection = connection if full else None
        connection.data_received(bytes(9))  # DATA of no stream
        before = [] if full else ["closed"]
        assert transport.ended == before
        service.gate.set()
        await until(lambda: not any("_answer" in str(task.get_coro()) for task in asyncio.all_tasks()))
        connection.wind_up()
        start_s = asyncio.get_running_loop().time()
        connection.check(start_s)
        assert transport.ended == before
        connection.check(start_s + 2 * LIMITS.patience_s)
        assert transport.ended == [*before, "aborted"]
        connection.connection_lost(None)


@pytest.mark.asyncio
async def test_bodies_that_are_not_whole_are_refused_together(service: Service, raw: Raw) -> None:
    """Each is within its own limit; together they are not."""
    for _ in range(LIMITS.unfinished_bytes // LIMITS.body_bytes + 1):
        raw.http2.send_data(raw.call(), framed(bytes(LIMITS.body_bytes))[:-1])
    raw.send()
    assert status_of(await raw.receive(ngh2.ResponseReceived)) in (b"14", b"4")
    assert service.intake.unfinished_bytes <= LIMITS.unfinished_bytes


@pytest.mark.asyncio
async def test_heads_of_calls_that_bring_no_message_are_bounded(service: Service, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    """A field costs a byte on the wire, by header compression, and a hundred here."""
    monkeypatch.setattr(grpc_server, "_HEADS_BYTES", 16 * KIB)
    large = [*HEADERS, *[(b"more", b"x")] * 50]
    held = [raw.http2.send_request(large) for _ in range(2)]
    raw.send()
    refused = await raw.receive(ngh2.ResponseReceived)
    assert isinstance(refused, ngh2.ResponseReceived)
    assert (status_of(refused), refused.stream_id) == (b"14", held[1])
    raw.http2.reset_stream(held[0])
    raw.http2.send_data(raw.call(), framed(b"abc"), end_stream=True)
    raw.send()
    assert status_of(await raw.receive(ngh2.TrailersReceived)) == b"0"
    for _ in range(LIMITS.max_connections):
        raw.http2.send_request(large)
    raw.send()
    await raw.gone()
    assert not service.server.connections


@pytest.mark.asyncio
async def test_a_call_in_flight_is_answered_before_its_connection_ends(service: Service, raw: Raw) -> None:
    raw.http2.send_data(raw.call(b"/t.T/Wait"), framed(b"abc"), end_stream=True)
    raw.send()
    await until(lambda: service.requests)
    stopping = asyncio.create_task(service.server.stop(PATIENCE_S))
    await raw.receive(ngh2.GoAwayReceived)
    raw.http2.ping()
    raw.send()
    await raw.receive(ngh2.PingAcknowledged)
    assert not stopping.done()
    service.gate.set()
    assert status_of(await raw.receive(ngh2.TrailersReceived)) == b"0"
    await raw.gone()
    await stopping
