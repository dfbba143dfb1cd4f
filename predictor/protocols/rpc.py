"""KServe's gRPC service: inference, and where the other RPCs are added.

Owns the gRPC server's options, and inference: from the message's bytes to shared memory and back, under the caller's deadline.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

import grpc  # type: ignore[import-untyped]
import numpy as np
from google.protobuf.message import DecodeError
from grpc import StatusCode

from contracts.artifact import TEXT, Signature
from contracts.errors import InvalidTensor, InvalidValue, SluiceError
from contracts.units import S
from predictor.dispatch import Outcome
from predictor.front import Decoded, Front, parameters, timeout_ns
from predictor.protocols import management, v2, wire
from predictor.protocols.codes import codes
from predictor.protocols.inference_pb2 import ModelInferRequest, ModelInferResponse, Parameter, Tensor
from predictor.protocols.limits import Limits, grpc_options
from predictor.tensors import Array, Given, as_bytes

SERVICE = "inference.GRPCInferenceService"
SERVICES: tuple[Callable[[grpc.aio.Server, Front], None], ...] = (management.add_service,)
"""Each adds its handlers to the server, beside inference."""

_RAW_INPUT_CONTENTS, _RAW_OUTPUT_CONTENTS = 7, 6

log = logging.getLogger("sluice.predictor")


def server(front: Front, limits: Limits) -> grpc.aio.Server:
    """A gRPC server with every service on it; it has no port yet."""
    made = grpc.aio.server(options=grpc_options(limits), maximum_concurrent_rpcs=limits.max_connections)
    handler = grpc.unary_unary_rpc_method_handler(_Inference(front).infer)
    made.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, {"ModelInfer": handler}),))
    for add_service in SERVICES:
        add_service(made, front)
    return made


class _Inference:
    """ModelInfer on the message's bytes: protobuf parses and writes all but the raw tensors."""

    def __init__(self, front: Front) -> None:
        self._front = front

    async def infer(self, message: bytes, context: grpc.aio.ServicerContext) -> bytes:
        """The bytes of a ModelInferResponse; aborts with the code of what went wrong."""
        try:
            request, raw = _parse(message)
            metadata = context.invocation_metadata() or ()
            return await self._front.infer(
                request.model_name,
                lambda signature: _decode(request, raw, signature),
                _timeout_ns(context.time_remaining(), metadata),
                version=request.model_version,
                headers=metadata,
            )
        except SluiceError as error:
            _, status, more = codes(error)
            await context.abort(status, error.message, tuple(more.items()))
        except Exception as error:
            log.exception("a gRPC request could not be handled")
            await context.abort(StatusCode.INTERNAL, f"{type(error).__name__}: {error}")
        raise AssertionError("abort raises")


def _parse(message: bytes) -> tuple[ModelInferRequest, list[memoryview]]:
    """A request without its raw tensors, and those."""
    rest, raw = wire.split(message, _RAW_INPUT_CONTENTS)
    try:
        return ModelInferRequest.FromString(rest), raw
    except DecodeError as error:
        raise InvalidValue(f"the message is no ModelInferRequest: {error}") from None


def _timeout_ns(left_s: float | None, metadata: Iterable[tuple[str, str | bytes]]) -> int | None:
    """The shorter of the call's deadline and its `sluice-timeout-ms`; None when it has neither."""
    asked = next((timeout_ns(value) for key, value in metadata if key == "sluice-timeout-ms"), None)
    left_ns = None if left_s is None else max(1, int(left_s * S))
    return min((limit for limit in (asked, left_ns) if limit is not None), default=None)


def _decode(request: ModelInferRequest, raw: list[memoryview], signature: Signature) -> Decoded[bytes]:
    if raw and len(raw) != len(request.inputs):
        raise InvalidTensor(f"must be one for each of the {len(request.inputs)} inputs", key="raw_input_contents", value=len(raw))
    given = [
        Given(tensor.name, list(tensor.shape), tensor.datatype, raw[number] if raw else _typed(tensor))
        for number, tensor in enumerate(request.inputs)
    ]
    outputs = [{"name": output.name, "parameters": dict.fromkeys(output.parameters, True)} for output in request.outputs]
    wanted = v2.wanted(outputs or None, signature)

    def encode(outputs: Mapping[str, Array], outcome: Outcome) -> bytes:
        response = ModelInferResponse(model_name=request.model_name, id=request.id)
        for key, parameter in request.parameters.items():
            response.parameters[key].CopyFrom(parameter)
        for key, value in parameters(outcome).items():
            _set(response.parameters[key], value)
        dtypes = {spec.name: spec.dtype for spec in signature.outputs}
        for name in wanted:
            response.outputs.add(name=name, datatype=dtypes[name], shape=outputs[name].shape)
        tensors = (as_bytes(outputs[name]) for name in wanted)
        return wire.join(response.SerializeToString(), _RAW_OUTPUT_CONTENTS, tensors)

    return Decoded(given, encode)


def _set(parameter: Parameter, value: bool | int | float | str) -> None:
    """A parameter as KServe's clients can read it too: they know no floating point, so that goes as text."""
    if isinstance(value, bool):
        parameter.bool_param = value
    elif isinstance(value, int):
        parameter.int64_param = value
    else:
        parameter.string_param = str(value)


_CONTENTS: Mapping[str, tuple[str, type[np.generic] | None]] = {
    "BOOL": ("bool_contents", np.bool_),
    "INT8": ("int_contents", np.int32),
    "INT16": ("int_contents", np.int32),
    "INT32": ("int_contents", np.int32),
    "INT64": ("int64_contents", np.int64),
    "UINT8": ("uint_contents", np.uint32),
    "UINT16": ("uint_contents", np.uint32),
    "UINT32": ("uint_contents", np.uint32),
    "UINT64": ("uint64_contents", np.uint64),
    "FP32": ("fp32_contents", np.float32),
    "FP64": ("fp64_contents", np.float64),
    TEXT: ("bytes_contents", None),
}
"""Datatype -> the field that it comes in, and that field's own type. FP16 and BF16 have none: they come raw."""


def _typed(tensor: Tensor) -> object:
    """A tensor's typed contents: an array of the field's own type, texts as a list; None for a datatype without a field."""
    if tensor.datatype not in _CONTENTS:
        return None
    field, wide = _CONTENTS[tensor.datatype]
    values = list(getattr(tensor.contents, field))
    return values if wide is None else np.array(values, wide)
