"""KServe's gRPC service over our functions, and what else is served on its port.

Owns the servicer and the gRPC server's options; inference goes from the message's bytes to shared memory, under the caller's deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

import grpc  # type: ignore[import-untyped]
from grpc import StatusCode
from kserve.constants.constants import GRPC_CONTENT_DATATYPE_MAPPINGS
from kserve.protocol.dataplane import DataPlane
from kserve.protocol.grpc.grpc_predict_v2_pb2 import InferParameter, ModelInferRequest, ModelInferResponse
from kserve.protocol.grpc.grpc_predict_v2_pb2_grpc import add_GRPCInferenceServiceServicer_to_server
from kserve.protocol.grpc.interceptors import ExceptionToStatusInterceptor
from kserve.protocol.grpc.servicer import InferenceServicer
from kserve.protocol.model_repository_extension import ModelRepositoryExtension

from contracts.artifact import Signature
from contracts.errors import InvalidTensor, SluiceError
from contracts.units import S
from predictor import tensors
from predictor.dispatch import Outcome
from predictor.front import Encode, Front, parameters, timeout_ns
from predictor.protocols.codes import codes
from predictor.tensors import Array

SERVICES: tuple[Callable[[grpc.aio.Server, Front], None], ...] = ()
"""Each adds its handlers to the server, beside KServe's."""

log = logging.getLogger("sluice.predictor")


def server(front: Front, data_plane: DataPlane, max_message_bytes: int) -> grpc.aio.Server:
    """A gRPC server with every service on it; it has no port yet."""
    options = [(f"grpc.max_{way}_message_length", max_message_bytes) for way in ("send", "receive")]
    made = grpc.aio.server(interceptors=(ExceptionToStatusInterceptor(),), options=options)
    for add_service in SERVICES:
        add_service(made, front)
    add_GRPCInferenceServiceServicer_to_server(Servicer(front, data_plane), made)
    return made


class Servicer(InferenceServicer):  # type: ignore[misc]
    """KServe's gRPC service; inference goes from the message's bytes to shared memory, under the caller's deadline."""

    def __init__(self, front: Front, data_plane: DataPlane) -> None:
        super().__init__(data_plane, ModelRepositoryExtension(data_plane.model_registry))
        self._front = front

    async def ModelInfer(self, request: ModelInferRequest, context: grpc.aio.ServicerContext) -> ModelInferResponse:  # noqa: N802
        """Inference; aborts with the code of what went wrong."""
        try:
            return await self._front.infer(request.model_name, lambda signature: _decode_grpc(request, signature), _grpc_timeout_ns(context))
        except SluiceError as error:
            _, status, more = codes(error)
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
