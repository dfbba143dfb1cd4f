"""The KServe server of this process: the only module that imports kserve, and the only one that knows HTTP and gRPC codes.

KServe's own application answers metadata, readiness, metrics, gRPC and everything unusual; the two routes that carry load (`:predict` and `/infer`
with JSON) are answered before it, straight from the body's bytes. Owns the listening sockets and the way down: on SIGTERM readiness turns false,
requests in flight finish, then the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import time
import warnings
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from typing import Any

import kserve
import msgspec
import uvicorn
import uvloop
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from grpc import StatusCode  # type: ignore[import-untyped]
from grpc_interceptor.exceptions import GrpcException
from kserve.errors import ModelNotReady
from kserve.model_server import app as kserve_app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.grpc_predict_v2_pb2 import InferParameter, ModelInferResponse
from kserve.protocol.grpc.server import GRPCServer
from kserve.protocol.infer_type import InferOutput, InferRequest, InferResponse
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer

from contracts.artifact import Signature, TensorSpec
from contracts.errors import DeadlineExceeded, InvalidValue, NotFound, NotPermitted, Refused, SluiceError, Unavailable
from contracts.units import MS, S, ms
from predictor import tensors
from predictor.dispatch import Dispatcher, Outcome, Ticket
from predictor.metrics import Metrics

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Encode = Callable[[dict[str, tensors.Array], Outcome], Any]

_GRACE_S = 30
_GRPC_MESSAGE_BYTES = 64 << 20
_WATCH_AFTER_S = 0.05
"""Who is not answered by then is watched: should the client hang up, its request is cancelled."""

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


class _BodyTooLarge(InvalidValue):
    """The body is larger than this server takes."""


class _ClientGone(Exception):
    """Nobody is there any more to hear the answer."""


_CODES: tuple[tuple[type[SluiceError], int, StatusCode], ...] = (
    (_BodyTooLarge, 413, StatusCode.INVALID_ARGUMENT),
    (InvalidValue, 400, StatusCode.INVALID_ARGUMENT),
    (NotFound, 404, StatusCode.NOT_FOUND),
    (NotPermitted, 403, StatusCode.PERMISSION_DENIED),
    (Refused, 429, StatusCode.RESOURCE_EXHAUSTED),
    (Unavailable, 503, StatusCode.UNAVAILABLE),
    (DeadlineExceeded, 504, StatusCode.DEADLINE_EXCEEDED),
    (SluiceError, 500, StatusCode.INTERNAL),
)


def _codes(error: SluiceError) -> tuple[int, StatusCode]:
    return next((http, grpc) for kind, http, grpc in _CODES if isinstance(error, kind))


def _retry_after(error: SluiceError, code: int) -> dict[str, str]:
    """The header of 429 and 503, in whole seconds."""
    return {"retry-after": str(max(1, -(-error.retry_after_ms // 1000)))} if code in (429, 503) else {}


class Front:
    """The ASGI application: inference with JSON bodies itself, all else by KServe's."""

    def __init__(self, dispatcher: Dispatcher, max_body_bytes: int) -> None:
        self.dispatcher = dispatcher
        self.draining = False
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path = scope.get("path", "")
        if scope["type"] == "http" and scope["method"] == "POST":
            if path.startswith("/v1/models/") and path.endswith(":predict"):
                await self._serve(path[11:-8], self._predict, scope, receive, send)
                return
            if path.startswith("/v2/models/") and path.endswith("/infer") and path.count("/") == 4:
                await self._serve(path[11:-6], self._infer, scope, receive, send)
                return
        await kserve_app(scope, receive, send)

    async def _serve(self, name: str, protocol: Callable[..., Awaitable[tuple[bytes, bytes]]], scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if b"inference-header-content-length" in headers or b"ce-specversion" in headers or b"cloudevents" in headers.get(b"content-type", b""):
            await kserve_app(scope, receive, send)
            return
        try:
            timing, payload = await protocol(name, await self._body(receive), _timeout_ns(headers.get(b"sluice-timeout-ms")), receive)
            await _respond(send, 200, payload, {"server-timing": timing.decode()} if timing else {})
        except SluiceError as error:
            code, _ = _codes(error)
            await _respond(send, code, tensors.dump({"error": error.message}), _retry_after(error, code))
        except _ClientGone:
            pass
        except Exception as error:
            log.exception("a request for %s could not be handled", name)
            await _respond(send, 500, tensors.dump({"error": f"{type(error).__name__}: {error}"}), {})

    async def _body(self, receive: Receive) -> bytes:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise _ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                raise _BodyTooLarge(f"must be at most {self._max_body_bytes} bytes", key="body", value=f"{size} bytes and more")
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)

    async def _predict(self, name: str, body: bytes, timeout_ns: int | None, receive: Receive) -> tuple[bytes, bytes]:
        """V1. Its body has no place for the timing, so that goes into a Server-Timing header."""

        def decode(signature: Signature) -> tuple[dict[str, tensors.Array], Encode]:
            def encode(outputs: dict[str, tensors.Array], outcome: Outcome) -> tuple[bytes, bytes]:
                return _server_timing(outcome), tensors.dump(tensors.encode_v1(outputs, signature))

            return tensors.decode_v1(tensors.parse(body), signature), encode

        answer: tuple[bytes, bytes] = await self.infer(name, decode, timeout_ns, receive)
        return answer

    async def _infer(self, name: str, body: bytes, timeout_ns: int | None, receive: Receive) -> tuple[bytes, bytes]:
        """V2."""

        def decode(signature: Signature) -> tuple[dict[str, tensors.Array], Encode]:
            asked = tensors.decode_v2(tensors.parse(body), signature)

            def encode(outputs: dict[str, tensors.Array], outcome: Outcome) -> tuple[bytes, bytes]:
                return b"", tensors.dump(tensors.encode_v2(name, asked.id, outputs, signature, asked.outputs, parameters(outcome)))

            return asked.inputs, encode

        answer: tuple[bytes, bytes] = await self.infer(name, decode, timeout_ns, receive)
        return answer

    async def infer(
        self,
        name: str,
        decode: Callable[[Signature], tuple[dict[str, tensors.Array], Encode]],
        timeout_ns: int | None,
        receive: Receive | None = None,
    ) -> Any:
        """One request, whatever its protocol: `decode` gives the inputs and how to encode the outputs, read before their memory is freed."""
        served = self.dispatcher.find(name)
        try:
            signature = self.dispatcher.signature(served)
            inputs, encode = decode(signature)
            ticket = self.dispatcher.submit(served, signature, inputs, timeout_ns)
            try:
                with _watched(receive, ticket):
                    outcome = await ticket.future
                answer = encode(ticket.outputs, outcome)
            finally:
                self.dispatcher.finish(ticket)
        except SluiceError as error:
            served.metrics.count(type(error).__name__)
            raise
        except _ClientGone:
            served.metrics.count("cancelled")
            raise
        served.metrics.count("ok")
        served.metrics.total.observe((time.monotonic_ns() - ticket.arrival_ns) / S)
        return answer


@contextlib.contextmanager
def _watched(receive: Receive | None, ticket: Ticket) -> Iterator[None]:
    """Ends the wait with _ClientGone when the client hangs up. Costs a task only for requests that wait long."""
    tasks: list[asyncio.Task[None]] = []

    async def watch(receive: Receive) -> None:
        if (await receive())["type"] == "http.disconnect" and not ticket.future.done():
            ticket.future.set_exception(_ClientGone())

    if receive is None:
        yield
        return
    loop = asyncio.get_running_loop()
    timer = loop.call_later(_WATCH_AFTER_S, lambda: tasks.append(loop.create_task(watch(receive))))
    try:
        yield
    finally:
        timer.cancel()
        for task in tasks:
            task.cancel()


def parameters(outcome: Outcome) -> dict[str, Any]:
    """The timing of an answer, and where its rows lay in which batch, as V2 response parameters."""
    return {
        "sluice_queue_ms": ms(outcome.queue_ns),
        "sluice_swap_ms": ms(outcome.swap_ns),
        "sluice_run_ms": ms(outcome.run_ns),
        "sluice_batch": outcome.batch,
        "sluice_batch_row": outcome.row,
        "sluice_batch_rows": outcome.rows,
        "sluice_cold": outcome.cold,
        "sluice_device": outcome.device,
    }


def _server_timing(outcome: Outcome) -> bytes:
    """The same for V1, as the Server-Timing header of the W3C has it."""
    return b"queue;dur=%.3f, swap;dur=%.3f, run;dur=%.3f" % (ms(outcome.queue_ns), ms(outcome.swap_ns), ms(outcome.run_ns))


def _timeout_ns(value: bytes | str | None) -> int | None:
    if value is None:
        return None
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    try:
        timeout_ms = float(text)
    except ValueError:
        timeout_ms = 0.0
    if not 0 < timeout_ms < 1e9:
        raise InvalidValue("must be a number of milliseconds greater than 0", key="Sluice-Timeout-Ms", value=text)
    return max(1, int(timeout_ms * MS))


async def _respond(send: Send, code: int, payload: bytes, headers: dict[str, str]) -> None:
    lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(payload))]
    lines += [(name.encode(), value.encode()) for name, value in headers.items()]
    if code == 413:
        lines.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": code, "headers": lines})
    await send({"type": "http.response.body", "body": payload})


class FunctionModel(kserve.Model):  # type: ignore[misc]
    """One function as KServe sees it: gRPC, CloudEvents and binary bodies come this way."""

    def __init__(self, name: str, front: Front) -> None:
        super().__init__(name)
        self._front = front

    async def healthy(self) -> bool:
        """Ready to run a request at once, and this process is not on its way down."""
        return not self._front.draining and self._front.dispatcher.ready(self.name)

    def load(self) -> bool:
        """KServe calls this before it infers with a model that is not ready; functions are loaded by the node agent alone."""
        return False

    def get_input_types(self) -> list[dict[str, Any]]:
        """V2 metadata."""
        return self._types("inputs")

    def get_output_types(self) -> list[dict[str, Any]]:
        """V2 metadata."""
        return self._types("outputs")

    def _types(self, side: str) -> list[dict[str, Any]]:
        served = self._front.dispatcher.find(self.name)
        specs: tuple[TensorSpec, ...] = getattr(served.info.signature, side, ())
        return [{"name": spec.name, "datatype": spec.dtype, "shape": [dim if isinstance(dim, int) else -1 for dim in spec.shape]} for spec in specs]

    async def __call__(self, body: Any, headers: dict[str, str] | None = None, verb: Any = None) -> tuple[Any, dict[str, str]]:
        """A V1 document or a V2 InferRequest; errors leave as what KServe's gRPC server or our handler on its application turn into codes."""
        over_grpc = isinstance(body, InferRequest) and body.from_grpc
        try:
            timeout_ns = _timeout_ns((headers or {}).get("sluice-timeout-ms"))
            return await self._front.infer(self.name, lambda signature: self._decode(body, signature), timeout_ns), {}
        except SluiceError as error:
            if over_grpc:
                raise GrpcException(error.message, _codes(error)[1]) from None
            raise

    def _decode(self, body: Any, signature: Signature) -> tuple[dict[str, tensors.Array], Encode]:
        if not isinstance(body, InferRequest):
            inputs = tensors.decode_v1(body, signature)
            return inputs, lambda outputs, _: tensors.parse(tensors.dump(tensors.encode_v1(outputs, signature)))
        inputs = {}
        for tensor in body.inputs:
            raw = tensor._raw_data
            data = bytes(raw) if raw is not None else None if tensor.data is None else list(tensor.data)
            tensors.add_input(inputs, signature, tensor.name, list(tensor.shape), tensor.datatype, data)
        asked = [{"name": output.name} for output in body.request_outputs] if body.request_outputs else None
        wanted = tensors.requested(asked, signature) or tuple(spec.name for spec in signature.outputs)
        encode = _encode_grpc if body.from_grpc else _encode_kserve
        return inputs, lambda outputs, outcome: encode(self.name, body, signature, {name: outputs[name] for name in wanted}, outcome)


def _encode_grpc(name: str, request: InferRequest, signature: Signature, outputs: dict[str, tensors.Array], outcome: Outcome) -> ModelInferResponse:
    response = ModelInferResponse(model_name=name, id=request.id or "")
    dtypes = {spec.name: spec.dtype for spec in signature.outputs}
    for key, value in parameters(outcome).items():
        field = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
        response.parameters[key].CopyFrom(InferParameter(double_param=value) if isinstance(value, float) else InferParameter(**{field: value}))
    for output, array in outputs.items():
        response.outputs.add(name=output, datatype=dtypes[output], shape=array.shape)
        response.raw_output_contents.append(array.tobytes())
    return response


def _encode_kserve(name: str, request: InferRequest, signature: Signature, outputs: dict[str, tensors.Array], outcome: Outcome) -> InferResponse:
    found = []
    for spec in signature.outputs:
        if spec.name in outputs:
            output = InferOutput(spec.name, list(outputs[spec.name].shape), spec.dtype)
            output._raw_data = outputs[spec.name].tobytes()
            found.append(output)
    return InferResponse(
        response_id=request.id,
        model_name=name,
        infer_outputs=found,
        parameters=parameters(outcome),
        use_binary_outputs=request.use_binary_outputs,
        requested_outputs=request.request_outputs,
    )


class _Functions(kserve.ModelRepository):  # type: ignore[misc]
    """KServe's view of the functions: always what the dispatcher has now."""

    def __init__(self, front: Front) -> None:
        super().__init__()
        self._front = front

    def get_model(self, name: str) -> FunctionModel | None:
        return FunctionModel(name, self._front) if name in self._front.dispatcher.names else None

    def get_models(self) -> dict[str, FunctionModel]:
        return {name: FunctionModel(name, self._front) for name in self._front.dispatcher.names}

    def unload(self, name: str) -> None:
        raise NotImplementedError("functions are declared at the node agent, not loaded and unloaded here")


class _DataPlane(DataPlane):  # type: ignore[misc]
    """KServe's, with a server readiness that means something."""

    def __init__(self, front: Front) -> None:
        super().__init__(_Functions(front))
        self._front = front

    async def ready(self) -> bool:
        return not self._front.draining and self._front.dispatcher.client.connected


async def _on_sluice_error(_: Request, error: SluiceError) -> JSONResponse:
    code, _grpc = _codes(error)
    return JSONResponse({"error": error.message}, code, _retry_after(error, code))


async def _on_not_ready(_: Request, error: ModelNotReady) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 503, {"retry-after": "1"})


async def _on_bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse({"error": str(error.errors())}, 400)


class _Server(uvicorn.Server):
    """uvicorn without its signal handlers: `_run` decides when it ends."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def serve(settings: Settings) -> int:
    """Serves until SIGTERM or SIGINT; 0 after a clean drain."""
    logging.getLogger("kserve").setLevel(logging.CRITICAL)  # it logs a traceback for every 404
    warnings.filterwarnings("ignore", module="fastapi.routing")  # about KServe's own use of FastAPI
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        return runner.run(_run(settings))


async def _run(settings: Settings) -> int:
    loop = asyncio.get_running_loop()
    dispatcher = Dispatcher(settings.agent_path, settings.segment_bytes, Metrics())
    front = Front(dispatcher, settings.max_body_bytes)
    data_plane = _DataPlane(front)
    extension = ModelRepositoryExtension(data_plane.model_registry)
    RESTServer("kserve.model_server:app", data_plane, extension, settings.http_port).create_application()
    for kind, handler in ((SluiceError, _on_sluice_error), (ModelNotReady, _on_not_ready), (RequestValidationError, _on_bad_request)):
        kserve_app.add_exception_handler(kind, handler)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    listener = socket.create_server((settings.host, settings.http_port), backlog=2048)
    server = _Server(uvicorn.Config(front, log_config=None, access_log=False, lifespan="off", timeout_graceful_shutdown=_GRACE_S))
    serving = [loop.create_task(server.serve([listener]))]
    grpc = None
    if settings.grpc_port is not None:
        limits = {"grpc_max_send_message_length": _GRPC_MESSAGE_BYTES, "grpc_max_receive_message_length": _GRPC_MESSAGE_BYTES}
        grpc = GRPCServer(settings.grpc_port, data_plane, extension, limits, _GRACE_S)
        serving.append(loop.create_task(grpc.start(1)))
    dispatcher.client.start()
    log.info("serving on http://%s:%d", *listener.getsockname()[:2])
    stopping = loop.create_task(stop.wait())
    await asyncio.wait([*serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    front.draining = True
    await asyncio.sleep(settings.linger_ms / 1000)
    server.should_exit = True
    if grpc is not None:
        await grpc.stop()
    stopping.cancel()
    outcomes = await asyncio.gather(*serving, return_exceptions=True)
    dispatcher.client.close()
    failures = [outcome for outcome in outcomes if isinstance(outcome, BaseException)]
    for failure in failures:
        log.error("the server failed: %r", failure)
    return 1 if failures else 0
