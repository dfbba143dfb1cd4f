"""The life of the server process: its sockets, uvicorn, the gRPC server, and the way down.

What is served is in `predictor.protocols`. On SIGTERM readiness turns false, requests in flight finish, then the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import warnings
from collections.abc import Iterator

import grpc  # type: ignore[import-untyped]
import msgspec
import uvicorn
import uvloop

from predictor.dispatch import Dispatcher
from predictor.front import Front
from predictor.http_head import BoundedHttp
from predictor.metrics import Metrics
from predictor.protocols import rest, rpc
from predictor.protocols.http import Http

_GRACE_S = 30
log = logging.getLogger("sluice.predictor")


class Settings(msgspec.Struct, frozen=True):
    """What the command line said."""

    agent_path: str
    http_port: int
    host: str = "127.0.0.1"
    grpc_port: int | None = None
    segment_bytes: int = 256 << 20
    max_body_bytes: int = 64 << 20
    linger_ms: int = 0


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `_run` decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; 0 after a clean drain."""
    logging.getLogger("uvicorn").setLevel(logging.WARNING)
    logging.getLogger("kserve").setLevel(logging.CRITICAL)  # it logs a traceback for every 404
    warnings.filterwarnings("ignore", module="fastapi.routing")  # about KServe's own use of FastAPI
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        try:
            return runner.run(_run(settings))
        except (OSError, RuntimeError) as error:  # gRPC's error for a port that is taken is a RuntimeError
            log.error("cannot serve: %s", error)
            return 1


async def _run(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    dispatcher = Dispatcher(settings.agent_path, settings.segment_bytes, Metrics())
    front = Front(dispatcher)
    application, data_plane = rest.application(front)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host, settings.http_port), family=family, backlog=2048)
    server = _Server(
        uvicorn.Config(
            Http(front, application, settings.max_body_bytes),
            http=BoundedHttp,
            log_config=None,
            access_log=False,
            proxy_headers=False,
            lifespan="off",
            timeout_graceful_shutdown=_GRACE_S,
        )
    )
    serving = loop.create_task(server.serve([listener]))
    grpc_server = None if settings.grpc_port is None else await _start_grpc(settings, rpc.server(front, data_plane, settings.max_body_bytes))
    dispatcher.client.start()
    log.info("serving on http://%s:%d", _authority(settings.host), listener.getsockname()[1])
    stopping = loop.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    front.draining = True
    await asyncio.sleep(settings.linger_ms / 1000)
    log.info("stopping: no new connections, finishing what is in flight")
    server.should_exit = True
    if grpc_server is not None:
        await grpc_server.stop(_GRACE_S)
    await serving
    dispatcher.client.close()
    return 0 if stop.is_set() else 1


async def _start_grpc(settings: Settings, server: grpc.aio.Server) -> grpc.aio.Server:
    port = server.add_insecure_port(f"{_authority(settings.host)}:{settings.grpc_port}")
    await server.start()
    log.info("serving gRPC on %s:%d", _authority(settings.host), port)
    return server


def _authority(host: str) -> str:
    return f"[{host}]" if ":" in host else host
