"""KServe's own HTTP application over our functions: metadata, readiness, metrics, CloudEvents and everything unusual.

Owns how KServe sees the functions, and the list of what adds routes to its application.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import kserve
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from kserve.errors import ModelNotReady
from kserve.model_server import app as kserve_app
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.infer_type import InferOutput, InferRequest, InferResponse
from kserve.protocol.model_repository_extension import ModelRepositoryExtension
from kserve.protocol.rest.server import RESTServer

from contracts.artifact import Signature, TensorSpec
from contracts.errors import SluiceError
from predictor import tensors
from predictor.dispatch import Outcome
from predictor.front import Encode, Front, parameters, timeout_ns
from predictor.protocols.codes import codes
from predictor.tensors import Array

ROUTES: tuple[Callable[[FastAPI, Front], None], ...] = ()
"""Each adds its routes to the application; they come before KServe's, so that one of ours wins over one of theirs."""


def application(front: Front) -> tuple[FastAPI, DataPlane]:
    """KServe's application and data plane over this front. Once a process: KServe's application is a module's global."""
    data_plane = FrontDataPlane(front)
    for add_routes in ROUTES:
        add_routes(kserve_app, front)
    extension = ModelRepositoryExtension(data_plane.model_registry)
    RESTServer("kserve.model_server:app", data_plane, extension, 0).create_application()
    for kind, handler in ((SluiceError, _on_sluice_error), (ModelNotReady, _on_not_ready), (RequestValidationError, _on_bad_request)):
        kserve_app.add_exception_handler(kind, handler)
    return kserve_app, data_plane


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


class FrontDataPlane(DataPlane):  # type: ignore[misc]
    """KServe's, with a server readiness that means something."""

    def __init__(self, front: Front) -> None:
        super().__init__(_Functions(front))
        self._front = front

    async def ready(self) -> bool:
        """Whether the node agent is there, and this process is not on its way down."""
        return not self._front.draining and self._front.dispatcher.client.connected


async def _on_sluice_error(_request: Request, error: SluiceError) -> JSONResponse:
    code, _, headers = codes(error)
    return JSONResponse({"error": error.message}, code, headers)


async def _on_not_ready(_: Request, error: ModelNotReady) -> JSONResponse:
    return JSONResponse({"error": str(error)}, 503, {"retry-after": "1"})


async def _on_bad_request(_: Request, error: RequestValidationError) -> JSONResponse:
    return JSONResponse({"error": str(error.errors())}, 400)
