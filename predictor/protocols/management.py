"""Everything that is asked of the server beside inference: the routes and the RPCs of `metadata`, `repository` and `statistics`.

Owns how a view is reached and written, over HTTP and gRPC alike; the views are dictionaries, which JSON and protobuf are written from. Messages are
Triton's (`management.proto`), of which KServe's are a part, so that clients of both find their methods. Inference is not here.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from google.protobuf import json_format
from google.protobuf.message import DecodeError
from prometheus_client import REGISTRY, exposition
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from contracts.errors import InvalidValue, SluiceError
from predictor import tensors
from predictor.front import Front, timeout_ns
from predictor.protocols import management_pb2 as pb
from predictor.protocols import metadata, repository
from predictor.protocols.codes import BodyTooLarge, codes
from predictor.protocols.grpc_calls import Method
from predictor.protocols.grpc_calls import Request as GrpcRequest
from predictor.protocols.statistics import statistics

SERVICE = "inference.GRPCInferenceService"
_MAX_BODY_BYTES = 16 << 10
log = logging.getLogger("sluice.predictor")

_GET: Mapping[str, Callable[..., object]] = {
    "/": lambda _: {"status": "alive"},
    "/v1/models": metadata.models,
    "/v1/models/{name}": metadata.check_model_ready,
    "/v2": metadata.server,
    "/v2/health/live": lambda _: {"live": True},
    "/v2/health/ready": metadata.check_server_ready,
    "/v2/models": metadata.models,
    "/v2/models/stats": statistics,
    "/v2/models/{name}": metadata.model,
    "/v2/models/{name}/config": metadata.config,
    "/v2/models/{name}/ready": metadata.check_model_ready,
    "/v2/models/{name}/stats": statistics,
    "/v2/models/{name}/versions/{version}": metadata.model,
    "/v2/models/{name}/versions/{version}/config": metadata.config,
    "/v2/models/{name}/versions/{version}/ready": metadata.check_model_ready,
    "/v2/models/{name}/versions/{version}/stats": statistics,
}
"""Path -> view(front, **path parameters)."""

_INFERENCE = ("/v1/models/{name}:predict", "/v2/models/{name}/infer", "/v2/models/{name}/versions/{version}/infer")
"""Answered before they come here (`predictor.protocols.http`); here they say which method they have."""

_NOT_OFFERED = (
    "/v1/models/{name}:explain",
    "/v2/logging",
    "/v2/trace/setting",
    "/v2/models/{name}/trace/setting",
    "/v2/models/{name}/generate",
    "/v2/models/{name}/generate_stream",
    "/v2/systemsharedmemory/{rest:path}",
    "/v2/cudasharedmemory/{rest:path}",
)
"""What Triton's and KServe's clients can ask for and this server does not do. Over gRPC an unknown method says so by itself."""


def application(front: Front) -> Starlette:
    """The HTTP routes, and the description of all of this server's at /openapi.json."""
    described = tensors.dump(_description(front))
    routes = [Route(path, _not_offered, methods=["POST"]) for path in _INFERENCE]
    routes += [Route(path, _get(front, view)) for path, view in _GET.items()]
    for path, action in _POST.items():
        routes.append(Route(path, _post(front, action), methods=["POST"]))
    routes += [Route(path, _not_offered, methods=["GET", "POST"]) for path in _NOT_OFFERED]
    routes += [Route("/metrics", _metrics), Route("/openapi.json", lambda _: Response(described, media_type="application/json"))]
    return Starlette(routes=routes, exception_handlers={SluiceError: _on_sluice_error, HTTPException: _on_http_exception, Exception: _on_exception})


def _description(front: Front) -> Any:
    document = yaml.safe_load((Path(__file__).parent / "openapi.yaml").read_text())
    document["info"]["version"] = metadata.server(front)["version"]
    return document


def _get(front: Front, view: Callable[..., object]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return _json(view(front, **request.path_params))

    return answer


def _post(front: Front, action: Callable[..., Awaitable[object]]) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        return _json(await action(front, await _document(request), request))

    return answer


async def _metrics(request: Request) -> Response:
    encode, content_type = exposition.choose_encoder(request.headers.get("accept", ""))
    return Response(encode(REGISTRY), headers={"content-type": content_type})


async def _index(front: Front, document: Mapping[str, Any], _request: Request) -> object:
    ready = document.get("ready", False)
    if not isinstance(ready, bool):
        raise InvalidValue("must be true or false", key="ready", value=ready)
    return repository.index(front, ready)


async def _load(front: Front, document: Mapping[str, Any], request: Request) -> object:
    return await repository.load(front, request.path_params["name"], _parameters(document), timeout_ns(request.headers.get("sluice-timeout-ms")))


async def _unload(front: Front, document: Mapping[str, Any], request: Request) -> object:
    return repository.unload(front, request.path_params["name"], _parameters(document))


_POST: Mapping[str, Callable[..., Awaitable[object]]] = {
    "/v2/repository/index": _index,
    "/v2/repository/models/{name}/load": _load,
    "/v2/repository/models/{name}/unload": _unload,
}
"""Path -> action(front, the body's object, request)."""


async def _document(request: Request) -> Mapping[str, Any]:
    """The JSON object of a body; an empty body is an empty object."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > _MAX_BODY_BYTES:
            raise BodyTooLarge(f"must be at most {_MAX_BODY_BYTES} bytes", key="body", value=f"{len(body)} bytes and more")
    document = tensors.parse(bytes(body)) if body.strip() else {}
    if not isinstance(document, dict):
        raise InvalidValue("the body must be a JSON object")
    return document


def _parameters(document: Mapping[str, Any]) -> Mapping[str, object]:
    parameters = document.get("parameters", {})
    if not isinstance(parameters, dict):
        raise InvalidValue("must be an object", key="parameters", value=parameters)
    return parameters


def _json(value: object, code: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    return Response(tensors.dump(value), code, headers, media_type="application/json")


async def _not_offered(request: Request) -> Response:
    return _json({"error": f"this server does not do {request.url.path}"}, 501)


async def _on_sluice_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, SluiceError)
    code, _, headers = codes(error)
    return _json({"error": error.message}, code, {**headers, "connection": "close"} if code == 413 else headers)


async def _on_http_exception(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _json({"error": error.detail}, error.status_code, error.headers)


async def _on_exception(_request: Request, error: Exception) -> Response:
    return _json({"error": f"{type(error).__name__}: {error}"}, 500)


def methods(front: Front) -> dict[str, Method]:
    """Every RPC but ModelInfer, by its path."""
    return {f"/{SERVICE}/{name}": _rpc(front, *rpc) for name, rpc in _RPCS.items()}


def _rpc(front: Front, asked: type[Any], answered: type[Any], view: Callable[..., Awaitable[object]]) -> Method:
    async def call(request: GrpcRequest) -> bytes:
        try:
            message = asked.FromString(bytes(request.message))
        except DecodeError as error:
            raise InvalidValue(f"the message is no {asked.DESCRIPTOR.name}: {error}") from None
        found = json_format.ParseDict(await view(front, message, request.timeout_ns), answered(), ignore_unknown_fields=True)
        return bytes(found.SerializeToString())

    return call


async def _rpc_load(front: Front, request: Any, left_ns: int | None) -> object:
    done = await repository.load(front, _model_name(request), request.parameters, left_ns)
    return {"model_name": done["name"], "done": done["load"]}


async def _rpc_unload(front: Front, request: Any, _left_ns: int | None) -> object:
    done = repository.unload(front, _model_name(request), request.parameters)
    return {"model_name": done["name"], "done": done["unload"]}


def _model_name(request: Any) -> str:
    """KServe's clients write the model's name where Triton's write a repository's, which nothing here has."""
    if request.repository_name and request.model_name:
        raise InvalidValue("there are no repositories to choose from", key="repository_name", value=request.repository_name)
    return str(request.model_name or request.repository_name)


async def _rpc_index(front: Front, request: Any, _left_ns: int | None) -> object:
    if request.repository_name:
        raise InvalidValue("there are no repositories to choose from", key="repository_name", value=request.repository_name)
    return {"models": repository.index(front, request.ready)}


def _of_server(view: Callable[[Front], object]) -> Callable[..., Awaitable[object]]:
    async def call(front: Front, _request: Any, _left_ns: int | None) -> object:
        return view(front)

    return call


def _of_model(view: Callable[[Front, str, str], object]) -> Callable[..., Awaitable[object]]:
    async def call(front: Front, request: Any, _left_ns: int | None) -> object:
        return view(front, request.name, request.version)

    return call


_RPCS: Mapping[str, tuple[type[Any], type[Any], Callable[..., Awaitable[object]]]] = {
    "ServerLive": (pb.Empty, pb.Flag, _of_server(lambda _: {"value": True})),
    "ServerReady": (pb.Empty, pb.Flag, _of_server(lambda front: {"value": metadata.server_ready(front)})),
    "ServerMetadata": (pb.Empty, pb.ServerMetadata, _of_server(metadata.server)),
    "ModelReady": (pb.ModelRequest, pb.Flag, _of_model(lambda *model: {"value": metadata.model_ready(*model)})),
    "ModelMetadata": (pb.ModelRequest, pb.ModelMetadata, _of_model(metadata.model)),
    "ModelConfig": (pb.ModelRequest, pb.ModelConfigResponse, _of_model(lambda *model: {"config": metadata.config(*model)})),
    "ModelStatistics": (pb.ModelRequest, pb.ModelStatisticsResponse, _of_model(statistics)),
    "RepositoryIndex": (pb.RepositoryIndexRequest, pb.RepositoryIndexResponse, _rpc_index),
    "RepositoryModelLoad": (pb.RepositoryModelRequest, pb.RepositoryModelResponse, _rpc_load),
    "RepositoryModelUnload": (pb.RepositoryModelRequest, pb.RepositoryModelResponse, _rpc_unload),
}
"""Method -> its request and response, and the view of (front, request, ns that are left)."""
