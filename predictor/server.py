"""The KServe server of this process: the only module that imports kserve, and the only one that knows HTTP and gRPC codes.

KServe's own application answers metadata, readiness, metrics and everything unusual; the two routes that carry load (`:predict` and `/infer` with
JSON) are answered before it, straight from the body's bytes. Owns the listening sockets and the way down: on SIGTERM readiness turns false, requests
in flight finish, then the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import warnings
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping
from typing import Any

import grpc  # type: ignore[import-untyped]
import kserve
import msgspec
import uvicorn
import uvloop
from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from grpc import StatusCode
from kserve.constants.constants import GRPC_CONTENT_DATATYPE_MAPPINGS
from kserve.errors import ModelNotReady
from kserve.model_server import app as kserve_app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.grpc_predict_v2_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.infer_type import InferOutput, InferRequest, InferResponse
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer

from contracts.artifact import Signature, TensorSpec
from contracts.errors import DeadlineExceeded, InvalidTensor, InvalidValue, NotFound, NotPermitted, Refused, SluiceError, Unavailable
from contracts.units import S
from predictor import tensors
from predictor.dispatch import Dispatcher, Outcome
from predictor.front import ClientGone, Encode, Front, Receive, parameters, server_timing, timeout_ns
from predictor.http_head import BoundedHttp
from predictor.metrics import Metrics
from predictor.tensors import Array

Scope = MutableMapping[str, Any]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

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


class _BodyTooLarge(InvalidValue):
    """The body is larger than this server takes."""


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


def _codes(error: SluiceError) -> tuple[int, StatusCode, dict[str, str]]:
    """HTTP code, gRPC code, and a Retry-After in whole seconds where another try may succeed."""
    http, status = next((http, status) for kind, http, status in _CODES if isinstance(error, kind))
    return http, status, {"retry-after": str(max(1, -(-error.retry_after_ms // 1000)))} if http in (429, 503) else {}


class Http:
    """The ASGI application: inference with JSON bodies by itself, all else by KServe's."""

    def __init__(self, front: Front, max_body_bytes: int) -> None:
        self._front = front
        self._max_body_bytes = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        path = scope.get("path", "")
        if scope["type"] == "http" and scope["method"] == "POST":
            if path.startswith("/v1/models/") and path.endswith(":predict"):
                await self._serve(path[11:-8], _v1, scope, receive, send)
                return
            if path.startswith("/v2/models/") and path.endswith("/infer") and path.count("/") == 4:
                await self._serve(path[11:-6], _v2, scope, receive, send)
                return
        await kserve_app(scope, receive, send)

    async def _serve(self, name: str, protocol: Callable[..., Any], scope: Scope, receive: Receive, send: Send) -> None:
        headers = dict(scope["headers"])
        if b"inference-header-content-length" in headers or b"ce-specversion" in headers or b"cloudevents" in headers.get(b"content-type", b""):
            await kserve_app(scope, receive, send)
            return
        try:
            body = await self._body(receive)
            timeout = timeout_ns(headers.get(b"sluice-timeout-ms"))
            payload, more = await self._front.infer(name, lambda signature: protocol(name, body, signature), timeout, receive)
            await _respond(send, 200, payload, more)
        except SluiceError as error:
            code, _, more = _codes(error)
            await _respond(send, code, tensors.dump({"error": error.message}), more)
        except ClientGone:
            pass
        except Exception as error:
            log.exception("a request for %s could not be handled", name)
            await _respond(send, 500, tensors.dump({"error": f"{type(error).__name__}: {error}"}), {})

    async def _body(self, receive: Receive) -> bytes:
        chunks, size, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ClientGone
            chunk = message.get("body", b"")
            size += len(chunk)
            if size > self._max_body_bytes:
                raise _BodyTooLarge(f"must be at most {self._max_body_bytes} bytes", key="body", value=f"{size} bytes and more")
            chunks.append(chunk)
            more = message.get("more_body", False)
        return chunks[0] if len(chunks) == 1 else b"".join(chunks)


Answered = tuple[bytes, Mapping[str, str]]


def _v1(_name: str, body: bytes, signature: Signature) -> tuple[Mapping[str, Array], Encode[Answered]]:
    """V1. Its answers have no place for the timing, so that goes into a Server-Timing header."""

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> Answered:
        return tensors.dump(tensors.encode_v1(outputs, signature)), {"server-timing": server_timing(outcome)}

    return tensors.decode_v1(tensors.parse(body), signature), encode


def _v2(name: str, body: bytes, signature: Signature) -> tuple[Mapping[str, Array], Encode[Answered]]:
    asked = tensors.decode_v2(tensors.parse(body), signature)

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> Answered:
        return tensors.dump(tensors.encode_v2(name, asked.id, outputs, signature, asked.outputs, parameters(outcome))), {}

    return asked.inputs, encode


async def _respond(send: Send, code: int, payload: bytes, headers: Mapping[str, str]) -> None:
    lines = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(payload))]
    lines += [(name.encode(), value.encode()) for name, value in headers.items()]
    if code == 413:
        lines.append((b"connection", b"close"))
    await send({"type": "http.response.start", "status": code, "headers": lines})
    await send({"type": "http.response.body", "body": payload})


class FunctionModel(kserve.Model):  # type: ignore[misc]
    """One function as KServe sees it. CloudEvents and binary bodies are inferred through here."""

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
        """Answers a V1 document or a V2 InferRequest with its like."""
        decode = _decode_request if isinstance(body, InferRequest) else _decode_document
        timeout = timeout_ns((headers or {}).get("sluice-timeout-ms"))
        return await self._front.infer(self.name, lambda signature: decode(self.name, body, signature), timeout), {}


def _decode_document(_name: str, document: Any, signature: Signature) -> tuple[Mapping[str, Array], Encode[Any]]:
    return tensors.decode_v1(document, signature), lambda outputs, _: tensors.parse(tensors.dump(tensors.encode_v1(outputs, signature)))


def _decode_request(name: str, request: InferRequest, signature: Signature) -> tuple[Mapping[str, Array], Encode[InferResponse]]:
    inputs: dict[str, Array] = {}
    for tensor in request.inputs:
        tensors.add_input(inputs, signature, tensor.name, list(tensor.shape), tensor.datatype, tensor.data)
    asked = [{"name": output.name} for output in request.request_outputs] if request.request_outputs else None
    wanted = tensors.requested(asked, signature)

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> InferResponse:
        found = []
        for spec in signature.outputs:
            if wanted is None or spec.name in wanted:
                output = InferOutput(spec.name, list(outputs[spec.name].shape), spec.dtype)
                output.set_data_from_numpy(outputs[spec.name], binary_data=True)
                found.append(output)
        return InferResponse(
            request.id or "",
            name,
            found,
            parameters=parameters(outcome),
            use_binary_outputs=request.use_binary_outputs,
            requested_outputs=request.request_outputs,
        )

    return inputs, encode


class _Servicer(InferenceServicer):  # type: ignore[misc]
    """KServe's gRPC service; inference goes from the message's bytes to shared memory, under the caller's deadline."""

    def __init__(self, front: Front, data_plane: DataPlane, extension: ModelRepositoryExtension) -> None:
        super().__init__(data_plane, extension)
        self._front = front

    async def ModelInfer(self, request: ModelInferRequest, context: grpc.aio.ServicerContext) -> ModelInferResponse:  # noqa: N802
        try:
            return await self._front.infer(request.model_name, lambda signature: _decode_grpc(request, signature), _grpc_timeout_ns(context))
        except SluiceError as error:
            _, status, more = _codes(error)
            await context.abort(status, error.message, tuple(more.items()))
        except Exception as error:
            log.exception("a gRPC request for %s could not be handled", request.model_name)
            await context.abort(StatusCode.INTERNAL, f"{type(error).__name__}: {error}")


def _grpc_timeout_ns(context: grpc.aio.ServicerContext) -> int | None:
    """The shorter of the call's deadline and its `sluice-timeout-ms`; None when it has neither."""
    left_s = context.time_remaining()
    asked = timeout_ns(dict(context.invocation_metadata()).get("sluice-timeout-ms"))
    given = [limit for limit in (asked, None if left_s is None else max(1, int(left_s * S))) if limit is not None]
    return min(given, default=None)


def _decode_grpc(request: ModelInferRequest, signature: Signature) -> tuple[Mapping[str, Array], Encode[ModelInferResponse]]:
    raw = request.raw_input_contents
    if raw and len(raw) != len(request.inputs):
        raise InvalidTensor(f"must be one for each of the {len(request.inputs)} inputs", key="raw_input_contents", value=len(raw))
    inputs: dict[str, Array] = {}
    for number, tensor in enumerate(request.inputs):
        field = GRPC_CONTENT_DATATYPE_MAPPINGS.get(tensor.datatype)
        data = raw[number] if raw else list(getattr(tensor.contents, field)) if field else None
        tensors.add_input(inputs, signature, tensor.name, list(tensor.shape), tensor.datatype, data)
    wanted = tensors.requested([{"name": output.name} for output in request.outputs] or None, signature)

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> ModelInferResponse:
        response = ModelInferResponse(model_name=request.model_name, id=request.id)
        for key, value in parameters(outcome).items():  # KServe's message has no floating point parameter: those go as text
            kind = "bool_param" if isinstance(value, bool) else "int64_param" if isinstance(value, int) else "string_param"
            response.parameters[key].CopyFrom(InferParameter(**{kind: str(value) if kind == "string_param" else value}))
        for spec in signature.outputs:
            if wanted is None or spec.name in wanted:
                response.outputs.add(name=spec.name, datatype=spec.dtype, shape=outputs[spec.name].shape)
                response.raw_output_contents.append(outputs[spec.name].tobytes())
        return response

    return inputs, encode


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
    code, _status, headers = _codes(error)
    return JSONResponse({"error": error.message}, code, headers)


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
    data_plane = _DataPlane(front)
    extension = ModelRepositoryExtension(data_plane.model_registry)
    RESTServer("kserve.model_server:app", data_plane, extension, settings.http_port).create_application()
    for kind, handler in ((SluiceError, _on_sluice_error), (ModelNotReady, _on_not_ready), (RequestValidationError, _on_bad_request)):
        kserve_app.add_exception_handler(kind, handler)
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listener = socket.create_server((settings.host, settings.http_port), family=family, backlog=2048)
    application = Http(front, settings.max_body_bytes)
    server = _Server(
        uvicorn.Config(
            application, http=BoundedHttp, log_config=None, access_log=False, proxy_headers=False, lifespan="off", timeout_graceful_shutdown=_GRACE_S
        )
    )
    serving = loop.create_task(server.serve([listener]))
    rpc = None if settings.grpc_port is None else await _start_grpc(settings, _Servicer(front, data_plane, extension))
    dispatcher.client.start()
    log.info("serving on http://%s:%d", _authority(settings.host), listener.getsockname()[1])
    stopping = loop.create_task(stop.wait())
    await asyncio.wait([serving, stopping], return_when=asyncio.FIRST_COMPLETED)
    front.draining = True
    await asyncio.sleep(settings.linger_ms / 1000)
    log.info("stopping: no new connections, finishing what is in flight")
    server.should_exit = True
    if rpc is not None:
        await rpc.stop(_GRACE_S)
    await serving
    dispatcher.client.close()
    return 0 if stop.is_set() else 1


async def _start_grpc(settings: Settings, servicer: _Servicer) -> grpc.aio.Server:
    options = [(f"grpc.max_{way}_message_length", settings.max_body_bytes) for way in ("send", "receive")]
    rpc = grpc.aio.server(interceptors=(ExceptionToStatusInterceptor(),), options=options)
    add_GRPCInferenceServiceServicer_to_server(servicer, rpc)
    port = rpc.add_insecure_port(f"{_authority(settings.host)}:{settings.grpc_port}")
    await rpc.start()
    log.info("serving gRPC on %s:%d", _authority(settings.host), port)
    return rpc


def _authority(host: str) -> str:
    return f"[{host}]" if ":" in host else host
