"""A rolling restart under load: two predictors of one node end and come again, one after the other. No request that was accepted is lost.

The clients try again only where nobody took the connection, or a predictor that has just begun says so (503). They keep their connections, and open
another when an answer says that it is the last. gRPC has no such word: its server cancels the calls that reach it between its shutdown and the
client's hearing of that, so its clients leave when they are told, as Kubernetes tells them when a pod is to end. The predictor lingers for that.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator

import grpc
import numpy as np
import psutil
import pytest

from benchmarks.protocol_parts import messages, rpc
from benchmarks.protocol_parts.client import Connection
from benchmarks.protocol_parts.messages import Values
from benchmarks.protocol_parts.servers import HOST, running
from contracts.wire import Grant
from sluice.control import call
from sluice.ports import free_port
from tests.protocol.node import PATIENCE_S, Node
from tests.protocol.outside.expected import IDENTITY

LINGER_MS = 1000
CLIENTS = 4
KINDS = ("v1", "v2", "binary", "grpc")
_NOT_YET = "waits for its node agent"


class Place:
    """An address, and the predictor that listens there now."""

    def __init__(self, served: Node) -> None:
        self._served = served
        self.leaving = False
        self.http_port, self.grpc_port = free_port(HOST), free_port(HOST)

    @contextlib.contextmanager
    def predictor(self) -> Iterator[psutil.Popen]:
        """A predictor process, granted everything."""
        ports = ("--http-port", str(self.http_port), "--grpc-port", str(self.grpc_port))
        with running("predictor", "--agent", str(self._served.run_dir / "agent.sock"), *ports, "--linger-ms", str(LINGER_MS)) as process:
            call(self._served.run_dir, lambda id_: Grant(id_, process.pid))
            yield process

    async def ready(self) -> bool:
        """Whether it says that it is."""
        try:
            reader, writer = await asyncio.open_connection(HOST, self.http_port)
            writer.write(f"GET /v2/models/{IDENTITY}/ready HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n".encode())
            answer = await reader.read()
            writer.close()
        except OSError:
            return False
        return answer.startswith(b"HTTP/1.1 200 ")


class Load:
    """Clients that ask until they are stopped, each the places in turn."""

    def __init__(self, places: list[Place]) -> None:
        self._places = places
        self._numbers = itertools.count()
        self.stopping = False
        self.right = 0
        self.failed: list[str] = []

    async def client(self, kind: str) -> None:
        """One client of one protocol."""
        connections: dict[int, Connection] = {}
        channels = {place.grpc_port: grpc.aio.insecure_channel(f"{HOST}:{place.grpc_port}") for place in self._places}
        while not self.stopping:
            number = next(self._numbers)
            values = np.random.default_rng(number).standard_normal((1, 32), dtype=np.float32)
            try:
                found = await self._anywhere(number, lambda place, kind=kind, values=values: self._ask(place, kind, values, connections, channels))
                if np.array_equal(found, values):
                    self.right += 1
                else:
                    self.failed.append(f"{kind} {number}: another's answer")
            except Exception as error:
                self.failed.append(f"{kind} {number}: {type(error).__name__}: {error}")
                connections.clear()
        for channel in channels.values():
            await channel.close()

    async def _anywhere(self, number: int, ask: Callable) -> Values:
        """The answer of the first place that takes the connection."""
        deadline = asyncio.get_running_loop().time() + PATIENCE_S
        for turn in itertools.count(number):
            found = await asyncio.wait_for(ask(self._places[turn % len(self._places)]), PATIENCE_S)
            if found is not None:
                return found
            assert asyncio.get_running_loop().time() < deadline, "nobody listens"
            await asyncio.sleep(0.01)
        raise AssertionError

    async def _ask(
        self, place: Place, kind: str, values: Values, connections: dict[int, Connection], channels: dict[int, grpc.aio.Channel]
    ) -> Values | None:
        """The answer; None when the place does not take the request."""
        if kind == "grpc" and place.leaving:
            return None
        if kind == "grpc":
            try:
                return rpc.answer(await channels[place.grpc_port].unary_unary(rpc.INFER)(rpc.request(IDENTITY, values)))
            except grpc.aio.AioRpcError as error:
                if "Connection refused" in (error.details() or "") or _NOT_YET in (error.details() or ""):
                    return None
                raise
        connection = connections.pop(place.http_port, None)
        if connection is None:
            try:
                connection = (await asyncio.get_running_loop().create_connection(Connection, HOST, place.http_port))[1]
            except ConnectionRefusedError:
                return None
        status = await connection.ask(messages.http_request(kind, IDENTITY, values))
        if connection.headers.get("connection") == "close":
            connection.close()
        else:
            connections[place.http_port] = connection
        if status == 503 and _NOT_YET.encode() in connection.body:
            return None
        assert status == 200, (status, connection.body)
        return connection.values(kind)


@pytest.mark.asyncio
async def test_a_rolling_restart_under_load_loses_nothing(served: Node) -> None:
    places = [Place(served), Place(served)]
    load = Load(places)

    async def until(probe: Callable[[], object]) -> None:
        async with asyncio.timeout(PATIENCE_S):
            while not (await found if asyncio.iscoroutine(found := probe()) else found):
                await asyncio.sleep(0.02)

    async def answered_more() -> None:
        seen = load.right
        await until(lambda: load.right > seen + 50 or load.failed)

    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(place.predictor()) for place in places]
        for place in places:
            await until(place.ready)
        clients = [asyncio.create_task(load.client(kind)) for kind in KINDS * CLIENTS]
        for place, process in zip(places, processes, strict=True):
            await answered_more()
            process.send_signal(signal.SIGTERM)
            place.leaving = True
            assert await asyncio.to_thread(process.wait, PATIENCE_S) == 0
            await answered_more()
            stack.enter_context(place.predictor())
            await until(place.ready)
            place.leaving = False
        await answered_more()
        load.stopping = True
        await asyncio.gather(*clients)
    assert not load.failed, f"{len(load.failed)} of {load.right + len(load.failed)} failed: {load.failed[:5]}"
