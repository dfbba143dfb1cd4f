"""KServe's gRPC service: inference, and all the other RPCs beside it.

Owns inference: from the message's bytes to shared memory and back, under the caller's deadline.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
from google.protobuf.message import DecodeError

from contracts.artifact import TEXT, Signature
from contracts.errors import InvalidTensor, InvalidValue
from predictor.dispatch import Outcome
from predictor.front import Decoded, Front, parameters, timeout_ns
from predictor.protocols import management, v2, wire
from predictor.protocols.grpc_calls import Method, Request
from predictor.protocols.inference_pb2 import ModelInferRequest, ModelInferResponse, Parameter, Tensor
from predictor.tensors import Array, Given, as_bytes

_RAW_INPUT_CONTENTS, _RAW_OUTPUT_CONTENTS = 7, 6


def methods(front: Front) -> dict[str, Method]:
    """Every method of the service, by its path."""
    return {**management.methods(front), f"/{management.SERVICE}/ModelInfer": functools.partial(_infer, front)}


async def _infer(front: Front, call: Request) -> bytes:
    """ModelInfer on the message's bytes: protobuf parses and writes all but the raw tensors."""
    request, raw = _parse(call.message)
    return await front.infer(
        request.model_name,
        lambda signature: _decode(request, raw, signature),
        _timeout_ns(call),
        version=request.model_version,
        headers=call.headers,
    )


def _parse(message: bytes | memoryview) -> tuple[ModelInferRequest, list[memoryview]]:
    """A request without its raw tensors, and those."""
    rest, raw = wire.split(message, _RAW_INPUT_CONTENTS)
    try:
        return ModelInferRequest.FromString(rest), raw
    except DecodeError as error:
        raise InvalidValue(f"the message is no ModelInferRequest: {error}") from None


def _timeout_ns(call: Request) -> int | None:
    """The shorter of the call's deadline and its `sluice-timeout-ms`; None when it has neither."""
    asked_ns = next((timeout_ns(value) for name, value in call.headers if name == b"sluice-timeout-ms"), None)
    return min((limit for limit in (asked_ns, call.timeout_ns) if limit is not None), default=None)


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
