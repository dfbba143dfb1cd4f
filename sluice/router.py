"""The router of `sluice up --isolate`: each function has its own predictor process, none at all while nobody calls it.

Holds requests of a function that is at zero, starts its predictor once for all of them, forwards them, and ends the process after an idle time; the
weights stay in host memory with the agent. A response that waited for a start says for how long (`Sluice-Start-Ms`); what the request then waited for
weights and ran is in the response's own parameters. Interprets paths only, never bodies.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Callable, Sequence

import aiohttp
from aiohttp import web

from contracts.errors import SluiceError, Unavailable
from contracts.functions import Function
from sluice.control import Client
from sluice.fronts import Pauses
from sluice.ports import free_port
from sluice.predictors import STOP_GRACE_S, Predictor, PredictorOptions

START_HEADER = "Sluice-Start-Ms"
INSTANCE_HEADER = "Sluice-Instance"
_MAX_BODY_BYTES = 64 << 20
_MODEL_PATH = re.compile(r"/v1/models/(?P<v1>[^/:]+)(:\w+)?|/v2/(repository/)?models/(?P<v2>[^/]+)(/.*)?")
# RFC 9110, 7.6.1: they belong to one connection. The body is read and sent whole, so its length and coding are set anew.
_HOP_BY_HOP = frozenset(
    (
        "connection",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "content-length",
        "host",
    )
)


class Backend:
    """One function's predictor: at zero, starting, up. Started by the first request, ended by the idle clock."""

    def __init__(self, function: Function, options: PredictorOptions, http: aiohttp.ClientSession, idle_s: float, say: Callable[[str], None]) -> None:
        self.function = function
        self.client: Client | None = None
        self._options = options
        self._http = http
        self._idle_s = idle_s
        self._say = say
        self._predictor: Predictor | None = None
        self._starting: asyncio.Task[Predictor] | None = None
        self._alive: set[Predictor] = set()
        self._stopping: set[asyncio.Task[None]] = set()
        self._idle: asyncio.TimerHandle | None = None
        self._in_flight = 0
        self._pauses = Pauses()
        self._refuse_until = 0.0
        self._refusal = ""
        self._killed = False

    @property
    def at_zero(self) -> bool:
        """Whether no process runs or starts."""
        return self._predictor is None and self._starting is None

    @property
    def is_up(self) -> bool:
        """Whether a call need not wait for a start."""
        return self._predictor is not None and self._predictor.child.returncode is None

    async def __aenter__(self) -> Backend:
        self._in_flight += 1
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None
        return self

    async def __aexit__(self, *_: object) -> None:
        self._in_flight -= 1
        self._wind_idle_clock()

    def _wind_idle_clock(self) -> None:
        if self._in_flight == 0 and self._predictor is not None:
            self._idle = asyncio.get_running_loop().call_later(self._idle_s, self._scale_to_zero)

    async def grant(self, client: Client) -> None:
        """A new agent runs: its processes are granted the function there."""
        self.client = client
        for predictor in list(self._alive):
            await predictor.grant(client)

    async def ready(self) -> Predictor:
        """The running predictor, started if need be, once for all who wait; Unavailable with the reason when it cannot be started."""
        if self._predictor is not None and self.is_up:
            return self._predictor
        if self._starting is None:
            if self._killed:
                raise Unavailable("the node is being stopped")
            wait_s = self._refuse_until - time.monotonic()
            if wait_s > 0:
                raise Unavailable(self._refusal, retry_after_ms=round(wait_s * 1000) + 1)
            self._starting = asyncio.create_task(self._start())
        return await asyncio.shield(self._starting)

    async def _start(self) -> Predictor:
        predictor: Predictor | None = None
        try:
            self._retire()
            if self.client is None or self.client.closed:
                raise Unavailable("the node agent is being started again", retry_after_ms=1000)
            predictor = Predictor(self._options, free_port(self._options.host), (self.function.key,), f"predictor {self.function.name}")
            self._alive.add(predictor)
            self._pauses.started()
            await predictor.grant(self.client)
            await predictor.wait_ready(self._http, [self.function.name])
        except (OSError, SluiceError) as error:
            if predictor is not None:
                self._end(predictor)
            pause = self._pauses.next()
            self._refuse_until = time.monotonic() + pause
            self._refusal = f"{self.function.key} cannot be started: {error}"
            self._say(self._refusal)
            raise Unavailable(self._refusal, retry_after_ms=round(pause * 1000)) from None
        else:
            self._predictor = predictor
            self._wind_idle_clock()
            return predictor
        finally:
            self._starting = None

    def lost(self, predictor: Predictor) -> None:
        """A connection to this process failed: if it is still ours, it is ended and forgotten, and the next call starts another."""
        if predictor is self._predictor:
            self._retire()

    def _scale_to_zero(self) -> None:
        self._idle = None
        if self._in_flight == 0 and self._predictor is not None:
            self._say(f"{self.function.key} is at zero: not called for {self._idle_s:g} s")
            self._retire()

    def _retire(self) -> None:
        if self._predictor is not None:
            self._end(self._predictor)
            self._predictor = None

    def _end(self, predictor: Predictor) -> None:
        task = asyncio.create_task(self._finish(predictor))
        self._stopping.add(task)
        task.add_done_callback(self._stopping.discard)

    async def _finish(self, predictor: Predictor) -> None:
        await predictor.stop()
        self._alive.discard(predictor)

    def kill(self) -> None:
        """Ends its processes at once; none is started any more."""
        self._killed = True
        for predictor in self._alive:
            predictor.child.kill()

    async def stop(self) -> None:
        """Ends its processes, and waits for their end."""
        if self._idle is not None:
            self._idle.cancel()
        if self._starting is not None:
            await asyncio.gather(self._starting, return_exceptions=True)
        self._retire()
        await asyncio.gather(*self._stopping, return_exceptions=True)


class Router:
    """The public port of an isolated node; a Front."""

    def __init__(
        self, options: PredictorOptions, host: str, port: int, functions: Sequence[Function], idle_s: float, say: Callable[[str], None]
    ) -> None:
        self._options = options
        self._address = (host, port)
        self._functions = functions
        self._idle_s = idle_s
        self._say = say
        self._backends: dict[str, Backend] = {}
        self._http: aiohttp.ClientSession | None = None
        self._runner: web.AppRunner | None = None

    async def start(self, client: Client) -> None:
        """Begins to listen; no predictor runs yet."""
        # No limit of its own: a request's deadline is the predictor's to keep.
        self._http = aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None), connector=aiohttp.TCPConnector(limit=0), auto_decompress=False)
        self._backends = {function.name: Backend(function, self._options, self._http, self._idle_s, self._say) for function in self._functions}
        await self.agent_changed(client)
        app = web.Application(client_max_size=_MAX_BODY_BYTES)
        app.router.add_get("/", _alive)
        app.router.add_get("/v2/health/live", _alive)
        app.router.add_get("/v2/health/ready", _alive)
        app.router.add_get("/v1/models", self._list)
        app.router.add_get("/v2/models", self._list)
        app.router.add_route("*", "/{path:.*}", self._serve)
        self._runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=STOP_GRACE_S)
        await self._runner.setup()
        await web.TCPSite(self._runner, *self._address).start()

    async def wait_ready(self, names: Sequence[str]) -> None:
        """Keeps to these functions: the others failed to load and are not found."""
        self._backends = {name: backend for name, backend in self._backends.items() if name in names}

    async def agent_changed(self, client: Client) -> None:
        """Grants each running predictor its function at the new agent."""
        for backend in self._backends.values():
            await backend.grant(client)

    async def stop(self) -> None:
        """Closes the port, lets requests in flight finish, ends all predictors."""
        if self._runner is not None:
            await self._runner.cleanup()
        await asyncio.gather(*(backend.stop() for backend in self._backends.values()))
        if self._http is not None:
            await self._http.close()

    def kill(self) -> None:
        """Ends all predictors at once."""
        for backend in self._backends.values():
            backend.kill()

    async def _list(self, _request: web.Request) -> web.Response:
        return web.json_response({"models": list(self._backends)})

    async def _serve(self, request: web.Request) -> web.Response:
        match = _MODEL_PATH.fullmatch(request.path)
        name = match and (match["v1"] or match["v2"])
        backend = self._backends.get(name or "")
        if backend is None:
            return _error(404, f"no function {name!r} here" if name else f"no such path: {request.path}")
        if backend.at_zero and request.method == "GET" and request.path == f"/v2/models/{name}/ready":
            return web.json_response({"name": name, "ready": True})
        body = await request.read()
        async with backend:
            try:
                return await self._forward(backend, request, body)
            except Unavailable as error:
                return _error(503, error.message, error.retry_after_ms)

    async def _forward(self, backend: Backend, request: web.Request, body: bytes) -> web.Response:
        """One request, tried once more on a new process when its own was lost: a run changes nothing, so it may run twice."""
        assert self._http is not None
        headers = {key: value for key, value in request.headers.items() if key.lower() not in _HOP_BY_HOP}
        waited_s = 0.0
        for last in (False, True):
            asked = time.monotonic()
            held = not backend.is_up
            predictor = await backend.ready()
            if held:
                waited_s += time.monotonic() - asked
            try:
                async with self._http.request(request.method, predictor.url + request.raw_path, data=body, headers=headers) as response:
                    content = await response.read()
                    kept = {key: value for key, value in response.headers.items() if key.lower() not in _HOP_BY_HOP}
                    if waited_s:
                        kept[START_HEADER] = f"{waited_s * 1000:.3f}"
                    kept[INSTANCE_HEADER] = str(predictor.child.pid)
                    return web.Response(status=response.status, headers=kept, body=content)
            except aiohttp.ClientConnectionError as error:
                backend.lost(predictor)
                if last:
                    raise Unavailable(f"the predictor of {backend.function.key} was lost twice: {error}", retry_after_ms=1000) from None
        raise AssertionError("unreachable")


async def _alive(_request: web.Request) -> web.Response:
    return web.json_response({"live": True, "ready": True})


def _error(status: int, message: str, retry_after_ms: int = 0) -> web.Response:
    headers = {"Retry-After": str(max(1, -(-retry_after_ms // 1000)))} if retry_after_ms else {}
    return web.json_response({"error": message}, status=status, headers=headers)
