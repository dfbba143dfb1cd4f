"""The Open Inference Protocol over HTTP (V2): named tensors as JSON, as binary data after the JSON, or as any mix of the two.

Owns this dialect, the binary tensor data extension included, both ways. Pure: bytes in, bytes out.
https://github.com/triton-inference-server/server/blob/main/docs/protocol/extension_binary_data.md
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from contracts.artifact import Signature
from contracts.errors import InvalidTensor, InvalidValue
from predictor.tensors import Array, Given, as_bytes, dump, parse, readable, shown

_UNSERVED = ("classification", "shared_memory_region")


class Asked(NamedTuple):
    """A request: its inputs, the id and the parameters to hand back, and the outputs that are wanted: name -> whether as binary data."""

    given: list[Given]
    id: str | None
    parameters: Mapping[str, object]
    outputs: Mapping[str, bool]


def decode(body: bytes, json_bytes: int | None, signature: Signature) -> Asked:
    """A request whose first `json_bytes` are JSON and the rest binary data; None: all of it is JSON."""
    if json_bytes is not None and json_bytes > len(body):
        raise InvalidValue(f"must be at most the body's {len(body)} bytes", key="Inference-Header-Content-Length", value=json_bytes)
    view = memoryview(body)
    document = parse(body if json_bytes is None else view[:json_bytes])
    if not isinstance(document, dict) or not isinstance(document.get("inputs"), list):
        raise InvalidTensor('write {"inputs": [{"name", "shape", "datatype", "data"}, ...]}', key="body", value=shown(document))
    id_ = document.get("id")
    if id_ is not None and not isinstance(id_, str):
        raise InvalidValue("must be text", key="id", value=shown(id_))
    parameters = dict(_parameters(document, "parameters"))
    binary = _flag(parameters, "binary_data_output", False)
    parameters.pop("binary_data_output", None)
    given = _inputs(document["inputs"], view[len(body) if json_bytes is None else json_bytes :])
    return Asked(given, id_, parameters, wanted(document.get("outputs"), signature, binary))


def _inputs(tensors: list[Any], binary: memoryview) -> list[Given]:
    """Inputs in their order; each takes its part of the binary data."""
    given, at = [], 0
    for number, tensor in enumerate(tensors):
        if not isinstance(tensor, dict) or not isinstance(tensor.get("name"), str):
            raise InvalidTensor("must be an object with a name", key=f"inputs[{number}]", value=shown(tensor))
        name = tensor["name"]
        data = tensor.get("data")
        parameters = _parameters(tensor, f"{name}.parameters")
        if "binary_data_size" in parameters:
            size = parameters["binary_data_size"]
            if type(size) is not int or not 0 <= size <= len(binary) - at:
                left = f"must be a number of bytes, at most the {len(binary) - at} that are left"
                raise InvalidTensor(left, key=f"{name}.parameters.binary_data_size", value=shown(size))
            if data is not None:
                raise InvalidTensor("must not be there beside binary data", key=f"{name}.data", value=shown(data))
            data = binary[at : at + size]
            at += size
        given.append(Given(name, tensor.get("shape"), tensor.get("datatype"), data))
    if at != len(binary):
        raise InvalidTensor(f"the inputs take {at} bytes of it", key="binary data", value=f"{len(binary)} bytes")
    return given


def wanted(outputs: object, signature: Signature, binary: bool = False) -> dict[str, bool]:
    """Output name -> whether as binary data, in the order of the request (V2 `outputs`); all of the model's where it names none."""
    known = [spec.name for spec in signature.outputs]
    if outputs is None:
        return dict.fromkeys(known, binary)
    if not isinstance(outputs, list):
        raise InvalidTensor(f"must be a list of outputs of this model (outputs: {', '.join(known)})", key="outputs", value=shown(outputs))
    found: dict[str, bool] = {}
    for output in outputs:
        name = output.get("name") if isinstance(output, dict) else None
        if name not in known:
            raise InvalidTensor(f"asks for no output of this model (outputs: {', '.join(known)})", key="outputs", value=shown(name))
        parameters = _parameters(output, f"{name}.parameters")
        for unserved in _UNSERVED:
            if unserved in parameters:
                raise InvalidTensor("is not served here", key=f"{name}.parameters.{unserved}", value=shown(parameters[unserved]))
        found[str(name)] = _flag(parameters, "binary_data", binary)
    return found or dict.fromkeys(known, binary)


def encode(
    model: str, asked: Asked, outputs: Mapping[str, Array], signature: Signature, parameters: Mapping[str, object]
) -> tuple[bytes, int | None]:
    """(body, bytes of its JSON; None when all of it is). Binary outputs are copied once, from where they lie into the body."""
    dtypes = {spec.name: spec.dtype for spec in signature.outputs}
    tensors: list[dict[str, object]] = []
    binary: list[memoryview] = []
    for name, as_binary in asked.outputs.items():
        array = outputs[name]
        tensor: dict[str, object] = {"name": name, "shape": array.shape, "datatype": dtypes[name]}
        if as_binary:
            tensor["parameters"] = {"binary_data_size": array.nbytes}
            binary.append(as_bytes(array))
        else:
            tensor["data"] = readable(array, dtypes[name]).reshape(-1)
        tensors.append(tensor)
    document: dict[str, object] = {"model_name": model, "outputs": tensors, "parameters": {**asked.parameters, **parameters}}
    if asked.id is not None:
        document = {"id": asked.id, **document}
    json = dump(document)
    return (b"".join((json, *binary)), len(json)) if binary else (json, None)


def _parameters(owner: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    """The `parameters` of a request, an input or an output."""
    parameters = owner.get("parameters")
    if parameters is None:
        return {}
    if not isinstance(parameters, dict):
        raise InvalidValue("must be an object", key=key, value=shown(parameters))
    return parameters


def _flag(parameters: Mapping[str, Any], name: str, default: bool) -> bool:
    value = parameters.get(name, default)
    if not isinstance(value, bool):
        raise InvalidValue("must be true or false", key=f"parameters.{name}", value=shown(value))
    return value
