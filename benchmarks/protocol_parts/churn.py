"""Changes to a node while it is loaded: shares, functions unloaded and loaded at the predictor (REST and gRPC), declared and removed at the agent.

Owns which functions come and go.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import aiohttp
import grpc  # type: ignore[import-untyped]
from kserve.protocol.grpc.grpc_predict_v2_pb2 import RepositoryModelLoadRequest, RepositoryModelUnloadRequest

from benchmarks.protocol_parts.messages import Values
from benchmarks.protocol_parts.rpc import SERVICE
from benchmarks.protocol_parts.servers import Server
from contracts.errors import SluiceError
from contracts.functions import DEFAULT_NAMESPACE, Function, ModelFormat, ModelRef, Share
from sluice.control import Client

UNLOADED = ("unloaded-rest", "unloaded-grpc")
"""Functions that are unloaded and loaded again, by this protocol."""
REMOVED = "removed"
"""The function that is removed and declared again."""
_PAUSE_S = 0.1
_SEED = 5
_SM_PERCENTS = (50, 100)
_QUOTAS = (1, 5, 10)


@dataclass(frozen=True, slots=True)
class Node:
    """The node under load: where it listens, its run directory, the factors of each function, and the program of the one that is removed."""

    server: Server
    run_dir: Path
    factors: Mapping[str, Values]
    program: Path


@dataclass(slots=True)
class Changes:
    """How many were made, and why others were not."""

    done: int = 0
    failed: list[str] = field(default_factory=list)


@contextlib.asynccontextmanager
async def changing(node: Node, channel: grpc.aio.Channel, steady: tuple[str, ...]) -> AsyncIterator[Changes]:
    """Changes the node until the block ends; leaves everything loaded and declared."""
    control = Client(node.run_dir)
    changes = Changes()
    stop = asyncio.Event()
    async with aiohttp.ClientSession(node.server.url) as http:
        loops = (_shares(control, steady), _rest(http), _grpc(channel), _declared(control, node.program))
        tasks = [asyncio.create_task(_repeat(change, changes, stop)) for change in loops]
        try:
            yield changes
        finally:
            stop.set()
            await asyncio.gather(*tasks)
            control.close()


Turn = Callable[[], Awaitable[None]]


async def _repeat(turn: Turn, changes: Changes, stop: asyncio.Event) -> None:
    """One turn after another, each of which ends where it began."""
    while not stop.is_set():
        try:
            await turn()
            changes.done += 1
        except (OSError, RuntimeError, SluiceError, aiohttp.ClientError, grpc.aio.AioRpcError) as error:
            changes.failed.append(f"{type(error).__name__}: {error}")
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), _PAUSE_S)


def _shares(control: Client, steady: tuple[str, ...]) -> Turn:
    chance = random.Random(_SEED)

    async def turn() -> None:
        await control.set_share(f"{DEFAULT_NAMESPACE}/{chance.choice(steady)}", Share.of(chance.choice(_SM_PERCENTS), chance.choice(_QUOTAS)))

    return turn


def _rest(http: aiohttp.ClientSession) -> Turn:
    async def turn() -> None:
        for verb in ("unload", "load"):
            async with http.post(f"/v2/repository/models/{UNLOADED[0]}/{verb}") as response:
                if response.status != 200:
                    raise RuntimeError(f"{verb}: {response.status} {await response.text()}")
            await asyncio.sleep(_PAUSE_S)

    return turn


def _grpc(channel: grpc.aio.Channel) -> Turn:
    calls = [
        (channel.unary_unary(f"{SERVICE}/RepositoryModel{verb}"), message(model_name=UNLOADED[1]).SerializeToString())
        for verb, message in (("Unload", RepositoryModelUnloadRequest), ("Load", RepositoryModelLoadRequest))
    ]

    async def turn() -> None:
        for call, message in calls:
            await call(message)
            await asyncio.sleep(_PAUSE_S)

    return turn


def _declared(control: Client, program: Path) -> Turn:
    function = Function(REMOVED, ModelRef(ModelFormat.TORCH_EXPORT, f"file://{program}"), share=Share.of(100, 5), max_batch=32)

    async def turn() -> None:
        await control.remove(function.key)
        await asyncio.sleep(_PAUSE_S)
        await control.declare(function)
        await asyncio.sleep(_PAUSE_S)

    return turn
