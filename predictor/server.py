"""The life of the server process: its sockets, uvicorn, the gRPC server, and the way down.

What is served is in `predictor.protocols`. On SIGTERM readiness turns false, requests in flight finish, then the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import functools
import logging
import math
import signal
import socket
import struct
from collections.abc import Callable, Iterator, Sequence

import msgspec
import uvicorn
import uvloop

from contracts.errors import InvalidValue
from predictor.dispatch import Dispatcher
from predictor.front import Finished, Front
from predictor.heap import keep_freed_memory
from predictor.logs import access_log
from predictor.metrics import Metrics
from predictor.protocols import management, rpc, tracing
from predictor.protocols.grpc_server import GrpcServer
from predictor.protocols.http import Http
from predictor.protocols.limits import BoundedHttp, Intake, Limits, watch

_GRACE_S = 30
_HANDSHAKE_S = 0.1
_BACKLOG = 2048
_SO_ATTACH_FILTER = 26
log = logging.getLogger("sluice.predictor")


class Settings(msgspec.Struct, frozen=True):
    """What the command line said."""

    agent_path: str
    http_port: int
    host: str = "127.0.0.1"
    grpc_port: int | None = None
    segment_bytes: int = 256 << 20
    linger_ms: int = 0
    limits: Limits = Limits()
    traces: str = ""
    access_log_per_s: float = 0.0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `_run` decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; 0 after a clean drain."""
    logging.getLogger("uvicorn").setLevel(logging.ERROR)  # a warning for each bad request is for whoever sent it
    keep_freed_memory()
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_run(settings))
        except (OSError, RuntimeError, InvalidValue) as error:
            log.error("cannot serve: %s", error)
            return 1


async def _run(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    dispatcher = Dispatcher(settings.agent_path, settings.segment_bytes, Metrics())
    front = Front(dispatcher)
    front.observers += _observers(settings)
    intake = Intake(settings.limits.fitting())
    listener = _listen(settings.host, settings.http_port, intake.limits)
    server = _http_server(settings, intake, Http(front, management.application(front)))
    serving = loop.create_task(server.serve([listener]))
    grpc_server = GrpcServer(rpc.methods(front), intake)
    doors = [listener, *await _serve_grpc(settings, grpc_server)]
    dispatcher.client.start()
    log.info("serving on http://%s:%d", _authority(settings.host), listener.getsockname()[1])
    watching = loop.create_task(watch(intake.limits.patience_s, server.server_state.connections, grpc_server.connections))
    stopping = loop.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    dispatcher.drain()
    intake.close_connections(server.server_state.connections)
    await _linger(stop, settings.linger_ms / 1000)
    log.info("stopping: no new connections, finishing what is in flight")
    await _close_doors(doors)
    server.should_exit = True
    await grpc_server.stop(_GRACE_S)
    await serving
    watching.cancel()
    dispatcher.client.close()
    return 0 if stopping.done() else 1


async def _linger(stop: asyncio.Event, delay_s: float) -> None:
    """Serves on until whoever sends requests here has heard that we are not ready; a second signal ends the wait."""
    stop.clear()
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(stop.wait(), delay_s)


def _observers(settings: Settings) -> list[Callable[[Finished], None]]:
    tracer = tracing.tracer(settings.traces)
    found = [] if tracer is None else [tracing.spans(tracer)]
    return [*found, access_log(settings.access_log_per_s)] if settings.access_log_per_s > 0 else found


def _http_server(settings: Settings, intake: Intake, application: Http) -> _Server:
    config = uvicorn.Config(
        application,
        http=functools.partial(BoundedHttp, intake),  # type: ignore[arg-type]  # called, never subclassed
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=False,
        lifespan="off",
        timeout_keep_alive=math.ceil(settings.limits.keep_alive_s),
        timeout_graceful_shutdown=_GRACE_S,
    )
    return _Server(config)


def _listen(host: str, port: int, limits: Limits) -> socket.socket:
    """A socket that listens; OSError as the kernel gives it."""
    listener = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=_BACKLOG)
    # For answers that the kernel holds, and those whose connection has been closed: a peer that takes nothing for so long is given up.
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limits.patience_s * 1000))
    return listener


async def _serve_grpc(settings: Settings, server: GrpcServer) -> list[socket.socket]:
    """The socket where gRPC is served, if it is to be."""
    if settings.grpc_port is None:
        return []
    listener = _listen(settings.host, settings.grpc_port, settings.limits)
    await server.listen(listener)
    log.info("serving gRPC on %s:%d", _authority(settings.host), listener.getsockname()[1])
    return [listener]


async def _close_doors(listeners: Sequence[socket.socket]) -> None:
    """From now on connections are refused, and none is lost that the kernel has accepted for us but we have not.

    Closing a listening socket resets those. So first the kernel is told to drop what would begin another (a TCP segment with SYN), which the other
    end sends again, and time is given for the rest to arrive.
    """
    drop_syn = ((0x30, 0, 0, 13), (0x45, 0, 1, 0x02), (0x06, 0, 0, 0), (0x06, 0, 0, 0xFFFFFFFF))
    program = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *instruction) for instruction in drop_syn))
    with contextlib.suppress(OSError):  # not every kernel has socket filters
        for listener in listeners:
            listener.setsockopt(socket.SOL_SOCKET, _SO_ATTACH_FILTER, struct.pack("HL", len(drop_syn), ctypes.addressof(program)))
        await asyncio.sleep(_HANDSHAKE_S)


def _authority(host: str) -> str:
    return f"[{host}]" if ":" in host else host
