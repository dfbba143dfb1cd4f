"""`python -m benchmarks.protocol_parts.client`: the load of the protocol benchmark, in a process of its own.

Reads one `Leg` a line, answers one `Timing` a line. Every server gets the same bytes over the same kind of connection; before a leg is measured, an
answer is compared with what was sent.
"""

from __future__ import annotations

import asyncio
import functools
import sys
import time
from collections.abc import Awaitable, Callable
from typing import cast

import grpc  # type: ignore[import-untyped]
import httptools
import msgspec
import numpy as np
import uvloop

from benchmarks.protocol_parts import messages, rpc
from benchmarks.protocol_parts.messages import IDENTITY, Values

_WARM_UP = 3
SEED = 3
_MESSAGE_BYTES = 64 << 20

Ask = Callable[[], Awaitable[None]]


class Leg(msgspec.Struct, frozen=True):
    """One thing to measure: `kind` of request with `values` numbers, so many at a time, for `seconds`, yet `least` requests at the fewest."""

    port: int
    kind: str
    values: int
    concurrency: int
    seconds: float
    least: int = 1
    echo: bool = False


class Timing(msgspec.Struct, frozen=True):
    """What came of it: the latency of every request, requests answered per second, and how many were asked in all, those that warmed up included."""

    latencies_ns: list[int]
    per_s: float
    asked: int


class Connection(asyncio.Protocol):
    """A keep-alive HTTP/1.1 connection; one request at a time. `headers` (names in lower case) and `body` are those of the last answer."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """The transport's callback."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpResponseParser(self)
        self._answer: asyncio.Future[int] | None = None

    def data_received(self, data: bytes) -> None:
        """The transport's callback."""
        self._parser.feed_data(data)

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser's callback."""
        self.headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        """The parser's callback."""
        self._chunks.append(data)

    def on_message_complete(self) -> None:
        """The parser's callback."""
        assert self._answer is not None, "an answer without a request"
        self._answer.set_result(self._parser.get_status_code())

    def connection_lost(self, error: Exception | None) -> None:
        """The transport's callback."""
        if self._answer is not None and not self._answer.done():
            self._answer.set_exception(error or ConnectionError("the server closed the connection"))

    async def ask(self, request: bytes) -> int:
        """The status, when the whole answer is there; ConnectionError when it never comes."""
        self.headers: dict[str, str] = {}
        self._chunks: list[bytes] = []
        self._answer = asyncio.get_running_loop().create_future()
        self._transport.write(request)
        return await self._answer

    def values(self, kind: str) -> Values:
        """What the last answer holds."""
        return messages.http_answer(kind, self.headers, self.body)

    @property
    def body(self) -> bytes:
        """The last answer's."""
        return b"".join(self._chunks)

    def close(self) -> None:
        """Ends it."""
        self._transport.close()


async def _http(leg: Leg, values: Values) -> tuple[list[Ask], Callable[[], None]]:
    request = messages.http_request(leg.kind, IDENTITY, values)
    loop = asyncio.get_running_loop()
    connections = [(await loop.create_connection(Connection, "127.0.0.1", leg.port))[1] for _ in range(leg.concurrency)]
    status, first = await connections[0].ask(request), connections[0]
    right = status == 200 and (request.endswith(first.body) if leg.echo else np.array_equal(first.values(leg.kind), values))
    assert right, f"port {leg.port} answers {leg.kind} wrongly: {status} {first.body[:300]!r}"

    def close() -> None:
        for connection in connections:
            connection.close()

    async def ask(connection: Connection) -> None:
        status = await connection.ask(request)
        assert status == 200, f"port {leg.port} answers {leg.kind} with {status}: {connection.body[:300]!r}"

    return [functools.partial(ask, connection) for connection in connections], close


async def _grpc(leg: Leg, values: Values) -> tuple[list[Ask], Callable[[], Awaitable[None]]]:
    request = rpc.request(IDENTITY, values)
    options = [(f"grpc.max_{way}_message_length", _MESSAGE_BYTES) for way in ("send", "receive")]
    channel = grpc.aio.insecure_channel(f"127.0.0.1:{leg.port}", options)
    call = channel.unary_unary(rpc.INFER)
    assert np.array_equal(rpc.answer(await call(request)), values), f"port {leg.port} answers gRPC wrongly"

    async def ask() -> None:
        await call(request)

    return [ask] * leg.concurrency, channel.close


async def measure(leg: Leg) -> Timing:
    """Connects, checks one answer, warms up, measures, closes."""
    values = np.random.default_rng(SEED).standard_normal((1, leg.values), dtype=np.float32)
    asks, close = await (_grpc if leg.kind == "grpc" else _http)(leg, values)
    latencies_ns: list[int] = []

    async def loop(ask: Ask, until_ns: int, least: int) -> None:
        clock = time.perf_counter_ns
        asked = 0
        while asked < least or clock() < until_ns:
            begun_ns = clock()
            await ask()
            latencies_ns.append(clock() - begun_ns)
            asked += 1

    await asyncio.gather(*(loop(ask, 0, _WARM_UP) for ask in asks))
    latencies_ns.clear()
    begun_ns = time.perf_counter_ns()
    await asyncio.gather(*(loop(ask, begun_ns + int(leg.seconds * 1e9), leg.least) for ask in asks))
    per_s = len(latencies_ns) * 1e9 / (time.perf_counter_ns() - begun_ns)
    timing = Timing(latencies_ns, per_s, 1 + _WARM_UP * leg.concurrency + len(latencies_ns))
    closed = close()
    if closed is not None:
        await closed
    return timing


async def _serve() -> None:
    loop = asyncio.get_running_loop()
    while line := await loop.run_in_executor(None, sys.stdin.buffer.readline):
        timing = await measure(msgspec.json.decode(line, type=Leg))
        sys.stdout.buffer.write(msgspec.json.encode(timing) + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    uvloop.run(_serve())
