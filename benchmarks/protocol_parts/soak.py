"""The soak: one stream of requests mixed over all protocols, while functions are loaded, unloaded, declared, removed and given other shares.

Every request has values of its own and asks a function with weights of its own, so an answer that belongs to another request, or comes of another's
weights, is wrong in every bit. Owns the load and the verdict; `churn` makes the changes.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc  # type: ignore[import-untyped]
import numpy as np

from benchmarks.protocol_parts import churn, messages, models, rpc, servers
from benchmarks.protocol_parts.churn import Changes, Node
from benchmarks.protocol_parts.client import Connection
from benchmarks.protocol_parts.messages import Values

CONCURRENCY = 64
WIDTH = 64
STEADY = tuple(f"steady-{number}" for number in range(5))
"""Functions that stay while their shares change."""
_DEVICE_MEMORY = "1Ki"
_KINDS = ("v1", "v2", "binary", "grpc", "grpc typed")
_ROWS = (1, 1, 1, 2, 3, 5, 32)
_GONE_HTTP = (404, 503)
_GONE_GRPC = (grpc.StatusCode.NOT_FOUND, grpc.StatusCode.UNAVAILABLE)
_TOLD = 5
_PATIENCE_S = 120.0


@dataclass(slots=True)
class Verdict:
    """What became of the requests. `refused`: a function that was away at the time said so; it counts neither as lost nor as right."""

    right: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    changes: Changes = field(default_factory=Changes)

    @property
    def asked(self) -> int:
        """All requests."""
        return self.right + self.refused + len(self.wrong) + len(self.lost)

    def __str__(self) -> str:
        details = "\n".join([*self.wrong[:_TOLD], *self.lost[:_TOLD], *self.changes.failed[:_TOLD]])
        changes = f"{self.changes.done} changes, {len(self.changes.failed)} failed"
        return f"{self.right} right, {self.refused} refused, {len(self.wrong)} wrong, {len(self.lost)} lost, {changes}\n{details}"


@dataclass(frozen=True, slots=True)
class Request:
    """The request with this number: everything about it follows from the number."""

    number: int
    name: str
    kind: str
    values: Values

    @classmethod
    def of(cls, number: int, names: tuple[str, ...]) -> Request:
        """Makes it."""
        chance = np.random.default_rng(number)
        name, kind, rows = names[chance.integers(len(names))], _KINDS[number % len(_KINDS)], int(chance.choice(_ROWS))
        return cls(number, name, kind, chance.standard_normal((rows, WIDTH), dtype=np.float32))


@contextmanager
def node() -> Iterator[Node]:
    """A node that serves the soak's functions, more of them than its device holds."""
    names = (*STEADY, *churn.UNLOADED, churn.REMOVED)
    with tempfile.TemporaryDirectory(prefix="sluice-soak-") as folder:
        programs = {name: Path(folder, f"{name}.pt2") for name in names}
        for seed, program in enumerate(programs.values()):
            models.export_scale(program, seed, WIDTH)
        documents = "".join(models.document(name, program) for name, program in programs.items())
        with servers.ours(documents, "--device-memory", _DEVICE_MEMORY) as (server, run_dir):
            factors = {name: models.factors(seed, WIDTH) for seed, name in enumerate(names)}
            yield Node(server, run_dir, factors, programs[churn.REMOVED])


async def drive(on: Node, requests: int, on_request: Callable[[int], None] = lambda _: None) -> Verdict:
    """Asks `requests` times, `CONCURRENCY` at a time, amid changes; `on_request` gets how many have been answered."""
    verdict = Verdict()
    numbers = iter(range(requests))
    channel = grpc.aio.insecure_channel(f"{servers.HOST}:{on.server.grpc_port}")
    async with channel, churn.changing(on, channel, STEADY) as verdict.changes:
        await asyncio.gather(*(_Worker(on, channel, verdict, on_request).run(numbers) for _ in range(CONCURRENCY)))
    return verdict


class _Worker:
    """One client: an HTTP connection of its own, and a share of the gRPC channel."""

    def __init__(self, on: Node, channel: grpc.aio.Channel, verdict: Verdict, on_request: Callable[[int], None]) -> None:
        self._on = on
        self._names = tuple(on.factors)
        self._infer = channel.unary_unary(rpc.INFER)
        self._verdict = verdict
        self._on_request = on_request
        self._connection: Connection | None = None

    async def run(self, numbers: Iterator[int]) -> None:
        for number in numbers:
            request = Request.of(number, self._names)
            try:
                async with asyncio.timeout(_PATIENCE_S):
                    found = await (self._grpc if request.kind.startswith("grpc") else self._http)(request)
                self._judge(request, found)
            except Exception as error:
                self._connection = None
                self._verdict.lost.append(f"{request.kind} {number} of {request.name}: {type(error).__name__}: {error}")
            self._on_request(self._verdict.asked)
        if self._connection is not None:
            self._connection.close()

    def _judge(self, request: Request, found: Values | None) -> None:
        if found is None:
            self._verdict.refused += 1
        elif np.array_equal(found, request.values * self._on.factors[request.name]):
            self._verdict.right += 1
        else:
            self._verdict.wrong.append(f"{request.kind} {request.number} of {request.name}: {found!r}")

    async def _http(self, request: Request) -> Values | None:
        """The answer; None when a function that comes and goes was away."""
        if self._connection is None:
            loop = asyncio.get_running_loop()
            self._connection = (await loop.create_connection(Connection, servers.HOST, self._on.server.http_port))[1]
        status = await self._connection.ask(messages.http_request(request.kind, request.name, request.values))
        if status in _GONE_HTTP and request.name not in STEADY:
            return None
        if status != 200:
            raise ValueError(f"{status} {self._connection.body[:300]!r}")
        return self._connection.values(request.kind)

    async def _grpc(self, request: Request) -> Values | None:
        message = rpc.request(request.name, request.values, typed=request.kind == "grpc typed")
        try:
            return rpc.answer(await self._infer(message))
        except grpc.aio.AioRpcError as error:
            if error.code() in _GONE_GRPC and request.name not in STEADY:
                return None
            raise ValueError(f"{error.code()} {error.details()}") from None
